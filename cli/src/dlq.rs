//! `forebay dlq`: requests that no worker could do, kept until a person decides.

use crate::{
    config::{NatsArgs, init_logging, runtime},
    request::find,
    show::{date_and_time, print},
};
use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use forebay_schemas::{
    dead_letter::DeadLetter,
    event::{Body, FailureCode, RequestAccepted, RequestFailed},
    ids::RequestId,
    task::DecodeTask,
};
use forebay_streams::{Streams, environment, log::LogRef, tasks::enqueue, writer::LogWriter};

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  forebay dlq list
  forebay dlq show 01a20cfaf783740ca231537fde0c9b96
  forebay dlq retry 01a20cfaf783740ca231537fde0c9b96      once the reason is gone")]
pub(crate) struct DlqArgs {
    /// What to do.
    #[arg(value_name = "ACTION")]
    action: Action,
    /// The request, for all but `list`.
    #[arg(required_if_eq_any([("action", "show"), ("action", "retry"), ("action", "drop")]), value_name = "ID")]
    request: Option<RequestId>,
    /// One JSON object a line (`list` and `show`).
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    nats: NatsArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Action {
    /// All dead letters, oldest first.
    List,
    /// One, and where to look further.
    Show,
    /// Ask the same again as a new request, which nobody waits for, and forget the letter.
    Retry,
    /// Forget the letter. Its request's log stays.
    Drop,
}

pub(crate) fn run(args: &DlqArgs) -> anyhow::Result<()> {
    init_logging("warn");
    runtime(1)?.block_on(async {
        let streams = args.nats.connect("log", "dlq").await?;
        let letters = streams.dead_letters.list().await?;
        let (Some(request), false) = (args.request, matches!(args.action, Action::List)) else {
            return list(&letters, args.json);
        };
        let of_request: Vec<_> = letters.into_iter().filter(|letter| letter.request == request).collect();
        let Some(letter) = of_request.last() else {
            bail!("no dead letter of request {request}: `forebay dlq list` shows those that there are");
        };
        match args.action {
            Action::Show if args.json => of_request.iter().try_for_each(print_json),
            Action::Retry => retry(&streams, letter).await,
            Action::Drop => {
                streams.dead_letters.drop_letter(request).await?;
                print(format!("forgotten; its log stays: forebay log {request}"))
            }
            Action::List | Action::Show => of_request.iter().try_for_each(show),
        }
    })
}

fn list(letters: &[DeadLetter], json: bool) -> anyhow::Result<()> {
    if json {
        return letters.iter().try_for_each(print_json);
    }
    match letters.is_empty() {
        true => print("no dead letters"),
        false => table(letters).iter().try_for_each(print),
    }
}

fn print_json(letter: &DeadLetter) -> anyhow::Result<()> {
    print(serde_json::to_string(letter)?)
}

fn table(letters: &[DeadLetter]) -> Vec<String> {
    let heading = ["given up (UTC)", "request", "model", "role", "tries", "why"].map(str::to_owned);
    let row = |letter: &DeadLetter| {
        [
            date_and_time(letter.time_us),
            letter.request.to_string(),
            letter.model.to_string(),
            letter.role.as_str().to_owned(),
            letter.attempts.to_string(),
            format!("{}: {}", code(letter.code), letter.reason),
        ]
    };
    let rows: Vec<[String; 6]> = std::iter::once(heading).chain(letters.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..5).map(width).collect();
    let line = |row: &[String; 6]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}  "));
        cells.collect::<String>() + &row[5]
    };
    rows.iter().map(line).collect()
}

fn show(letter: &DeadLetter) -> anyhow::Result<()> {
    let DeadLetter { request, gateway, model, role, reason, attempts, time_us, .. } = letter;
    print(format!("request   {request}, of gateway {gateway}"))?;
    print(format!("model     {model}"))?;
    print(format!("given up  {} UTC by {}, after {attempts} tries", date_and_time(*time_us), role.as_str()))?;
    print(format!("why       {}: {reason}", code(letter.code)))?;
    print(format!("\nWhat happened:  forebay log {request}"))?;
    print(format!("Try it again:   forebay dlq retry {request}"))
}

/// As in logs and errors.
fn code(code: Option<FailureCode>) -> String {
    let named = code.and_then(|code| serde_json::to_value(code).ok());
    named
        .and_then(|name| name.as_str().map(str::to_owned))
        .unwrap_or_else(|| "its log is not readable".into())
}

/// The same request under a fresh id. It is told to nobody but the log: whoever asked first has had an error.
async fn retry(streams: &Streams, letter: &DeadLetter) -> anyhow::Result<()> {
    let accepted = asked(streams, letter).await?;
    let log = LogRef { gateway: letter.gateway.clone(), request: environment::request_id() };
    let task = DecodeTask { request: log.request, gateway: log.gateway.clone(), model: letter.model.clone() };
    let mut writer = LogWriter::create(streams.log.clone(), log.clone(), accepted).await?;
    if let Err(error) = enqueue(&*streams.tasks, &task).await {
        let failed = RequestFailed { code: FailureCode::QueueUnavailable, message: error.to_string() };
        writer.append(Body::RequestFailed(failed)).await?;
        return Err(error).context("the letter is kept");
    }
    streams.dead_letters.drop_letter(letter.request).await?;
    print(format!("asked again as request {}; follow it with", log.request))?;
    print(format!("  forebay log --follow {}", log.request))
}

async fn asked(streams: &Streams, letter: &DeadLetter) -> anyhow::Result<RequestAccepted> {
    let request = letter.request;
    let gone = || format!("what was asked is not known any more; `forebay dlq drop {request}` forgets it");
    let log = find(streams, request).await.with_context(gone)?;
    match streams.log.read(&log, 0).await?.into_iter().next().map(|first| first.event.body) {
        // The client's key was for the request that failed.
        Some(Body::RequestAccepted(accepted)) => {
            Ok(RequestAccepted { detached: true, fingerprint: None, ..accepted })
        }
        _ => bail!("{}", gone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::{ids::ModelKey, task::Role};

    #[test]
    fn letters_stand_in_columns() {
        let letter = |model: &str, code, reason: &str| DeadLetter {
            request: "019ab3c4d5e67f80a1b2c3d4e5f60718".parse().unwrap(),
            gateway: "gw-1".parse().unwrap(),
            model: ModelKey::of(model),
            role: Role::Decode,
            code,
            reason: reason.into(),
            attempts: 5,
            time_us: 1_764_000_000_654_321,
        };
        let letters = [
            letter("demo", Some(FailureCode::TooManyAttempts), "the engine has stopped"),
            letter("Qwen/Qwen3-0.6B", None, "event at sequence 7: unreadable"),
        ];
        insta::assert_snapshot!(format!("{}", table(&letters).join("\n")), @r#"
        given up (UTC)       request                           model                     role    tries  why
        2025-11-24 16:00:00  019ab3c4d5e67f80a1b2c3d4e5f60718  demo                      decode  5      too_many_attempts: the engine has stopped
        2025-11-24 16:00:00  019ab3c4d5e67f80a1b2c3d4e5f60718  Qwen-Qwen3-0-6B-820428f2  decode  5      its log is not readable: event at sequence 7: unreadable
        "#);
    }
}
