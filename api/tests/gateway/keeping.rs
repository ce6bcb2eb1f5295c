//! Requests that outlive their connection: stored, or sent under a key.

use crate::{
    endings::{AT_ONCE, cancelled},
    errors::refused,
    site::{Events, Site, ask, id_of},
};
use forebay_api::GatewayConfig;
use forebay_schemas::{
    event::{Body, FailureCode, FinishReason, RequestCancelled},
    ids::{RequestId, WorkerId},
    lifecycle::{Lifecycle, Phase},
};
use forebay_streams::memory::{Limits, streams, streams_with};
use futures::StreamExt;
use serde_json::{Value, json};
use std::time::Duration;

const CHATS: &str = "/v1/chat/completions";

fn path(request: RequestId) -> String {
    format!("{CHATS}/chatcmpl-{request}")
}

#[tokio::test]
async fn a_stored_chat_goes_on_when_its_client_leaves_and_is_there_afterwards() {
    let site = Site::start().await;
    let another = site.another().await;
    let body = ask(json!({ "stream": true, "store": true, "metadata": { "for": "test" } }));
    let response = site.post(body).await;
    let request = id_of(&response);
    let mut events = Events::of(response);
    let mut attempt = site.claim().await;
    attempt.text("one ").await;
    events.chunk().await;
    drop(events);
    tokio::time::sleep(AT_ONCE).await;
    // Whoever asks for it before it ends, waits.
    let rest = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        attempt.text("two").await;
        attempt.complete(FinishReason::Stop).await;
    };
    let path_of_it = path(request);
    let (waited, ()) = tokio::join!(another.get(&path_of_it), rest);
    let answer: Value = waited.json().await.unwrap();
    assert_eq!(answer["id"], format!("chatcmpl-{request}"));
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["metadata"], json!({ "for": "test" }));
    assert_eq!(answer["system_fingerprint"], "fb_0000000000000abc");
    assert_eq!(answer["choices"][0]["message"]["content"], "one two");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["completion_tokens"], 2);
    assert_eq!(site.get(&path(request)).await.json::<Value>().await.unwrap(), answer);

    let deleted: Value = another.delete(&path(request)).await.json().await.unwrap();
    let object = "chat.completion.deleted";
    assert_eq!(deleted, json!({ "id": format!("chatcmpl-{request}"), "object": object, "deleted": true }));
    refused(site.get(&path(request)).await, 404, "request_not_found", None).await;
    refused(site.delete(&path(request)).await, 404, "request_not_found", None).await;
}

#[tokio::test]
async fn a_stored_chat_that_failed_gives_its_error() {
    let site = Site::start().await;
    let worker = async {
        let mut attempt = site.claim().await;
        attempt.end(Body::RequestCancelled(RequestCancelled { cause: "by the operator".into() })).await;
    };
    let (response, ()) = tokio::join!(site.post(ask(json!({ "store": true }))), worker);
    let request = id_of(&response);
    let first = refused(response, 499, "request_cancelled", None).await;
    assert_eq!(refused(site.get(&path(request)).await, 499, "request_cancelled", None).await, first);
}

#[tokio::test]
async fn what_is_not_stored_is_not_there() {
    let site = Site::start().await;
    for body in [json!({}), json!({ "store": false })] {
        let (response, ()) = tokio::join!(site.post(ask(body)), site.serve(&["a"]));
        let request = id_of(&response);
        refused(site.get(&path(request)).await, 404, "request_not_found", None).await;
        refused(site.delete(&path(request)).await, 404, "request_not_found", None).await;
    }
}

#[tokio::test]
async fn deleting_cancels_first() {
    let site = Site::start().await;
    let mut signals = site.streams.tasks.cancel_signals(&WorkerId::new("worker-1").unwrap()).await.unwrap();
    let mut events = Events::of(site.post(ask(json!({ "stream": true, "store": true }))).await);
    let attempt = site.claim().await;
    let log = attempt.writer.log().clone();
    assert_eq!(site.delete(&path(log.request)).await.status(), 200);
    assert_eq!(signals.next().await.unwrap().request, log.request);
    assert!(events.rest().await[0].contains("request_cancelled"));
    assert_eq!(site.streams.log.find(log.request).await.unwrap(), None);
}

