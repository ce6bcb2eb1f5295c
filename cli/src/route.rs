//! `forebay route`: where a prompt would go now, and why.

use crate::{
    config::{NatsArgs, RegistryArgs, init_logging, runtime},
    show::print,
};
use clap::Args;
use forebay_api::routing::{
    cost::Why,
    explain::{Explanation, Question, explain},
};

#[derive(Args, Debug)]
#[command(after_help = "\
Decides as a gateway would that has just started: one that runs counts what it has just routed too.
Columns: blocks of the prompt that a worker has, blocks that it would prefill, blocks of other prompts that wait there, blocks that its running sequences hold, \
sequences that it runs, free slots, and the cost, of which the lowest is best.

Examples:
  forebay route --explain \"What is a forebay?\"
  forebay route --explain \"What is a forebay?\" --json | jq .worker")]
pub(crate) struct RouteArgs {
    /// The prompt: what a user says, which goes through the chat template.
    #[arg(long, value_name = "TEXT")]
    explain: String,
    /// The model; needed if there are several.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// The text is the whole prompt, without a chat template.
    #[arg(long)]
    raw: bool,
    /// The request's `cache_salt`.
    #[arg(long, value_name = "SALT")]
    cache_salt: Option<String>,
    /// One JSON object instead of a table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

pub(crate) fn run(args: &RouteArgs) -> anyhow::Result<()> {
    init_logging("warn");
    let explanation = runtime(1)?.block_on(async {
        let streams = args.registry.apply(args.nats.connect("route", "route").await?).await?;
        let (model, salt) = (args.model.as_deref(), args.cache_salt.as_deref());
        let question = Question { model, text: &args.explain, raw: args.raw, salt };
        anyhow::Ok(explain(&streams, question).await?)
    })?;
    if args.json {
        return print(&serde_json::to_string(&explanation)?);
    }
    table(&explanation).iter().try_for_each(print)
}

fn table(explanation: &Explanation) -> Vec<String> {
    let Explanation { model, prompt_tokens, prompt_blocks, weights, worker, why, choices, unknown } =
        explanation;
    let mut lines = vec![
        format!("{model}: a prompt of {prompt_tokens} tokens, {prompt_blocks} blocks"),
        format!(
            "weights: prefill {}, KV load {}, active {}",
            weights.prefill, weights.kv_load, weights.active
        ),
        String::new(),
        format!(
            "  {:<20} {:>6} {:>8} {:>8} {:>8} {:>7} {:>6} {:>9}",
            "worker", "hit", "prefill", "waiting", "KV load", "active", "free", "cost"
        ),
    ];
    for row in choices {
        let mark = if worker.as_ref() == Some(&row.worker) { '*' } else { ' ' };
        lines.push(format!(
            "{mark} {:<20} {:>6} {:>8} {:>8} {:>8} {:>7} {:>6} {:>9.1}",
            row.worker,
            row.hit_blocks,
            row.prefill_blocks,
            row.queued_blocks,
            row.kv_blocks,
            row.active,
            row.free_slots,
            row.cost
        ));
    }
    lines.push(String::new());
    let to = worker.as_ref().map_or("any worker that has room".to_owned(), |worker| worker.to_string());
    let because = match why {
        Why::Cheapest => "it is the cheapest, and has a part of the prompt's KV",
        Why::NoOverlap => "nobody who has room has a part of the prompt's KV",
        Why::OthersCheaper => "it is cheaper than those that have a part of the prompt's KV",
        Why::NoRoom => "no worker with a queue of its own has room",
    };
    lines.push(format!("goes to {to}: {because}"));
    lines.extend(unknown.iter().map(|worker| format!("what {worker} has is not known (now)")));
    lines
}
