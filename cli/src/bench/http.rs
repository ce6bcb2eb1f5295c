//! A load client for any OpenAI-compatible server: closed-loop clients, streamed answers.

use super::percentile;
use anyhow::{Context, bail};
use clap::Args;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

#[derive(Args, Debug)]
pub(crate) struct HttpArgs {
    /// The server, as in `http://127.0.0.1:8000`.
    #[arg(long, default_value = "http://127.0.0.1:8000", value_name = "URL")]
    url: String,
    /// Model to ask for. Default: the first that the server lists.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Clients at once; several numbers are measured one after another.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32", value_name = "N,…")]
    concurrency: Vec<usize>,
    /// Requests of each client.
    #[arg(long, default_value_t = 8, value_name = "N")]
    requests: u64,
    /// Words of each prompt; all prompts differ.
    #[arg(long, default_value_t = 64, value_name = "N")]
    words: usize,
    /// Tokens of each answer. The end-of-sequence token is ignored where the server can (`ignore_eos`).
    #[arg(long, default_value_t = 64, value_name = "N")]
    tokens: u32,
}

/// One measurement.
#[derive(Clone, Debug)]
pub(super) struct Load {
    pub(super) url: String,
    pub(super) model: String,
    pub(super) clients: usize,
    pub(super) requests: u64,
    pub(super) words: usize,
    pub(super) tokens: u32,
    /// Prompts are made of these.
    pub(super) vocabulary: Arc<Vec<String>>,
}

/// What a load measured. Times in milliseconds.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) clients: usize,
    pub(super) requests: usize,
    pub(super) failed: usize,
    pub(super) first_failure: Option<String>,
    pub(super) prompt_tokens: u64,
    pub(super) tokens: u64,
    /// Chunks with text that these tokens came in.
    pub(super) chunks: u64,
    pub(super) seconds: f64,
    /// Time to the first token, sorted.
    pub(super) ttft: Vec<f64>,
    /// Mean time between tokens of each request, sorted.
    pub(super) itl: Vec<f64>,
}

impl Report {
    pub(super) const HEADER: &'static str =
        " clients  requests  failed   tokens/s  tokens/chunk   TTFT p50   TTFT p99    ITL p50    ITL p99";

    pub(super) fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    pub(super) fn row(&self) -> String {
        format!(
            "{:>8} {:>9} {:>7} {:>10.1} {:>13.1} {:>7.2} ms {:>7.2} ms {:>7.3} ms {:>7.3} ms",
            self.clients,
            self.requests,
            self.failed,
            self.tokens_per_s(),
            self.tokens as f64 / self.chunks as f64,
            percentile(&self.ttft, 0.5),
            percentile(&self.ttft, 0.99),
            percentile(&self.itl, 0.5),
            percentile(&self.itl, 0.99),
        )
    }
}

pub(crate) fn run(args: HttpArgs) -> anyhow::Result<()> {
    let runtime = client_runtime()?;
    let url = args.url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
    let model = match args.model {
        Some(model) => model,
        None => runtime.block_on(first_model(&url))?,
    };
    println!("{url}, model {model}, {} words in, {} tokens out\n{}", args.words, args.tokens, Report::HEADER);
    for clients in args.concurrency {
        let load = Load {
            url: url.clone(),
            model: model.clone(),
            clients,
            requests: args.requests,
            words: args.words,
            tokens: args.tokens,
            vocabulary: words(),
        };
        let report = runtime.block_on(measure(&load));
        println!("{}", report.row());
        if let Some(failure) = report.first_failure {
            bail!("{} of {} requests failed, the first with: {failure}", report.failed, report.requests);
        }
    }
    Ok(())
}

/// One thread: a client must leave the processor to what it measures.
pub(super) fn client_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the client")
}

/// Common words, each about a token in most vocabularies.
pub(super) fn words() -> Arc<Vec<String>> {
    let text = "river stone cloud tiger lemon piano candle forest window garden rocket silver copper marble castle \
                bridge island desert meadow harbor lantern mirror pencil ribbon saddle velvet walnut anchor basket \
                carpet dragon eagle falcon hammer jacket kettle ladder magnet needle orange parrot rabbit salmon \
                turtle violin wagon zebra almond beacon cactus dolphin feather ginger jasmine maple olive pepper";
    Arc::new(text.split_whitespace().map(str::to_owned).collect())
}

/// A plain client; through the proxy of the environment, unless the server is on this machine.
fn client(url: &str, connections: usize) -> reqwest::Client {
    let builder = reqwest::Client::builder().pool_max_idle_per_host(connections);
    let local = ["://127.", "://localhost", "://[::1]"].iter().any(|host| url.contains(host));
    if local { builder.no_proxy() } else { builder }.build().expect("plain settings")
}

async fn first_model(url: &str) -> anyhow::Result<String> {
    let answer = client(url, 1).get(format!("{url}/v1/models")).send().await.context("listing models")?;
    let text = answer.text().await?;
    let list: serde_json::Value = serde_json::from_str(&text).context("listing models")?;
    list["data"][0]["id"]
        .as_str()
        .map(str::to_owned)
        .context("the server lists no model; name one with --model")
}

