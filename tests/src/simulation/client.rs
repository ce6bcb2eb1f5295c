//! Clients of the simulated gateways: they ask, read, and some leave. Those whose request goes on without them come back,
//! to any gateway, until they know how it ended.

use super::{
    chance::{below, between, between_ms, chance},
    poison,
    site::{RunningGateway, Site},
};
use crate::Answer;
use axum::{body::Body, http::Request, response::Response};
use bytes::Bytes;
use forebay_schemas::{
    event::FinishReason,
    ids::RequestId,
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

const CHATS: &str = "/v1/chat/completions";

/// What a client is going to do.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) begin: Duration,
    body: Value,
    streams: bool,
    /// Its idempotency key.
    key: Option<String>,
    /// Another client sends the same under the same key at the same time.
    pub(super) twin: bool,
    /// When it leaves its connections, as far as it does.
    leaves: Vec<Duration>,
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

/// What a client came away with, over all its connections.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) answer: Option<Answer>,
    /// Of the last connection.
    pub(super) ending: Ending,
    /// Its request goes on without it, and it came back until it knew the end.
    pub(super) detached: bool,
    pub(super) key: Option<String>,
    /// When it asked for the last time.
    pub(super) asked: Instant,
    pub(super) ended: Instant,
    pub(super) connections: u32,
    /// What must not be answered.
    pub(super) problem: Option<String>,
    streams: bool,
    /// Bytes that are no whole event yet.
    unread: Vec<u8>,
    last_id: Option<String>,
    /// The stream said that nothing follows.
    pub(super) done: bool,
    /// The log says so too.
    logged: bool,
    /// The answer is to be told from the start, and replaces what was read.
    anew: bool,
}

/// How a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// `POST`: begins a request, or finds it by its key.
    Post,
    /// `POST` after a certain event.
    PostAfter,
    /// `GET`, for the rest of a stream.
    Get,
}

impl Plan {
    /// Client number so much.
    pub(super) fn draw(number: u64, storm: Duration, poisoned: bool) -> Plan {
        let streams = chance(750);
        let key = chance(250).then(|| format!("key {number}"));
        let stored = streams && chance(350);
        let mut body = json!({
            "model": MODEL,
            "messages": [{ "role": "user", "content": "water waits ".repeat(1 + below(6) as usize) }],
            "max_tokens": between(1..=24),
            "stream": streams,
        });
        let poisoned = poisoned && chance(300);
        if poisoned || key.is_some() {
            body["seed"] = json!(poison::seed(number, poisoned));
        } else if chance(500) {
            body["seed"] = json!(below(1000));
        }
        if stored {
            body["store"] = json!(true);
        }
        if chance(200) {
            body["stop"] = json!(["e", "the"]);
        }
        if streams && chance(500) {
            body["stream_options"] = json!({ "include_usage": true });
        }
        let leaves = if stored || key.is_some() { below(6) } else { u64::from(chance(200)) };
        // In the midst of an answer, or while it waits.
        let patience = || if chance(700) { between_ms(0..=150) } else { between_ms(0..=3000) };
        Plan {
            begin: Duration::from_millis(below(storm.as_millis() as u64)),
            body,
            streams,
            twin: key.is_some() && chance(600),
            key,
            leaves: (0..leaves).map(|_| patience()).collect(),
            slow: if chance(100) { between_ms(1..=300) } else { Duration::ZERO },
        }
    }

    /// Asks a gateway and reads the answer; again, elsewhere perhaps, as long as there is more to know.
    pub(super) async fn ask(&self, site: &Site) -> Read {
        let mut read = Read {
            answer: None,
            ending: Ending::Broken,
            detached: self.key.is_some() || self.body["store"] == json!(true),
            key: self.key.clone(),
            asked: Instant::now(),
            ended: Instant::now(),
            connections: 0,
            problem: None,
            streams: self.streams,
            unread: Vec::new(),
            last_id: None,
            done: false,
            logged: false,
            anew: true,
        };
        let mut leaves = self.leaves.iter().copied();
        loop {
            let gateway = site.any_gateway().await;
            read.asked = Instant::now();
            let way = read.way();
            if way != Way::Post && read.last_id.is_some() {
                site.world.count("stream resumed after an event");
            }
            read.connect(&gateway, self.request(way, &read), leaves.next(), self.slow).await;
            read.ended = Instant::now();
            site.world.trace(|| format!("client: {way:?} at {}: {read:?}", gateway.name));
            if !read.comes_back() {
                return read;
            }
            site.world.count("client comes back");
            let pause = if chance(500) { 100 } else { 1500 };
            tokio::time::sleep(between_ms(0..=pause)).await;
        }
    }

    fn request(&self, way: Way, read: &Read) -> Request<Body> {
        let mut request = match (way, &read.answer) {
            (Way::Get, Some(answer)) => {
                Request::get(format!("{CHATS}/chatcmpl-{}?stream=true", answer.request))
            }
            _ => Request::post(CHATS),
        };
        if let Some(key) = self.key.as_ref().filter(|_| way != Way::Get) {
            request = request.header("idempotency-key", key);
        }
        if let Some(id) = read.last_id.as_ref().filter(|_| way != Way::Post) {
            request = request.header("last-event-id", id);
        }
        let body = if way == Way::Get { String::new() } else { self.body.to_string() };
        request.header("content-type", "application/json").body(Body::from(body)).expect("a request")
    }
}

impl Read {
    /// How it asks next.
    fn way(&mut self) -> Way {
        if self.anew || !self.streams {
            return Way::Post;
        }
        match self.key {
            Some(_) if chance(250) => {
                self.anew = true;
                Way::Post
            }
            Some(_) if self.last_id.is_some() && chance(300) => Way::PostAfter,
            _ => Way::Get,
        }
    }

