//! Deterministic simulation: gateways, workers and their KV, the code that is deployed, on one thread, the in-memory
//! backend and a virtual clock. A seed decides what there is to do and all that goes wrong; run again, it goes the same
//! way. After the storm everything must come to its end, and every invariant must hold.
//!
//! Read on in `site` (what runs, and what befalls it), `network` (what happens to messages), `checks`.

mod chance;
mod checks;
mod client;
mod many;
mod mutation;
mod network;
mod panics;
mod poison;
mod site;
mod weather;
mod world;

pub use many::{Report, replay, run_many};
pub use mutation::Mutation;

use chance::{between, between_ms};
use checks::{Logs, Violation};
use client::Read;
use forebay_schemas::{dead_letter::DeadLetter, event::Body, ids::fnv1a, wire};
use forebay_streams::{environment, log::Recorded, memory};
use site::Site;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{task::JoinSet, time::sleep};
use weather::Weather;
use world::World;

/// When simulations begin, in microseconds since the Unix epoch.
const BEGAN_US: u64 = 1_750_000_000_000_000;

/// How long after the storm everything may take to end: the longest deadline, and what a gateway may need to say so.
const CALM_MAX: Duration = Duration::from_secs(150);

/// How often one looks whether it has.
const LOOK: Duration = Duration::from_millis(100);

/// What came of a seed.
#[derive(Debug)]
pub struct Outcome {
    /// Which one.
    pub seed: u64,
    /// Promises that were not kept.
    pub violations: Vec<String>,
    /// Faults by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Requests made.
    pub requests: u64,
    /// Events in all logs, by kind.
    pub events: BTreeMap<String, u64>,
    /// Virtual time that it took.
    pub lasted: Duration,
    /// Of all logs and answers: equal for equal runs.
    pub digest: u64,
    /// All logs, in words, if something was violated or is to be traced.
    pub logs: String,
    /// All that happened, if it was to be traced.
    pub trace: Vec<String>,
}

/// How a seed is run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Whether all that happens is to be told.
    pub traced: bool,
    /// What is broken on purpose.
    pub mutation: Mutation,
}

/// Runs a seed.
pub fn run(seed: u64, options: Options) -> Outcome {
    panics::watch();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without I/O needs nothing");
    let simulation = runtime.block_on(async { environment::simulate(seed, BEGAN_US) });
    let mut outcome = runtime.block_on(simulated(seed, options));
    // What is left of the processes still belongs to the simulation.
    drop(runtime);
    drop(simulation);
    outcome.violations.extend(panics::take());
    outcome
}

async fn simulated(seed: u64, options: Options) -> Outcome {
    let limits = memory::Limits {
        queue_max: if chance::chance(100) { 2 } else { 4096 },
        ack_wait: between_ms(600..=3000),
        max_deliver: if chance::chance(400) { between(5..=20) } else { 100 },
        lease_time: between_ms(600..=2000),
    };
    let weather = Weather::draw();
    let plan = site::Plan::draw();
    let storm = between_ms(2000..=12_000);
    let clients: Vec<client::Plan> =
        (0..between(2..=10)).map(|number| client::Plan::draw(number, storm, plan.poison.is_some())).collect();
    let requests = clients.len() as u64;
    let world = Arc::new(World::new(memory::streams_with(limits.clone()), weather, options));
    world.trace(|| format!("{limits:?}\n{:?}\n{plan:?}", world.weather));
    let site = Site::start(world.clone(), plan).await;
    let mut reading = JoinSet::new();
    for plan in clients {
        for _ in 0..=u64::from(plan.twin) {
            reading.spawn(ask(site.clone(), plan.clone()));
        }
    }
    site.trouble(storm).await;
    let (reads, mut violations) = settle(&site, reading).await;
    let logs = checks::logs(&site).await;
    let letters = site.world.streams.dead_letters.list().await.expect("memory answers");
    violations.extend(checks::violations(&site, &logs, &reads, &letters));
    let told = options.traced || !violations.is_empty();
    let faults = world.record().faults.clone();
    Outcome {
        seed,
        violations,
        faults,
        requests,
        events: events(&logs, &letters),
        lasted: world.elapsed(),
        digest: digest(&logs, &reads, &letters) ^ world.elapsed().as_micros() as u64,
        logs: if told { in_words(&logs, &reads) } else { String::new() },
        trace: world.take_trace(),
    }
}

/// Events by kind, those that tell of a failure by that too; and dead letters.
fn events(logs: &Logs, letters: &[DeadLetter]) -> BTreeMap<String, u64> {
    let mut events = BTreeMap::new();
    for letter in letters {
        let kind = format!("dead letter, {}, {:?}", letter.role.as_str(), letter.code);
        *events.entry(kind).or_default() += 1;
    }
    for recorded in logs.values().flatten() {
        let body = &recorded.event.body;
        let why = match body {
            Body::KvLost(lost) => {
                let words = lost.reason.split([' ', ':']);
                // Without names and numbers.
                let words = words.filter(|word| word.bytes().all(|b| b.is_ascii_alphabetic() || b == b'\''));
                words.take(6).collect::<Vec<_>>().join(" ")
            }
            Body::RequestFailed(failed) => format!("{:?}", failed.code),
            Body::Claimed(_) if recorded.event.attempt > 1 => "again".to_owned(),
            _ => String::new(),
        };
        *events.entry(format!("{} {why}", body.name())).or_default() += 1;
    }
    events
}

fn digest(logs: &Logs, reads: &[Read], letters: &[DeadLetter]) -> u64 {
    let mut bytes = Vec::new();
    for recorded in logs.values().flatten() {
        bytes.extend_from_slice(&recorded.seq.to_le_bytes());
        bytes.extend(wire::encode(&recorded.event));
    }
    reads.iter().for_each(|read| bytes.extend(format!("{:?}", read.answer).bytes()));
    letters.iter().for_each(|letter| bytes.extend(format!("{letter:?}").bytes()));
    fnv1a(&bytes)
}

fn in_words(logs: &Logs, reads: &[Read]) -> String {
    let lines = logs.iter().flat_map(|(log, events)| {
        events.iter().map(move |Recorded { seq, event }| {
            format!("{log} {seq} {} of {}: {:?}\n", event.time_us - BEGAN_US, event.attempt, event.body)
        })
    });
    lines.chain(reads.iter().map(|read| format!("{:?}: {:?}\n", read.ending, read.answer))).collect()
}

async fn ask(site: Arc<Site>, plan: client::Plan) -> Read {
    sleep(plan.begin).await;
    plan.ask(&site).await
}

/// Waits until all has come to its end, and says what has not.
async fn settle(site: &Site, mut reading: JoinSet<Read>) -> (Vec<Read>, Vec<Violation>) {
    let (mut reads, mut violations) = (Vec::new(), Vec::new());
    let until = tokio::time::Instant::now() + CALM_MAX;
    let all = async {
        while let Some(read) = reading.join_next().await {
            match read {
                Ok(read) => reads.push(read),
                Err(panic) => violations.push(format!("a client can't read its answer: {panic}")),
            }
        }
    };
    let read_all = tokio::time::timeout_at(until, all).await.is_ok();
    if !read_all {
        violations.push(format!("7: a client still waits, {CALM_MAX:?} after the storm"));
    }
    loop {
        let logs = checks::logs(site).await;
        match checks::unfinished(site, &logs).await {
            None => return (reads, violations),
            Some(problem) if tokio::time::Instant::now() >= until => {
                violations.push(format!("{problem}, {CALM_MAX:?} after the storm"));
                return (reads, violations);
            }
            Some(_) => sleep(LOOK).await,
        }
    }
}
