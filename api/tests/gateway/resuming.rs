//! A stream that broke off goes on, at any gateway, with exactly what is missing.

use crate::{
    endings::{AT_ONCE, cancelled},
    errors::refused,
    site::{Events, Site, Sse, ask, id_of},
};
use forebay_schemas::{
    event::{Body, FailureCode, FinishReason, RequestAccepted, RequestFailed},
    ids::{GatewayId, RequestId},
    openai::ErrorEnvelope,
};
use forebay_streams::{log::LogRef, writer::LogWriter};
use serde_json::json;
use std::time::{Duration, Instant};

fn id(event: &Sse) -> &str {
    event.id.as_deref().expect("every event of the log has an id")
}

#[tokio::test]
async fn whatever_was_read_the_rest_is_the_same_at_any_gateway() {
    let site = Site::start().await;
    let another = site.another().await;
    for (pieces, usage) in [(&["Wat", "", "er", " waits\n"][..], true), (&["a"], false), (&[], true)] {
        let body = ask(json!({ "stream": true, "stream_options": { "include_usage": usage } }));
        let response = site.post(body.clone()).await;
        let request = id_of(&response);
        let mut events = Events::of(response);
        site.serve(pieces).await;
        let all = events.events().await;
        for gateway in [&site, &another] {
            assert_eq!(gateway.resume(request, None).await.events().await, all);
            for read in 0..all.len() {
                let last = id(&all[read]);
                assert_eq!(
                    gateway.resume(request, Some(last)).await.events().await,
                    all[read + 1..],
                    "after {last}"
                );
                let path = format!("/v1/chat/completions/{request}?stream=true&starting_after={last}");
                assert_eq!(Events::of(gateway.get(&path).await).events().await, all[read + 1..]);
                let again =
                    gateway.post_to("/v1/chat/completions", &[("last-event-id", last)], body.clone()).await;
                assert_eq!(id_of(&again), request);
                assert_eq!(Events::of(again).events().await, all[read + 1..]);
            }
        }
    }
}

#[tokio::test]
async fn a_stream_is_taken_up_while_it_comes() {
    let site = Site::start().await;
    let another = site.another().await;
    let response = site.post(ask(json!({ "stream": true }))).await;
    let request = id_of(&response);
    let mut first = Events::of(response);
    let mut attempt = site.claim().await;
    attempt.text("one ").await;
    let read = first.event().await.unwrap();
    let mut others =
        [another.resume(request, read.id.as_deref()).await, site.resume(request, read.id.as_deref()).await];
    for word in ["two ", "three ", "four"] {
        attempt.text(word).await;
        let sent = Instant::now();
        let told = first.event().await.unwrap();
        for other in &mut others {
            assert_eq!(other.event().await.unwrap(), told);
        }
        assert!(sent.elapsed() < AT_ONCE, "{:?}", sent.elapsed());
    }
    attempt.complete(FinishReason::Stop).await;
    let rest = first.events().await;
    assert_eq!(rest.last().unwrap().data, "[DONE]");
    for other in &mut others {
        assert_eq!(other.events().await, rest);
    }
}

#[tokio::test]
async fn who_takes_a_stream_up_cancels_nothing() {
    let site = Site::start().await;
    let another = site.another().await;
    let response = site.post(ask(json!({ "stream": true }))).await;
    let request = id_of(&response);
    let mut first = Events::of(response);
    let mut attempt = site.claim().await;
    attempt.text("one").await;
    for gateway in [&site, &another] {
        gateway.resume(request, None).await.chunk().await;
    }
    tokio::time::sleep(AT_ONCE).await;
    let events = site.streams.log.read(attempt.writer.log(), 0).await.unwrap();
    assert!(!events.iter().any(|recorded| cancelled(&recorded.event.body)));
    attempt.complete(FinishReason::Stop).await;
    assert_eq!(first.rest().await.last().unwrap(), "[DONE]");
}

#[tokio::test]
async fn a_failed_request_fails_again() {
    let site = Site::start().await;
    let mut events = Events::of(site.post(ask(json!({ "stream": true }))).await);
    let mut attempt = site.claim().await;
    attempt.text("half").await;
    let failed = RequestFailed { code: FailureCode::EngineFailed, message: "as it is".into() };
    attempt.end(Body::RequestFailed(failed)).await;
    let all = events.events().await;
    let request = attempt.writer.log().request;
    assert_eq!(site.resume(request, all[0].id.as_deref()).await.events().await, all[1..]);
    assert!(all[1].data.contains("engine_failed"), "{all:?}");
    assert_eq!(site.resume(request, all[1].id.as_deref()).await.events().await, []);
}

#[tokio::test]
async fn what_is_no_place_in_a_stream_is_refused() {
    let site = Site::start().await;
    let mut events = Events::of(site.post(ask(json!({ "stream": true }))).await);
    let request = site.pull().await.0.request;
    let path = format!("/v1/chat/completions/chatcmpl-{request}?stream=true");
    for bad in ["x", "5", &format!("{request}/x"), &format!("{}/5", RequestId::new())] {
        let get = site.http.get(format!("{}{path}", site.url)).header("last-event-id", bad);
        refused(get.send().await.unwrap(), 400, "invalid_value", Some("Last-Event-ID")).await;
    }
    refused(
        site.get(&format!("{path}&starting_after=x")).await,
        400,
        "invalid_value",
        Some("starting_after"),
    )
    .await;
    for unknown in [RequestId::new().to_string(), "nobody".into()] {
        let path = format!("/v1/chat/completions/{unknown}?stream=true");
        refused(site.get(&path).await, 404, "request_not_found", None).await;
    }
    site.streams.log.remove(&site.log(request)).await.unwrap();
    refused(site.get(&path).await, 404, "request_not_found", None).await;
    drop(events.next());
}

/// Nobody is left of the gateway that accepted it.
#[tokio::test]
async fn who_reads_a_request_past_its_deadline_ends_it() {
    let site = Site::start().await;
    let log = LogRef { gateway: GatewayId::new("gw-dead").unwrap(), request: RequestId::new() };
    let accepted = RequestAccepted {
        timeout_ms: 200,
        detached: true,
        stored: true,
        ..RequestAccepted::greedy("demo", vec![1], 3)
    };
    LogWriter::create(site.streams.log.clone(), log.clone(), accepted).await.unwrap();
    let began = Instant::now();
    let response = site.get(&format!("/v1/chat/completions/{}", log.request)).await;
    assert_eq!(response.status(), 504);
    let error: ErrorEnvelope = response.json().await.unwrap();
    assert_eq!(error.error.message, "the request did not end within 0.2 s");
    assert!((1000..1900).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    let expired =
        |body: &Body| matches!(body, Body::RequestFailed(f) if f.code == FailureCode::DeadlineExceeded);
    assert_eq!(site.until(&log, expired).await.len(), 2);
    tokio::time::sleep(Duration::from_millis(10)).await;
    let events = site.resume(log.request, None).await.events().await;
    assert!(events[0].data.contains("deadline_exceeded"));
}
