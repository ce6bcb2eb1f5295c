//! What a run came to, in numbers.
//!
//! *Recovery* of a fault is the longest silence that it caused: over all streams that were under way at the process
//! concerned (owned by the decode worker and with text already; waiting for the prefill worker; read through the gateway;
//! all of them, for NATS), the longest time from the fault to the first text that the client read later than 50 ms
//! after it. What comes within 50 ms was on its way. Other faults happen meanwhile, and count into it.

use super::{
    fault::Part,
    inject::Hit,
    judge::{Findings, Judged, Violation},
};
use forebay_schemas::ids::RequestId;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write},
    time::Duration,
};

/// Text that comes within this of a fault was on its way.
const ON_ITS_WAY_US: u64 = 50_000;

/// Faults of one kind.
#[derive(Clone, Debug, Default)]
pub struct Kind {
    /// How many.
    pub count: usize,
    /// How many met the moment that they were aimed at.
    pub aimed: usize,
    /// Longest silences, of faults that silenced a stream, in microseconds, ascending.
    pub recoveries_us: Vec<u64>,
    /// From SIGTERM to exit, in microseconds, ascending.
    pub drains_us: Vec<u64>,
}

/// A run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Engine.
    pub engine: String,
    /// What it repeats with, as far as time allows.
    pub seed: u64,
    /// How long it took.
    pub took: Duration,
    /// By kind.
    pub faults: BTreeMap<String, Kind>,
    /// How requests ended, by their logs.
    pub outcomes: BTreeMap<&'static str, usize>,
    /// How answers ended, as clients saw it.
    pub ends: BTreeMap<String, u64>,
    /// Attempts of all requests.
    pub attempts: usize,
    /// The most attempts of one request.
    pub attempts_max: usize,
    /// Streams that broke and went on at another gateway.
    pub resumed: u64,
    /// Requests whose tokens part from those of an undisturbed run, where they may.
    pub parted: u64,
    /// See [`Findings::unacknowledged`].
    pub unacknowledged: u64,
    /// The longest silence of a stream during a rolling restart, in microseconds.
    pub rolling_gap_us: u64,
    /// Promises not kept.
    pub violations: Vec<Violation>,
    /// The longest silences, longest first, as far as they were asked for.
    pub slowest: Vec<Slow>,
}

/// A long silence.
#[derive(Clone, Debug)]
pub struct Slow {
    /// Of which fault.
    pub hit: Hit,
    /// How long, in microseconds.
    pub silence_us: u64,
    /// Whose.
    pub request: RequestId,
    /// Its log, for people.
    pub shown: String,
}

impl Report {
    /// Counts.
    pub(super) fn of(engine: &str, seed: u64, took: Duration, hits: &[Hit], findings: &Findings) -> Report {
        let mut faults = BTreeMap::<String, Kind>::new();
        let mut rolling_gap_us = 0;
        for hit in hits {
            let kind = faults.entry(hit.kind.clone()).or_default();
            kind.count += 1;
            kind.aimed += usize::from(hit.aimed);
            kind.drains_us.extend(hit.drain.map(|drain| drain.as_micros() as u64));
            if hit.kind.starts_with("rolling") {
                let gaps = findings.judged.iter().filter_map(|judged| gap(judged, hit));
                rolling_gap_us = gaps.max().unwrap_or(0).max(rolling_gap_us);
            } else {
                let silences = findings.judged.iter().filter_map(|judged| silence(judged, hit));
                kind.recoveries_us.extend(silences.max());
            }
        }
        for kind in faults.values_mut() {
            kind.recoveries_us.sort_unstable();
            kind.drains_us.sort_unstable();
        }
        let mut outcomes = BTreeMap::new();
        for judged in &findings.judged {
            *outcomes.entry(judged.outcome).or_default() += 1;
        }
        let attempts = findings.judged.iter().map(|judged| judged.owners.len());
        Report {
            engine: engine.to_owned(),
            seed,
            took,
            faults,
            outcomes,
            ends: findings
                .ends
                .iter()
                .map(|(end, count)| (format!("{end:?}").to_lowercase(), *count))
                .collect(),
            attempts: attempts.clone().sum(),
            attempts_max: attempts.max().unwrap_or(0),
            resumed: findings.judged.iter().map(|judged| u64::from(judged.reading.resumed)).sum(),
            parted: findings.parted,
            unacknowledged: findings.unacknowledged,
            rolling_gap_us,
            violations: findings.violations.clone(),
            slowest: Vec::new(),
        }
    }

