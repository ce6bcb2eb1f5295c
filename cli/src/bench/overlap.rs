//! How long a request waits for its KV after its prefill is done: with the KV read while the prefill goes on, and with
//! the KV read afterwards.

use super::{
    engine::random_model,
    http::client_runtime,
    median,
    processes::Deployment,
    stream::{stream, words},
};
use anyhow::Context;
use clap::Args;
use forebay_schemas::{
    event::{Body, KvTransferred},
    ids::RequestId,
};
use std::path::PathBuf;

#[derive(Args, Clone, Debug)]
pub(crate) struct OverlapArgs {
    /// A checkpoint of yours instead of a random one of Qwen3-0.6B's shape.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 2048, value_name = "N")]
    tokens: usize,
    /// Prompts, with and without.
    #[arg(long, default_value_t = 3, value_name = "N")]
    repeats: u64,
}

impl Default for OverlapArgs {
    fn default() -> Self {
        OverlapArgs { model: None, tokens: 2048, repeats: 3 }
    }
}

/// Medians, in milliseconds.
struct Measured {
    transport: String,
    read_ms: f64,
    /// From the end of the prefill, as the decode worker hears of it, until all KV is in its slot.
    after_ms: f64,
    /// From the event of the prefill's end to the event of the first token that was decoded.
    next_token_ms: f64,
}

pub(crate) fn run(args: &OverlapArgs) -> anyhow::Result<()> {
    let model = args.model.clone().map_or_else(random_model, Ok)?;
    println!(
        "\n# After the prefill (prompt of {} tokens, prefill and decode on one core each)\n",
        args.tokens
    );
    println!("{:>14} {:>9} {:>12} {:>14} {:>16}", "", "transport", "KV read", "left at end", "to next token");
    let mut lefts = Vec::new();
    for (name, flags) in [("with overlap", &[][..]), ("without", &["--bench-no-overlap"][..])] {
        let measured = measure(args, &model.display().to_string(), flags)?;
        println!(
            "{name:>14} {:>9} {:>9.2} ms {:>11.2} ms {:>13.2} ms",
            measured.transport, measured.read_ms, measured.after_ms, measured.next_token_ms
        );
        lefts.push(measured.after_ms / measured.read_ms);
    }
    println!(
        "\nleft of the read at the end of the prefill: {:.1} % (without overlap {:.1} %)",
        lefts[0] * 1e2,
        lefts[1] * 1e2
    );
    Ok(())
}

fn measure(args: &OverlapArgs, model: &str, flags: &[&str]) -> anyhow::Result<Measured> {
    let arguments = [
        &["--model", model, "--weights", "int4", "--prefill", "1", "--decode", "1", "--threads", "1"][..],
        &["--context", "4096", "--max-local-prefill-length", "0", "--cache-gib", "0"],
        flags,
    ]
    .concat();
    let deployment = Deployment::start(&arguments)?;
    let client = reqwest::Client::builder().no_proxy().build()?;
    let (mut reads, mut afters, mut nexts, mut transport) =
        (Vec::new(), Vec::new(), Vec::new(), String::new());
    client_runtime()?.block_on(async {
        for number in 0..=args.repeats {
            // The first one warms up: peers are mapped, and memory is committed.
            let words = words(number, if number == 0 { 512 } else { args.tokens });
            let streamed = stream(&client, &deployment, &words, 4, |_| {}).await?;
            let (transferred, next_us) = read_back(&deployment, streamed.request).await?;
            if number > 0 {
                reads.push(transferred.read_us as f64 / 1e3);
                afters.push(transferred.after_us as f64 / 1e3);
                nexts.push(next_us as f64 / 1e3);
                transport = transferred.transport;
            }
        }
        anyhow::Ok(())
    })?;
    let (read_ms, after_ms, next_token_ms) = (median(reads), median(afters), median(nexts));
    Ok(Measured { transport, read_ms, after_ms, next_token_ms })
}

/// What the log says of a request's KV.
async fn read_back(deployment: &Deployment, request: RequestId) -> anyhow::Result<(KvTransferred, u64)> {
    let streams = deployment.streams().await?;
    let log = streams.log.find(request).await?.context("the request has no log")?;
    let (mut prefilled_us, mut moved, mut next_us) = (0, None, None);
    for recorded in streams.log.read(&log, 0).await? {
        match recorded.event.body {
            Body::PrefillCompleted(_) => prefilled_us = recorded.event.time_us,
            Body::KvTransferred(transferred) => moved = Some(transferred),
            Body::TokensGenerated(_) => {
                next_us.get_or_insert(recorded.event.time_us.saturating_sub(prefilled_us));
            }
            Body::KvLost(lost) => anyhow::bail!("the KV was lost: {}", lost.reason),
            _ => {}
        }
    }
    Ok((moved.context("no KV was moved")?, next_us.context("nothing was decoded")?))
}
