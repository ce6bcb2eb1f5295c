//! Requests that were routed a moment ago: their workers' leases do not show them yet.

use super::cost::Given;
use forebay_schemas::ids::{RequestId, WorkerId};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::Instant;

/// How long a request counts that nobody has claimed. Then it has gone elsewhere, or will.
const UNCLAIMED_MAX: Duration = Duration::from_secs(2);

/// How long a lease may take to show a claim.
const SHOWN_AFTER: Duration = Duration::from_millis(60);

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct JustRouted(BTreeMap<RequestId, Routed>);

#[derive(Debug)]
struct Routed {
    worker: WorkerId,
    prefill_blocks: u32,
    until: Instant,
}

impl JustRouted {
    /// A request goes to a worker.
    pub(super) fn add(&mut self, request: RequestId, worker: WorkerId, prefill_blocks: u32, now: Instant) {
        self.0.insert(request, Routed { worker, prefill_blocks, until: now + UNCLAIMED_MAX });
    }

    /// Somebody has claimed it.
    pub(super) fn claimed(&mut self, request: RequestId, now: Instant) {
        if let Some(routed) = self.0.get_mut(&request) {
            routed.until = routed.until.min(now + SHOWN_AFTER);
        }
    }

    /// It has ended.
    pub(super) fn ended(&mut self, request: RequestId) {
        self.0.remove(&request);
    }

    /// What each worker was given. Requests that count no longer are forgotten.
    pub(super) fn by_worker(&mut self, now: Instant) -> BTreeMap<WorkerId, Given> {
        self.0.retain(|_, routed| routed.until > now);
        let mut all = BTreeMap::<_, Given>::new();
        for routed in self.0.values() {
            let given = all.entry(routed.worker.clone()).or_default();
            given.requests += 1;
            given.prefill_blocks += routed.prefill_blocks;
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_until_the_lease_shows_it() {
        let (mut routed, now) = (JustRouted::default(), Instant::now());
        let worker = WorkerId::new("a").unwrap();
        let (one, two) = (RequestId::new(), RequestId::new());
        routed.add(one, worker.clone(), 5, now);
        routed.add(two, worker.clone(), 7, now);
        assert_eq!(
            routed.by_worker(now),
            BTreeMap::from([(worker.clone(), Given { requests: 2, prefill_blocks: 12 })])
        );
        routed.claimed(one, now);
        assert_eq!(
            routed.by_worker(now + SHOWN_AFTER),
            BTreeMap::from([(worker, Given { requests: 1, prefill_blocks: 7 })])
        );
        routed.claimed(one, now + SHOWN_AFTER);
        let three = RequestId::new();
        routed.add(three, WorkerId::new("b").unwrap(), 1, now + SHOWN_AFTER);
        routed.ended(three);
        assert_eq!(routed.by_worker(now + UNCLAIMED_MAX), BTreeMap::new());
        assert!(routed.0.is_empty());
    }
}
