//! `forebay log`: a request's events as a timeline, as far as they go or as they happen.

use crate::{
    config::{NatsArgs, init_logging, runtime},
    request::find,
    show::{millis, print, summary},
};
use clap::Args;
use forebay_schemas::{export, ids::RequestId};
use forebay_streams::{follow::Follow, log::Recorded};
use std::time::Duration;

/// Pause before a log that could not be read is read again.
const READ_PAUSE: Duration = Duration::from_secs(1);

#[derive(Args, Debug)]
#[command(after_help = "\
Columns: number of the event (for `forebay replay --at`), time since the first, time since the one before, \
sequence in the stream, attempt, event.

Examples:
  forebay log chatcmpl-01a20cfaf783740ca231537fde0c9b96
  forebay log --follow 01a20cfaf783740ca231537fde0c9b96      until the request ends
  forebay log --json 01a20cfaf783740ca231537fde0c9b96 | jq -r '.data.text // empty'")]
pub(crate) struct LogArgs {
    /// The request: its id as in answers (`chatcmpl-…`) or bare.
    request: RequestId,
    /// One JSON object a line instead of a timeline.
    #[arg(long)]
    json: bool,
    /// Go on with what happens, until the request ends (or Ctrl-C).
    #[arg(long, short)]
    follow: bool,
    #[command(flatten)]
    nats: NatsArgs,
}

pub(crate) fn run(args: &LogArgs) -> anyhow::Result<()> {
    init_logging("warn");
    runtime(1)?.block_on(async {
        let streams = args.nats.connect("log", "log").await?;
        let log = find(&streams, args.request).await?;
        // Before the log is read, so that nothing falls between the two.
        let live = if args.follow { Some(streams.log.watch(&log).await?) } else { None };
        let events = streams.log.read(&log, 0).await?;
        let mut printer = Printer { json: args.json, timeline: Timeline::default() };
        events.iter().try_for_each(|recorded| printer.print(recorded))?;
        let (Some(live), Some(mut last)) = (live, events.into_iter().next_back()) else { return Ok(()) };
        let mut follow = Follow::new(streams.log.clone(), log, last.seq, live);
        while !last.event.body.is_terminal() {
            match follow.next().await {
                Ok(next) => last = next,
                Err(error) => {
                    tracing::warn!(%error, "the log can't be read now; trying again");
                    tokio::time::sleep(READ_PAUSE).await;
                    continue;
                }
            }
            printer.print(&last)?;
        }
        Ok(())
    })
}

struct Printer {
    json: bool,
    timeline: Timeline,
}

impl Printer {
    fn print(&mut self, recorded: &Recorded) -> anyhow::Result<()> {
        if self.json {
            return print(export::line(recorded.seq, &recorded.event));
        }
        if self.timeline.number == 0 {
            print(HEADING)?;
        }
        print(self.timeline.line(recorded))
    }
}

const HEADING: &str = "   #         at      after     seq  try  event";

/// A line for each event.
#[derive(Default)]
struct Timeline {
    number: usize,
    first_us: u64,
    before_us: u64,
}

impl Timeline {
    fn line(&mut self, Recorded { seq, event }: &Recorded) -> String {
        if self.number == 0 {
            (self.first_us, self.before_us) = (event.time_us, event.time_us);
        }
        self.number += 1;
        let at = millis(event.time_us.saturating_sub(self.first_us));
        let after = millis(event.time_us.saturating_sub(self.before_us));
        self.before_us = event.time_us;
        format!(
            "{:>4} {at:>10} {after:>10}  {seq:>6}  {:>3}  {:<16} {}",
            self.number,
            event.attempt,
            event.body.name(),
            summary(event)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::event::{Body, Event, FinishReason, RequestCompleted, TokensGenerated, Usage};

    #[test]
    fn a_timeline_counts_from_the_first_event() {
        let request: RequestId = "019ab3c4d5e67f80a1b2c3d4e5f60718".parse().unwrap();
        let generated = TokensGenerated {
            first_index: 1,
            tokens: vec![5, 6],
            text: " basin".into(),
            cached_tokens: 0,
            logprobs: Vec::new(),
        };
        let usage = Usage { prompt_tokens: 13, completion_tokens: 3, cached_tokens: 0 };
        let completed = RequestCompleted { reason: FinishReason::Stop, usage };
        let events = [
            (41, 1_000_000, Body::TokensGenerated(generated)),
            (57, 1_001_250, Body::RequestCompleted(completed)),
        ];
        let mut timeline = Timeline::default();
        let lines = events.map(|(seq, time_us, body)| {
            timeline.line(&Recorded { seq, event: Event { request, attempt: 1, time_us, body } })
        });
        insta::assert_snapshot!(format!("{HEADING}\n{}", lines.join("\n")), @r#"
        #         at      after     seq  try  event
        1    0.00 ms    0.00 ms      41    1  TokensGenerated  token 1..=2: " basin"
        2    1.25 ms    1.25 ms      57    1  RequestCompleted Stop: 13 prompt tokens, 3 generated
        "#);
    }
}
