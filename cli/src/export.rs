//! `forebay export` and `forebay import`: a request as one file.

use crate::{
    config::{NatsArgs, init_logging, runtime},
    request::{fold, read_file, take},
    show::print,
};
use anyhow::{Context, bail};
use clap::Args;
use forebay_schemas::{
    export,
    ids::{GatewayId, RequestId},
};
use forebay_streams::log::{AppendError, LogRef};
use std::path::PathBuf;

/// Whose requests imported ones are. No gateway has this name, so that none answers for them.
const IMPORT: &str = "import";

#[derive(Args, Debug)]
#[command(after_help = "\
The file holds everything that the log does: the tokens of the prompt and the text of the answer too. Look at \
who gets it.

Examples:
  forebay export chatcmpl-01a20cfaf783740ca231537fde0c9b96 > request.jsonl
  forebay replay request.jsonl                  anywhere, without NATS
  forebay import request.jsonl                  into the log of another NATS")]
pub(crate) struct ExportArgs {
    /// The request: its id as in answers (`chatcmpl-…`) or bare.
    request: RequestId,
    #[command(flatten)]
    nats: NatsArgs,
}

#[derive(Args, Debug)]
#[command(after_help = "\
The request can then be looked at like any other. Nothing works on it: it is in no queue.

Example:
  forebay import request.jsonl --nats nats://127.0.0.1:4222")]
pub(crate) struct ImportArgs {
    /// A file that `forebay export` wrote.
    file: PathBuf,
    #[command(flatten)]
    nats: NatsArgs,
}

pub(crate) fn run(args: &ExportArgs) -> anyhow::Result<()> {
    init_logging("warn");
    let export = runtime(1)?.block_on(async {
        let streams = args.nats.connect("log", "export").await?;
        take(&streams, args.request).await
    })?;
    print(export::write(&export).trim_end())
}

pub(crate) fn import(args: &ImportArgs) -> anyhow::Result<()> {
    init_logging("warn");
    let export = read_file(&args.file)?;
    let request = export.header.request;
    fold(&export.events, export.events.len()).with_context(|| args.file.display().to_string())?;
    runtime(1)?.block_on(async {
        let streams = args.nats.connect("log", "import").await?;
        let gateway = GatewayId::new(IMPORT).expect("it fits a subject");
        let log = LogRef { gateway, request };
        let mut events = export.events.iter().map(|(_, event)| event);
        let first = events.next().expect("what folds has events");
        let mut seq = match streams.log.begin(&log, first).await {
            Err(AppendError::Conflict { .. }) => {
                bail!("request {request} is in the log already: `forebay log {request}` shows it")
            }
            other => other?,
        };
        for event in events {
            seq = match streams.log.append(&log, seq, event).await {
                Ok(seq) => seq,
                Err(error) => {
                    // Half a request helps nobody, and would be in the way of the next try.
                    streams.log.remove(&log).await.with_context(|| format!("after {error}"))?;
                    return Err(error.into());
                }
            };
        }
        print(format!("imported {} events of request {request}; look at them with", export.events.len()))?;
        print(format!("  forebay log {request}"))
    })
}
