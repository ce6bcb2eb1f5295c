//! `forebay cancel`.

use crate::{
    config::{NatsArgs, init_logging, runtime},
    request::{events_of, find, fold},
    show::print,
};
use clap::Args;
use forebay_schemas::{
    ids::RequestId,
    lifecycle::{Lifecycle, Phase},
};

#[derive(Args, Debug)]
#[command(after_help = "\
The worker that has the request stops at its next step; the client gets an error with the cause. A request \
that has ended already stays as it is.

Example:
  forebay cancel chatcmpl-01a20cfaf783740ca231537fde0c9b96 --cause 'runs for too long'")]
pub(crate) struct CancelArgs {
    /// The request: its id as in answers (`chatcmpl-…`) or bare.
    request: RequestId,
    /// Why, for the log and the client.
    #[arg(long, default_value = "cancelled by an operator", value_name = "TEXT")]
    cause: String,
    #[command(flatten)]
    nats: NatsArgs,
}

pub(crate) fn run(args: &CancelArgs) -> anyhow::Result<()> {
    init_logging("warn");
    let request = args.request;
    runtime(1)?.block_on(async {
        let streams = args.nats.connect("log", "cancel").await?;
        let log = find(&streams, request).await?;
        let was_going = forebay_streams::cancel::cancel(&streams, &log, &args.cause).await?;
        let events = events_of(&streams, &log).await?;
        let state = fold(&events, events.len())?;
        print(match (was_going, &state.phase) {
            (false, _) => format!("request {request} had ended already: {}", ending(&state)),
            (true, Phase::Cancelled) => {
                format!("request {request} is cancelled, after {} tokens", state.tokens.len())
            }
            // It ended by itself in that moment, or its worker has been told and is about to say so.
            (true, phase) if phase.is_terminal() => {
                format!("request {request} has ended: {}", ending(&state))
            }
            (true, _) => format!("request {request} is being cancelled: its worker has been told"),
        })
    })
}

/// How a request ended, in words; or where it is.
pub(crate) fn ending(state: &Lifecycle) -> String {
    match (&state.phase, &state.finish, &state.failure) {
        (Phase::Completed, Some(reason), _) => format!("completed ({reason:?})").to_lowercase(),
        (Phase::Failed, _, Some(failure)) => format!("failed: {}", failure.message),
        (Phase::Cancelled, ..) => "cancelled".to_owned(),
        (phase, ..) => serde_json::to_value(phase)
            .map_or(String::new(), |name| name.as_str().unwrap_or_default().replace('_', " ")),
    }
}
