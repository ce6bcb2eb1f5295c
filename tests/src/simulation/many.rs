//! Many seeds, on some threads.

use super::{Options, Outcome, run};
use std::{
    collections::BTreeMap,
    fmt,
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Failed seeds that are kept whole.
const FAILED_MAX: usize = 5;

/// What came of many seeds.
#[derive(Debug)]
pub struct Report {
    /// Seeds run.
    pub seeds: u64,
    /// Requests made.
    pub requests: u64,
    /// Events in all logs, by kind.
    pub events: BTreeMap<String, u64>,
    /// Faults by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Every seed that failed.
    pub failing: Vec<u64>,
    /// The first few of them.
    pub failed: Vec<Outcome>,
    /// Virtual time, of all seeds together.
    pub lasted: Duration,
    began: Instant,
}

impl Report {
    fn new() -> Report {
        Report {
            seeds: 0,
            requests: 0,
            events: BTreeMap::new(),
            faults: BTreeMap::new(),
            failing: Vec::new(),
            failed: Vec::new(),
            lasted: Duration::ZERO,
            began: Instant::now(),
        }
    }

    fn add(&mut self, outcome: Outcome) {
        self.seeds += 1;
        self.requests += outcome.requests;
        self.lasted += outcome.lasted;
        for (fault, count) in &outcome.faults {
            *self.faults.entry(fault).or_default() += count;
        }
        for (kind, count) in &outcome.events {
            *self.events.entry(kind.clone()).or_default() += count;
        }
        if !outcome.violations.is_empty() {
            self.failing.push(outcome.seed);
            if self.failed.len() < FAILED_MAX {
                self.failed.push(outcome);
            }
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let minutes = self.began.elapsed().as_secs_f64() / 60.0;
        write!(
            f,
            "{} seeds ({:.0} a minute), {} requests, {} events, {} faults, {:.1} h of virtual time; failed: {:?}",
            self.seeds,
            self.seeds as f64 / minutes,
            self.requests,
            self.events.values().sum::<u64>(),
            self.faults.values().sum::<u64>(),
            self.lasted.as_secs_f64() / 3600.0,
            self.failing,
        )
    }
}

/// Runs seeds on so many threads, and tells how it goes every so often.
pub fn run_many(
    seeds: Range<u64>,
    threads: u64,
    options: Options,
    every: Duration,
    progress: impl Fn(&Report) + Sync,
) -> Report {
    let next = AtomicU64::new(seeds.start);
    let report = Mutex::new((Report::new(), Instant::now()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let outcome = run(seed, options);
            let mut report = report.lock().expect("no panics while held");
            report.0.add(outcome);
            if report.1.elapsed() >= every {
                report.1 = Instant::now();
                progress(&report.0);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let mut report = report.into_inner().expect("no panics while held").0;
    report.failing.sort_unstable();
    report
}

/// The command that runs a seed again and tells all that happens in it.
pub fn replay(seed: u64) -> String {
    format!("cargo run --release -p forebay-tests --bin simulate -- --seed {seed} --trace")
}
