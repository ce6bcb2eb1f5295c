//! Who holds which task, and which of the holders has died: pure decisions over what was heard and when.
//!
//! A worker that makes progress is alive: its events say so. One that falls silent is asked. If nobody is at the other
//! end, twice, it has died; if somebody is and does not answer for as long as a lease, it has frozen or is cut off.
//! While this gateway has trouble of its own with NATS, nobody is judged. A wrong verdict costs a redelivery and never
//! a wrong log: see ARCHITECTURE.md.

use forebay_schemas::{
    event::{Body, Event},
    ids::{RequestId, WorkerId},
    task::Role,
};
use forebay_streams::tasks::Presence;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};
use tokio::time::Instant;

/// Silence after which a worker is asked whether it is there.
const SILENCE: Duration = Duration::from_millis(250);

/// Time between two questions to a worker that gives no sign.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Questions in a row to which nobody was there.
const GONE_TIMES: u32 = 2;

/// After trouble with NATS: time that workers get to connect again before they are judged.
const SETTLE: Duration = Duration::from_millis(2500);

/// A task in a worker's hands.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    worker: WorkerId,
    ack_subject: String,
}

/// What is known of a worker that holds a task.
#[derive(Debug)]
struct Holder {
    tasks: BTreeSet<(RequestId, Role)>,
    heard: Instant,
    asked: Option<Instant>,
    gone: u32,
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Owners {
    patience: Duration,
    held: BTreeMap<(RequestId, Role), Held>,
    holders: BTreeMap<WorkerId, Holder>,
    trouble: Option<Instant>,
}

impl Owners {
    /// Nobody holds anything yet. A worker that does not answer for `patience` counts as dead.
    pub(super) fn new(patience: Duration) -> Owners {
        Owners { patience, held: BTreeMap::new(), holders: BTreeMap::new(), trouble: None }
    }

    /// Takes note of an event.
    pub(super) fn observe(&mut self, event: &Event, now: Instant) {
        let request = event.request;
        match &event.body {
            Body::Claimed(claimed) => {
                // What an earlier attempt asked for is void.
                self.drop_task(request, Role::Prefill);
                self.take(request, Role::Decode, &claimed.worker, &claimed.ack_subject, now);
            }
            Body::PrefillClaimed(claimed) => {
                self.take(request, Role::Prefill, &claimed.worker, &claimed.ack_subject, now);
            }
            Body::KvReady(_) => self.heard_of(request, Role::Prefill, now),
            Body::PrefillCompleted(_) => {
                self.heard_of(request, Role::Prefill, now);
                self.drop_task(request, Role::Prefill);
            }
            Body::KvLost(_) => self.drop_task(request, Role::Prefill),
            Body::PrefillQueued(_) | Body::KvTransferred(_) | Body::TokensGenerated(_) => {
                self.heard_of(request, Role::Decode, now);
            }
            Body::Released(_)
            | Body::RequestCompleted(_)
            | Body::RequestFailed(_)
            | Body::RequestCancelled(_) => self.forget(request),
            Body::RequestAccepted(_) => {}
        }
    }

    /// A request is no longer looked after here.
    pub(super) fn forget(&mut self, request: RequestId) {
        self.drop_task(request, Role::Decode);
        self.drop_task(request, Role::Prefill);
    }

    /// Who is to be asked now.
    pub(super) fn silent(&mut self, now: Instant) -> Vec<WorkerId> {
        let mut silent = Vec::new();
        for (worker, holder) in &mut self.holders {
            let due = holder.asked.is_none_or(|asked| now >= asked + ASK_AGAIN);
            if due && now >= holder.heard + SILENCE {
                holder.asked = Some(now);
                silent.push(worker.clone());
            }
        }
        silent
    }

    /// NATS did not answer this gateway.
    pub(super) fn trouble(&mut self, now: Instant) {
        self.trouble = Some(now);
        self.holders.values_mut().for_each(|holder| holder.gone = 0);
    }

    /// What came of asking. Returns where the tasks of a worker that has died are to be given back.
    pub(super) fn answered(&mut self, worker: &WorkerId, presence: Presence, now: Instant) -> Vec<String> {
        let settled = self.trouble.is_none_or(|trouble| now >= trouble + SETTLE);
        let Some(holder) = self.holders.get_mut(worker) else { return Vec::new() };
        match presence {
            Presence::Answers => {
                holder.heard = now;
                holder.gone = 0;
            }
            Presence::Gone => holder.gone += 1,
            Presence::Silent => holder.gone = 0,
        }
        let since = self.trouble.map_or(holder.heard, |trouble| holder.heard.max(trouble));
        let dead = holder.gone >= GONE_TIMES || now >= since + self.patience;
        if settled && dead { self.bury(worker) } else { Vec::new() }
    }

    fn bury(&mut self, worker: &WorkerId) -> Vec<String> {
        let Some(holder) = self.holders.remove(worker) else { return Vec::new() };
        holder.tasks.iter().filter_map(|task| self.held.remove(task)).map(|held| held.ack_subject).collect()
    }

    fn take(&mut self, request: RequestId, role: Role, worker: &WorkerId, ack_subject: &str, now: Instant) {
        self.drop_task(request, role);
        let held = Held { worker: worker.clone(), ack_subject: ack_subject.to_owned() };
        self.held.insert((request, role), held);
        let holder = self.holders.entry(worker.clone()).or_insert_with(|| Holder {
            tasks: BTreeSet::new(),
            heard: now,
            asked: None,
            gone: 0,
        });
        holder.tasks.insert((request, role));
        holder.heard = now;
        holder.gone = 0;
    }

