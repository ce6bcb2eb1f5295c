//! Clients of the simulated gateways: they ask, read, and some leave.

use super::{
    chance::{below, between, between_ms, chance},
    site::RunningGateway,
};
use crate::Answer;
use axum::{body::Body, http::Request, response::Response};
use bytes::Bytes;
use forebay_schemas::{
    event::FinishReason,
    openai::{ChatChunk, ChatCompletion},
};
use futures::StreamExt;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tower::ServiceExt;

/// The name of the one model.
pub(super) const MODEL: &str = "demo";

/// What a client is going to do.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) begin: Duration,
    body: Value,
    streams: bool,
    /// When it leaves, if it does.
    leaves: Option<Duration>,
    /// Pause before each read of a client that is slow.
    slow: Duration,
}

/// How it ended for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// It read all there was.
    Whole,
    /// It left.
    Left,
    /// The gateway died.
    Broken,
}

/// What a client came away with.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) answer: Option<Answer>,
    pub(super) ending: Ending,
    /// When.
    pub(super) ended: Option<Instant>,
}

impl Plan {
    pub(super) fn draw(storm: Duration) -> Plan {
        let streams = chance(750);
        let mut body = json!({
            "model": MODEL,
            "messages": [{ "role": "user", "content": "water waits ".repeat(1 + below(6) as usize) }],
            "max_tokens": between(1..=24),
            "stream": streams,
        });
        if chance(500) {
            body["seed"] = json!(below(1000));
        }
        if chance(200) {
            body["stop"] = json!(["e", "the"]);
        }
        if streams && chance(500) {
            body["stream_options"] = json!({ "include_usage": true });
        }
        Plan {
            begin: Duration::from_millis(below(storm.as_millis() as u64)),
            body,
            streams,
            leaves: chance(200).then(|| between_ms(0..=3000)),
            slow: if chance(100) { between_ms(1..=300) } else { Duration::ZERO },
        }
    }

    /// Asks a gateway and reads the answer.
    pub(super) async fn ask(&self, gateway: &RunningGateway) -> Read {
        let (head, headed) = oneshot::channel();
        // As much as a connection holds.
        let (frames, mut body) = mpsc::channel::<Bytes>(4);
        let request = Request::post("/v1/chat/completions")
            .header("content-type", "application/json")
            .body(Body::from(self.body.to_string()))
            .expect("a request");
        let (process, router) = (gateway.process.clone(), gateway.gateway.router());
        tokio::spawn(async move { process.run(connection(router, request, head, frames)).await });

        let mut answer = None;
        let read = async {
            let Ok((status, id)) = headed.await else { return };
            let parsed = answer.insert(Answer {
                request: id.parse().expect("an id"),
                status,
                text: String::new(),
                finish: None,
                usage: None,
                error: None,
            });
            let mut text = Vec::new();
            loop {
                tokio::time::sleep(self.slow).await;
                let Some(bytes) = body.recv().await else { break };
                text.extend_from_slice(&bytes);
                while self.streams
                    && let Some(end) = text.windows(2).position(|pair| pair == b"\n\n")
                {
                    let event: Vec<u8> = text.drain(..end + 2).collect();
                    event_of(parsed, std::str::from_utf8(&event[..end]).expect("UTF-8"));
                }
            }
            whole(parsed, &text);
        };
        let leaves = async {
            match self.leaves {
                Some(after) => tokio::time::sleep(after).await,
                None => std::future::pending().await,
            }
        };
        let ending = tokio::select! {
            biased;
            () = gateway.process.died() => Ending::Broken,
            () = read => Ending::Whole,
            () = leaves => Ending::Left,
        };
        Read { answer, ending, ended: None }
    }
}

/// The gateway's end of a connection.
async fn connection(
    router: axum::Router,
    request: Request<Body>,
    mut head: oneshot::Sender<(u16, String)>,
    frames: mpsc::Sender<Bytes>,
) {
    let response: Response = tokio::select! {
        biased;
        response = router.oneshot(request) => response.unwrap_or_else(|never| match never {}),
        // The client has left.
        () = head.closed() => return,
    };
    let id = response.headers()["x-request-id"].to_str().expect("an id").to_owned();
    let _ = head.send((response.status().as_u16(), id));
    let mut body = response.into_body().into_data_stream();
    loop {
        let frame = tokio::select! {
            biased;
            () = frames.closed() => return,
            frame = body.next() => frame,
        };
        let Some(Ok(frame)) = frame else { return };
        if frames.send(frame).await.is_err() {
            return;
        }
    }
}

/// One server-sent event.
fn event_of(answer: &mut Answer, event: &str) {
    let data = event.lines().find_map(|line| line.strip_prefix("data: "));
    let Some(data) = data.filter(|data| *data != "[DONE]") else { return };
    let Ok(chunk) = serde_json::from_str::<ChatChunk>(data) else {
        answer.error = Some(serde_json::from_str(data).expect("an error in JSON"));
        return;
    };
    answer.usage = chunk.usage.or(answer.usage);
    for choice in chunk.choices {
        answer.text += choice.delta.content.as_deref().unwrap_or_default();
        answer.finish = answer.finish.or(choice.finish_reason);
    }
}

/// What is not a stream: an answer in one piece, or an error.
fn whole(answer: &mut Answer, text: &[u8]) {
    if text.is_empty() {
        return;
    }
    if answer.status != 200 {
        answer.error = Some(serde_json::from_slice(text).expect("an error in JSON"));
        return;
    }
    let completion: ChatCompletion = serde_json::from_slice(text).expect("a completion");
    answer.text = completion.choices[0].message.content.clone().expect("a text");
    answer.finish = completion.choices[0].finish_reason.or(None::<FinishReason>);
    answer.usage = Some(completion.usage);
}
