//! However a request ends, its log ends too.

use crate::{
    flaky,
    site::{Events, Site, ask, id_of},
};
use forebay_api::GatewayConfig;
use forebay_schemas::{
    event::{Body, FailureCode, FinishReason},
    ids::WorkerId,
    openai::ErrorEnvelope,
};
use forebay_streams::memory::streams;
use futures::StreamExt;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

pub(crate) fn cancelled(body: &Body) -> bool {
    matches!(body, Body::RequestCancelled(cancelled) if cancelled.cause == "client disconnected")
}

/// Within how long a client's going must show in the log.
pub(crate) const AT_ONCE: Duration = Duration::from_millis(200);

#[tokio::test]
async fn a_reader_that_goes_cancels_its_request() {
    let site = Site::start().await;
    let mut signals = site.streams.tasks.cancel_signals(&WorkerId::new("worker-1").unwrap()).await.unwrap();
    let response = site.post(ask(json!({ "stream": true }))).await;
    let log = site.log(id_of(&response));
    let mut events = Events::of(response);
    let mut attempt = site.claim().await;
    attempt.text("one").await;
    events.chunk().await;
    let gone = Instant::now();
    drop(events);
    site.until(&log, cancelled).await;
    assert!(gone.elapsed() < AT_ONCE, "{:?}", gone.elapsed());
    let signal = signals.next().await.unwrap();
    assert_eq!((signal.request, signal.cause.as_str()), (log.request, "client disconnected"));
}

#[tokio::test]
async fn a_waiter_that_goes_cancels_its_request() {
    let site = Site::start().await;
    // By hand: the id is not known before the answer, and there will be none.
    let mut connection = TcpStream::connect(site.url.strip_prefix("http://").unwrap()).await.unwrap();
    connection.write_all(raw(&ask(json!({})).to_string()).as_bytes()).await.unwrap();
    let attempt = site.claim().await;
    let gone = Instant::now();
    drop(connection);
    site.until(attempt.writer.log(), cancelled).await;
    assert!(gone.elapsed() < AT_ONCE, "{:?}", gone.elapsed());
}

#[tokio::test]
async fn the_deadline_ends_the_log_and_the_answer() {
    let config = GatewayConfig { request_timeout: Duration::from_millis(300), ..Default::default() };
    let site = Site::with(streams(), config).await;
    let mut signals = site.streams.tasks.cancel_signals(&WorkerId::new("worker-1").unwrap()).await.unwrap();

    let response = site.post(ask(json!({}))).await;
    assert_eq!(response.status(), 504);
    let log = site.log(id_of(&response));
    let expired =
        |body: &Body| matches!(body, Body::RequestFailed(f) if f.code == FailureCode::DeadlineExceeded);
    assert_eq!(site.until(&log, expired).await.len(), 2);
    let error: ErrorEnvelope = response.json().await.unwrap();
    assert_eq!(error.error.message, "the request did not end within 0.3 s");

    let (unserved, _) = site.pull().await;
    assert_eq!(unserved.request, log.request);
    let mut events = Events::of(site.post(ask(json!({ "stream": true }))).await);
    let mut attempt = site.claim().await;
    attempt.text("half").await;
    let events = events.rest().await;
    assert!(events[0].contains("half") && events[1].contains("deadline_exceeded"), "{events:?}");
    assert_eq!(signals.next().await.unwrap().request, attempt.writer.log().request);
}

#[tokio::test]
async fn the_client_hears_of_the_deadline_even_if_the_log_does_not() {
    let (streams, switch) = flaky::streams();
    let config = GatewayConfig { request_timeout: Duration::from_millis(200), ..Default::default() };
    let site = Site::with(streams, config).await;
    let response = site.post(ask(json!({ "stream": true }))).await;
    let log = site.log(id_of(&response));
    switch.break_down();
    let events = Events::of(response).rest().await;
    assert!(events[0].contains("deadline_exceeded"), "{events:?}");
    // The log is told as soon as it listens again.
    switch.repair();
    site.until(&log, Body::is_terminal).await;
}

