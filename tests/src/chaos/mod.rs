//! Chaos: a deployment under load, harmed at random until so many faults have happened, and then in calm. No promise of
//! ARCHITECTURE.md may be broken by then, whatever was done to whom.
//!
//! The clients ([`load`]) ask questions whose undisturbed answers are known. Faults ([`fault`]) are drawn from a seed, half
//! of them aimed ([`trail`]) at the moment that matters, and done to processes ([`fleet`]) or their network ([`link`]) by
//! the injector ([`inject`]). Each request is judged ([`judge`]) once it has ended. A seed repeats what is drawn; when
//! it happens is up to the machine.

pub mod dice;
pub mod fault;
pub mod fleet;
pub mod inject;
pub mod judge;
pub mod link;
pub mod load;
pub mod reading;
pub mod report;
pub mod trail;

use crate::{
    Deployment,
    deployment::shown,
    invariants::{self, broken},
    process::POLL,
};
use dice::Dice;
use fault::{Fault, Part};
use fleet::Fleet;
use forebay_schemas::{ids::ModelKey, task::Role};
use forebay_streams::tasks::Depth;
use inject::Injector;
use judge::Judge;
use load::{Asker, Question};
use report::Report;
use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::{
    sync::{RwLock, mpsc},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use trail::Trail;

/// How long anything may take to end once all is calm.
const CALM_PATIENCE: Duration = Duration::from_secs(90);

/// Time between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(5);

/// What computes tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Tokens are a function of prompt, seed and index: they must come out the same whatever happens.
    Sim,
    /// The built-in model.
    Onnx,
}

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// What computes tokens.
    pub engine: Engine,
    /// How many faults.
    pub faults: usize,
    /// Where chance comes from.
    pub seed: u64,
    /// Clients that ask all the time.
    pub clients: usize,
    /// Gateways.
    pub gateways: usize,
    /// Decode workers.
    pub decode: usize,
    /// Prefill workers.
    pub prefill: usize,
    /// Faults that go on at the same time.
    pub at_once: usize,
    /// Only faults of kinds with one of these in their names; all, if there are none.
    pub only: Vec<String>,
    /// Calm after each fault.
    pub pause: Duration,
    /// Different questions.
    pub questions: usize,
    /// The longest answer, in tokens.
    pub tokens: u32,
    /// Time of a simulated decode step.
    pub step: Duration,
    /// What computes, as `--device` of a worker has it.
    pub device: String,
    /// Whether NATS is a cluster of three.
    pub cluster: bool,
    /// Of how many of the longest silences the report has the logs.
    pub slowest: usize,
}

impl Options {
    /// What a machine with two cores can stand.
    pub fn new(engine: Engine, faults: usize, seed: u64) -> Options {
        Options {
            engine,
            faults,
            seed,
            clients: 16,
            gateways: 2,
            decode: 3,
            prefill: 2,
            at_once: 4,
            only: Vec::new(),
            pause: Duration::ZERO,
            questions: 24,
            tokens: 200,
            step: Duration::from_millis(15),
            device: "cpu".to_owned(),
            cluster: false,
            slowest: 0,
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Engine::Sim => "sim",
            Engine::Onnx => "onnx",
        })
    }
}

