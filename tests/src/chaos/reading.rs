//! One answer, as a client that expects everything reads it: streams break off, and go on at another gateway.

use crate::Answer;
use forebay_schemas::{
    ids::RequestId,
    openai::{ChatChunk, ChatCompletion},
};
use forebay_streams::environment::now_us;
use serde_json::{Value, json};
use std::time::Duration;

/// Silence after which a client gives up.
const PATIENCE: Duration = Duration::from_secs(90);

/// How a reading ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// The whole answer was read.
    Whole,
    /// An error came for an answer, or ended it.
    Error,
    /// The client closed the connection.
    Left,
    /// The connection broke, after the request was accepted.
    Broken,
    /// Nothing came for too long.
    Silent,
    /// There was no response at all: nobody can say whether the request was accepted.
    Unanswered,
}

/// What a client read, and when.
#[derive(Clone, Debug)]
pub struct Reading {
    /// Where it was asked.
    pub gateway: String,
    /// What was read; none without a response.
    pub answer: Option<Answer>,
    /// When text came, in microseconds since the Unix epoch.
    pub times_us: Vec<u64>,
    /// How it ended.
    pub end: End,
    /// A stream that any gateway can go on with.
    pub resumable: bool,
    /// How often a broken stream went on at another gateway.
    pub resumed: u32,
}

/// What came of asking for the rest of an answer.
pub(super) enum Rest {
    /// It comes.
    Comes(reqwest::Response),
    /// Not here, not now.
    NotNow,
}

/// A stream being read.
pub(super) struct Stream {
    pub(super) reading: Reading,
    response: reqwest::Response,
    unread: Vec<u8>,
    /// The last event's id.
    pub(super) last_id: Option<String>,
}

/// Sends a request.
pub(super) async fn post(
    http: &reqwest::Client,
    gateway: &str,
    body: &Value,
) -> Result<reqwest::Response, reqwest::Error> {
    http.post(format!("{gateway}/v1/chat/completions"))
        .header("content-type", "application/json")
        .body(body.to_string())
        .send()
        .await
}

/// Asks a gateway, any gateway, for what comes after the last event that was read.
pub(super) async fn rest(http: &reqwest::Client, gateway: &str, request: RequestId, last_id: &str) -> Rest {
    let url = format!("{gateway}/v1/chat/completions/chatcmpl-{request}?stream=true");
    let asked = http.get(url).header("last-event-id", last_id).timeout(PATIENCE).send().await;
    match asked.map(|response| (response.status().as_u16(), response)) {
        Ok((200, response)) => Rest::Comes(response),
        Ok(_) | Err(_) => Rest::NotNow,
    }
}

impl Reading {
    /// Nothing.
    pub(super) fn nothing(gateway: &str, end: End) -> Reading {
        Reading {
            gateway: gateway.to_owned(),
            answer: None,
            times_us: Vec::new(),
            end,
            resumable: false,
            resumed: 0,
        }
    }

    /// A whole answer at once.
    pub(super) async fn whole(gateway: &str, response: reqwest::Response) -> Reading {
        let mut reading = Reading::nothing(gateway, End::Broken);
        let mut answer = begun(&response);
        let body = tokio::time::timeout(PATIENCE, response.text()).await;
        match body {
            Err(_) => reading.end = End::Silent,
            Ok(Err(_)) => {}
            Ok(Ok(body)) if answer.status == 200 => match serde_json::from_str::<ChatCompletion>(&body) {
                Ok(completion) => {
                    answer.text = completion.choices[0].message.content.clone().unwrap_or_default();
                    answer.finish = completion.choices[0].finish_reason;
                    answer.usage = Some(completion.usage);
                    reading.end = End::Whole;
                }
                Err(error) => answer.error = Some(json!({ "unreadable": error.to_string(), "body": body })),
            },
            Ok(Ok(body)) => {
                answer.error = Some(serde_json::from_str(&body).unwrap_or(Value::String(body)));
                reading.end = End::Error;
            }
        }
        reading.answer = Some(answer);
        reading
    }
}

impl Stream {
    /// A stream that begins.
    pub(super) fn new(gateway: &str, response: reqwest::Response, resumable: bool) -> Stream {
        let mut reading = Reading { resumable, ..Reading::nothing(gateway, End::Broken) };
        reading.answer = Some(begun(&response));
        Stream { reading, response, unread: Vec::new(), last_id: None }
    }

    /// Goes on with what another gateway sends.
    pub(super) fn resume(&mut self, response: reqwest::Response) {
        self.response = response;
        self.unread.clear();
        self.reading.resumed += 1;
    }

    /// Reads until the answer or the connection ends. Cancel-safe.
    pub(super) async fn read(&mut self) -> End {
        loop {
            let bytes = match tokio::time::timeout(PATIENCE, self.response.chunk()).await {
                Err(_) => return End::Silent,
                Ok(Ok(Some(bytes))) => bytes,
                Ok(_) => return End::Broken,
            };
            self.unread.extend_from_slice(&bytes);
            while let Some(end) = self.unread.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.unread.drain(..end + 2).collect();
                if let Some(end) = self.take(&String::from_utf8_lossy(&event)) {
                    return end;
                }
            }
        }
    }

    fn take(&mut self, event: &str) -> Option<End> {
        let answer = self.reading.answer.as_mut().expect("a stream has an answer");
        let mut end = None;
        for line in event.lines() {
            if let Some(id) = line.strip_prefix("id: ") {
                self.last_id = Some(id.to_owned());
            }
            let Some(data) = line.strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                return Some(End::Whole);
            }
            let Ok(chunk) = serde_json::from_str::<ChatChunk>(data) else {
                answer.error = Some(serde_json::from_str(data).unwrap_or(Value::String(data.to_owned())));
                end = Some(End::Error);
                continue;
            };
            answer.usage = chunk.usage.or(answer.usage);
            for choice in chunk.choices {
                let text = choice.delta.content.as_deref().unwrap_or_default();
                if !text.is_empty() {
                    answer.text += text;
                    self.reading.times_us.push(now_us());
                }
                answer.finish = choice.finish_reason.or(answer.finish);
            }
        }
        end
    }
}

fn begun(response: &reqwest::Response) -> Answer {
    let id = response.headers().get("x-request-id").and_then(|id| id.to_str().ok());
    let request = id.and_then(|id| id.parse().ok()).expect("every answer names its request");
    let status = response.status().as_u16();
    Answer { request, status, text: String::new(), finish: None, usage: None, error: None }
}
