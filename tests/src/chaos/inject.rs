//! Doing harm, and what follows of it.

use super::{
    dice::Dice,
    fault::{Blow, Fault, Part},
    fleet::{Fleet, GRACE, Member},
    judge::Judge,
    link::Weather,
    trail::Trail,
};
use crate::{
    Deployment,
    invariants::{self, broken},
    process::POLL,
};
use forebay_streams::environment::now_us;
use rustix::process::Signal;
use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::sync::{Notify, RwLock};

/// How long a moment is waited for; then the fault happens at any time.
const AIM_PATIENCE: Duration = Duration::from_millis(1500);

/// How long a process may take to end after its grace is over.
const END_SLACK: Duration = Duration::from_secs(10);

/// Lines of a process that ended by itself that are shown.
const LINES_SHOWN: usize = 30;

/// A fault that happened.
#[derive(Clone, Debug)]
pub struct Hit {
    /// Its kind, as reports count it.
    pub kind: String,
    /// Which kind of process, if it was one.
    pub part: Option<Part>,
    /// Which process.
    pub name: String,
    /// Where clients find it, if it is a gateway.
    pub url: Option<String>,
    /// It met the moment that it was aimed at.
    pub aimed: bool,
    /// When, in microseconds since the Unix epoch.
    pub at_us: u64,
    /// When everything was as before.
    pub until_us: u64,
    /// From SIGTERM to exit.
    pub drain: Option<Duration>,
}

/// Who does harm.
pub struct Injector {
    /// Whose NATS.
    pub deployment: Arc<Deployment>,
    /// To whom.
    pub fleet: Arc<Fleet>,
    /// Where to aim.
    pub trail: Arc<Trail>,
    /// Tells a client to leave.
    pub leave: Arc<Notify>,
    /// Who hears of what must not be.
    pub judge: Arc<Judge>,
    /// What happened.
    pub hits: Mutex<Vec<Hit>>,
    /// NATS goes away once at a time.
    pub nats: RwLock<()>,
}

impl Injector {
    /// Lets a fault happen, and returns when all is as before.
    pub async fn inject(&self, fault: Fault, mut dice: Dice) -> anyhow::Result<()> {
        let mut hit = Hit {
            kind: fault.to_string(),
            part: None,
            name: String::new(),
            url: None,
            aimed: false,
            at_us: now_us(),
            until_us: 0,
            drain: None,
        };
        match fault {
            Fault::Leave => self.leave.notify_one(),
            Fault::Nats(pause) => {
                let _alone = self.nats.write().await;
                hit.at_us = now_us();
                self.deployment.interrupt_nats(pause).await;
            }
            Fault::Rolling(part) => return self.roll(part, hit).await,
            Fault::Process { blow, part, moment } => {
                let (place, mut member) = match self.aim(part, moment, &mut dice).await {
                    Some(taken) => {
                        hit.aimed = true;
                        taken
                    }
                    None => self.any(part, &mut dice).await,
                };
                (hit.part, hit.name, hit.url) = (Some(part), member.name.clone(), member.url.clone());
                hit.at_us = now_us();
                if let Some(status) = member.process.exited() {
                    self.ended_by_itself(&member, &status.to_string());
                    member = self.fleet.member(part).await?;
                } else {
                    member = self.strike(blow, member, &mut hit).await?;
                }
                self.fleet.put(place, member);
            }
        }
        hit.until_us = now_us();
        self.hits.lock().expect("no panics while held").push(hit);
        Ok(())
    }

    /// Waits for the moment, and takes the process that has the request.
    async fn aim(&self, part: Part, moment: Option<&str>, dice: &mut Dice) -> Option<(usize, Member)> {
        let moment = moment?;
        let mut sightings = self.trail.sightings();
        let aim = async {
            loop {
                // One that was too late for some aims at those that come.
                let Ok(seen) = sightings.recv().await else { continue };
                if seen.event != moment {
                    continue;
                }
                let Some(name) = seen.holder(part) else { continue };
                if let Some(taken) = self.fleet.take(dice, |member| member.name == name) {
                    return taken;
                }
            }
        };
        tokio::time::timeout(AIM_PATIENCE, aim).await.ok()
    }

    async fn any(&self, part: Part, dice: &mut Dice) -> (usize, Member) {
        loop {
            if let Some(taken) = self.fleet.take(dice, |member| member.part == part) {
                return taken;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Strikes, and returns who stands in that place afterwards.
    async fn strike(&self, blow: Blow, mut member: Member, hit: &mut Hit) -> anyhow::Result<Member> {
        match blow {
            Blow::Kill(pause) => {
                member.process.kill();
                self.look(&member);
                let part = member.part;
                drop(member);
                tokio::time::sleep(pause).await;
                return self.fleet.member(part).await;
            }
            Blow::Freeze(pause) => {
                member.process.signal(Signal::STOP);
                tokio::time::sleep(pause).await;
                member.process.signal(Signal::CONT);
            }
            Blow::Drain => {
                let part = member.part;
                let (next, drain) = tokio::join!(self.fleet.member(part), self.drain(member));
                hit.drain = drain;
                return next;
            }
            Blow::Cut(pause) => weather(&member, Weather::Cut, pause).await,
            Blow::Still(pause) => weather(&member, Weather::Still, pause).await,
            Blow::Slow(delay, pause) => weather(&member, Weather::Slow(delay), pause).await,
        }
        Ok(member)
    }

    /// Tells a process to stop, and waits until it has. Returns how long that took.
    async fn drain(&self, mut member: Member) -> Option<Duration> {
        let told = Instant::now();
        member.process.signal(Signal::TERM);
        while member.process.exited().is_none() {
            if told.elapsed() > GRACE + END_SLACK {
                let detail =
                    format!("{} {} does not end within {:?}", member.part, member.name, told.elapsed());
                self.judge.accuse(broken(invariants::BOUNDED, detail), last_lines(&member.process.log()));
                return None;
            }
            tokio::time::sleep(POLL).await;
        }
        self.look(&member);
        Some(told.elapsed())
    }

    /// Replaces all workers of a kind, one after the other.
    async fn roll(&self, part: Part, mut hit: Hit) -> anyhow::Result<()> {
        for place in self.fleet.places(part) {
            let old = self.fleet.take_from(place).await;
            let next = self.fleet.member(part).await?;
            self.fleet.put(place, next);
            hit.drain = self.drain(old).await.max(hit.drain);
        }
        hit.until_us = now_us();
        self.hits.lock().expect("no panics while held").push(hit);
        Ok(())
    }

    fn ended_by_itself(&self, member: &Member, status: &str) {
        let detail = format!("{} {} ended by itself: {status}", member.part, member.name);
        self.judge.accuse(broken(invariants::ALIVE, detail), last_lines(&member.process.log()));
    }

    /// Looks through what a process has logged for what must not be there.
    fn look(&self, member: &Member) {
        let log = member.process.log();
        if log.contains("panicked at") {
            let detail = format!("{} {} panicked", member.part, member.name);
            self.judge.accuse(broken(invariants::ALIVE, detail), last_lines(&log));
        }
    }
}

async fn weather(member: &Member, weather: Weather, pause: Duration) {
    member.link.set(weather);
    tokio::time::sleep(pause).await;
    member.link.set(Weather::Fair);
}

fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n")
}