/// Runs the load: every client sends its requests one after another.
pub(super) async fn measure(load: &Load) -> Report {
    let client =
        reqwest::Client::builder().pool_max_idle_per_host(load.clients).build().expect("plain settings");
    let (load, next) = (Arc::new(load.clone()), Arc::new(AtomicU64::new(0)));
    let begun = Instant::now();
    let clients: Vec<_> = (0..load.clients)
        .map(|_| {
            let (client, load, next) = (client.clone(), load.clone(), next.clone());
            tokio::spawn(async move {
                let mut answers = Vec::new();
                for _ in 0..load.requests {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    answers.push(ask(&client, &load, number).await);
                }
                answers
            })
        })
        .collect();
    let answers: Vec<_> = futures::future::join_all(clients)
        .await
        .into_iter()
        .flat_map(|done| done.expect("no panic"))
        .collect();
    let seconds = begun.elapsed().as_secs_f64();
    let good: Vec<&Answer> = answers.iter().filter_map(|answer| answer.as_ref().ok()).collect();
    let sorted = |value: fn(&Answer) -> f64| {
        let mut values: Vec<f64> =
            good.iter().map(|answer| value(answer)).filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    Report {
        clients: load.clients,
        requests: answers.len(),
        failed: answers.len() - good.len(),
        first_failure: answers
            .iter()
            .find_map(|answer| answer.as_ref().err().map(|error| format!("{error:#}"))),
        prompt_tokens: good.iter().map(|answer| answer.prompt_tokens).sum(),
        tokens: good.iter().map(|answer| answer.tokens).sum(),
        chunks: good.iter().map(|answer| answer.chunks).sum(),
        seconds,
        ttft: sorted(|answer| answer.ttft_ms),
        itl: sorted(|answer| answer.itl_ms),
    }
}

struct Answer {
    prompt_tokens: u64,
    tokens: u64,
    chunks: u64,
    ttft_ms: f64,
    itl_ms: f64,
}

async fn ask(client: &reqwest::Client, load: &Load, number: u64) -> anyhow::Result<Answer> {
    let body = serde_json::json!({
        "model": load.model,
        "messages": [{ "role": "user", "content": prompt(load, number) }],
        "max_tokens": load.tokens,
        "ignore_eos": true,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    let begun = Instant::now();
    let request = client.post(format!("{}/v1/chat/completions", load.url));
    let mut answer = request.header("content-type", "application/json").body(body.to_string()).send().await?;
    if !answer.status().is_success() {
        bail!("{}: {}", answer.status(), answer.text().await.unwrap_or_default());
    }
    let (mut first, mut last, mut chunks, mut tail) = (None, begun, 0, Vec::new());
    while let Some(bytes) = answer.chunk().await? {
        let now = Instant::now();
        // The first chunk of a stream may hold the role alone; a token comes with content.
        let texts = occurrences(&bytes, b"\"content\":\"") - occurrences(&bytes, b"\"content\":\"\"");
        if texts > 0 {
            first.get_or_insert(now);
            last = now;
            chunks += texts;
        }
        // Only the end is parsed: a client that parsed every chunk would measure itself.
        tail.extend_from_slice(&bytes);
        let keep = tail.len().saturating_sub(8192);
        tail.drain(..keep);
    }
    let usage = last_usage(&tail).with_context(|| {
        format!("the stream ended without usage: …{}", String::from_utf8_lossy(&tail).trim_end())
    })?;
    let (prompt_tokens, tokens) = (count(&usage, "prompt_tokens"), count(&usage, "completion_tokens"));
    let first = first.unwrap_or(last);
    Ok(Answer {
        prompt_tokens,
        tokens,
        chunks,
        ttft_ms: (first - begun).as_secs_f64() * 1e3,
        itl_ms: (last - first).as_secs_f64() * 1e3 / tokens.saturating_sub(1) as f64,
    })
}

fn occurrences(bytes: &[u8], wanted: &[u8]) -> u64 {
    memchr::memmem::find_iter(bytes, wanted).count() as u64
}

fn last_usage(tail: &[u8]) -> Option<serde_json::Value> {
    let text = String::from_utf8_lossy(tail);
    let chunks = text.lines().rev().filter_map(|line| line.strip_prefix("data: "));
    let parsed = chunks.filter_map(|chunk| serde_json::from_str::<serde_json::Value>(chunk).ok());
    parsed.map(|mut chunk| chunk["usage"].take()).find(serde_json::Value::is_object)
}

fn count(usage: &serde_json::Value, name: &str) -> u64 {
    usage[name].as_u64().unwrap_or(0)
}

/// Words chosen by the request's number: the same load is the same bytes, and no two prompts share a prefix.
fn prompt(load: &Load, number: u64) -> String {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        load.vocabulary[(state >> 33) as usize % load.vocabulary.len()].as_str()
    };
    (0..load.words).map(|_| next()).collect::<Vec<_>>().join(" ")
}