    /// Whether there is more to know.
    fn comes_back(&mut self) -> bool {
        let known = self.answer.as_ref().is_some_and(|answer| answer.status == 200);
        if !self.detached || self.problem.is_some() || !known && self.key.is_none() {
            return false;
        }
        if self.ending != Ending::Whole {
            return true;
        }
        let Some(answer) = &self.answer else { return true };
        let code = answer.error.as_ref().and_then(|error| error["error"]["code"].as_str());
        let passing = ["backend_unavailable", "queue_full", "too_many_requests", "log_full", "shutting_down"];
        let passing = code.is_some_and(|code| passing.contains(&code));
        match (&self.key, self.streams && known) {
            // Nothing was done for it, says the log: the key names another request now.
            (Some(_), true) if self.logged && passing => {
                self.anew = true;
                true
            }
            (_, true) => !self.done && !self.logged,
            (Some(_), false) => passing,
            (None, false) => false,
        }
    }

    /// Asks over one connection and reads what comes.
    async fn connect(
        &mut self,
        gateway: &RunningGateway,
        request: Request<Body>,
        leaves: Option<Duration>,
        slow: Duration,
    ) {
        let (head, headed) = oneshot::channel();
        // As much as a connection holds.
        let (frames, mut body) = mpsc::channel::<Bytes>(4);
        let (process, router) = (gateway.process.clone(), gateway.gateway.router());
        tokio::spawn(async move { process.run(connection(router, request, head, frames)).await });
        self.connections += 1;
        self.unread.clear();

        let read = async {
            let Ok((status, id)) = headed.await else { return };
            let refused = self.begin(status, id.parse().expect("an id"));
            loop {
                tokio::time::sleep(slow).await;
                let Some(bytes) = body.recv().await else { break };
                self.unread.extend_from_slice(&bytes);
                while self.streams
                    && status == 200
                    && let Some(end) = self.unread.windows(2).position(|pair| pair == b"\n\n")
                {
                    let event: Vec<u8> = self.unread.drain(..end + 2).collect();
                    self.event(std::str::from_utf8(&event[..end]).expect("UTF-8"));
                }
            }
            if refused {
                // The gateway can't say now how it goes on.
                if ![429, 503].contains(&status) {
                    let why = String::from_utf8_lossy(&self.unread);
                    self.problem = Some(format!("2: coming back is answered {status}: {why}"));
                }
            } else if !self.unread.is_empty() {
                whole(self.answer.as_mut().expect("it has begun"), &self.unread);
            }
        };
        let leaves = async {
            match leaves {
                Some(after) => tokio::time::sleep(after).await,
                None => std::future::pending().await,
            }
        };
        self.ending = tokio::select! {
            biased;
            () = gateway.process.died() => Ending::Broken,
            () = read => Ending::Whole,
            () = leaves => Ending::Left,
        };
        if self.done || self.logged {
            self.ending = Ending::Whole;
        }
    }

    /// An answer begins. True if it only says that there is none, to a client that was accepted before.
    fn begin(&mut self, status: u16, request: RequestId) -> bool {
        let accepted = self.answer.as_ref().filter(|answer| answer.status == 200);
        if self.streams && status != 200 && accepted.is_some() {
            return true;
        }
        if status == 200 && !self.anew && accepted.is_some_and(|answer| answer.request != request) {
            self.problem = Some(format!("2: coming back leads to {request}"));
        }
        if self.anew || accepted.is_none() || !self.streams {
            let (text, finish, usage, error) = Default::default();
            self.answer = Some(Answer { request, status, text, finish, usage, error });
            self.last_id = None;
            (self.done, self.logged) = (false, false);
            // A refusal is no answer to go on with.
            self.anew = status != 200;
        } else if let Some(answer) = &mut self.answer {
            // The last word of a gateway, not of the request.
            answer.error = None;
        }
        false
    }

    /// One server-sent event.
    fn event(&mut self, event: &str) {
        let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name));
        let Some(data) = field("data: ") else { return };
        if self.done || self.logged {
            self.problem = Some(format!("2: {data} after the end"));
        }
        let id = field("id: ");
        let answer = self.answer.as_mut().expect("it has begun");
        self.last_id = id.map(str::to_owned).or(self.last_id.take());
        if data == "[DONE]" {
            self.done = true;
            return;
        }
        let Ok(chunk) = serde_json::from_str::<ChatChunk>(data) else {
            answer.error = Some(serde_json::from_str(data).expect("an error in JSON"));
            self.logged = id.is_some();
            return;
        };
        answer.usage = chunk.usage.or(answer.usage);
        for choice in chunk.choices {
            answer.text += choice.delta.content.as_deref().unwrap_or_default();
            answer.finish = answer.finish.or(choice.finish_reason);
        }
    }

    /// Whether all was read that there is to read of a stream.
    pub(super) fn is_whole(&self) -> bool {
        self.done || self.logged || !self.streams
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

/// What is not a stream: an answer in one piece, or an error.
fn whole(answer: &mut Answer, text: &[u8]) {
    if answer.status != 200 {
        answer.error = Some(serde_json::from_slice(text).expect("an error in JSON"));
        return;
    }
    let completion: ChatCompletion = serde_json::from_slice(text).expect("a completion");
    answer.text = completion.choices[0].message.content.clone().expect("a text");
    answer.finish = completion.choices[0].finish_reason.or(None::<FinishReason>);
    answer.usage = Some(completion.usage);
}
