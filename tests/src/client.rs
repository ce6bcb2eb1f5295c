//! A client in Rust, for tests that do something while an answer comes. The official one is driven from Python.

use crate::PATIENCE;
use forebay_schemas::{
    event::FinishReason,
    ids::RequestId,
    openai::{ChatChunk, ChatCompletion, TokenUsage},
};
use serde_json::{Value, json};
use std::time::Duration;

/// What is asked.
#[derive(Clone, Debug)]
pub struct Chat(Value);

impl Chat {
    /// One question, answered greedily.
    pub fn new(question: &str) -> Chat {
        let messages = json!([{ "role": "user", "content": question }]);
        Chat(json!({ "model": crate::deployment::MODEL, "messages": messages, "temperature": 0 }))
    }

    /// That many tokens exactly.
    pub fn tokens(self, count: u32) -> Chat {
        self.with("max_tokens", json!(count)).with("ignore_eos", json!(true))
    }

    /// With this seed.
    pub fn seed(self, seed: u64) -> Chat {
        self.with("seed", json!(seed))
    }

    /// With any other field.
    pub fn with(mut self, field: &str, value: Value) -> Chat {
        self.0[field] = value;
        self
    }
}

/// An answer, as far as it was read.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Whose answer.
    pub request: RequestId,
    /// HTTP status.
    pub status: u16,
    /// The text.
    pub text: String,
    /// Why it ended; none if it did not end well, or was not read to its end.
    pub finish: Option<FinishReason>,
    /// Tokens counted.
    pub usage: Option<TokenUsage>,
    /// The error, if that was the answer or ended it.
    pub error: Option<Value>,
}

/// A client of one gateway.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    url: String,
}

impl Client {
    /// For a gateway at `http://host:port`.
    pub fn new(url: &str) -> Client {
        let http = reqwest::Client::builder().no_proxy().timeout(2 * PATIENCE).build().expect("a client");
        Client { http, url: url.to_owned() }
    }

    /// Waits until the gateway says that it is ready.
    pub async fn wait_ready(&self) {
        let ready = || self.http.get(format!("{}/ready", self.url)).timeout(Duration::from_secs(5)).send();
        while !ready().await.is_ok_and(|answer| answer.status().is_success()) {
            tokio::time::sleep(crate::process::POLL).await;
        }
    }

    /// Asks, and waits for the whole answer.
    ///
    /// # Panics
    /// If the gateway can't be reached or does not answer as OpenAI does.
    pub async fn ask(&self, chat: &Chat) -> Answer {
        whole(self.post(chat.0.to_string()).await).await
    }

    /// The same under an idempotency key.
    ///
    /// # Panics
    /// As [`Client::ask`].
    pub async fn ask_under(&self, key: &str, chat: &Chat) -> Answer {
        let request =
            self.http.post(format!("{}/v1/chat/completions", self.url)).header("idempotency-key", key);
        whole(request.json(&chat.0).send().await.expect("the gateway answers")).await
    }
    /// `GET` of something: status and body.
    pub async fn get(&self, path: &str) -> (u16, Value) {
        read(self.http.get(format!("{}{path}", self.url))).await
    }

    /// `DELETE` of something: status and body.
    pub async fn delete(&self, path: &str) -> (u16, Value) {
        read(self.http.delete(format!("{}{path}", self.url))).await
    }

    /// `POST` of something: status and body.
    pub async fn post_json(&self, path: &str, body: &Value) -> (u16, Value) {
        read(self.http.post(format!("{}{path}", self.url)).json(body)).await
    }

    /// Asks for a stream.
    pub async fn stream(&self, chat: &Chat) -> Streaming {
        let chat =
            chat.clone().with("stream", json!(true)).with("stream_options", json!({ "include_usage": true }));
        let response = self.post(chat.0.to_string()).await;
        let (request, status) = (request_of(&response), response.status().as_u16());
        assert_eq!(status, 200, "{}", response.text().await.unwrap_or_default());
        let answer = Answer { request, status, text: String::new(), finish: None, usage: None, error: None };
        Streaming { response, unread: Vec::new(), answer, done: false, last_id: None }
    }

