//! What became of each request: its log is read, checked by the [`invariants`], and held against what its client read.

use super::{
    load::Question,
    reading::{End, Reading},
};
use crate::{
    Deployment,
    deployment::shown,
    invariants::{self, Broken, broken},
};
use forebay_schemas::{
    event::{Body, Event, FailureCode},
    ids::RequestId,
    lifecycle::{Lifecycle, Phase},
};
use forebay_streams::log::{LogRef, Recorded};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Pause before a log is looked at again that has not ended.
const AGAIN: Duration = Duration::from_millis(250);

/// How often a log is read that does not come.
const READS_MAX: u32 = 40;

/// A promise not kept, and the request that shows it.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which promise.
    pub broken: Broken,
    /// Its log, for people, or whatever else shows it.
    pub shown: String,
}

/// A request that was judged: what is needed of its log afterwards.
#[derive(Clone, Debug)]
pub struct Judged {
    /// What its client read.
    pub reading: Reading,
    /// From when on which decode worker had it.
    pub owners: Vec<(u64, String)>,
    /// From when on which prefill worker had it, in which attempt.
    pub prefillers: Vec<(u64, String)>,
    /// When it ended.
    pub ended_us: u64,
    /// How.
    pub outcome: &'static str,
    last: (LogRef, u64),
}

/// Judges requests as they end.
pub struct Judge {
    deployment: Arc<Deployment>,
    questions: Arc<[Question]>,
    /// Tokens must be those of the undisturbed run.
    exact: bool,
    findings: Mutex<Findings>,
}

/// What was found so far.
#[derive(Debug, Default)]
pub struct Findings {
    /// Promises not kept.
    pub violations: Vec<Violation>,
    /// Requests judged.
    pub judged: Vec<Judged>,
    /// How readings ended that no log belongs to, or that have not been judged.
    pub ends: BTreeMap<End, u64>,
    /// Requests whose tokens part from the undisturbed run, where they may.
    pub parted: u64,
    /// Requests that nobody was told of as accepted, and that have no end: their gateway died before it had queued them.
    pub unacknowledged: u64,
}

impl Judge {
    /// Of requests that ask these questions.
    pub fn new(deployment: Arc<Deployment>, questions: Arc<[Question]>, exact: bool) -> Judge {
        Judge { deployment, questions, exact, findings: Mutex::default() }
    }

