//! `response.…` events as bytes. Each has a number, counted from the first event of the log on: a client that knows the
//! last one gets exactly the rest, at any gateway.

use super::object::{message, message_id, object, without_output};
use crate::{
    error::ApiError,
    running::News,
    sse::{Teller, put_json},
};
use bytes::{BufMut, BytesMut};
use forebay_schemas::{
    event::Body,
    lifecycle::Lifecycle,
    openai::{OutputMessage, OutputText, ResponseStatus},
};
use forebay_streams::log::Recorded;
use serde::Serialize;
use serde_json::json;
use std::fmt::Write;

/// Renders the events of one response.
pub(super) struct Events {
    request: String,
    item: String,
    /// The number of the next event.
    next: u64,
    /// The client has read up to this one.
    after: Option<u64>,
    /// The message was announced.
    begun: bool,
}

#[derive(Serialize)]
struct Numbered<'a, T> {
    #[serde(rename = "type")]
    kind: &'a str,
    sequence_number: u64,
    #[serde(flatten)]
    fields: T,
}

/// Fields of events about the text.
#[derive(Serialize)]
struct OfText<'a, T> {
    item_id: &'a str,
    output_index: u32,
    content_index: u32,
    #[serde(flatten)]
    fields: T,
}

#[derive(Serialize)]
struct More<'a> {
    delta: &'a str,
    logprobs: [(); 0],
}

#[derive(Serialize)]
struct Done<'a> {
    text: &'a str,
    logprobs: [(); 0],
}

impl Teller for Events {
    fn tell(&mut self, frame: &mut BytesMut, recorded: &Recorded, state: &Lifecycle) {
        match &recorded.event.body {
            Body::RequestAccepted(_) => {
                let response = without_output(state, ResponseStatus::Queued);
                self.put(frame, "response.created", json!({ "response": response }));
            }
            Body::Claimed(_) if recorded.event.attempt == 1 => {
                let response = without_output(state, ResponseStatus::InProgress);
                self.put(frame, "response.in_progress", json!({ "response": response }));
            }
            body => match News::of(body) {
                Some(News::Text(text, _)) if !text.is_empty() => {
                    self.begin(frame);
                    self.put_text(frame, "response.output_text.delta", More { delta: text, logprobs: [] });
                }
                Some(News::Completed(_)) => self.complete(frame, state),
                // OpenAI has no event for a response that was cancelled; the status says which it is.
                Some(News::Ended(_)) => {
                    self.put(frame, "response.failed", json!({ "response": object(state) }));
                }
                Some(News::Text(..)) | None => {}
            },
        }
    }

    /// With the number of the event before: the log says nothing of it, and what comes next has the next number.
    fn stopped(&mut self, frame: &mut BytesMut, error: &ApiError) {
        let error = error.envelope().error;
        let fields = json!({ "code": error.code, "message": error.message, "param": error.param });
        let error = Numbered { kind: "error", sequence_number: self.next.saturating_sub(1), fields };
        frame.put_slice(b"event: error\ndata: ");
        put_json(frame, &error);
        frame.put_slice(b"\n\n");
    }
}

impl Events {
    pub(super) fn new(state: &Lifecycle, after: Option<u64>) -> Events {
        Events { request: state.request.to_string(), item: message_id(state), next: 0, after, begun: false }
    }

    /// Announces the message, once.
    fn begin(&mut self, frame: &mut BytesMut) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let item = OutputMessage {
            id: self.item.clone(),
            kind: "message".into(),
            status: ResponseStatus::InProgress,
            role: "assistant".into(),
            content: vec![],
        };
        self.put(frame, "response.output_item.added", json!({ "output_index": 0, "item": item }));
        self.put_text(frame, "response.content_part.added", json!({ "part": OutputText::new("") }));
    }

    fn complete(&mut self, frame: &mut BytesMut, state: &Lifecycle) {
        self.begin(frame);
        let part = OutputText::new(&state.text);
        let item = message(state, vec![part.clone()]);
        let response = object(state);
        let end = match response.status {
            ResponseStatus::Incomplete => "response.incomplete",
            _ => "response.completed",
        };
        self.put_text(frame, "response.output_text.done", Done { text: &state.text, logprobs: [] });
        self.put_text(frame, "response.content_part.done", json!({ "part": part }));
        self.put(frame, "response.output_item.done", json!({ "output_index": 0, "item": item }));
        self.put(frame, end, json!({ "response": response }));
    }

    fn put_text(&mut self, frame: &mut BytesMut, kind: &str, fields: impl Serialize) {
        let item = std::mem::take(&mut self.item);
        self.put(frame, kind, OfText { item_id: &item, output_index: 0, content_index: 0, fields });
        self.item = item;
    }

    fn put(&mut self, frame: &mut BytesMut, kind: &str, fields: impl Serialize) {
        let number = self.next;
        self.next += 1;
        if self.after.is_some_and(|after| number <= after) {
            return;
        }
        write!(frame, "event: {kind}\nid: {}/{number}\ndata: ", self.request).expect("memory takes all text");
        put_json(frame, &Numbered { kind, sequence_number: number, fields });
        frame.put_slice(b"\n\n");
    }
}
