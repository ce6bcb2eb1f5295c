//! What dead workers leave in their own queues goes to the shared ones, and what they told of their prefix caches is
//! dropped. Every gateway looks; twice does no harm.

use forebay_schemas::{card::WorkerLease, ids::WorkerId, task::Role};
use forebay_streams::{Streams, own_queues::Owner, registry::Workers, tasks::Presence};
use futures::{StreamExt, stream};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};
use tokio::{sync::watch, time::Instant};

/// How often the leases are looked at.
const LOOK: Duration = Duration::from_millis(100);

/// How often all queues are looked at: a lapse that nobody saw, or a task that was queued late.
const LOOK_AT_ALL: Duration = Duration::from_secs(5);

/// How long a worker has to answer.
const ANSWER: Duration = Duration::from_millis(300);

/// Pause before a worker is asked again, or its queue is closed again: a gateway that has not heard of its end may have
/// queued something meanwhile.
const AGAIN: Duration = Duration::from_secs(1);

/// How often a queue is closed.
const CLOSES: u32 = 2;

/// Silent workers are asked so often. One without a lease that never answers hangs.
const ASKED_MAX: u32 = 4;

/// Workers that are asked at once.
const AT_ONCE: usize = 32;

/// Workers whose leases have lapsed.
#[derive(Default)]
struct Lapsed {
    /// Of decode workers, as far as they were seen.
    living: BTreeSet<Owner>,
    gone: BTreeMap<Owner, Gone>,
}

#[derive(Clone, Copy)]
struct Gone {
    due: Instant,
    asked: u32,
    closed: u32,
}

impl Lapsed {
    /// Takes note of who lives, and of whose queues hold tasks. Returns whose turn it is.
    fn due(&mut self, workers: &Workers, filled: Vec<Owner>, now: Instant) -> Vec<Owner> {
        let owner = |lease: &WorkerLease| Owner { model: lease.model.clone(), worker: lease.worker.clone() };
        let decoders = workers.values().filter(|lease| lease.role == Role::Decode);
        let living: BTreeSet<Owner> = decoders.map(|lease| owner(lease)).collect();
        let lapsed = std::mem::take(&mut self.living).into_iter().chain(filled);
        for owner in lapsed.filter(|owner| !living.contains(owner)) {
            self.gone.entry(owner).or_insert(Gone { due: now, asked: 0, closed: 0 });
        }
        self.gone.retain(|owner, _| !living.contains(owner));
        self.living = living;
        self.gone.iter().filter(|(_, gone)| gone.due <= now).map(|(owner, _)| owner.clone()).collect()
    }

    /// A worker without a lease was asked. Whether its queue is to be closed.
    fn answered(&mut self, owner: &Owner, presence: Presence, now: Instant) -> bool {
        let Some(gone) = self.gone.get_mut(owner) else { return false };
        gone.due = now + AGAIN;
        match presence {
            Presence::Gone => true,
            // It will have a lease again.
            Presence::Answers => {
                gone.asked = 0;
                false
            }
            Presence::Silent => {
                gone.asked += 1;
                gone.asked >= ASKED_MAX
            }
        }
    }

    fn closed(&mut self, owner: &Owner) {
        if let Some(gone) = self.gone.get_mut(owner) {
            gone.closed += 1;
            if gone.closed >= CLOSES {
                self.gone.remove(owner);
            }
        }
    }
}

/// Looks after what is left behind, for as long as the gateway lives.
pub(crate) async fn sweep(streams: Streams, workers: watch::Receiver<Workers>) {
    let mut lapsed = Lapsed::default();
    let mut all_due = Instant::now() + LOOK_AT_ALL;
    loop {
        tokio::time::sleep(LOOK).await;
        let filled = match Instant::now() >= all_due {
            false => Vec::new(),
            true => {
                all_due = Instant::now() + LOOK_AT_ALL;
                streams.own_queues.filled().await.unwrap_or_else(|error| {
                    tracing::debug!(%error, "the workers' own queues are not known; looking again");
                    Vec::new()
                })
            }
        };
        let due = lapsed.due(&workers.borrow().clone(), filled, Instant::now());
        let answers = stream::iter(due)
            .map(|owner| async {
                let presence = streams.tasks.presence(&owner.worker, ANSWER).await;
                (owner, presence)
            })
            .buffered(AT_ONCE);
        let answers: Vec<_> = answers.collect().await;
        for (owner, presence) in answers {
            // While NATS has trouble, nobody is judged.
            let Ok(presence) = presence else { continue };
            if lapsed.answered(&owner, presence, Instant::now()) && close(&streams, &owner).await {
                lapsed.closed(&owner);
            }
        }
    }
}

/// Moves what is left, and drops what was told. Whether that is done.
async fn close(streams: &Streams, owner: &Owner) -> bool {
    let worker: &WorkerId = &owner.worker;
    let (closed, forgotten) =
        (streams.own_queues.close(owner).await, streams.cache_events.forget(owner).await);
    match (closed, forgotten) {
        (Ok(moved), Ok(())) => {
            if moved > 0 {
                tracing::info!(%worker, moved, "tasks of a worker that is gone are for all workers now");
            }
            true
        }
        (Err(error), _) | (_, Err(error)) => {
            tracing::debug!(%worker, %error, "the queue of a worker that is gone is not closed yet");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::ids::ModelKey;
    use std::sync::Arc;

    fn owner(name: &str) -> Owner {
        Owner { model: ModelKey::of("m"), worker: WorkerId::new(name).unwrap() }
    }

    fn workers(names: &[&str]) -> Workers {
        let lease = |name: &&str| {
            let worker = WorkerId::new(*name).unwrap();
            (worker.clone(), Arc::new(crate::fleet::decode_lease(worker)))
        };
        Arc::new(names.iter().map(lease).collect())
    }

    #[test]
    fn who_is_gone_is_swept_twice() {
        let (mut lapsed, now) = (Lapsed::default(), Instant::now());
        assert_eq!(lapsed.due(&workers(&["a", "b"]), vec![owner("a")], now), []);
        assert_eq!(lapsed.due(&workers(&["b"]), vec![], now), [owner("a")]);
        assert!(lapsed.answered(&owner("a"), Presence::Gone, now));
        lapsed.closed(&owner("a"));
        assert_eq!(lapsed.due(&workers(&["b"]), vec![], now), []);
        assert_eq!(lapsed.due(&workers(&["b"]), vec![], now + AGAIN), [owner("a")]);
        lapsed.closed(&owner("a"));
        assert_eq!(lapsed.due(&workers(&["b"]), vec![], now + AGAIN * 9), []);
        // Something was queued late.
        assert_eq!(lapsed.due(&workers(&["b"]), vec![owner("a"), owner("b")], now), [owner("a")]);
    }

    #[test]
    fn who_answers_or_has_a_lease_again_is_left_alone() {
        let (mut lapsed, mut now) = (Lapsed::default(), Instant::now());
        lapsed.due(&workers(&["a"]), vec![], now);
        for presence in [Presence::Silent, Presence::Silent, Presence::Silent, Presence::Answers] {
            assert_eq!(lapsed.due(&workers(&[]), vec![], now), [owner("a")]);
            assert!(!lapsed.answered(&owner("a"), presence, now));
            now += AGAIN;
        }
        for asked in 1..=ASKED_MAX {
            assert_eq!(lapsed.answered(&owner("a"), Presence::Silent, now), asked == ASKED_MAX);
        }
        assert_eq!(lapsed.due(&workers(&["a"]), vec![], now + AGAIN), []);
        assert!(!lapsed.answered(&owner("a"), Presence::Gone, now), "it is back");
    }
}
