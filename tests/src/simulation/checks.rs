//! What must hold once it is calm again: the invariants of ARCHITECTURE.md, under its numbers.

use super::{
    client::{Ending, Read},
    site::Site,
};
use crate::invariants;
use forebay_schemas::{
    dead_letter::DeadLetter,
    event::{Body, Event, FailureCode, FinishReason},
    ids::{RequestId, WorkerId},
    lifecycle::{Lifecycle, Phase},
    task::Role,
};
use forebay_streams::{
    environment::Condition,
    log::{LogRef, Recorded},
};
use forebay_workers::{
    engine::{Draw, Engine, Row},
    output::OutputText,
};
use std::{collections::BTreeMap, time::Duration};

/// How long after the end of a log, in calm, its reader may have to wait: the longest silence without a probe, doubled
/// for one that began before, and the pauses of a slow client.
const TOLD_MAX: Duration = Duration::from_secs(16);

/// How requests end that were tried as often as they may be.
const GIVEN_UP: [FailureCode; 2] = [FailureCode::EngineFailed, FailureCode::TooManyAttempts];

/// A promise that was not kept, in words.
pub(super) type Violation = String;

/// All logs, as they are.
pub(super) type Logs = BTreeMap<LogRef, Vec<Recorded>>;

/// All logs that were begun.
pub(super) async fn logs(site: &Site) -> Logs {
    let begun: Vec<LogRef> = site.world.record().logs.keys().cloned().collect();
    let mut logs = Logs::new();
    for log in begun {
        let events = site.world.streams.log.read(&log, 0).await.expect("memory answers");
        if !events.is_empty() {
            logs.insert(log, events);
        }
    }
    logs
}

/// What keeps the simulation from being over, if anything does: 1, 5 and 7.
pub(super) async fn unfinished(site: &Site, logs: &Logs) -> Option<Violation> {
    let queued = |role| site.world.streams.tasks.depth(role, &site.card().key);
    for role in [Role::Decode, Role::Prefill] {
        let depth = queued(role).await.expect("memory answers");
        if depth.lag() > 0 {
            return Some(format!("5: a task is left in the {} queue: {depth:?}", role.as_str()));
        }
    }
    if let Some(owner) = site.world.streams.own_queues.filled().await.expect("memory answers").first() {
        return Some(format!("5: a task is left in the queue of {}", owner.worker));
    }
    for (log, events) in logs {
        if !events.iter().any(|recorded| recorded.event.body.is_terminal()) && !is_orphan(site, log, events) {
            return Some(format!("1: {log} has not ended"));
        }
    }
    let letters = site.world.streams.dead_letters.list().await.expect("memory answers");
    if let Some(problem) = unburied(site, logs, &letters) {
        return Some(problem);
    }
    let workers = site.world.streams.registry.workers().await.expect("memory answers").borrow().clone();
    for gateway in site.gateways() {
        let held = gateway.held().await;
        if held != (0, 0) {
            return Some(format!("5: {held:?} requests are admitted, and logs followed, at an idle gateway"));
        }
    }
    let held = workers.values().find(|worker| worker.free_slots != worker.slots);
    if let Some(held) = held {
        return Some(format!("5: {} holds {} slots", held.worker, held.slots - held.free_slots));
    }
    None
}

/// A log that its gateway began and, being dead, could not queue: nobody was told that it is accepted. (Asked again
/// under its key, another gateway queues it.)
fn is_orphan(site: &Site, log: &LogRef, events: &[Recorded]) -> bool {
    let record = site.world.record();
    events.len() == 1 && record.logs[log].condition() == Condition::Dead && !record.queued.contains(log)
}

/// What each log and each answer must be like.
pub(super) fn violations(site: &Site, logs: &Logs, reads: &[Read], letters: &[DeadLetter]) -> Vec<Violation> {
    let mut found = one_log(logs, reads);
    let mut states = BTreeMap::new();
    for (log, events) in logs {
        if is_orphan(site, log, events) {
            continue;
        }
        match invariants::of_log(events) {
            Ok(state) => {
                found.extend(undisturbed(site, &state).map(|problem| format!("{log}: {problem}")));
                found.extend(left_alone(events, &state, reads).map(|problem| format!("{log}: {problem}")));
                states.insert(log.request, state);
            }
            Err(broken) => found.push(format!("{log}: {broken}")),
        }
        found.extend(one_hand(site, events).map(|problem| format!("{log}: {problem}")));
        found.extend(sealed_bytes(events).map(|problem| format!("{log}: {problem}")));
    }
    found.extend(buried(site, logs, &states, letters));
    for read in reads {
        found.extend(read.problem.clone());
        let Some(answer) = &read.answer else { continue };
        let Some(state) = states.get(&answer.request) else {
            if answer.status == 200 {
                found.push(format!("1: {} was accepted and has no log that ended", answer.request));
            }
            continue;
        };
        found.extend(late(site, logs_of(logs, state), read));
        // Who left, was cut off, or was told of an error has a part of it; who comes back has all.
        let part = || {
            let same = match read.detached && read.ending == Ending::Whole && answer.status == 200 {
                true => state.text == answer.text && state.phase != Phase::Completed,
                false => state.text.starts_with(&answer.text),
            };
            (!same).then(|| format!("2: read {:?}, logged {:?}", answer.text, state.text))
        };
        let problem = match read.ending {
            Ending::Whole if answer.status == 200 && answer.error.is_none() => match answer.finish {
                Some(_) if read.is_whole() => {
                    invariants::of_answer(state, answer).err().map(|broken| broken.to_string())
                }
                _ => Some("2: the answer broke off".to_owned()),
            },
            Ending::Whole | Ending::Left | Ending::Broken => part(),
        };
        found.extend(problem.map(|problem| format!("{}: {problem}", answer.request)));
    }
    found
}

