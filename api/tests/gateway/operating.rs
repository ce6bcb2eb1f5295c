//! What operators and their machines ask.

use crate::{
    flaky,
    site::{Site, ask, card},
};
use forebay_api::GatewayConfig;
use forebay_schemas::{
    event::FinishReason,
    openai::{ModelEntry, ModelList},
};
use serde_json::{Value, json};
use std::time::Duration;

#[tokio::test]
async fn models_are_listed_as_they_come() {
    let site = Site::start().await;
    let list: ModelList = site.get("/v1/models").await.json().await.unwrap();
    assert_eq!(list.object, "list");
    let entry = ModelEntry {
        id: "demo".into(),
        object: "model".into(),
        created: 1_700_000_000,
        owned_by: "forebay".into(),
        max_model_len: Some(512),
    };
    assert_eq!(list.data, [entry]);

    site.streams.catalog.publish_model(&card(&site.streams, "Qwen/Qwen3-0.6B").await).await.unwrap();
    let entry: ModelEntry = site.get("/v1/models/Qwen/Qwen3-0.6B").await.json().await.unwrap();
    assert_eq!(entry.id, "Qwen/Qwen3-0.6B");
}

#[tokio::test]
async fn health_tells_living_from_ready() {
    let (streams, switch) = flaky::streams();
    let mut site = Site::with(streams, GatewayConfig::default()).await;
    assert_eq!(site.get("/live").await.status(), 200);
    assert_eq!(site.get("/ready").await.status(), 200);
    let health: Value = site.get("/health").await.json().await.unwrap();
    assert_eq!((&health["status"], &health["models"]), (&json!("ok"), &json!(1)));

    switch.break_down();
    let unready = async {
        while site.get("/ready").await.status() == 200 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), unready).await.expect("it notices");
    assert_eq!(site.get("/live").await.status(), 200);
    let health: Value = site.get("/health").await.json().await.unwrap();
    assert_eq!(health["backend_reachable"], false);
    site.stop();
}

#[tokio::test]
async fn metrics_count_requests_and_tokens() {
    let site = Site::start().await;
    let worker = async {
        let mut attempt = site.claim().await;
        attempt.text("a").await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        attempt.text("b").await;
        attempt.complete(FinishReason::Stop).await;
    };
    tokio::join!(site.post(ask(json!({}))), worker);
    let response = site.get("/metrics").await;
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    let text = response.text().await.unwrap();
    for line in [
        "forebay_requests_total{endpoint=\"/v1/chat/completions\",status=\"200\"} ",
        "forebay_time_to_first_token_seconds_bucket{model=\"demo\",le=\"0.001\"} ",
        "forebay_inter_token_seconds_bucket{model=\"demo\",le=\"0.0005\"} ",
        "forebay_prompt_tokens_total{model=\"demo\"} ",
        "forebay_completion_tokens_total{model=\"demo\"} ",
        &format!("forebay_requests_in_flight{{gateway=\"{}\"}} 0", site.config.gateway),
        &format!("forebay_followed_logs{{gateway=\"{}\"}} ", site.config.gateway),
    ] {
        assert!(text.contains(line), "{line} in:\n{text}");
    }
}
