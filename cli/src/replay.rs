//! `forebay replay`: going through a request again, from its log alone or on an engine here.

mod execute;
mod state;

use crate::{
    config::{NatsArgs, init_logging, runtime},
    model::ModelArgs,
    request::Source,
};
use clap::Args;
use std::path::PathBuf;

#[derive(Args, Debug)]
#[command(after_help = "\
From the log alone: the request's state after any of its events (`forebay log` numbers them), and what the \
client saw when. It needs no model, and no NATS if given a file that `forebay export` wrote.

  forebay replay chatcmpl-01a20cfaf783740ca231537fde0c9b96
  forebay replay request.jsonl --at 7

With --execute: the prompt is run again on an engine here, and every token that it would draw is compared with \
the log, after the same tokens. Exit code 0 if all are equal; 1 if one differs, with both tokens and their \
logits. A model or precision other than the log's is named. Equal ones can still differ where steps were \
batched or a prompt was cut otherwise, which rounds differently: then the margin is small.

  forebay replay request.jsonl --execute
  forebay replay request.jsonl --execute --model Qwen/Qwen3-0.6B --weights int4")]
pub(crate) struct ReplayArgs {
    /// The request: its id, or a file that `forebay export` wrote.
    #[arg(value_name = "ID|FILE")]
    request: Source,
    /// Stop after this many events. Default: all.
    #[arg(long, value_name = "N", conflicts_with = "execute")]
    at: Option<usize>,
    /// Run the request again, and compare its tokens.
    #[arg(long)]
    execute: bool,
    /// Tokens of the prompt that are run at once, as the worker's --chunk.
    #[arg(long, env = "FOREBAY_CHUNK", default_value_t = 256, value_name = "TOKENS")]
    chunk: u32,
    #[command(flatten)]
    model: ModelArgs,
    /// Folder for unpacked models.
    #[arg(long, env = "FOREBAY_DATA", value_name = "DIR")]
    data: Option<PathBuf>,
    #[command(flatten)]
    nats: NatsArgs,
}

pub(crate) fn run(args: ReplayArgs) -> anyhow::Result<()> {
    init_logging("warn");
    let export = runtime(1)?.block_on(args.request.load(&args.nats))?;
    match args.execute {
        true => execute::run(&export, &args.model, args.data, args.chunk),
        false => state::show(&export, args.at),
    }
}
