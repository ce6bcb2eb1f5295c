//! Who lives, as far as etcd tells. Etcd itself times the leases, so that nobody lapses while it is away; and for a
//! while after its return nobody is taken for gone, since workers must first find it again.

use crate::registry::Workers;
use forebay_schemas::{card::WorkerLease, ids::WorkerId};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;

/// Time after the return of etcd within which every worker is sure to have renewed its lease, or to have a new one.
const RETURN_GRACE: Duration = Duration::from_secs(4);

/// The workers that are known.
#[derive(Default)]
pub(super) struct Roster {
    known: BTreeMap<WorkerId, Arc<WorkerLease>>,
    /// Those of them that have no lease any more.
    gone: BTreeSet<WorkerId>,
    /// Nobody is dropped before.
    judged_from: Option<Instant>,
}

impl Roster {
    /// A worker has a lease.
    pub(super) fn present(&mut self, lease: WorkerLease) {
        self.gone.remove(&lease.worker);
        self.known.insert(lease.worker.clone(), Arc::new(lease));
    }

    /// A worker has none any more: it has resigned, or was not heard for the time of a lease.
    pub(super) fn gone(&mut self, worker: &str) {
        self.gone.extend(worker.parse());
    }

    /// Etcd is back.
    pub(super) fn back(&mut self, now: Instant) {
        self.judged_from = Some(now + RETURN_GRACE);
    }

    /// Drops who is gone, if it is time to judge, and says who is left.
    pub(super) fn living(&mut self, now: Instant) -> Workers {
        if self.judged_from.is_none_or(|from| now >= from) {
            self.judged_from = None;
            for worker in std::mem::take(&mut self.gone) {
                self.known.remove(&worker);
            }
        }
        Arc::new(self.known.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::{ids::ModelKey, task::Role};

    fn lease(worker: &str) -> WorkerLease {
        WorkerLease::of(worker.parse().unwrap(), Role::Decode, ModelKey::of("m"))
    }

    #[test]
    fn who_is_gone_when_etcd_returns_has_time_to_come_back() {
        let (mut roster, start) = (Roster::default(), Instant::now());
        let names = |workers: &Workers| workers.keys().map(ToString::to_string).collect::<Vec<_>>();
        for worker in ["a", "b", "c"] {
            roster.present(lease(worker));
        }
        roster.gone("c");
        assert_eq!(names(&roster.living(start)), ["a", "b"]);
        roster.back(start);
        roster.gone("a");
        roster.gone("b");
        let judged = start + RETURN_GRACE;
        assert_eq!(names(&roster.living(judged - Duration::from_millis(1))), ["a", "b"]);
        roster.present(lease("b"));
        assert_eq!(names(&roster.living(judged)), ["b"]);
        roster.gone("b");
        assert!(roster.living(judged).is_empty(), "and from then on at once");
    }
}
