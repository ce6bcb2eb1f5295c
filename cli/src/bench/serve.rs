//! The engine behind gateway, log and queue: what a user gets.

use super::{
    engine::{EngineBenchArgs, random_model, random_model_words},
    http::{Load, Report, client_runtime, measure},
    processes::Deployment,
};
use anyhow::bail;
use clap::Args;
use std::{path::PathBuf, sync::Arc};

#[derive(Args, Clone, Debug)]
pub(crate) struct ServeArgs {
    /// A checkpoint of yours instead of a random one of Qwen3-0.6B's shape.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Block size of int4.
    #[arg(long, default_value_t = 32, value_name = "N")]
    block: usize,
    /// Clients at once, one number after another.
    #[arg(long, value_delimiter = ',', default_value = "1,4,8", value_name = "N,…")]
    concurrency: Vec<usize>,
    /// Requests of each client.
    #[arg(long, default_value_t = 3, value_name = "N")]
    requests: u64,
    /// Words of each prompt (tokens, with the random checkpoint).
    #[arg(long, default_value_t = 128, value_name = "N")]
    words: usize,
    /// Tokens of each answer.
    #[arg(long, default_value_t = 64, value_name = "N")]
    tokens: u32,
    /// Prefill workers: with 0, the decode worker prefills.
    #[arg(long, default_value_t = 0, value_name = "N")]
    prefill: u32,
}

impl ServeArgs {
    /// The defaults, on the same model as the engine's benchmark.
    pub(super) fn like(args: &EngineBenchArgs) -> ServeArgs {
        ServeArgs {
            model: args.model.clone(),
            block: args.blocks.first().copied().unwrap_or(32),
            concurrency: vec![1, 4, 8],
            requests: 3,
            words: 128,
            tokens: 64,
            prefill: 0,
        }
    }
}

pub(crate) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let (folder, vocabulary) = match &args.model {
        Some(folder) => (folder.clone(), super::http::words()),
        None => (random_model()?, Arc::new(random_model_words(100_000).collect())),
    };
    let (model, block, prefill) =
        (folder.display().to_string(), args.block.to_string(), args.prefill.to_string());
    let deployment = Deployment::start(&[
        "--model",
        &model,
        "--weights",
        "int4",
        "--block",
        &block,
        "--prefill",
        &prefill,
        "--context",
        "1024",
    ])?;
    let runtime = client_runtime()?;
    println!(
        "\n# Served: int4 in blocks of {block}, {} words in, {} tokens out, {prefill} prefill workers\n",
        args.words, args.tokens
    );
    println!("{}", Report::HEADER);
    for clients in &args.concurrency {
        let load = Load {
            url: format!("http://{}", deployment.address),
            model: super::processes::MODEL.into(),
            clients: *clients,
            requests: args.requests,
            words: args.words,
            tokens: args.tokens,
            vocabulary: vocabulary.clone(),
        };
        let report = runtime.block_on(measure(&load));
        println!(
            "{}   ({:.0} prompt tokens each)",
            report.row(),
            report.prompt_tokens as f64 / report.requests as f64
        );
        if let Some(failure) = report.first_failure {
            bail!("a request failed: {failure}");
        }
    }
    Ok(())
}
