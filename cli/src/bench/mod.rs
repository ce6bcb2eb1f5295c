//! `forebay bench`: what things cost, as medians, compared within one run.

mod cache;
mod control;
mod engine;
mod http;
mod interference;
mod kv;
mod overlap;
mod prefix;
mod processes;
mod route;
mod serve;
mod stream;
mod trace;

use crate::config::init_logging;
use clap::{Args, Subcommand};

#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Load any OpenAI-compatible server.
    Http(http::HttpArgs),
    /// What NATS, gateway and worker add, with a simulated engine.
    Control(control::ControlArgs),
    /// Prefill and decode of the engine, on a random checkpoint of Qwen3-0.6B's shape or one of yours.
    Engine(engine::EngineBenchArgs),
    /// The engine behind the whole path: 1, 4 and 8 clients, prompts of 128 tokens, 64 tokens each.
    Serve(serve::ServeArgs),
    /// Reading KV from another worker, against a plain copy.
    Kv(kv::KvArgs),
    /// How long a request waits for its KV after its prefill, with the KV read meanwhile and afterwards.
    Overlap(overlap::OverlapArgs),
    /// The first token of a prompt that was seen before, against the first time.
    Prefix(prefix::PrefixArgs),
    /// What long prompts do to the pace of running answers: prefill and decode workers against workers that do both.
    Interference(interference::InterferenceArgs),
    /// The router alone: decisions over an index of many blocks and workers.
    Route(route::RouteArgs),
    /// Routing by KV against round robin, with simulated workers and shared prefixes. Takes ten minutes.
    Cache(cache::CacheArgs),
    /// All of these but `http` and `cache`, one after another.
    All(engine::EngineBenchArgs),
}

pub(crate) fn run(args: BenchArgs) -> anyhow::Result<()> {
    init_logging("warn");
    match args.what {
        What::Http(args) => http::run(args),
        What::Control(args) => control::run(&args),
        What::Engine(args) => engine::run(&args),
        What::Serve(args) => serve::run(&args),
        What::Kv(args) => kv::run(&args),
        What::Overlap(args) => overlap::run(&args),
        What::Prefix(args) => prefix::run(&args),
        What::Interference(args) => interference::run(&args),
        What::Route(args) => route::run(&args),
        What::Cache(args) => cache::run(&args),
        What::All(args) => {
            control::run(&control::ControlArgs::default())?;
            kv::run(&kv::KvArgs::default())?;
            route::run(&route::RouteArgs::default())?;
            engine::run(&args)?;
            serve::run(&serve::ServeArgs::like(&args))?;
            overlap::run(&overlap::OverlapArgs::default())?;
            prefix::run(&prefix::PrefixArgs::default())?;
            interference::run(&interference::InterferenceArgs::default())
        }
    }
}

/// The value that this share of the sorted values does not exceed.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
}

/// Sorts and takes the middle.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    percentile(&values, 0.5)
}