/// Runs it. Fails if a deployment can't be had at all; promises not kept are in the report. Stops early if one is
/// broken, or `stop` is cancelled.
pub async fn run(options: &Options, stop: &CancellationToken, say: impl Fn(&str)) -> anyhow::Result<Report> {
    let began = Instant::now();
    let mut dice = Dice::new(options.seed);
    let mut deployment =
        if options.cluster { Deployment::start_on_cluster().await } else { Deployment::start().await };
    settle(&mut deployment, options, Duration::ZERO);
    let questions = undisturbed(&deployment, options, &mut dice).await;
    say(&format!("{} questions answered in calm after {:.1?}", questions.len(), began.elapsed()));
    settle(&mut deployment, options, options.step);
    let deployment = Arc::new(deployment);
    let trail = Arc::new(Trail::follow(&deployment.streams).await?);
    let strength =
        [(Part::Decode, options.decode), (Part::Prefill, options.prefill), (Part::Gateway, options.gateways)];
    let fleet = Arc::new(Fleet::start(deployment.clone(), &strength).await?);
    let judge = Arc::new(Judge::new(deployment.clone(), questions.clone(), options.engine == Engine::Sim));
    let injector = Arc::new(Injector {
        deployment: deployment.clone(),
        fleet: fleet.clone(),
        trail: trail.clone(),
        leave: Arc::default(),
        judge: judge.clone(),
        hits: Mutex::default(),
        nats: RwLock::default(),
    });
    let (sender, readings) = mpsc::unbounded_channel();
    let hearing = tokio::spawn({
        let judge = judge.clone();
        async move { judge.hear(readings).await }
    });
    let enough = CancellationToken::new();
    let mut clients = JoinSet::new();
    for _ in 0..options.clients {
        let (fleet, questions, readings) = (fleet.clone(), questions.clone(), sender.clone());
        let asker = Asker { fleet, questions, leave: injector.leave.clone(), readings };
        clients.spawn(asker.run(dice.fork(), enough.clone()));
    }
    drop(sender);
    say(&format!("the fleet is up after {:.1?}; faults begin", began.elapsed()));

    harm(&injector, options, &mut dice, stop, &say).await?;
    say("calm: no more faults; what runs ends");
    enough.cancel();
    let took = began.elapsed();
    let ended = async { while clients.join_next().await.is_some() {} };
    if tokio::time::timeout(CALM_PATIENCE + crate::PATIENCE, ended).await.is_err() {
        judge.accuse(broken(invariants::BOUNDED, "clients still wait for answers"), "");
        clients.shutdown().await;
    }
    let open = hearing.await?;
    say(&format!("{} requests judged, {} are open", judge.findings().judged.len(), open.len()));
    judge.conclude(open, trail.requests(), CALM_PATIENCE).await;
    free(&deployment, &judge).await;
    let hits = injector.hits.lock().expect("no panics while held").clone();
    let mut slowest = report::slowest(&hits, &judge.findings(), options.slowest);
    for slow in &mut slowest {
        slow.shown = shown(&judge.events(slow.request).await);
    }
    let report = Report::of(&options.engine.to_string(), options.seed, took, &hits, &judge.findings());
    Ok(Report { slowest, ..report })
}

/// Settings of all processes from now on.
fn settle(deployment: &mut Deployment, options: &Options, step: Duration) {
    if options.engine == Engine::Sim {
        deployment.simulate(step);
        // A prompt of a hundred tokens takes as long as some ten steps.
        deployment.set("FOREBAY_SIM_PREFILL_TOKEN_US", &(step.as_micros() / 10).to_string());
    }
    deployment.set("FOREBAY_DEVICE", &options.device);
    // A stand-in for a GPU, where there is none.
    if let Ok(stand_in) = std::env::var("FOREBAY_BENCH_STAND_IN") {
        deployment.set("FOREBAY_BENCH_STAND_IN", &stand_in);
    }
    deployment.set("FOREBAY_CHUNK", "24");
    // The shortest prompts stay with the decode worker.
    deployment.set("FOREBAY_MAX_LOCAL_PREFILL_LENGTH", "24");
    deployment.set("FOREBAY_PREFILL_PATIENCE_S", "5");
    deployment.set("FOREBAY_SLOTS", "8");
    deployment.set("FOREBAY_MAX_ATTEMPTS", "1000");
    // What is measured is what users get: the times of failover are the defaults.
    deployment.set("FOREBAY_ACK_WAIT_S", "30");
    deployment.set("FOREBAY_LEASE_S", "1.5");
}

