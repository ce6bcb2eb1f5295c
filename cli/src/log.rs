//! `forebay log`: a request's events as a timeline.

use crate::config::{NatsArgs, init_logging, runtime};
use anyhow::bail;
use clap::Args;
use forebay_schemas::{
    event::{Body, Event},
    ids::RequestId,
};
use forebay_streams::log::Recorded;

#[derive(Args, Debug)]
pub(crate) struct LogArgs {
    /// The request: its id as in answers (`chatcmpl-…`) or bare.
    request: RequestId,
    /// One JSON object a line instead of a timeline.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    nats: NatsArgs,
}

pub(crate) fn run(args: &LogArgs) -> anyhow::Result<()> {
    init_logging("warn");
    let events = runtime(1)?.block_on(async {
        let streams = args.nats.connect("log", "log").await?;
        let Some(log) = streams.log.find(args.request).await? else {
            bail!("no request {} in the log: never accepted here, or older than the log keeps", args.request);
        };
        Ok(streams.log.read(&log, 0).await?)
    })?;
    if args.json {
        for Recorded { seq, event } in &events {
            let mut value = serde_json::to_value(event)?;
            value["seq"] = (*seq).into();
            println!("{value}");
        }
    } else {
        print!("{}", timeline(&events));
    }
    Ok(())
}

/// One line an event: time since the first, time since the one before, sequence, attempt, what happened.
fn timeline(events: &[Recorded]) -> String {
    let Some(first) = events.first().map(|recorded| recorded.event.time_us) else { return String::new() };
    let mut text = format!("{:>10} {:>10}  {:>6}  {:>3}  event\n", "at", "after", "seq", "try");
    let mut before = first;
    for Recorded { seq, event } in events {
        let at = millis(event.time_us.saturating_sub(first));
        let after = millis(event.time_us.saturating_sub(before));
        before = event.time_us;
        text += &format!(
            "{at:>10} {after:>10}  {seq:>6}  {:>3}  {:<16} {}\n",
            event.attempt,
            event.body.name(),
            summary(event)
        );
    }
    text
}

fn millis(micros: u64) -> String {
    format!("{:.2} ms", micros as f64 / 1e3)
}

fn summary(event: &Event) -> String {
    match &event.body {
        Body::RequestAccepted(accepted) => format!(
            "{} {}: {} prompt tokens, at most {} more, temperature {}, seed {}",
            accepted.endpoint,
            accepted.model,
            accepted.prompt.len(),
            accepted.max_tokens,
            accepted.sampling.temperature,
            accepted.sampling.seed
        ),
        Body::Claimed(claimed) => format!("by {}, delivery {}", claimed.worker, claimed.delivery),
        Body::PrefillQueued(queued) => format!("{} tokens: {}", queued.tokens, queued.reason),
        Body::PrefillClaimed(claimed) => format!("by {}, delivery {}", claimed.worker, claimed.delivery),
        Body::KvReady(ready) => {
            let kv = &ready.handle;
            let (tokens, bytes) = (kv.tokens, size(kv.bytes() as u64));
            format!(
                "tokens {}..{} ({bytes}) in slot {} of {}, lease {} ms",
                tokens.start,
                tokens.end(),
                kv.slot,
                kv.agent,
                kv.lease_remaining_ms
            )
        }
        Body::PrefillCompleted(done) => {
            format!("token {}: {:?}, computed in {}", done.first_index, done.text, millis(done.compute_us))
        }
        Body::KvTransferred(read) => {
            format!(
                "{} of {} tokens over {} in {}",
                size(read.bytes),
                read.tokens,
                read.transport,
                millis(read.read_us)
            )
        }
        Body::KvLost(lost) => lost.reason.clone(),
        Body::TokensGenerated(generated) => {
            let last = generated.first_index as usize + generated.tokens.len() - 1;
            let range = if generated.tokens.len() == 1 {
                format!("{last}")
            } else {
                format!("{}..={last}", generated.first_index)
            };
            format!("token {range}: {:?}", generated.text)
        }
        Body::Released(released) => {
            let kv = released.kv.as_ref().map_or(String::new(), |kv| {
                format!(", with KV of {} tokens in slot {}", kv.tokens.end(), kv.slot)
            });
            format!("by {}: {}{kv}", released.worker, released.reason)
        }
        Body::RequestCompleted(done) => format!(
            "{:?}: {} prompt tokens, {} generated",
            done.reason, done.usage.prompt_tokens, done.usage.completion_tokens
        ),
        Body::RequestFailed(failed) => format!("{:?}: {}", failed.code, failed.message),
        Body::RequestCancelled(cancelled) => cancelled.cause.clone(),
    }
}

fn size(bytes: u64) -> String {
    match bytes {
        0..=9_999 => format!("{bytes} B"),
        10_000..=9_999_999 => format!("{:.1} kB", bytes as f64 / 1e3),
        _ => format!("{:.1} MB", bytes as f64 / 1e6),
    }
}
