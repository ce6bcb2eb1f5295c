//! `chat.completion.chunk` events as bytes. What is the same in all chunks of an answer is rendered once; a chunk
//! costs a copy of that and the escaping of its text.

use bytes::{BufMut, BytesMut};
use forebay_schemas::{
    event::{FinishReason, RequestCompleted, Usage},
    lifecycle::Lifecycle,
    openai::{ErrorEnvelope, TokenUsage},
};
use serde::Serialize;

/// Room for a few chunks, so that a frame rarely grows while it is written.
const FRAME_BYTES: usize = 1024;

/// Renders the chunks of one answer.
pub(super) struct Chunks {
    /// `data: {…,` up to the fields that differ.
    head: String,
    /// The client wants the usage at the end; the other chunks then say `"usage":null`.
    usage: bool,
    /// The first chunk was sent, with the role.
    begun: bool,
}

impl Chunks {
    pub(super) fn new(state: &Lifecycle, fingerprint: &str, usage: bool) -> Chunks {
        let text = |text: &str| serde_json::to_string(text).expect("text is always valid JSON");
        let head = format!(
            r#"data: {{"id":"chatcmpl-{id}","object":"chat.completion.chunk","created":{created},"model":{model},"system_fingerprint":{fingerprint},"#,
            id = state.request,
            created = state.accepted_us / 1_000_000,
            model = text(&state.accepted.model),
            fingerprint = text(fingerprint),
        );
        Chunks { head, usage, begun: false }
    }

    /// One chunk with text; the first one also says who speaks. No text, no chunk.
    pub(super) fn text(&mut self, frame: &mut BytesMut, text: &str) {
        if !text.is_empty() {
            self.content(frame, text);
        }
    }

    /// The end: why, then how much if the client asked, then that nothing follows.
    pub(super) fn finish(&mut self, frame: &mut BytesMut, completed: &RequestCompleted) {
        if !self.begun {
            self.content(frame, "");
        }
        frame.put_slice(self.head.as_bytes());
        frame.put_slice(br#""choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"#);
        frame.put_slice(match completed.reason {
            FinishReason::Stop => br#""stop""#,
            FinishReason::Length => br#""length""#,
        });
        self.close(frame);
        if self.usage {
            self.counted(frame, completed.usage);
        }
        frame.put_slice(b"data: [DONE]\n\n");
    }

    /// The end of an answer that failed: no `[DONE]`, so that nobody takes what came for all.
    pub(super) fn error(&self, frame: &mut BytesMut, error: &ErrorEnvelope) {
        frame.put_slice(b"data: ");
        put_json(frame, error);
        frame.put_slice(b"\n\n");
    }

    /// What clients skip, and what keeps proxies from closing a silent connection.
    pub(super) fn comment(&self, frame: &mut BytesMut) {
        frame.put_slice(b": waiting\n\n");
    }

    fn content(&mut self, frame: &mut BytesMut, text: &str) {
        frame.reserve(FRAME_BYTES.max(self.head.len() + 128 + text.len()));
        frame.put_slice(self.head.as_bytes());
        let role = if self.begun { "" } else { r#""role":"assistant","# };
        self.begun = true;
        frame.put_slice(br#""choices":[{"index":0,"delta":{"#);
        frame.put_slice(role.as_bytes());
        frame.put_slice(br#""content":"#);
        put_json(frame, &text);
        frame.put_slice(br#"},"logprobs":null,"finish_reason":null"#);
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

fn put_json(frame: &mut BytesMut, value: &impl Serialize) {
    serde_json::to_writer(frame.writer(), value).expect("plain data always encodes into memory");
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::{
        event::{Body, Event, RequestAccepted},
        ids::RequestId,
        openai::ChatChunk,
        sampling::Sampling,
    };

    fn chunks(usage: bool) -> Chunks {
        let accepted = RequestAccepted {
            model: "Qwen/\"3\"".into(),
            endpoint: "chat.completions".into(),
            prompt: vec![1],
            sampling: Sampling::GREEDY,
            max_tokens: 3,
            stop: vec![],
            ignore_eos: false,
            timeout_ms: 1,
            detached: false,
            stored: false,
            fingerprint: None,
            echo: None,
        };
        let request = RequestId::from_parts(0, &[0; 10]);
        let event = Event {
            request,
            attempt: 0,
            time_us: 1_700_000_000_500_000,
            body: Body::RequestAccepted(accepted),
        };
        Chunks::new(&Lifecycle::begin(&event).unwrap(), "fb_1", usage)
    }

    fn completed() -> RequestCompleted {
        let usage = Usage { prompt_tokens: 4, completion_tokens: 2, cached_tokens: 3 };
        RequestCompleted { reason: FinishReason::Length, usage }
    }

    fn events(frame: &BytesMut) -> Vec<String> {
        let text = std::str::from_utf8(frame).unwrap();
        assert!(text.ends_with("\n\n"));
        text.trim_end().split("\n\n").map(|event| event.strip_prefix("data: ").unwrap().to_owned()).collect()
    }

    #[test]
    fn text_survives_whatever_it_is() {
        let text = "line\nquote\" back\\ tab\t bell\u{7} é 漢 😀 \u{2028} data: [DONE]\n\n";
        let (mut chunks, mut frame) = (chunks(false), BytesMut::new());
        chunks.text(&mut frame, text);
        let events = events(&frame);
        assert_eq!(events.len(), 1);
        let chunk: ChatChunk = serde_json::from_str(&events[0]).unwrap();
        assert_eq!(chunk.choices[0].delta.content.as_deref(), Some(text));
        assert_eq!(chunk.model, "Qwen/\"3\"");
        assert_eq!(chunk.created, 1_700_000_000);
    }

    #[test]
    fn a_stream_is_these_bytes() {
        let (mut chunks, mut frame) = (chunks(true), BytesMut::new());
        chunks.text(&mut frame, "Hel");
        chunks.text(&mut frame, "");
        chunks.text(&mut frame, "lo");
        chunks.finish(&mut frame, &completed());
        let head = r#"{"id":"chatcmpl-00000000000070008000000000000000","object":"chat.completion.chunk","created":1700000000,"model":"Qwen/\"3\"","system_fingerprint":"fb_1","#;
        let rest = [
            r#""choices":[{"index":0,"delta":{"role":"assistant","content":"Hel"},"logprobs":null,"finish_reason":null}],"usage":null}"#,
            r#""choices":[{"index":0,"delta":{"content":"lo"},"logprobs":null,"finish_reason":null}],"usage":null}"#,
            r#""choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}],"usage":null}"#,
            r#""choices":[],"usage":{"prompt_tokens":4,"completion_tokens":2,"total_tokens":6,"prompt_tokens_details":{"cached_tokens":3}}}"#,
        ];
        let mut expected: Vec<String> = rest.iter().map(|rest| format!("{head}{rest}")).collect();
        expected.push("[DONE]".into());
        assert_eq!(events(&frame), expected);
    }

    #[test]
    fn an_answer_without_text_still_says_who_speaks() {
        let (mut chunks, mut frame) = (chunks(false), BytesMut::new());
        chunks.finish(&mut frame, &completed());
        let events = events(&frame);
        assert_eq!(events.len(), 3);
        let first: ChatChunk = serde_json::from_str(&events[0]).unwrap();
        assert_eq!(first.choices[0].delta.role.as_deref(), Some("assistant"));
        assert!(first.usage.is_none() && !events[0].contains("usage"));
    }
}