/// Has the questions answered while nothing happens.
async fn undisturbed(deployment: &Deployment, options: &Options, dice: &mut Dice) -> Arc<[Question]> {
    let mut worker = deployment.decode().await;
    let mut gateway = deployment.gateway(&[]).await;
    let questions = load::questions(dice, options.questions, options.tokens, deployment, &gateway).await;
    worker.terminate();
    gateway.process.kill();
    worker.process.ended().await;
    deployment.gone(&worker.id).await;
    questions.into()
}

/// Draws a fault of the kinds that are wanted.
fn draw(dice: &mut Dice, only: &[String]) -> Fault {
    loop {
        let fault = Fault::draw(dice);
        let kind = fault.to_string();
        if only.is_empty() || only.iter().any(|wanted| kind.contains(wanted.as_str())) {
            return fault;
        }
    }
}

/// Injects one fault after the other, some at the same time.
async fn harm(
    injector: &Arc<Injector>,
    options: &Options,
    dice: &mut Dice,
    stop: &CancellationToken,
    say: &impl Fn(&str),
) -> anyhow::Result<()> {
    let mut under_way = JoinSet::new();
    let mut left = options.faults;
    let began = Instant::now();
    let mut progress = tokio::time::interval(PROGRESS);
    let broken = || !injector.judge.findings().violations.is_empty();
    while left > 0 && !stop.is_cancelled() && !broken() {
        while left > 0 && under_way.len() < options.at_once {
            let fault = draw(dice, &options.only);
            let (injector, dice, pause) = (injector.clone(), dice.fork(), options.pause);
            under_way.spawn(async move {
                injector.inject(fault, dice).await?;
                tokio::time::sleep(pause).await;
                Ok::<_, anyhow::Error>(())
            });
            left -= 1;
        }
        tokio::select! {
            Some(done) = under_way.join_next() => done??,
            () = stop.cancelled() => {}
            _ = progress.tick() => {
                let (requests, seconds) = (injector.judge.findings().judged.len(), began.elapsed().as_secs_f64());
                let faults = injector.hits.lock().expect("no panics while held").len();
                say(&format!(
                    "{faults} of {} faults, {requests} requests, {seconds:.0} s ({:.1} faults/s)",
                    options.faults,
                    faults as f64 / seconds.max(0.001)
                ));
            }
        }
    }
    while let Some(done) = under_way.join_next().await {
        done??;
    }
    Ok(())
}

/// Nothing is held once nothing runs.
async fn free(deployment: &Deployment, judge: &Judge) {
    let give_up = Instant::now() + CALM_PATIENCE;
    let model = ModelKey::of(crate::deployment::MODEL);
    let mut roles: VecDeque<Role> = [Role::Decode, Role::Prefill].into();
    while let Some(role) = roles.front().copied() {
        let depth = deployment.streams.tasks.depth(role, &model).await;
        if depth.as_ref().is_ok_and(|depth| *depth == Depth::default()) {
            roles.pop_front();
        } else if Instant::now() > give_up {
            let detail =
                format!("{} tasks: {depth:?} {CALM_PATIENCE:?} after the last answer", role.as_str());
            judge.accuse(broken(invariants::QUEUES_EMPTY, detail), "");
            roles.pop_front();
        } else {
            tokio::time::sleep(POLL).await;
        }
    }
    // What a lease says is as old as its last renewal.
    tokio::time::sleep(crate::deployment::LEASE / 2).await;
    let mut workers = deployment.registered();
    let all_free = workers
        .wait_for(|all| all.values().all(|lease| lease.free_slots == lease.slots && lease.kv_leases == 0));
    if tokio::time::timeout(give_up.saturating_duration_since(Instant::now()), all_free).await.is_err() {
        let busy =
            deployment.registered().borrow().values().map(|lease| format!("{lease:?}\n")).collect::<String>();
        judge.accuse(broken(invariants::ALL_FREE, "a worker's lease still says so"), busy);
    }
}