fn logs_of<'a>(logs: &'a Logs, state: &Lifecycle) -> &'a [Recorded] {
    logs.iter().find(|(log, _)| log.request == state.request).map_or(&[], |(_, events)| events)
}

/// 2, in time: once a log has ended and it is calm, its reader is told soon.
fn late(site: &Site, events: &[Recorded], read: &Read) -> Option<Violation> {
    let record = site.world.record();
    let stored = record.stored.get(&events.last()?.seq)?.0.max(record.calm?).max(read.asked);
    let took = read.ended.saturating_duration_since(stored);
    let request = read.answer.as_ref()?.request;
    (took > TOLD_MAX).then(|| format!("{request}: 2: the reader was told {took:?} after the end"))
}

/// A key names one request, at all gateways; another one only after one for which nothing was done.
fn one_log(logs: &Logs, reads: &[Read]) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut of_key: BTreeMap<&str, Vec<(&LogRef, &[Recorded])>> = BTreeMap::new();
    for (log, events) in logs {
        if let Body::RequestAccepted(accepted) = &events[0].event.body
            && let Some(fingerprint) = &accepted.fingerprint
        {
            of_key.entry(fingerprint).or_default().push((log, events));
        }
    }
    for logs in of_key.values() {
        let nothing_done = |events: &&[Recorded]| {
            let end = events.last().map(|recorded| &recorded.event.body);
            matches!(end, Some(Body::RequestFailed(failed)) if failed.code == FailureCode::QueueUnavailable)
        };
        let begun: Vec<&LogRef> =
            logs.iter().filter(|(_, events)| !nothing_done(events)).map(|(log, _)| *log).collect();
        if begun.len() > 1 {
            found.push(format!("one key has the requests {begun:?}"));
        }
    }
    for (read, other) in reads.iter().flat_map(|read| reads.iter().map(move |other| (read, other))) {
        let request = |read: &Read| {
            let answer = read.answer.as_ref()?;
            (read.ending == Ending::Whole && answer.status == 200).then_some(answer.request)
        };
        if read.key.is_some()
            && read.key == other.key
            && let (Some(one), Some(two)) = (request(read), request(other))
            && one < two
        {
            found.push(format!("{:?} leads to {one} and to {two}", read.key));
        }
    }
    found
}

/// A dead letter is kept of what was tried as often as it may be, and of nothing else.
fn buried(
    site: &Site,
    logs: &Logs,
    states: &BTreeMap<RequestId, Lifecycle>,
    letters: &[DeadLetter],
) -> Vec<Violation> {
    let mut found = Vec::new();
    for letter in letters {
        let failed = states.get(&letter.request).and_then(|state| state.failure.as_ref());
        let same = letter
            .code
            .is_none_or(|code| GIVEN_UP.contains(&code) && Some(code) == failed.map(|failed| failed.code));
        if !same {
            let found_instead = format!("{}: {letter:?}, but the log says {failed:?}", letter.request);
            found.push(found_instead);
        }
    }
    found.extend(unburied(site, logs, letters));
    found
}

/// What was tried as often as it may be, and has no dead letter. Workers keep them as far as that is possible, since the
/// log has the rest; gateways do not rest until it is done.
fn unburied(site: &Site, logs: &Logs, letters: &[DeadLetter]) -> Option<Violation> {
    let record = site.world.record();
    logs.iter().find_map(|(log, events)| {
        let Recorded { seq, event } = events.last()?;
        let Body::RequestFailed(failed) = &event.body else { return None };
        if !GIVEN_UP.contains(&failed.code) {
            return None;
        }
        let (_, by) = record.stored.get(seq)?;
        let lost = !by.starts_with("gateway")
            && (record.unburied.contains(&log.request) || record.gone.contains(by));
        let kept = letters.iter().any(|letter| {
            letter.request == log.request && letter.role == Role::Decode && letter.code == Some(failed.code)
        });
        (!kept && !lost).then(|| format!("{log}: {failed:?} by {by}, and there is no dead letter"))
    })
}