#[tokio::test]
async fn a_backend_that_is_away_only_pauses_a_stream() {
    let (streams, switch) = flaky::streams();
    let site = Site::with(streams, GatewayConfig::default()).await;
    let mut events = Events::of(site.post(ask(json!({ "stream": true }))).await);
    let mut attempt = site.claim().await;
    attempt.text("one").await;
    events.chunk().await;
    switch.break_down();
    // Long enough for the follower to ask the log, and to be refused.
    tokio::time::sleep(Duration::from_millis(800)).await;
    switch.repair();
    attempt.text("two").await;
    assert_eq!(events.chunk().await.choices[0].delta.content.as_deref(), Some("two"));
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_up_nobody() {
    let site = Site::start().await;
    let mut stuck = TcpStream::connect(site.url.strip_prefix("http://").unwrap()).await.unwrap();
    stuck.write_all(raw(&ask(json!({ "stream": true })).to_string()).as_bytes()).await.unwrap();
    let mut first = site.claim().await;
    // More than the buffers of both sockets hold.
    let piece = "x".repeat(64 << 10);
    for _ in 0..400 {
        first.text(&piece).await;
    }
    let (mut events, mut attempt) =
        (Events::of(site.post(ask(json!({ "stream": true }))).await), site.claim().await);
    for _ in 0..50 {
        let sent = Instant::now();
        attempt.text("quick").await;
        events.chunk().await;
        assert!(sent.elapsed() < AT_ONCE, "{:?}", sent.elapsed());
    }
    // It misses nothing once it reads.
    first.complete(FinishReason::Stop).await;
    let mut text = vec![0; 1 << 20];
    let (mut xs, mut tail) = (0, Vec::new());
    while !tail.ends_with(b"0\r\n\r\n") {
        let bytes =
            tokio::time::timeout(Duration::from_secs(5), stuck.read(&mut text)).await.unwrap().unwrap();
        assert!(bytes > 0, "the answer is whole");
        xs += text[..bytes].iter().filter(|byte| **byte == b'x').count();
        tail.extend_from_slice(&text[..bytes]);
        tail.drain(..tail.len().saturating_sub(64));
    }
    assert!(xs >= 400 * piece.len(), "{xs}");
}

#[tokio::test]
async fn stopping_lets_requests_finish() {
    let mut site = Site::start().await;
    let mut events = Events::of(site.post(ask(json!({ "stream": true }))).await);
    let mut attempt = site.claim().await;
    site.stop();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(site.http.get(format!("{}/live", site.url)).send().await.is_err(), "no new connections");
    attempt.text("still").await;
    attempt.complete(FinishReason::Stop).await;
    assert_eq!(events.rest().await.last().unwrap(), "[DONE]");
    site.stopped().await;
}

#[tokio::test]
async fn stopping_does_not_wait_longer_than_the_grace() {
    let config = GatewayConfig { grace: Duration::from_millis(200), ..Default::default() };
    let mut site = Site::with(streams(), config).await;
    let mut events = Events::of(site.post(ask(json!({ "stream": true }))).await);
    let attempt = site.claim().await;
    site.stop();
    let events = events.rest().await;
    assert!(events[0].contains("shutting_down"), "{events:?}");
    let log = attempt.writer.log().clone();
    let stopped = |body: &Body| matches!(body, Body::RequestCancelled(c) if c.cause == "gateway shut down");
    site.until(&log, stopped).await;
    site.stopped().await;
}

/// What is detached goes on without its gateway.
#[tokio::test]
async fn stopping_leaves_what_is_detached() {
    let config = GatewayConfig { grace: Duration::from_millis(200), ..Default::default() };
    let mut site = Site::with(streams(), config).await;
    let mut events = Events::of(site.post(ask(json!({ "stream": true, "store": true }))).await);
    let mut attempt = site.claim().await;
    attempt.text("one ").await;
    events.chunk().await;
    site.stop();
    let told = events.events().await;
    assert!(told[0].data.contains("shutting_down") && told[0].id.is_none(), "{told:?}");
    let (another, request) = (site.another().await, attempt.writer.log().request);
    site.stopped().await;
    attempt.text("two").await;
    attempt.complete(FinishReason::Stop).await;
    let answer: Value =
        another.get(&format!("/v1/chat/completions/chatcmpl-{request}")).await.json().await.unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"], "one two");
}

fn raw(body: &str) -> String {
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}
