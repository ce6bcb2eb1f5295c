//! `chat.completion.chunk` events as bytes. What is the same in all chunks of an answer is rendered once; a chunk
//! costs a copy of that and the escaping of its text.
//!
//! The id of an event is `<request>/<sequence>`, with the log's sequence. What ends the answer makes several events of
//! one in the log: `.0`, `.1` … are appended then, counted as if all of them were sent.

use super::answer::Echo;
use crate::{
    error::ApiError,
    identity::Cursor,
    running::News,
    sse::{Teller, put_json},
};
use bytes::{BufMut, BytesMut};
use forebay_schemas::{
    event::{FinishReason, RequestCompleted, Usage},
    lifecycle::Lifecycle,
    openai::{ChoiceLogprobs, ErrorEnvelope, TokenUsage},
    sampling::Logprobs,
};
use forebay_streams::log::Recorded;
use serde::Serialize;
use std::fmt::Write;

/// Room for a few chunks, so that a frame rarely grows while it is written.
const FRAME_BYTES: usize = 1024;

/// Renders the chunks of one answer.
pub(super) struct Chunks {
    /// `id: <request>/`.
    id: String,
    /// `data: {…,` up to the fields that differ.
    head: String,
    /// The client wants the usage at the end; the other chunks then say `"usage":null`.
    usage: bool,
    /// The first chunk was sent, with the role.
    begun: bool,
    /// The client has read up to here: sequence and part.
    after: Option<(u64, u64)>,
}

impl Teller for Chunks {
    fn tell(&mut self, frame: &mut BytesMut, recorded: &Recorded, _: &Lifecycle) {
        match News::of(&recorded.event.body) {
            None => {}
            Some(News::Text(text, logprobs)) => self.text(frame, recorded.seq, text, logprobs),
            Some(News::Completed(completed)) => self.finish(frame, recorded.seq, completed),
            Some(News::Ended(error)) if self.is_new(recorded.seq, 0) => {
                self.id(frame, recorded.seq, None);
                self.error(frame, &error.envelope());
            }
            Some(News::Ended(_)) => {}
        }
    }

    /// Without an id: the log says nothing of it, and the client goes on after the last event that it has.
    fn stopped(&mut self, frame: &mut BytesMut, error: &ApiError) {
        self.error(frame, &error.envelope());
    }
}

impl Chunks {
    pub(super) fn new(state: &Lifecycle, usage: bool, after: Option<Cursor>) -> Chunks {
        let head = format!(
            r#"data: {{"id":"chatcmpl-{id}","object":"chat.completion.chunk","created":{created},"model":{model},"system_fingerprint":{fingerprint},"#,
            id = state.request,
            created = state.accepted_us / 1_000_000,
            model = json(&state.accepted.model),
            fingerprint = json(&Echo::of(state).system_fingerprint),
        );
        let after = after.map(|after| (after.seq, after.part));
        Chunks { id: format!("id: {}/", state.request), head, usage, begun: false, after }
    }

    /// One chunk with text; the first one also says who speaks. Nothing to say, no chunk.
    fn text(&mut self, frame: &mut BytesMut, seq: u64, text: &str, logprobs: &[Logprobs]) {
        if text.is_empty() && logprobs.is_empty() {
            return;
        }
        if self.is_new(seq, 0) {
            self.content(frame, seq, None, text, logprobs);
        }
        self.begun = true;
    }

    /// The end: why, then how much if the client asked, then that nothing follows.
    fn finish(&mut self, frame: &mut BytesMut, seq: u64, completed: &RequestCompleted) {
        let mut part = 0;
        if !self.begun {
            if self.is_new(seq, part) {
                self.content(frame, seq, Some(part), "", &[]);
            }
            part += 1;
        }
        if self.is_new(seq, part) {
            self.id(frame, seq, Some(part));
            self.reason(frame, completed.reason);
        }
        part += 1;
        if self.usage && self.is_new(seq, part) {
            self.id(frame, seq, Some(part));
            self.counted(frame, completed.usage);
        }
        part += 1;
        if self.is_new(seq, part) {
            self.id(frame, seq, Some(part));
            frame.put_slice(b"data: [DONE]\n\n");
        }
    }

