//! What the gateway measures, in Prometheus' terms. Handles are made once for each model: a token costs a few
//! atomic operations here.

use crate::{fleet, routing::Route};
use metrics::{Counter, Histogram, counter, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

const TTFT: &str = "forebay_time_to_first_token_seconds";
const ITL: &str = "forebay_inter_token_seconds";
const PROMPT_TOKENS: &str = "forebay_prompt_tokens_total";
const COMPLETION_TOKENS: &str = "forebay_completion_tokens_total";
const ROUTED: &str = "forebay_routed_total";
const HIT_BLOCKS: &str = "forebay_routed_hit_blocks_total";
const REQUESTS: &str = "forebay_requests_total";
pub(crate) const IN_FLIGHT: &str = "forebay_requests_in_flight";
pub(crate) const FOLLOWED: &str = "forebay_followed_logs";

/// From a warm prefix cache to a queue that waits for a worker to start.
const TTFT_BUCKETS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// From a simulated engine to one that is swamped.
const ITL_BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// Samples are gathered into buckets this often, so that they do not pile up where nobody scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

static RECORDER: OnceLock<Result<PrometheusHandle, String>> = OnceLock::new();

/// Makes this process measure, once: a binary with several roles has one set of meters.
pub(crate) fn recorder() -> &'static Result<PrometheusHandle, String> {
    RECORDER.get_or_init(|| install().map_err(|error| error.to_string()))
}

fn install() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Full(TTFT.into()), &TTFT_BUCKETS)?
        .set_buckets_for_metric(Matcher::Full(ITL.into()), &ITL_BUCKETS)?
        .install_recorder()?;
    metrics::describe_histogram!(TTFT, "from reading a request to its first text");
    metrics::describe_histogram!(ITL, "from one token to the next");
    metrics::describe_counter!(PROMPT_TOKENS, "tokens of prompts");
    metrics::describe_counter!(COMPLETION_TOKENS, "tokens generated");
    metrics::describe_counter!(REQUESTS, "answered requests, by endpoint and status");
    metrics::describe_counter!(ROUTED, "requests queued, by model, and for one worker or for any");
    metrics::describe_counter!(HIT_BLOCKS, "blocks of prompts that the chosen workers had, by model");
    metrics::describe_gauge!(IN_FLIGHT, "requests under way");
    metrics::describe_gauge!(FOLLOWED, "logs being followed");
    metrics::describe_gauge!(fleet::WORKERS, "workers with a lease, by role and model");
    metrics::describe_gauge!(fleet::SLOTS_BUSY, "slots in use, by role and model");
    metrics::describe_gauge!(fleet::KV_LEASES, "slots whose KV is sealed for a reader, by role and model");
    Ok(handle)
}

/// Gathers samples, for as long as the gateway lives.
pub(crate) async fn upkeep() {
    let Ok(handle) = recorder() else { return };
    let mut interval = tokio::time::interval(UPKEEP);
    loop {
        interval.tick().await;
        handle.run_upkeep();
    }
}

/// Counts an answered request.
pub(crate) fn answered(endpoint: &str, status: u16) {
    counter!(REQUESTS, "endpoint" => endpoint.to_owned(), "status" => status.to_string()).increment(1);
}

/// Counts where a request was queued.
pub(crate) fn routed(model: &str, route: &Route) {
    let to = if route.worker.is_some() { "worker" } else { "any" };
    counter!(ROUTED, "model" => model.to_owned(), "to" => to).increment(1);
    counter!(HIT_BLOCKS, "model" => model.to_owned()).increment(route.hit_blocks.into());
}

/// The meters of one model.
#[derive(Clone)]
pub(crate) struct ModelMeters {
    ttft: Histogram,
    itl: Histogram,
    prompt_tokens: Counter,
    completion_tokens: Counter,
}

impl ModelMeters {
    pub(crate) fn new(model: &str) -> ModelMeters {
        let model = model.to_owned();
        ModelMeters {
            ttft: histogram!(TTFT, "model" => model.clone()),
            itl: histogram!(ITL, "model" => model.clone()),
            prompt_tokens: counter!(PROMPT_TOKENS, "model" => model.clone()),
            completion_tokens: counter!(COMPLETION_TOKENS, "model" => model),
        }
    }

    /// Begins to measure a request.
    pub(crate) fn request(&self, began: Instant, prompt_tokens: usize) -> RequestMeter {
        self.prompt_tokens.increment(prompt_tokens as u64);
        RequestMeter { meters: self.clone(), began, last: None }
    }
}

/// Measures the answer to one request.
pub(crate) struct RequestMeter {
    meters: ModelMeters,
    began: Instant,
    last: Option<Instant>,
}

impl RequestMeter {
    /// Takes note of tokens that came together.
    pub(crate) fn tokens(&mut self, tokens: usize) {
        if tokens == 0 {
            return;
        }
        let now = Instant::now();
        match self.last.replace(now) {
            None => self.meters.ttft.record(now - self.began),
            Some(last) => self.meters.itl.record_many((now - last).as_secs_f64() / tokens as f64, tokens),
        }
        self.meters.completion_tokens.increment(tokens as u64);
    }
}