    fn drop_task(&mut self, request: RequestId, role: Role) {
        let Some(held) = self.held.remove(&(request, role)) else { return };
        let Some(holder) = self.holders.get_mut(&held.worker) else { return };
        holder.tasks.remove(&(request, role));
        if holder.tasks.is_empty() {
            self.holders.remove(&held.worker);
        }
    }

    fn heard_of(&mut self, request: RequestId, role: Role, now: Instant) {
        if let Some(held) = self.held.get(&(request, role))
            && let Some(holder) = self.holders.get_mut(&held.worker)
        {
            holder.heard = now;
            holder.gone = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::event::{Claimed, PrefillClaimed, ReleaseCause, Released, TokensGenerated};

    const PATIENCE: Duration = Duration::from_millis(1500);

    fn worker(name: &str) -> WorkerId {
        WorkerId::new(name).unwrap()
    }

    fn event(request: RequestId, body: Body) -> Event {
        Event { request, attempt: 1, time_us: 0, body }
    }

    fn claimed(request: RequestId, by: &str) -> Event {
        let ack_subject = format!("ack.{request}");
        event(request, Body::Claimed(Claimed { worker: worker(by), ack_subject, delivery: 1, engine: None }))
    }

    fn token(request: RequestId) -> Event {
        let tokens = TokensGenerated {
            first_index: 0,
            tokens: vec![1],
            text: String::new(),
            cached_tokens: 0,
            logprobs: Vec::new(),
        };
        event(request, Body::TokensGenerated(tokens))
    }

    /// Two requests of one worker, at a moment from which time is counted.
    fn two() -> (Owners, [RequestId; 2], Instant) {
        let (mut owners, now) = (Owners::new(PATIENCE), Instant::now());
        let requests = [RequestId::new(), RequestId::new()];
        requests.iter().for_each(|request| owners.observe(&claimed(*request, "w"), now));
        (owners, requests, now)
    }

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn progress_is_a_sign_of_life() {
        let (mut owners, requests, now) = two();
        assert!(owners.silent(now + ms(200)).is_empty());
        owners.observe(&token(requests[0]), now + ms(200));
        assert!(owners.silent(now + ms(400)).is_empty());
        assert_eq!(owners.silent(now + ms(500)), [worker("w")]);
        assert!(owners.silent(now + ms(510)).is_empty(), "it was just asked");
    }

    #[test]
    fn a_worker_that_is_gone_twice_has_died_with_all_its_tasks() {
        let (mut owners, requests, now) = two();
        let mut expected = requests.map(|request| format!("ack.{request}")).to_vec();
        expected.sort();
        assert!(owners.answered(&worker("w"), Presence::Gone, now + ms(300)).is_empty());
        let mut given_back = owners.answered(&worker("w"), Presence::Gone, now + ms(500));
        given_back.sort();
        assert_eq!(given_back, expected);
        assert!(owners.answered(&worker("w"), Presence::Gone, now + ms(700)).is_empty(), "once");
        assert!(owners.silent(now + ms(5000)).is_empty());
    }

    #[test]
    fn a_worker_that_does_not_answer_has_frozen_and_one_that_does_is_busy() {
        let (mut owners, _, now) = two();
        assert!(owners.answered(&worker("w"), Presence::Silent, now + ms(500)).is_empty());
        assert!(owners.answered(&worker("w"), Presence::Answers, now + ms(1400)).is_empty());
        assert!(owners.answered(&worker("w"), Presence::Silent, now + ms(2000)).is_empty());
        assert_eq!(owners.answered(&worker("w"), Presence::Silent, now + ms(2900)).len(), 2);
    }

    #[test]
    fn nobody_is_judged_while_nats_is_away() {
        let (mut owners, _, now) = two();
        owners.trouble(now + ms(1000));
        for at in [1100, 1400, 3400] {
            assert!(owners.answered(&worker("w"), Presence::Gone, now + ms(at)).is_empty());
        }
        assert_eq!(owners.answered(&worker("w"), Presence::Gone, now + ms(3600)).len(), 2);
    }

    #[test]
    fn what_changes_hands_or_ends_is_no_longer_theirs() {
        let (mut owners, [one, two], now) = two();
        owners.observe(&claimed(one, "other"), now);
        let released = Released {
            worker: worker("w"),
            cause: ReleaseCause::Drained,
            reason: String::new(),
            kv: None,
            cached_tokens: 0,
        };
        owners.observe(&event(two, Body::Released(released)), now);
        for at in [300, 600] {
            assert!(owners.answered(&worker("w"), Presence::Gone, now + ms(at)).is_empty());
        }
        assert_eq!(owners.silent(now + ms(900)), [worker("other")]);
        owners.forget(one);
        assert!(owners.silent(now + ms(9000)).is_empty());
    }

    #[test]
    fn a_prefill_is_held_besides_the_request() {
        let (mut owners, [one, _], now) = two();
        let prefill = PrefillClaimed { worker: worker("p"), ack_subject: "ack.prefill".into(), delivery: 1 };
        owners.observe(&event(one, Body::PrefillClaimed(prefill)), now);
        owners.answered(&worker("p"), Presence::Gone, now + ms(300));
        assert_eq!(owners.answered(&worker("p"), Presence::Gone, now + ms(500)), ["ack.prefill"]);
        assert_eq!(owners.silent(now + ms(900)), [worker("w")]);
    }
}