    fn is_new(&self, seq: u64, part: u64) -> bool {
        self.after.is_none_or(|after| (seq, part) > after)
    }

    fn id(&self, frame: &mut BytesMut, seq: u64, part: Option<u64>) {
        frame.reserve(FRAME_BYTES.max(self.head.len() + 128));
        frame.put_slice(self.id.as_bytes());
        let written = match part {
            None => writeln!(frame, "{seq}"),
            Some(part) => writeln!(frame, "{seq}.{part}"),
        };
        written.expect("memory takes all text");
    }

    /// The end of an answer that failed: no `[DONE]`, so that nobody takes what came for all.
    fn error(&self, frame: &mut BytesMut, error: &ErrorEnvelope) {
        frame.put_slice(b"data: ");
        put_json(frame, error);
        frame.put_slice(b"\n\n");
    }

    fn content(&self, frame: &mut BytesMut, seq: u64, part: Option<u64>, text: &str, logprobs: &[Logprobs]) {
        self.id(frame, seq, part);
        frame.put_slice(self.head.as_bytes());
        let role = if self.begun { "" } else { r#""role":"assistant","# };
        frame.put_slice(br#""choices":[{"index":0,"delta":{"#);
        frame.put_slice(role.as_bytes());
        frame.put_slice(br#""content":"#);
        put_json(frame, &text);
        frame.put_slice(br#"},"logprobs":"#);
        put_json(frame, &(!logprobs.is_empty()).then(|| ChoiceLogprobs::of(logprobs)));
        frame.put_slice(br#","finish_reason":null"#);
        self.close(frame);
    }

    fn reason(&self, frame: &mut BytesMut, reason: FinishReason) {
        frame.put_slice(self.head.as_bytes());
        frame.put_slice(br#""choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"#);
        frame.put_slice(match reason {
            FinishReason::Stop => br#""stop""#,
            FinishReason::Length => br#""length""#,
        });
        self.close(frame);
    }

    fn close(&self, frame: &mut BytesMut) {
        frame.put_slice(if self.usage { b"}],\"usage\":null}\n\n" } else { b"}]}\n\n" });
    }

    fn counted(&self, frame: &mut BytesMut, usage: Usage) {
        frame.put_slice(self.head.as_bytes());
        frame.put_slice(br#""choices":[],"usage":"#);
        put_json(frame, &TokenUsage::from(usage));
        frame.put_slice(b"}\n\n");
    }
}

/// A value as JSON text.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain data always encodes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::{
        event::{Body, Event, RequestAccepted, TokensGenerated},
        ids::RequestId,
        openai::ChatChunk,
    };

    fn state() -> Lifecycle {
        let accepted = RequestAccepted {
            echo: Some(serde_json::json!({ "system_fingerprint": "fb_1" })),
            ..RequestAccepted::greedy("Qwen/\"3\"", vec![1], 3)
        };
        let request = RequestId::from_parts(0, &[0; 10]);
        let event = Event {
            request,
            attempt: 0,
            time_us: 1_700_000_000_500_000,
            body: Body::RequestAccepted(accepted),
        };
        Lifecycle::begin(&event).unwrap()
    }

    /// The events of an answer in these pieces, numbered from 5, after one of them.
    fn told(pieces: &[&str], usage: bool, after: Option<&str>) -> Vec<String> {
        let state = state();
        let after = after
            .map(|place| format!("{}/{place}", state.request).parse().unwrap_or_else(|_| panic!("{place}")));
        let (mut chunks, mut frame) = (Chunks::new(&state, usage, after), BytesMut::new());
        let generated = |text: &&str| {
            Body::TokensGenerated(TokensGenerated {
                first_index: 0,
                tokens: vec![1],
                text: (*text).to_owned(),
                cached_tokens: 0,
                logprobs: Vec::new(),
            })
        };
        let usage = Usage { prompt_tokens: 4, completion_tokens: 2, cached_tokens: 3 };
        let completed = Body::RequestCompleted(RequestCompleted { reason: FinishReason::Length, usage });
        for (seq, body) in (5..).zip(pieces.iter().map(generated).chain([completed])) {
            let event = Event { request: state.request, attempt: 1, time_us: 0, body };
            chunks.tell(&mut frame, &Recorded { seq, event }, &state);
        }
        let text = String::from_utf8(frame.to_vec()).unwrap();
        assert!(text.is_empty() || text.ends_with("\n\n"));
        text.split_terminator("\n\n").map(str::to_owned).collect()
    }

    fn data(event: &str) -> &str {
        event.split_once("\ndata: ").unwrap().1
    }

    #[test]
    fn text_survives_whatever_it_is() {
        let text = "line\nquote\" back\\ tab\t bell\u{7} é 漢 😀 \u{2028} data: [DONE]\n\n";
        let events = told(&[text], false, None);
        assert_eq!(events.len(), 3);
        let chunk: ChatChunk = serde_json::from_str(data(&events[0])).unwrap();
        assert_eq!(chunk.choices[0].delta.content.as_deref(), Some(text));
        assert_eq!(chunk.model, "Qwen/\"3\"");
        assert_eq!(chunk.created, 1_700_000_000);
    }

    #[test]
    fn a_stream_is_these_bytes() {
        let id = "00000000000070008000000000000000";
        let head = format!(
            r#"data: {{"id":"chatcmpl-{id}","object":"chat.completion.chunk","created":1700000000,"model":"Qwen/\"3\"","system_fingerprint":"fb_1","#
        );
        let rest = [
            (
                "5",
                r#""choices":[{"index":0,"delta":{"role":"assistant","content":"Hel"},"logprobs":null,"finish_reason":null}],"usage":null}"#,
            ),
            (
                "7",
                r#""choices":[{"index":0,"delta":{"content":"lo"},"logprobs":null,"finish_reason":null}],"usage":null}"#,
            ),
            (
                "8.0",
                r#""choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}],"usage":null}"#,
            ),
            (
                "8.1",
                r#""choices":[],"usage":{"prompt_tokens":4,"completion_tokens":2,"total_tokens":6,"prompt_tokens_details":{"cached_tokens":3}}}"#,
            ),
        ];
        let mut expected: Vec<String> =
            rest.iter().map(|(place, rest)| format!("id: {id}/{place}\n{head}{rest}")).collect();
        expected.push(format!("id: {id}/8.2\ndata: [DONE]"));
        assert_eq!(told(&["Hel", "", "lo"], true, None), expected);
    }

    #[test]
    fn a_client_gets_exactly_the_rest() {
        for (pieces, usage) in
            [(&["Hel", "", "lo"][..], true), (&["a"], false), (&[], true), (&["", ""], false)]
        {
            let all = told(pieces, usage, None);
            for read in 0..all.len() {
                let id = all[read].lines().next().unwrap().split_once('/').unwrap().1;
                assert_eq!(told(pieces, usage, Some(id)), all[read + 1..], "{pieces:?} after {id}");
            }
        }
        // Another choice of options does not move the ids.
        let done = |usage| told(&["a"], usage, None).pop().unwrap();
        assert_eq!(done(true), done(false));
    }

    #[test]
    fn an_answer_without_text_still_says_who_speaks() {
        let events = told(&[], false, None);
        assert_eq!(events.len(), 3);
        let first: ChatChunk = serde_json::from_str(data(&events[0])).unwrap();
        assert_eq!(first.choices[0].delta.role.as_deref(), Some("assistant"));
        assert!(first.usage.is_none() && !events[0].contains("usage"));
    }
}