#[tokio::test]
async fn a_detached_request_keeps_its_place_and_its_deadline() {
    let config =
        GatewayConfig { in_flight_max: 1, request_timeout: Duration::from_millis(600), ..Default::default() };
    let site = Site::with(streams(), config).await;
    let events = Events::of(site.post(ask(json!({ "stream": true, "store": true }))).await);
    let mut attempt = site.claim().await;
    drop(events);
    tokio::time::sleep(Duration::from_millis(100)).await;
    refused(site.post(ask(json!({}))).await, 429, "too_many_requests", None).await;
    attempt.text("a").await;
    attempt.complete(FinishReason::Stop).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let events = Events::of(site.post(ask(json!({ "stream": true, "store": true }))).await);
    let attempt = site.claim().await;
    drop(events);
    let expired =
        |body: &Body| matches!(body, Body::RequestFailed(f) if f.code == FailureCode::DeadlineExceeded);
    let ended = site.until(attempt.writer.log(), expired).await;
    assert!(!ended.iter().any(|recorded| cancelled(&recorded.event.body)));
}

#[tokio::test]
async fn the_same_key_is_the_same_request() {
    let site = Site::start().await;
    let another = site.another().await;
    let key = [("idempotency-key", "order 7")];
    let (first, ()) = tokio::join!(site.post_to(CHATS, &key, ask(json!({}))), site.serve(&["once"]));
    let request = id_of(&first);
    let first: Value = first.json().await.unwrap();
    for gateway in [&site, &another] {
        let again = gateway.post_to(CHATS, &key, ask(json!({}))).await;
        assert_eq!(id_of(&again), request);
        assert_eq!(again.json::<Value>().await.unwrap(), first);
        let other = gateway.post_to(CHATS, &key, ask(json!({ "max_tokens": 3 }))).await;
        refused(other, 422, "idempotency_key_reused", Some("Idempotency-Key")).await;
    }
    let long = "k".repeat(256);
    let refuse = site.post_to(CHATS, &[("idempotency-key", &long)], ask(json!({}))).await;
    refused(refuse, 400, "invalid_value", Some("Idempotency-Key")).await;
}

#[tokio::test]
async fn two_that_send_one_key_at_once_get_one_request() {
    let site = Site::start().await;
    let another = site.another().await;
    for round in 0..8 {
        let key = format!("round {round}");
        let key = [("idempotency-key", key.as_str())];
        let body = ask(json!({ "stream": true }));
        let (one, two) =
            tokio::join!(site.post_to(CHATS, &key, body.clone()), another.post_to(CHATS, &key, body));
        assert_eq!(id_of(&one), id_of(&two));
        site.serve(&["for ", "both"]).await;
        let (one, two) = (Events::of(one).events().await, Events::of(two).events().await);
        assert_eq!(one, two);
        assert_eq!(one.last().unwrap().data, "[DONE]");
    }
}

#[tokio::test]
async fn a_client_that_comes_back_under_its_key_finds_its_request() {
    let site = Site::start().await;
    let another = site.another().await;
    let key = [("idempotency-key", "k")];
    let body = ask(json!({ "stream": true }));
    let mut events = Events::of(site.post_to(CHATS, &key, body.clone()).await);
    let mut attempt = site.claim().await;
    attempt.text("one ").await;
    events.chunk().await;
    drop(events);
    tokio::time::sleep(AT_ONCE).await;
    let mut events = Events::of(another.post_to(CHATS, &key, body).await);
    assert_eq!(events.chunk().await.choices[0].delta.content.as_deref(), Some("one "));
    attempt.text("two").await;
    attempt.complete(FinishReason::Stop).await;
    assert_eq!(events.chunk().await.choices[0].delta.content.as_deref(), Some("two"));
}

/// What the queue refused may be asked again under its key, and is served then.
#[tokio::test]
async fn a_key_outlives_a_full_queue() {
    let limits = Limits { queue_max: 1, ..Limits::default() };
    let site = Site::with(streams_with(limits), GatewayConfig::default()).await;
    let first = Events::of(site.post(ask(json!({ "stream": true }))).await);
    let key = [("idempotency-key", "k")];
    let response = site.post_to(CHATS, &key, ask(json!({}))).await;
    let refused_id = id_of(&response);
    refused(response, 429, "queue_full", None).await;
    site.claim().await.complete(FinishReason::Stop).await;
    drop(first);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let (response, ()) = tokio::join!(site.post_to(CHATS, &key, ask(json!({}))), site.serve(&["a"]));
    assert_eq!(response.status(), 200);
    let request = id_of(&response);
    assert_ne!(request, refused_id);
    let state = async |request| {
        let events = site.streams.log.read(&site.log(request), 0).await.unwrap();
        Lifecycle::fold(events.iter().map(|recorded| &recorded.event)).unwrap().unwrap().phase
    };
    assert_eq!((state(refused_id).await, state(request).await), (Phase::Failed, Phase::Completed));
}
