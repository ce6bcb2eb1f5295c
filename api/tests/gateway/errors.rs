//! Every error has OpenAI's shape, the right status, and names what to change.

use crate::{
    flaky,
    site::{Attempt, Events, Site, ask, card, id_of, over},
};
use forebay_api::GatewayConfig;
use forebay_schemas::{
    card::BlobRef,
    event::{Body, FailureCode, FinishReason, RequestCancelled, RequestFailed},
    ids::ModelKey,
    openai::ErrorEnvelope,
    task::Role,
};
use forebay_streams::{
    jetstream,
    memory::{Limits, streams, streams_with},
    server::Server,
};
use serde_json::{Value, json};

/// Checks an error's shape, and returns its message.
pub(crate) async fn refused(
    response: reqwest::Response,
    status: u16,
    code: &str,
    param: Option<&str>,
) -> String {
    let retry =
        response.headers().get("retry-after").map(|value| value.to_str().unwrap().parse::<u32>().unwrap());
    assert_eq!(retry.is_some_and(|seconds| seconds >= 1), matches!(status, 429 | 503), "{status}");
    assert_eq!(response.status().as_u16(), status, "{code}");
    let body: Value = response.json().await.unwrap();
    for field in ["message", "type", "param", "code"] {
        assert!(body["error"].get(field).is_some(), "{field} in {body}");
    }
    let error = serde_json::from_value::<ErrorEnvelope>(body).unwrap().error;
    assert_eq!((error.code.as_deref(), error.param.as_deref()), (Some(code), param), "{}", error.message);
    error.message
}

async fn send(site: &Site, content_type: &str, body: impl Into<reqwest::Body>) -> reqwest::Response {
    let post = site.http.post(format!("{}/v1/chat/completions", site.url));
    post.header("content-type", content_type).body(body).send().await.unwrap()
}

#[tokio::test]
async fn what_is_no_request_is_refused() {
    let site = Site::start().await;
    let json = "application/json";
    refused(send(&site, json, "{\"model\":").await, 400, "invalid_json", None).await;
    refused(send(&site, "text/plain", "{}").await, 415, "unsupported_media_type", None).await;
    refused(send(&site, json, "{\"messages\":[]}").await, 400, "missing_required_parameter", Some("model"))
        .await;
    refused(send(&site, json, "[]").await, 400, "invalid_type", None).await;
    let wrong = ask(json!({ "temperature": "hot" })).to_string();
    refused(send(&site, json, wrong).await, 400, "invalid_type", Some("temperature")).await;
    let wrong = ask(json!({ "messages": [{ "role": "king", "content": "" }] })).to_string();
    refused(send(&site, json, wrong).await, 400, "invalid_value", Some("messages[0].role")).await;
}

#[tokio::test]
async fn what_is_nowhere_is_refused() {
    let site = Site::start().await;
    let message = refused(site.get("/v1/completions").await, 404, "not_found", None).await;
    assert!(message.contains("/v1/completions"));
    refused(site.get("/v1/chat/completions").await, 405, "method_not_allowed", None).await;
    refused(site.get("/v1/models/none").await, 404, "model_not_found", Some("model")).await;
    let message =
        refused(site.post(ask(json!({ "model": "none" }))).await, 404, "model_not_found", Some("model"))
            .await;
    assert!(message.contains("\"none\"") && message.contains("demo"), "{message}");
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused() {
    let config = GatewayConfig { body_bytes_max: 1000, ..Default::default() };
    let site = Site::with(streams(), config).await;
    let large = ask(json!({ "user": "x".repeat(1000) })).to_string();
    refused(send(&site, "application/json", large.clone()).await, 413, "request_too_large", None).await;
    // Without a length in the header, it is counted as it comes.
    let pieces = large
        .into_bytes()
        .chunks(100)
        .map(|piece| Ok::<_, std::io::Error>(piece.to_vec()))
        .collect::<Vec<_>>();
    let body = reqwest::Body::wrap_stream(futures::stream::iter(pieces));
    refused(send(&site, "application/json", body).await, 413, "request_too_large", None).await;
}

#[tokio::test]
async fn what_the_model_can_not_do_is_refused() {
    let site = Site::start().await;
    let refuse = async |more: Value, code: &str, param: &str| {
        refused(site.post(ask(more)).await, 400, code, Some(param)).await
    };
    let message = refuse(json!({ "max_tokens": 510 }), "context_length_exceeded", "messages").await;
    assert!(message.contains("512 tokens") && message.contains("510 of completion"), "{message}");
    let long = json!({ "messages": [{ "role": "user", "content": "a b c ".repeat(500) }] });
    refuse(long, "context_length_exceeded", "messages").await;
    refuse(json!({ "tools": [{ "type": "function" }] }), "unsupported_parameter", "tools").await;
    refuse(json!({ "top_p": 0 }), "invalid_value", "top_p").await;
    let raising = json!({ "messages": [{ "role": "user", "content": "refuse me" }] });
    let message = refuse(raising, "chat_template_failed", "messages").await;
    assert!(message.ends_with("not this"), "{message}");
    let image =
        json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }] });
    refuse(image, "unsupported_parameter", "messages[0].content[0].type").await;
    // None of these reached the queue.
    let depth = site.streams.tasks.depth(Role::Decode, &ModelKey::of("demo")).await.unwrap();
    assert_eq!(depth.lag(), 0);
}