/// Nobody cancels what goes on without its client.
fn left_alone(events: &[Recorded], state: &Lifecycle, reads: &[Read]) -> Option<Violation> {
    let Body::RequestCancelled(cancelled) = &events.last()?.event.body else { return None };
    if !state.accepted.detached {
        return None;
    }
    let cancelled = &cancelled.cause;
    let accepted = reads
        .iter()
        .filter_map(|read| read.answer.as_ref())
        .any(|answer| answer.request == state.request && answer.status == 200);
    (accepted || cancelled == "client disconnected").then(|| format!("it was cancelled: {cancelled}"))
}

/// 3, by who really appended: work on an attempt is stored by the process that claimed it.
fn one_hand(site: &Site, events: &[Recorded]) -> Option<Violation> {
    let record = site.world.record();
    let hand = |worker: &WorkerId| record.workers.get(worker).map(|link| link.name.clone());
    let (mut decoder, mut prefiller) = (None, None);
    for Recorded { seq, event } in events {
        let expected = match &event.body {
            Body::Claimed(claimed) => {
                decoder = hand(&claimed.worker);
                &decoder
            }
            Body::PrefillClaimed(claimed) => {
                prefiller = hand(&claimed.worker);
                &prefiller
            }
            Body::KvReady(_) | Body::PrefillCompleted(_) => &prefiller,
            Body::PrefillQueued(_)
            | Body::KvTransferred(_)
            | Body::TokensGenerated(_)
            | Body::RequestCompleted(_)
            | Body::Released(_) => &decoder,
            Body::RequestAccepted(_)
            | Body::KvLost(_)
            | Body::RequestFailed(_)
            | Body::RequestCancelled(_) => continue,
        };
        let by = record.stored.get(seq).map(|(_, by)| by.clone());
        if by != *expected {
            let name = event.body.name();
            return Some(format!("3: {name} at {seq} is by {by:?}, the claim by {expected:?}"));
        }
    }
    None
}

/// 4: the tokens and the text of a run without trouble.
fn undisturbed(site: &Site, state: &Lifecycle) -> Option<Violation> {
    let seed = state.accepted.sampling.seed;
    let poison = site.plan().poison.as_ref();
    if let Some(failure) = &state.failure
        && failure.code == FailureCode::EngineFailed
        && !poison.is_some_and(|poison| poison.explains(seed, &failure.message))
    {
        return Some(format!("6: the engine failed: {}", failure.message));
    }
    let expected = tokens(site, state);
    if !expected.starts_with(&state.tokens) {
        return Some(format!("4: tokens {:?}, undisturbed {expected:?}", state.tokens));
    }
    let accepted = Event {
        request: state.request,
        attempt: 0,
        time_us: state.accepted_us,
        body: Body::RequestAccepted((*state.accepted).clone()),
    };
    let fresh = Lifecycle::begin(&accepted).expect("it begins a log");
    let eos = site.card().eos_token_ids.clone().into();
    let mut output = OutputText::resume(Site::tokenizer(), eos, &fresh);
    let mut text = String::new();
    for token in &state.tokens {
        output.push(*token);
        text.push_str(&output.release());
    }
    let whole = state.phase == Phase::Completed;
    let same = if whole { text == state.text } else { text.starts_with(&state.text) };
    if !same {
        return Some(format!("4: text {:?}, undisturbed {text:?}", state.text));
    }
    if whole && (output.finish() != state.finish || state.finish.is_none()) {
        return Some(format!("4: finished by {:?}, undisturbed {:?}", state.finish, output.finish()));
    }
    let all = state.tokens.len() == state.accepted.max_tokens as usize;
    (state.finish == Some(FinishReason::Length) && !all)
        .then(|| format!("4: {} of {} tokens", state.tokens.len(), state.accepted.max_tokens))
}

fn tokens(site: &Site, state: &Lifecycle) -> Vec<u32> {
    let mut engine = site.plan().engine();
    let sampling = &state.accepted.sampling;
    let draw = |index| Draw::new(sampling, index);
    let prompt = &state.accepted.prompt;
    let first = engine.prefill(0, 0, prompt, Some(draw(0))).expect("it fits").expect("a token is drawn");
    let (mut tokens, mut drawn) = (vec![first.token], Vec::new());
    for index in 1..state.accepted.max_tokens {
        let position = prompt.len() as u32 + index - 1;
        let row = Row { slot: 0, position, token: tokens[index as usize - 1], draw: draw(index) };
        engine.decode(&[row], &[0; 8], &mut drawn).expect("it fits");
        tokens.push(drawn[0].token);
    }
    tokens
}

/// 6: nothing here damages memory, so that KV under its lease is whole, and KV that was read is good.
fn sealed_bytes(events: &[Recorded]) -> Option<Violation> {
    events.iter().find_map(|Recorded { seq, event }| {
        let reason = match &event.body {
            Body::KvLost(lost) => &lost.reason,
            Body::Released(released) => &released.reason,
            Body::RequestFailed(failed) => &failed.message,
            _ => return None,
        };
        let damaged = reason.contains("does not match") || reason.contains("is damaged");
        damaged.then(|| format!("6: {reason} at {seq}"))
    })
}
