//! How events are shown to people.

use forebay_schemas::event::{Body, Event};
use std::io::Write;

/// Prints a line at once. A reader that has gone away, as `head` does, is an error that ends the command quietly: see
/// [`reader_is_gone`].
pub(crate) fn print(line: impl std::fmt::Display) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// Whether a command ended because nobody reads what it prints.
pub(crate) fn reader_is_gone(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// What an event says, in a line.
pub(crate) fn summary(event: &Event) -> String {
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
        Body::Claimed(claimed) => {
            let engine =
                claimed.engine.as_ref().map_or(String::new(), |engine| format!(": {}", engine.weights));
            format!("by {}, delivery {}{engine}", claimed.worker, claimed.delivery)
        }
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
            let range = match (generated.first_index, generated.tokens.len() as u32) {
                (first, 0) => format!("{first}.."),
                (first, 1) => format!("{first}"),
                (first, count) => format!("{first}..={}", first.saturating_add(count - 1)),
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

pub(crate) fn millis(micros: u64) -> String {
    format!("{:.2} ms", micros as f64 / 1e3)
}

fn size(bytes: u64) -> String {
    match bytes {
        0..=9_999 => format!("{bytes} B"),
        10_000..=9_999_999 => format!("{:.1} kB", bytes as f64 / 1e3),
        _ => format!("{:.1} MB", bytes as f64 / 1e6),
    }
}

/// The time of day in UTC, to the millisecond.
pub(crate) fn time_of_day(unix_us: u64) -> String {
    let ms = unix_us / 1000 % 86_400_000;
    format!("{:02}:{:02}:{:02}.{:03}", ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60, ms % 1000)
}

/// Day and time in UTC, to the second.
pub(crate) fn date_and_time(unix_us: u64) -> String {
    let (year, month, day) = civil(unix_us / 86_400_000_000);
    format!("{year}-{month:02}-{day:02} {}", &time_of_day(unix_us)[..8])
}

/// Year, month and day of a number of days since 1970: <https://howardhinnant.github.io/date_algorithms.html>.
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    (yoe + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_calendars_do() {
        assert_eq!(date_and_time(0), "1970-01-01 00:00:00");
        assert_eq!(date_and_time(951_782_400_000_000), "2000-02-29 00:00:00");
        assert_eq!(date_and_time(1_764_000_000_654_321), "2025-11-24 16:00:00");
        assert_eq!(time_of_day(1_764_000_000_654_321), "16:00:00.654");
    }
}
