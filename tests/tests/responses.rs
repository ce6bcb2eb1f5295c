//! The Responses API and what is stored, through OpenAI's own client, and over the death of everything.

use forebay_schemas::{
    event::Body,
    ids::RequestId,
    lifecycle::Phase,
    openai::{ResponseObject, ResponseStatus},
    task::Role,
};
use forebay_tests::{Deployment, Gateway, deployment::MODEL, python, soon};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

fn ask(tokens: u32) -> Value {
    json!({
        "model": MODEL, "input": "Go on, whoever asks.", "max_output_tokens": tokens, "ignore_eos": true,
        "background": true, "seed": 1,
    })
}

async fn begin(gateway: &Gateway, tokens: u32) -> RequestId {
    let (status, response) = gateway.client.post_json("/v1/responses", &ask(tokens)).await;
    assert_eq!((status, &response["status"]), (200, &json!("queued")), "{response}");
    response["id"].as_str().and_then(|id| id.parse().ok()).expect("an id")
}

async fn get(gateway: &Gateway, request: RequestId) -> ResponseObject {
    let (status, response) = gateway.client.get(&format!("/v1/responses/resp_{request}")).await;
    assert_eq!(status, 200, "{response}");
    serde_json::from_value(response).expect("a response")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_official_client_keeps_its_requests() {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::from_millis(5));
    let (_decode, _prefill) = tokio::join!(deployment.decode(), deployment.prefill());
    let (one, two) = tokio::join!(deployment.gateway(&[]), deployment.gateway(&[]));
    let other = format!("{}/v1", two.url);
    let reported = python::run("kept.py", &one.url, &[&other]).await;
    assert!(reported.len() >= 8);
    for reported in &reported {
        // What was deleted again has no log.
        if !deployment.events(reported.answer.request).await.is_empty() {
            deployment.check(&reported.answer).await;
        }
    }
    deployment.all_slots_free().await;
    deployment.queue_empty(Role::Decode).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_outlives_gateways_nats_and_its_worker() {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::from_millis(20));
    let mut decode = deployment.decode().await;
    let mut gateway = deployment.gateway(&[]).await;
    let request = begin(&gateway, 200).await;
    deployment.logged(request, |event| matches!(event.body, Body::TokensGenerated(_))).await;
    gateway.process.kill();
    deployment.interrupt_nats(Duration::from_secs(1)).await;
    let gateway = deployment.gateway(&[]).await;
    assert_eq!(get(&gateway, request).await.status, ResponseStatus::InProgress);
    decode.process.kill();
    let _decode = deployment.decode().await;
    let state = deployment.check_log(request).await;
    assert_eq!((&state.phase, state.tokens.len()), (&Phase::Completed, 200));
    let response = get(&gateway, request).await;
    assert_eq!(response.status, ResponseStatus::Incomplete);
    assert_eq!(response.output[0].content[0].text, state.text);

    // The conversation goes on after another restart.
    drop(gateway);
    deployment.interrupt_nats(Duration::from_millis(200)).await;
    let gateway = deployment.gateway(&[]).await;
    let mut body = ask(10);
    body["previous_response_id"] = json!(format!("resp_{request}"));
    body["background"] = json!(false);
    let (status, next) = gateway.client.post_json("/v1/responses", &body).await;
    assert_eq!(status, 200, "{next}");
    let tokens = next["usage"]["input_tokens"].as_u64().expect("a count");
    assert!(tokens > 200, "{tokens} tokens of conversation");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelling_stops_the_work() {
    let mut deployment = Deployment::start().await;
    deployment.simulate(Duration::from_millis(10));
    let (_decode, _prefill) = tokio::join!(deployment.decode(), deployment.prefill());
    let (one, two) = tokio::join!(deployment.gateway(&[]), deployment.gateway(&[]));
    for (round, gateway) in [&one, &two, &two].into_iter().enumerate() {
        let request = begin(&one, 3000).await;
        if round < 2 {
            deployment.logged(request, |event| matches!(event.body, Body::TokensGenerated(_))).await;
        }
        let asked = Instant::now();
        let path = format!("/v1/responses/resp_{request}/cancel");
        let (status, response) = gateway.client.post_json(&path, &json!({})).await;
        assert_eq!((status, &response["status"]), (200, &json!("cancelled")), "{response}");
        assert!(asked.elapsed() < Duration::from_millis(200), "{:?}", asked.elapsed());
        let state = deployment.check_log(request).await;
        assert!(state.tokens.len() < 300, "{} tokens", state.tokens.len());
        assert_eq!(get(&one, request).await.status, ResponseStatus::Cancelled);
    }
    deployment.all_slots_free().await;
    soon("the queue is empty", deployment.queue_empty(Role::Decode)).await;
}
