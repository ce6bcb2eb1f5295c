//! `forebay tail`: live events of all requests.

mod known;

use crate::{
    config::{FILTERS, NatsArgs, init_logging, runtime},
    show::{print, summary, time_of_day},
};
use clap::{Args, builder::PossibleValuesParser};
use forebay_schemas::{
    event::Body,
    export,
    ids::{RequestId, WorkerId},
};
use forebay_streams::{
    Streams,
    log::{Live, LogRef, Recorded},
};
use futures::StreamExt;
use known::{Known, Requests};

#[derive(Args, Debug)]
#[command(after_help = "\
Columns: time of day (UTC), last digits of the request's id, attempt, event. Filters add up; --event may be \
given several times. Live events are not kept for a slow reader: where some were missed, a line says so, and \
`forebay log` has them.

Examples:
  forebay tail --event RequestFailed --event KvLost
  forebay tail --model demo --json | jq -c 'select(.type == \"RequestCompleted\") | .data.usage'
  forebay tail --worker decode-80ee524e --long")]
pub(crate) struct TailArgs {
    /// Only this request.
    #[arg(long, value_name = "ID", help_heading = FILTERS)]
    request: Option<RequestId>,
    /// Only requests for this model, by the name that clients use.
    #[arg(long, value_name = "NAME", help_heading = FILTERS)]
    model: Option<String>,
    /// Only what this worker has to do with: requests that it decodes or prefills, while it does.
    #[arg(long, value_name = "ID", help_heading = FILTERS)]
    worker: Option<WorkerId>,
    /// Only events of this name.
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(Body::NAMES), help_heading = FILTERS)]
    event: Vec<String>,
    /// One JSON object a line, as `forebay log --json`.
    #[arg(long)]
    json: bool,
    /// Whole request ids.
    #[arg(long)]
    long: bool,
    #[command(flatten)]
    nats: NatsArgs,
}

pub(crate) fn run(args: &TailArgs) -> anyhow::Result<()> {
    init_logging("warn");
    runtime(1)?.block_on(async {
        let streams = args.nats.connect("log", "tail").await?;
        let mut live = streams.log.tail_all().await?;
        eprintln!("forebay: waiting for events; Ctrl-C ends");
        let mut requests = Requests::default();
        while let Some(event) = live.next().await {
            show(args, &streams, &mut requests, event).await?;
        }
        anyhow::bail!("the subscription to live events has ended")
    })
}

async fn show(
    args: &TailArgs,
    streams: &Streams,
    requests: &mut Requests,
    Live { log, previous, recorded }: Live,
) -> anyhow::Result<()> {
    if args.request.is_some_and(|request| request != log.request) {
        return Ok(());
    }
    let missed = requests.missed(log.request, previous);
    let by_model_or_worker = args.model.is_some() || args.worker.is_some();
    if by_model_or_worker && previous > 0 && (missed.is_some() || !requests.knows(log.request)) {
        // What is missed or older than this tail says whose the request is.
        let earlier = streams.log.read(&log, 0).await?;
        requests.learn(log.request, earlier.iter().take_while(|earlier| earlier.seq <= previous));
    }
    let known = requests.note(log.request, &recorded);
    if !is_wanted(args, &known, &recorded) {
        return Ok(());
    }
    if let Some(after) = missed {
        print(missed_line(args, &log, after, previous))?;
    }
    print(line(args, &log, &recorded))
}

fn is_wanted(args: &TailArgs, known: &Known, recorded: &Recorded) -> bool {
    let of_model = args.model.as_ref().is_none_or(|model| known.model.as_deref() == Some(model));
    let of_worker = args.worker.as_ref().is_none_or(|worker| known.involves(worker));
    let name = recorded.event.body.name();
    of_model && of_worker && (args.event.is_empty() || args.event.iter().any(|event| event == name))
}

fn line(args: &TailArgs, log: &LogRef, recorded: &Recorded) -> String {
    if args.json {
        return export::line(recorded.seq, &recorded.event);
    }
    let event = &recorded.event;
    let (time, id) = (time_of_day(event.time_us), shown_id(args, log.request));
    format!("{time}  {id}  {:>3}  {:<16} {}", event.attempt, event.body.name(), summary(event))
}

fn missed_line(args: &TailArgs, log: &LogRef, after: u64, to: u64) -> String {
    let request = log.request;
    if args.json {
        return serde_json::json!({ "missed": { "request": request, "after": after, "to": to } }).to_string();
    }
    let id = shown_id(args, request);
    format!(
        "              {id}       events after sequence {after} to {to} were missed: forebay log {request}"
    )
}

/// The random end of an id: its beginning is a time, which neighbours share.
fn shown_id(args: &TailArgs, request: RequestId) -> String {
    let whole = request.to_string();
    if args.long { whole } else { whole[whole.len() - 8..].to_owned() }
}