    /// Goes on with a stream that broke off elsewhere, and with what was read of it.
    pub async fn resume(&self, broken: &Streaming) -> Streaming {
        let answer = broken.answer.clone();
        let url = format!("{}/v1/chat/completions/chatcmpl-{}?stream=true", self.url, answer.request);
        let mut request = self.http.get(url);
        if let Some(id) = &broken.last_id {
            request = request.header("last-event-id", id);
        }
        let response = request.send().await.expect("the gateway answers");
        assert_eq!(response.status(), 200, "{}", response.text().await.unwrap_or_default());
        assert_eq!(request_of(&response), answer.request);
        Streaming { response, unread: Vec::new(), answer, done: broken.done, last_id: broken.last_id.clone() }
    }

    /// Sends any body, and returns the status and the error.
    pub async fn refused(&self, body: impl Into<String>) -> (u16, Value) {
        let response = self.post(body.into()).await;
        (response.status().as_u16(), error_of(&response.text().await.expect("a body")))
    }

    async fn post(&self, body: String) -> reqwest::Response {
        let request = self.http.post(format!("{}/v1/chat/completions", self.url));
        request
            .header("content-type", "application/json")
            .body(body)
            .send()
            .await
            .expect("the gateway answers")
    }
}

/// An answer that comes. Dropped before its end, the connection is closed.
pub struct Streaming {
    response: reqwest::Response,
    unread: Vec<u8>,
    answer: Answer,
    done: bool,
    last_id: Option<String>,
}

impl Streaming {
    /// What was read so far.
    pub fn answer(&self) -> &Answer {
        &self.answer
    }

    /// The id of the last event that was read.
    pub fn last_id(&self) -> Option<&str> {
        self.last_id.as_deref()
    }

    /// Reads on until there is this much text, or the answer ends.
    pub async fn read_text(&mut self, bytes: usize) {
        while self.answer.text.len() < bytes && self.read().await {}
    }

    /// Reads to the end.
    ///
    /// # Panics
    /// If the stream breaks off: it must end with `[DONE]` or an error.
    pub async fn rest(mut self) -> Answer {
        while self.read().await {}
        assert!(self.done, "the stream broke off after {:?}", self.answer);
        self.answer
    }

    /// Reads some more. False at the end.
    async fn read(&mut self) -> bool {
        let Ok(Some(bytes)) = self.response.chunk().await else { return false };
        self.unread.extend_from_slice(&bytes);
        while let Some(end) = self.unread.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = self.unread.drain(..end + 2).collect();
            self.take(std::str::from_utf8(&event[..end]).expect("UTF-8"));
        }
        true
    }

    fn take(&mut self, event: &str) {
        let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name));
        // Comments only keep the connection busy.
        let Some(data) = field("data: ") else { return };
        assert!(!self.done, "{data} after the end");
        self.last_id = field("id: ").map(str::to_owned).or(self.last_id.take());
        if data == "[DONE]" {
            self.done = true;
            return;
        }
        let Ok(chunk) = serde_json::from_str::<ChatChunk>(data) else {
            self.answer.error = Some(error_of(data));
            self.done = true;
            return;
        };
        self.answer.usage = chunk.usage.or(self.answer.usage);
        for choice in chunk.choices {
            assert!(self.answer.finish.is_none(), "{data} after the finish reason");
            self.answer.text += choice.delta.content.as_deref().unwrap_or_default();
            self.answer.finish = choice.finish_reason;
        }
    }
}

async fn read(request: reqwest::RequestBuilder) -> (u16, Value) {
    let response = request.send().await.expect("the gateway answers");
    (response.status().as_u16(), response.json().await.expect("a body of JSON"))
}

/// Reads an answer in one piece.
async fn whole(response: reqwest::Response) -> Answer {
    let (request, status) = (request_of(&response), response.status().as_u16());
    let body = response.text().await.expect("a body");
    let mut answer = Answer { request, status, text: String::new(), finish: None, usage: None, error: None };
    if status == 200 {
        let completion: ChatCompletion = serde_json::from_str(&body).expect("a completion");
        answer.text = completion.choices[0].message.content.clone().expect("a text");
        answer.finish = completion.choices[0].finish_reason;
        answer.usage = Some(completion.usage);
    } else {
        answer.error = Some(error_of(&body));
    }
    answer
}

fn request_of(response: &reqwest::Response) -> RequestId {
    let id = response.headers().get("x-request-id").and_then(|id| id.to_str().ok());
    id.and_then(|id| id.parse().ok()).expect("every answer names its request")
}

fn error_of(body: &str) -> Value {
    let body: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("an error in JSON, not {body:?}"));
    assert!(body["error"]["message"].is_string(), "an error has a message: {body}");
    body["error"].clone()
}
