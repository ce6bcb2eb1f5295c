//! What the prefix cache saves: the time to the first token of a prompt that was seen before, against the first time.

use super::{
    engine::random_model,
    http::client_runtime,
    median,
    processes::Deployment,
    stream::{stream, words},
};
use clap::Args;
use std::path::PathBuf;

#[derive(Args, Clone, Debug)]
pub(crate) struct PrefixArgs {
    /// A checkpoint of yours instead of a random one of Qwen3-0.6B's shape.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 2048, value_name = "N")]
    tokens: usize,
    /// Prompts, each asked twice.
    #[arg(long, default_value_t = 3, value_name = "N")]
    repeats: u64,
}

impl Default for PrefixArgs {
    fn default() -> Self {
        PrefixArgs { model: None, tokens: 2048, repeats: 3 }
    }
}

pub(crate) fn run(args: &PrefixArgs) -> anyhow::Result<()> {
    let model = args.model.clone().map_or_else(random_model, Ok)?.display().to_string();
    println!("\n# Prefix cache (prompt of {} tokens)\n", args.tokens);
    println!("{:>34} {:>12} {:>12} {:>9} {:>8}", "", "first TTFT", "again", "of first", "cached");
    for (name, prefill) in [("one worker", "0"), ("prefill and decode worker", "1")] {
        let (cold, warm, cached) = measure(args, &model, prefill)?;
        println!("{name:>34} {cold:>9.0} ms {warm:>9.1} ms {:>7.2} % {cached:>8}", warm / cold * 1e2);
    }
    Ok(())
}

fn measure(args: &PrefixArgs, model: &str, prefill: &str) -> anyhow::Result<(f64, f64, u64)> {
    let arguments =
        ["--model", model, "--weights", "int4", "--prefill", prefill, "--decode", "1", "--context", "4096"];
    let deployment = Deployment::start(&arguments)?;
    let client = reqwest::Client::builder().no_proxy().build()?;
    let (mut cold, mut warm, mut cached) = (Vec::new(), Vec::new(), 0);
    client_runtime()?.block_on(async {
        stream(&client, &deployment, &words(0, 300), 4, |_| {}).await?;
        for number in 1..=args.repeats {
            let prompt = words(number, args.tokens);
            cold.push(stream(&client, &deployment, &prompt, 4, |_| {}).await?.ttft_ms());
            let again = stream(&client, &deployment, &prompt, 4, |_| {}).await?;
            warm.push(again.ttft_ms());
            cached = again.cached_tokens;
        }
        anyhow::Ok(())
    })?;
    Ok((median(cold), median(warm), cached))
}
