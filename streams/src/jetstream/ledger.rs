//! Who lives, as far as renewals tell. Time runs only while renewals can be heard: a server that is away takes nobody
//! with it.

use crate::registry::Workers;
use forebay_schemas::{card::WorkerLease, ids::WorkerId};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::Instant;

/// Time after the return of the server within which every worker is sure to be connected again, and to renew.
const RETURN_GRACE: Duration = Duration::from_millis(2500);

/// Leases, and when each was renewed last.
pub(super) struct Ledger {
    lease_time: Duration,
    leases: BTreeMap<WorkerId, (Arc<WorkerLease>, Instant)>,
    hearing: Hearing,
}

/// Whether renewals are heard.
enum Hearing {
    Undisturbed,
    Away,
    /// They are again; nobody is judged before this.
    Back(Instant),
}

impl Ledger {
    /// One with no leases.
    pub(super) fn new(lease_time: Duration) -> Ledger {
        Ledger { lease_time, leases: BTreeMap::new(), hearing: Hearing::Undisturbed }
    }

    /// A worker has said that it lives.
    pub(super) fn renewed(&mut self, lease: WorkerLease, now: Instant) {
        self.leases.insert(lease.worker.clone(), (Arc::new(lease), now));
    }

    /// A worker has said that it does not.
    pub(super) fn resigned(&mut self, worker: &str) {
        self.leases.retain(|id, _| id.as_str() != worker);
    }

    /// Nothing is heard from here on.
    pub(super) fn away(&mut self) {
        self.hearing = Hearing::Away;
    }

    /// Renewals are heard again.
    pub(super) fn back(&mut self, now: Instant) {
        self.hearing = Hearing::Back(now + self.lease_time + RETURN_GRACE);
    }

    /// Drops those whose time is up, and says who is left.
    pub(super) fn living(&mut self, now: Instant) -> Workers {
        let judges = match self.hearing {
            Hearing::Undisturbed => true,
            Hearing::Away => false,
            Hearing::Back(from) => now >= from,
        };
        if judges {
            self.leases.retain(|_, (_, renewed)| now.duration_since(*renewed) < self.lease_time);
        }
        let living = self.leases.iter().map(|(worker, (lease, _))| (worker.clone(), lease.clone()));
        Arc::new(living.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::{ids::ModelKey, task::Role};

    const LEASE: Duration = Duration::from_secs(1);

    fn lease(worker: &str) -> WorkerLease {
        WorkerLease::of(worker.parse().unwrap(), Role::Decode, ModelKey::of("m"))
    }

    fn names(workers: &Workers) -> Vec<&str> {
        workers.keys().map(WorkerId::as_str).collect()
    }

    #[test]
    fn who_does_not_renew_lapses() {
        let (mut ledger, start) = (Ledger::new(LEASE), Instant::now());
        ledger.renewed(lease("a"), start);
        ledger.renewed(lease("b"), start + LEASE / 2);
        assert_eq!(names(&ledger.living(start + LEASE - Duration::from_millis(1))), ["a", "b"]);
        assert_eq!(names(&ledger.living(start + LEASE)), ["b"]);
        ledger.resigned("b");
        assert!(ledger.living(start + LEASE).is_empty());
    }

    #[test]
    fn nobody_lapses_while_nothing_is_heard_nor_just_after() {
        let (mut ledger, start) = (Ledger::new(LEASE), Instant::now());
        ledger.renewed(lease("a"), start);
        ledger.renewed(lease("b"), start);
        ledger.away();
        let back = start + LEASE * 20;
        assert_eq!(names(&ledger.living(back)), ["a", "b"]);
        ledger.back(back);
        let judged = back + LEASE + RETURN_GRACE;
        ledger.renewed(lease("b"), judged - LEASE / 2);
        assert_eq!(names(&ledger.living(judged - Duration::from_millis(1))), ["a", "b"]);
        assert_eq!(names(&ledger.living(judged)), ["b"], "who has not come back by now is gone");
    }
}
