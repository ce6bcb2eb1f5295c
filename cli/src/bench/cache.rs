//! What routing by KV saves: the same load of shared prefixes, with workers chosen by their KV and in turn.

use super::{
    http::client_runtime,
    percentile,
    processes::Deployment,
    trace::{Trace, Visit},
};
use anyhow::bail;
use clap::Args;
use serde_json::{Value, json};
use std::{sync::Arc, time::Instant};
use tokio::task::JoinSet;

#[derive(Args, Clone, Debug)]
pub(crate) struct CacheArgs {
    /// Decode workers.
    #[arg(long, default_value_t = 4, value_name = "N")]
    workers: usize,
    /// Conversations.
    #[arg(long, default_value_t = 60, value_name = "N")]
    conversations: usize,
    /// Conversations that begin in a second, on average.
    #[arg(long, default_value_t = 0.4, value_name = "N")]
    rate: f64,
    /// How workers are chosen: one after another.
    #[arg(long, value_delimiter = ',', default_value = "round-robin,kv", value_name = "HOW,…")]
    routing: Vec<String>,
    /// Of the trace.
    #[arg(long, default_value_t = 1, value_name = "SEED")]
    seed: u64,
    /// Simulated microseconds that each prompt token takes to prefill.
    #[arg(long, default_value_t = 5000.0, value_name = "US")]
    prefill_token_us: f64,
    /// Simulated microseconds of a decode step.
    #[arg(long, default_value_t = 20_000.0, value_name = "US")]
    step_us: f64,
}

impl Default for CacheArgs {
    fn default() -> Self {
        CacheArgs {
            workers: 4,
            conversations: 60,
            rate: 0.4,
            routing: vec!["round-robin".into(), "kv".into()],
            seed: 1,
            prefill_token_us: 5000.0,
            step_us: 20_000.0,
        }
    }
}

/// Of one answer.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    ttft_ms: f64,
    prompt_tokens: u64,
    cached_tokens: u64,
}

pub(crate) fn run(args: &CacheArgs) -> anyhow::Result<()> {
    let trace = Trace::draw(args.seed, args.conversations, args.rate);
    println!("\n# Routing ({} decode workers, {} requests)\n", args.workers, trace.requests());
    println!(
        "{:>14} {:>11} {:>11} {:>11} {:>10} {:>9}",
        "", "mean TTFT", "median", "p99", "hit rate", "prompt"
    );
    let mut means = Vec::new();
    for how in &args.routing {
        let asked = measure(args, &trace, how)?;
        let mut times: Vec<f64> = asked.iter().map(|one| one.ttft_ms).collect();
        times.sort_by(f64::total_cmp);
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        means.push(mean);
        let prompt: u64 = asked.iter().map(|one| one.prompt_tokens).sum();
        let cached: u64 = asked.iter().map(|one| one.cached_tokens).sum();
        println!(
            "{how:>14} {mean:>8.0} ms {:>8.0} ms {:>8.0} ms {:>8.1} % {:>9.0}",
            percentile(&times, 0.5),
            percentile(&times, 0.99),
            cached as f64 / prompt as f64 * 1e2,
            prompt as f64 / asked.len() as f64
        );
    }
    if let [first, .., last] = means[..] {
        println!("\nmean TTFT of the first against the last: {:.2}", first / last);
    }
    Ok(())
}

fn measure(args: &CacheArgs, trace: &Trace, how: &str) -> anyhow::Result<Vec<Asked>> {
    let (workers, step, prefill) =
        (args.workers.to_string(), args.step_us.to_string(), args.prefill_token_us.to_string());
    let arguments = [
        "--engine",
        "sim",
        "--context",
        "8192",
        "--prefill",
        "0",
        "--decode",
        &workers,
        "--routing",
        how,
        "--sim-step-us",
        &step,
        "--sim-prefill-token-us",
        &prefill,
    ];
    let deployment = Deployment::start(&arguments)?;
    let client = reqwest::Client::builder().no_proxy().build()?;
    let url: Arc<str> = format!("http://{}/v1/chat/completions", deployment.address).into();
    client_runtime()?.block_on(async {
        let begun = Instant::now();
        let mut visits = JoinSet::new();
        for visit in trace.visits.clone() {
            visits.spawn(converse(client.clone(), url.clone(), begun, visit));
        }
        let mut all = Vec::new();
        while let Some(asked) = visits.join_next().await {
            all.extend(asked??);
        }
        Ok(all)
    })
}

/// One conversation, turn by turn.
async fn converse(
    client: reqwest::Client,
    url: Arc<str>,
    begun: Instant,
    visit: Visit,
) -> anyhow::Result<Vec<Asked>> {
    tokio::time::sleep(visit.begin.saturating_sub(begun.elapsed())).await;
    let mut messages = vec![json!({ "role": "system", "content": visit.document })];
    let mut all = Vec::new();
    for question in &visit.questions {
        messages.push(json!({ "role": "user", "content": question }));
        let (asked, text) = ask(&client, &url, &messages).await?;
        all.push(asked);
        messages.push(json!({ "role": "assistant", "content": text }));
        tokio::time::sleep(visit.pause).await;
    }
    Ok(all)
}

async fn ask(client: &reqwest::Client, url: &str, messages: &[Value]) -> anyhow::Result<(Asked, String)> {
    let body = json!({
        "model": super::processes::MODEL,
        "messages": messages,
        "max_tokens": 16,
        "ignore_eos": true,
        "seed": 7,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    let begun = Instant::now();
    let request = client.post(url).header("content-type", "application/json").body(body.to_string());
    let mut answer = request.send().await?;
    if !answer.status().is_success() {
        bail!("{}: {}", answer.status(), answer.text().await.unwrap_or_default());
    }
    let (mut asked, mut text, mut rest) = (Asked::default(), String::new(), Vec::new());
    while let Some(bytes) = answer.chunk().await? {
        rest.extend_from_slice(&bytes);
        while let Some(end) = memchr::memchr(b'\n', &rest) {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let Some(data) = line.strip_prefix(b"data: ") else { continue };
            let Ok(chunk) = serde_json::from_slice::<Value>(data) else { continue };
            let piece = chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
            if text.is_empty() && !piece.is_empty() {
                asked.ttft_ms = begun.elapsed().as_secs_f64() * 1e3;
            }
            text.push_str(piece);
            if let Some(tokens) = chunk["usage"]["prompt_tokens"].as_u64() {
                asked.prompt_tokens = tokens;
                asked.cached_tokens =
                    chunk["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
            }
        }
    }
    Ok((asked, text))
}