    /// Faults in all.
    pub fn count(&self) -> usize {
        self.faults.values().map(|kind| kind.count).sum()
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let ms = |us: Option<u64>| us.map(|us| us as f64 / 1000.0);
        let kind = |kind: &Kind| {
            json!({
                "count": kind.count, "aimed": kind.aimed, "silenced": kind.recoveries_us.len(),
                "recovery_p50_ms": ms(quantile(&kind.recoveries_us, 50)),
                "recovery_p99_ms": ms(quantile(&kind.recoveries_us, 99)),
                "drain_p50_ms": ms(quantile(&kind.drains_us, 50)),
                "drain_p99_ms": ms(quantile(&kind.drains_us, 99)),
            })
        };
        let violation = |violation: &Violation| {
            json!({
                "invariant": violation.broken.invariant, "detail": violation.broken.detail, "shown": violation.shown,
            })
        };
        json!({
            "engine": self.engine, "seed": self.seed, "took_s": self.took.as_secs_f64(), "faults": self.count(),
            "kinds": self.faults.iter().map(|(name, of)| (name.clone(), kind(of))).collect::<serde_json::Map<_, _>>(),
            "outcomes": self.outcomes, "ends": self.ends, "attempts": self.attempts,
            "attempts_max": self.attempts_max, "resumed": self.resumed, "parted": self.parted,
            "unacknowledged_open": self.unacknowledged, "rolling_gap_ms": ms(Some(self.rolling_gap_us)),
            "violations": self.violations.iter().map(violation).collect::<Vec<_>>(),
        })
    }
}

/// So many of the longest silences, one a fault, without their logs.
pub(super) fn slowest(hits: &[Hit], findings: &Findings, count: usize) -> Vec<Slow> {
    let longest = |hit: &Hit| {
        let silences = findings.judged.iter().filter_map(|judged| Some((silence(judged, hit)?, judged)));
        let (silence_us, judged) = silences.max_by_key(|(silence, _)| *silence)?;
        let request = judged.reading.answer.as_ref()?.request;
        Some(Slow { hit: hit.clone(), silence_us, request, shown: String::new() })
    };
    let mut slowest: Vec<Slow> = hits.iter().filter_map(longest).collect();
    slowest.sort_by_key(|slow| std::cmp::Reverse(slow.silence_us));
    slowest.truncate(count);
    slowest
}