#[tokio::test]
async fn a_broken_model_breaks_alone() {
    let site = Site::start().await;
    let good = card(&site.streams, "demo").await;
    let mut base = good.clone();
    (base.name, base.chat_template) = ("base".into(), None);
    let mut lost = good.clone();
    (lost.name, lost.tokenizer) = ("lost".into(), BlobRef { name: "gone".into(), bytes: 1 });
    let mut broken = good.clone();
    broken.name = "broken".into();
    broken.tokenizer = site.streams.catalog.put_blob("{}".into()).await.unwrap();
    let mut garbled = good;
    (garbled.name, garbled.chat_template) = ("garbled".into(), Some("{% if %}".into()));
    for card in [base, lost, broken, garbled] {
        site.streams.catalog.publish_model(&card).await.unwrap();
    }
    let model = async |name: &str| site.post(ask(json!({ "model": name }))).await;
    refused(model("base").await, 400, "no_chat_template", Some("model")).await;
    refused(model("lost").await, 503, "backend_unavailable", Some("model")).await;
    refused(model("broken").await, 500, "model_unreadable", Some("model")).await;
    refused(model("garbled").await, 500, "model_unreadable", Some("model")).await;

    let worker = async { site.claim().await.complete(FinishReason::Stop).await };
    let (response, ()) = tokio::join!(model("demo"), worker);
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn a_full_queue_asks_to_come_back() {
    let limits = Limits { queue_max: 1, ..Limits::default() };
    is_known_to_be_full(Site::with(streams_with(limits), GatewayConfig::default()).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_asks_to_come_back_over_nats() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(None, folder.path(), 0).unwrap();
    is_known_to_be_full(over(&server, jetstream::Limits { queue_max: 1, ..Default::default() }).await).await;
}

/// With a queue of one task.
async fn is_known_to_be_full(site: Site) {
    let mut first = Events::of(site.post(ask(json!({ "stream": true }))).await);
    // Room was there when it was asked about last: the queue itself refuses, and that is in the log.
    let response = site.post(ask(json!({ "stream": true }))).await;
    let log = site.log(id_of(&response));
    refused(response, 429, "queue_full", None).await;
    let events = site.streams.log.read(&log, 0).await.unwrap();
    let Body::RequestFailed(failed) = &events.last().unwrap().event.body else { panic!("a terminal event") };
    assert_eq!(failed.code, FailureCode::QueueUnavailable);
    // From then on it is known.
    let response = site.post(ask(json!({}))).await;
    let request = id_of(&response);
    refused(response, 429, "queue_full", None).await;
    assert_eq!(site.streams.log.find(request).await.unwrap(), None);
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let response = site.post(ask(json!({}))).await;
    assert_eq!(site.streams.log.find(id_of(&response)).await.unwrap(), None);
    refused(response, 429, "queue_full", None).await;
    // And again once there is room.
    site.claim().await.complete(FinishReason::Stop).await;
    first.rest().await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let worker = async { site.claim().await.complete(FinishReason::Stop).await };
    let (response, ()) = tokio::join!(site.post(ask(json!({}))), worker);
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn more_requests_than_fit_are_asked_to_come_back() {
    let site = Site::with(streams(), GatewayConfig { in_flight_max: 1, ..Default::default() }).await;
    let mut events = Events::of(site.post(ask(json!({ "stream": true }))).await);
    refused(site.post(ask(json!({}))).await, 429, "too_many_requests", None).await;
    site.claim().await.complete(FinishReason::Stop).await;
    events.rest().await;
    let worker = async { site.claim().await.complete(FinishReason::Stop).await };
    let (response, ()) = tokio::join!(site.post(ask(json!({}))), worker);
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn a_backend_that_is_away_asks_to_come_back() {
    let (streams, switch) = flaky::streams();
    let site = Site::with(streams, GatewayConfig::default()).await;
    switch.break_down();
    refused(site.post(ask(json!({}))).await, 503, "backend_unavailable", None).await;
    switch.repair();
    let worker = async { site.claim().await.complete(FinishReason::Stop).await };
    let (response, ()) = tokio::join!(site.post(ask(json!({}))), worker);
    assert_eq!(response.status(), 200);
}

async fn fail(mut attempt: Attempt, code: FailureCode) {
    attempt.text("half").await;
    attempt.end(Body::RequestFailed(RequestFailed { code, message: "as it is".into() })).await;
}

#[tokio::test]
async fn a_failed_request_is_answered_by_its_log() {
    let site = Site::start().await;
    for (failure, status, code) in [
        (FailureCode::EngineFailed, 500, "engine_failed"),
        (FailureCode::TooManyAttempts, 500, "too_many_attempts"),
        (FailureCode::Unservable, 400, "unservable"),
        (FailureCode::QueueUnavailable, 503, "backend_unavailable"),
        (FailureCode::DeadlineExceeded, 504, "deadline_exceeded"),
    ] {
        let worker = async { fail(site.claim().await, failure).await };
        let (response, ()) = tokio::join!(site.post(ask(json!({}))), worker);
        assert_eq!(refused(response, status, code, None).await, "as it is");
    }
    let worker = async {
        let mut attempt = site.claim().await;
        attempt.end(Body::RequestCancelled(RequestCancelled { cause: "by the operator".into() })).await;
    };
    let (response, ()) = tokio::join!(site.post(ask(json!({}))), worker);
    assert!(refused(response, 499, "request_cancelled", None).await.ends_with("by the operator"));
}

#[tokio::test]
async fn a_stream_that_fails_ends_with_the_error() {
    let site = Site::start().await;
    let mut events = Events::of(site.post(ask(json!({ "stream": true }))).await);
    fail(site.claim().await, FailureCode::EngineFailed).await;
    let events = events.rest().await;
    assert_eq!(events.len(), 2, "{events:?}");
    assert!(events[0].contains("half"));
    let error: ErrorEnvelope = serde_json::from_str(&events[1]).unwrap();
    assert_eq!(error.error.code.as_deref(), Some("engine_failed"));
}
