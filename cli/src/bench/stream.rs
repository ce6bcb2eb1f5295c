//! One streamed chat, with the time of each piece of text.

use super::processes::Deployment;
use anyhow::{Context, bail};
use forebay_schemas::ids::RequestId;
use serde_json::{Value, json};
use std::time::Instant;

/// What a stream brought.
#[derive(Clone, Debug)]
pub(super) struct Streamed {
    pub(super) request: RequestId,
    pub(super) begun: Instant,
    /// When each piece of text came.
    pub(super) texts: Vec<Instant>,
    pub(super) cached_tokens: u64,
}

impl Streamed {
    /// Time to the first text, in milliseconds.
    pub(super) fn ttft_ms(&self) -> f64 {
        self.texts.first().map_or(f64::NAN, |first| (*first - self.begun).as_secs_f64() * 1e3)
    }
}

/// Asks a deployment for that many tokens after a prompt, and tells each piece of text as it comes.
pub(super) async fn stream(
    client: &reqwest::Client,
    deployment: &Deployment,
    prompt: &str,
    tokens: u32,
    mut on_text: impl FnMut(Instant),
) -> anyhow::Result<Streamed> {
    let body = json!({
        "model": super::processes::MODEL,
        "messages": [{ "role": "user", "content": prompt }],
        "max_tokens": tokens,
        "ignore_eos": true,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    let begun = Instant::now();
    let request = client.post(format!("http://{}/v1/chat/completions", deployment.address));
    let mut answer = request.header("content-type", "application/json").body(body.to_string()).send().await?;
    if !answer.status().is_success() {
        bail!("{}: {}", answer.status(), answer.text().await.unwrap_or_default());
    }
    let (mut texts, mut rest, mut id, mut usage) = (Vec::new(), Vec::new(), None, Value::Null);
    while let Some(bytes) = answer.chunk().await? {
        let now = Instant::now();
        rest.extend_from_slice(&bytes);
        while let Some(end) = memchr::memchr(b'\n', &rest) {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let Some(data) = line.strip_prefix(b"data: ") else { continue };
            let Ok(mut chunk) = serde_json::from_slice::<Value>(data) else { continue };
            if let Some(error) = chunk.get("error") {
                bail!("the answer ended with {error}");
            }
            id = id.or_else(|| chunk["id"].as_str().and_then(|id| id.parse().ok()));
            if chunk["choices"][0]["delta"]["content"].as_str().is_some_and(|text| !text.is_empty()) {
                texts.push(now);
                on_text(now);
            }
            if chunk["usage"].is_object() {
                usage = chunk["usage"].take();
            }
        }
    }
    Ok(Streamed {
        request: id.context("the stream has no id")?,
        begun,
        texts,
        cached_tokens: usage["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .context("the stream ended without usage")?,
    })
}

/// A prompt of that many words, one token each with the random checkpoint's tokenizer. Prompts of two seeds have no
/// beginning in common.
pub(super) fn words(seed: u64, count: usize) -> String {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        format!("w{}", (state >> 33) % 100_000)
    };
    (0..count).map(|_| next()).collect::<Vec<_>>().join(" ")
}
