//! Requests that were routed a moment ago: their workers' leases do not show them yet.

use forebay_schemas::ids::{RequestId, WorkerId};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::Instant;

/// How long a request counts that nobody has claimed. Then it has gone elsewhere, or will.
const UNCLAIMED_MAX: Duration = Duration::from_secs(2);

/// How long a lease may take to show a claim.
const SHOWN_AFTER: Duration = Duration::from_millis(60);

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct JustRouted(BTreeMap<RequestId, (WorkerId, Instant)>);

impl JustRouted {
    /// A request goes to a worker.
    pub(super) fn add(&mut self, request: RequestId, worker: WorkerId, now: Instant) {
        self.0.insert(request, (worker, now + UNCLAIMED_MAX));
    }

    /// Somebody has claimed it.
    pub(super) fn claimed(&mut self, request: RequestId, now: Instant) {
        if let Some((_, until)) = self.0.get_mut(&request) {
            *until = (*until).min(now + SHOWN_AFTER);
        }
    }

    /// It has ended.
    pub(super) fn ended(&mut self, request: RequestId) {
        self.0.remove(&request);
    }

    /// How many each worker was given. Those that count no longer are forgotten.
    pub(super) fn by_worker(&mut self, now: Instant) -> BTreeMap<WorkerId, u32> {
        self.0.retain(|_, (_, until)| *until > now);
        let mut counts = BTreeMap::new();
        for (worker, _) in self.0.values() {
            *counts.entry(worker.clone()).or_default() += 1;
        }
        counts
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
        routed.add(one, worker.clone(), now);
        routed.add(two, worker.clone(), now);
        assert_eq!(routed.by_worker(now), BTreeMap::from([(worker.clone(), 2)]));
        routed.claimed(one, now);
        assert_eq!(routed.by_worker(now + SHOWN_AFTER), BTreeMap::from([(worker, 1)]));
        routed.claimed(one, now + SHOWN_AFTER);
        let three = RequestId::new();
        routed.add(three, WorkerId::new("b").unwrap(), now + SHOWN_AFTER);
        routed.ended(three);
        assert_eq!(routed.by_worker(now + UNCLAIMED_MAX), BTreeMap::new());
        assert!(routed.0.is_empty());
    }
}