impl fmt::Display for Slow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Slow { hit, silence_us, request, shown } = self;
        let (at_s, at_us) = (hit.at_us / 1_000_000, hit.at_us % 1_000_000);
        let lasted = (hit.until_us - hit.at_us) / 1000;
        writeln!(
            f,
            "{} ms of silence: {} ({}) at {at_s}.{at_us:06}, over after {lasted} ms; request {request}:\n{shown}",
            silence_us / 1000,
            hit.kind,
            hit.name
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |us: Option<u64>| us.map_or("–".to_owned(), |us| format!("{:.0}", us as f64 / 1000.0));
        let list = |counts: &mut dyn Iterator<Item = (String, u64)>| {
            counts.fold(String::new(), |mut list, (name, count)| {
                let comma = if list.is_empty() { "" } else { ", " };
                let _ = write!(list, "{comma}{count} {name}");
                list
            })
        };
        let (engine, seed, faults, took) = (&self.engine, self.seed, self.count(), self.took.as_secs_f64());
        writeln!(f, "engine {engine}, seed {seed}: {faults} faults in {took:.0} s")?;
        writeln!(
            f,
            "\n{:<34} {:>6} {:>6} {:>9} {:>9} {:>9} {:>9}",
            "fault", "count", "aimed", "silenced", "p50 ms", "p99 ms", "max ms"
        )?;
        for (name, kind) in &self.faults {
            let silences = &kind.recoveries_us;
            writeln!(
                f,
                "{name:<34} {:>6} {:>6} {:>9} {:>9} {:>9} {:>9}",
                kind.count,
                kind.aimed,
                silences.len(),
                ms(quantile(silences, 50)),
                ms(quantile(silences, 99)),
                ms(silences.last().copied())
            )?;
        }
        writeln!(f)?;
        for (name, kind) in self.faults.iter().filter(|(_, kind)| !kind.drains_us.is_empty()) {
            let (p50, p99) = (quantile(&kind.drains_us, 50), quantile(&kind.drains_us, 99));
            writeln!(f, "{name}: ended after p50 {} ms, p99 {} ms", ms(p50), ms(p99))?;
        }
        if self.rolling_gap_us > 0 {
            writeln!(f, "longest silence during rolling restarts: {} ms", ms(Some(self.rolling_gap_us)))?;
        }
        let mut outcomes = self.outcomes.iter().map(|(name, count)| ((*name).to_owned(), *count as u64));
        let total: usize = self.outcomes.values().sum();
        writeln!(f, "requests with a log: {total} ({})", list(&mut outcomes))?;
        let mut ends = self.ends.iter().map(|(name, count)| (name.clone(), *count));
        writeln!(f, "answers, as clients saw them: {}", list(&mut ends))?;
        writeln!(
            f,
            "attempts: {}, of one request at most {}; streams read on at another gateway: {}; accepted but never \
             acknowledged, and open: {}",
            self.attempts, self.attempts_max, self.resumed, self.unacknowledged
        )?;
        if self.parted > 0 {
            writeln!(f, "tokens that part from an undisturbed run (KV computed again): {}", self.parted)?;
        }
        let named: BTreeSet<_> = self.violations.iter().map(|violation| violation.broken.invariant).collect();
        writeln!(
            f,
            "violations: {} {}",
            self.violations.len(),
            named.into_iter().collect::<Vec<_>>().join("; ")
        )
    }
}

/// How long a fault silenced a stream, if it was one that it concerns.
fn silence(judged: &Judged, hit: &Hit) -> Option<u64> {
    let times = &judged.reading.times_us;
    let (at, after) = (hit.at_us, hit.at_us + ON_ITS_WAY_US);
    let began = *times.first()? < at;
    let holder = |claims: &[(u64, String)]| claims.iter().rev().find(|(since, _)| *since <= at).cloned();
    let concerned = match hit.part {
        Some(Part::Decode) => began && holder(&judged.owners).is_some_and(|(_, name)| name == hit.name),
        Some(Part::Prefill) => holder(&judged.prefillers).is_some_and(|(since, name)| {
            let read_since = times.iter().any(|time| (since..=at).contains(time));
            let claimed_anew = judged.owners.iter().any(|(claimed, _)| (since..=at).contains(claimed));
            name == hit.name && !read_since && !claimed_anew
        }),
        Some(Part::Gateway) => began && Some(&judged.reading.gateway) == hit.url.as_ref(),
        None => began && hit.kind.starts_with("nats"),
    };
    let next = times.iter().find(|time| **time > after)?;
    (concerned && judged.ended_us > at).then(|| next - at)
}

/// The longest silence of a stream while something went on.
fn gap(judged: &Judged, hit: &Hit) -> Option<u64> {
    let pairs = judged.reading.times_us.windows(2);
    pairs.filter(|pair| pair[1] > hit.at_us && pair[0] < hit.until_us).map(|pair| pair[1] - pair[0]).max()
}

/// Of ascending values; none of none.
fn quantile(ascending: &[u64], percent: usize) -> Option<u64> {
    let last = ascending.len().checked_sub(1)?;
    Some(ascending[(last * percent).div_ceil(100)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_values() {
        assert_eq!(quantile(&[], 50), None);
        assert_eq!(quantile(&[3], 99), Some(3));
        let all: Vec<u64> = (1..=101).collect();
        assert_eq!((quantile(&all, 50), quantile(&all, 99)), (Some(51), Some(100)));
    }
}
