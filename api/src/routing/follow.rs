//! Keeps the index: reads what workers tell, reads again what was missed, and forgets workers that are gone.

use super::SharedIndex;
use forebay_schemas::{ids::WorkerId, task::Role};
use forebay_streams::{
    cache_events::{CacheEvents, CacheFollow, Heard, Told, all_told},
    own_queues::Owner,
    registry::Workers,
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{sync::watch, time::Instant};

/// Pause before a stream that could not be read is read again.
const READ_RETRY: Duration = Duration::from_millis(500);

/// How often the index is compared with the leases.
const TEND: Duration = Duration::from_millis(250);

/// Pause before a worker of which nothing is known is read again; doubles up to [`REREAD_MAX`].
const REREAD: Duration = Duration::from_millis(500);

/// The longest such pause.
const REREAD_MAX: Duration = Duration::from_secs(60);

/// Takes in what workers tell, for as long as it is polled.
pub(super) async fn follow(events: Arc<dyn CacheEvents>, index: SharedIndex) {
    loop {
        let mut follow = match CacheFollow::start(events.clone()).await {
            Ok(follow) => follow,
            Err(error) => {
                tracing::debug!(%error, "the events of prefix caches can't be followed; trying again");
                tokio::time::sleep(READ_RETRY).await;
                continue;
            }
        };
        loop {
            match follow.next().await {
                Ok(Heard::Events(told)) => take_in(&index, &told),
                Ok(Heard::Anew) => index.lock().expect("no panics while held").clear(),
                Err(error) => {
                    tracing::debug!(%error, "the events of prefix caches can't be read; trying again");
                    tokio::time::sleep(READ_RETRY).await;
                }
            }
        }
    }
}

fn take_in(index: &SharedIndex, told: &[Told]) {
    for told in told {
        // One by one: a request must not wait for many.
        let mut index = index.lock().expect("no panics while held");
        match &told.event {
            Some(event) => {
                if !index.apply(event) {
                    tracing::debug!(worker = %event.worker, number = event.number, "an event was missed");
                }
            }
            None => index.lose(&told.of.worker),
        }
    }
}

/// Forgets workers without a lease, and reads again what is kept of those that have one and are not known, for as long as
/// it is polled.
pub(super) async fn tend(
    events: Arc<dyn CacheEvents>,
    index: SharedIndex,
    workers: watch::Receiver<Workers>,
) {
    let mut rereads: BTreeMap<WorkerId, (Instant, Duration)> = BTreeMap::new();
    loop {
        tokio::time::sleep(TEND).await;
        let living = workers.borrow().clone();
        let unknown = unknown(&index, &living);
        rereads.retain(|worker, _| unknown.iter().any(|of| of.worker == *worker));
        for of in unknown {
            let now = Instant::now();
            let (due, pause) = *rereads.entry(of.worker.clone()).or_insert((now, REREAD));
            if now < due {
                continue;
            }
            rereads.insert(of.worker.clone(), (now + pause, (pause * 2).min(REREAD_MAX)));
            match all_told(events.as_ref(), &of).await {
                Ok(told) => take_in(&index, &told),
                Err(error) => tracing::debug!(worker = %of.worker, %error, "its events can't be read"),
            }
        }
    }
}

/// Forgets who has no lease, and tells of whom nothing is known.
fn unknown(index: &SharedIndex, living: &Workers) -> Vec<Owner> {
    let mut index = index.lock().expect("no panics while held");
    let gone: Vec<WorkerId> = index
        .workers()
        .filter(|(worker, _)| !living.contains_key(*worker))
        .map(|(worker, _)| worker.clone())
        .collect();
    gone.iter().for_each(|worker| index.remove(worker));
    let known: BTreeMap<&WorkerId, bool> =
        index.workers().map(|(worker, held)| (worker, held.is_some())).collect();
    let wanted = living.values().filter(|lease| lease.role == Role::Decode);
    let unknown = wanted.filter(|lease| !known.get(&lease.worker).copied().unwrap_or(false));
    unknown.map(|lease| Owner { model: lease.model.clone(), worker: lease.worker.clone() }).collect()
}