    /// What was found so far.
    pub fn findings(&self) -> std::sync::MutexGuard<'_, Findings> {
        self.findings.lock().expect("no panics while held")
    }

    /// Notes a promise that was not kept.
    pub fn accuse(&self, broken: Broken, shown: impl Into<String>) {
        self.findings().violations.push(Violation { broken, shown: shown.into() });
    }

    /// Judges readings as they come, until there are no more; returns those whose logs had not ended when they were
    /// looked at.
    pub async fn hear(&self, mut readings: mpsc::UnboundedReceiver<Reading>) -> Vec<Reading> {
        let mut open = Vec::new();
        while let Some(reading) = readings.recv().await {
            *self.findings().ends.entry(reading.end).or_default() += 1;
            if reading.answer.is_some() && !self.judge(&reading).await {
                open.push(reading);
            }
        }
        open
    }

    /// Judges what is left, each within this time, and everything that happened to other logs than clients know of.
    pub async fn conclude(&self, mut open: Vec<Reading>, seen: Vec<RequestId>, patience: Duration) {
        let give_up = Instant::now() + patience;
        while !open.is_empty() && Instant::now() < give_up {
            let mut still = Vec::new();
            for reading in open {
                if !self.judge(&reading).await {
                    still.push(reading);
                }
            }
            open = still;
            if !open.is_empty() {
                tokio::time::sleep(AGAIN).await;
            }
        }
        for reading in open {
            let answer = reading.answer.expect("only answers wait");
            // What was refused is nobody's promise.
            if answer.status == 200 {
                let events = self.events(answer.request).await;
                let detail = format!("request {} has none {patience:?} after all is calm", answer.request);
                self.accuse(broken(invariants::ENDS, detail), shown(&events));
            }
        }
        self.strangers(seen).await;
        self.nothing_after().await;
    }

    /// A request's log. A server that was just restarted may not answer at once.
    pub(super) async fn events(&self, request: RequestId) -> Vec<Recorded> {
        let log = &self.deployment.streams.log;
        for _ in 0..READS_MAX {
            match log.find(request).await {
                Ok(None) => return Vec::new(),
                Ok(Some(name)) => {
                    if let Ok(events) = log.read(&name, 0).await {
                        return events;
                    }
                }
                Err(_) => {}
            }
            tokio::time::sleep(AGAIN).await;
        }
        Vec::new()
    }

    /// Requests whose clients never had an answer: their logs keep the promises too, but for that of an end.
    async fn strangers(&self, seen: Vec<RequestId>) {
        let known = |findings: &Findings| -> std::collections::HashSet<RequestId> {
            findings
                .judged
                .iter()
                .filter_map(|judged| Some(judged.reading.answer.as_ref()?.request))
                .collect()
        };
        let known = known(&self.findings());
        for request in seen.into_iter().filter(|request| !known.contains(request)) {
            let events = self.events(request).await;
            if !events.iter().any(|recorded| recorded.event.body.is_terminal()) {
                self.findings().unacknowledged += 1;
            } else if let Err(broken) = invariants::of_log(&events).and_then(|state| self.tokens(&state)) {
                self.accuse(broken, shown(&events));
            }
        }
    }

    /// The log of a request that was judged has the same end still.
    async fn nothing_after(&self) {
        let ends: Vec<_> = self.findings().judged.iter().map(|judged| judged.last.clone()).collect();
        for (log, seq) in ends {
            if self.deployment.streams.log.last_seq(&log).await.is_ok_and(|last| last > seq) {
                let events = self.events(log.request).await;
                self.accuse(
                    broken(invariants::NOTHING_AFTER, format!("request {}", log.request)),
                    shown(&events),
                );
            }
        }
    }

    /// Judges a request, if it has ended and its log can be read.
    async fn judge(&self, reading: &Reading) -> bool {
        let answer = reading.answer.as_ref().expect("a reading with an answer");
        let log = &self.deployment.streams.log;
        let Ok(found) = log.find(answer.request).await else { return false };
        let Some(name) = found else {
            // Refused before it had a log.
            return answer.status != 200;
        };
        let Ok(events) = log.read(&name, 0).await else { return false };
        let Some(end) = events.last().filter(|last| last.event.body.is_terminal()) else { return false };
        let checked = invariants::of_log(&events).and_then(|state| {
            if reading.resumable && reading.end == End::Broken {
                return Err(broken(invariants::GOES_ON, format!("after {:?}", answer.text)));
            }
            match reading.end {
                End::Whole | End::Error if !excused(&state, answer) => invariants::of_answer(&state, answer)?,
                _ => invariants::of_part(&state, answer)?,
            }
            self.tokens(&state)
        });
        if let Err(broken) = checked {
            let read = format!("{:?}: {answer:?}", reading.end);
            self.accuse(broken, format!("request {}, read {read}\n{}", answer.request, shown(&events)));
        }
        let judged = Judged {
            reading: reading.clone(),
            owners: holders(&events, |body| match body {
                Body::Claimed(claimed) => Some(claimed.worker.to_string()),
                _ => None,
            }),
            prefillers: holders(&events, |body| match body {
                Body::PrefillClaimed(claimed) => Some(claimed.worker.to_string()),
                _ => None,
            }),
            ended_us: end.event.time_us,
            outcome: outcome(&end.event),
            last: (name, end.seq),
        };
        self.findings().judged.push(judged);
        true
    }

    fn tokens(&self, state: &Lifecycle) -> Result<(), Broken> {
        let asked: HashMap<_, _> =
            self.questions.iter().map(|question| (&question.prompt[..], &question.tokens[..])).collect();
        let Some(undisturbed) = asked.get(&state.accepted.prompt[..]) else {
            return Err(broken(invariants::SAME_TOKENS, "nobody has asked that"));
        };
        let same = invariants::of_tokens(state, undisturbed);
        if same.is_err() && !self.exact {
            self.findings().parted += 1;
            return Ok(());
        }
        same
    }
}

/// A gateway that ends tells its clients so, and its requests may end well all the same.
fn excused(state: &Lifecycle, answer: &crate::Answer) -> bool {
    let code = answer.error.as_ref().map(|error| &error["error"]["code"]);
    state.phase == Phase::Completed && code.is_some_and(|code| *code == "shutting_down")
        || answer.status != 200
}

fn holders(events: &[Recorded], holder: impl Fn(&Body) -> Option<String>) -> Vec<(u64, String)> {
    let claims =
        events.iter().filter_map(|recorded| Some((recorded.event.time_us, holder(&recorded.event.body)?)));
    claims.collect()
}

fn outcome(end: &Event) -> &'static str {
    match &end.body {
        Body::RequestCompleted(_) => "completed",
        Body::RequestCancelled(_) => "cancelled",
        Body::RequestFailed(failed) => match failed.code {
            FailureCode::TooManyAttempts => "too many attempts",
            FailureCode::DeadlineExceeded => "deadline exceeded",
            _ => "failed",
        },
        _ => "open",
    }
}
