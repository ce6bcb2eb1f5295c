//! What the registry says of the workers, as gauges: how many there are, and what they hold. After the last request all
//! that is held goes back to zero.

use forebay_schemas::{card::WorkerLease, ids::ModelKey, task::Role};
use forebay_streams::{StreamError, registry::Registry, registry::Workers};
use metrics::gauge;
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};
use tokio::sync::watch;

/// Workers with a lease.
pub(crate) const WORKERS: &str = "forebay_workers";
/// Slots that hold a sequence, or KV that somebody may still read.
pub(crate) const SLOTS_BUSY: &str = "forebay_slots_busy";
/// Of these, slots whose KV is sealed and not given back.
pub(crate) const KV_LEASES: &str = "forebay_kv_leases";

/// The workers of one role and model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sums {
    workers: u32,
    slots_busy: u32,
    kv_leases: u32,
}

/// See the [module](self).
pub(crate) struct Fleet {
    workers: watch::Receiver<Workers>,
    /// What was shown once is shown as zero when it is gone.
    shown: Mutex<BTreeMap<(Role, ModelKey), Sums>>,
}

impl Fleet {
    /// Follows a registry.
    pub(crate) async fn follow(registry: &dyn Registry) -> Result<Fleet, StreamError> {
        Ok(Fleet { workers: registry.workers().await?, shown: Mutex::default() })
    }

    /// Sets the gauges to what is so now.
    pub(crate) fn show(&self) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let workers = self.workers.borrow().clone();
        add_up(&mut shown, workers.values().map(AsRef::as_ref));
        for ((role, model), sums) in &*shown {
            let labels = [("role", role.as_str().to_owned()), ("model", model.to_string())];
            gauge!(WORKERS, &labels).set(sums.workers);
            gauge!(SLOTS_BUSY, &labels).set(sums.slots_busy);
            gauge!(KV_LEASES, &labels).set(sums.kv_leases);
        }
    }
}

fn add_up<'a>(
    all: &mut BTreeMap<(Role, ModelKey), Sums>,
    workers: impl IntoIterator<Item = &'a WorkerLease>,
) {
    all.values_mut().for_each(|sums| *sums = Sums::default());
    for lease in workers {
        let sums = all.entry((lease.role, lease.model.clone())).or_default();
        sums.workers += 1;
        sums.slots_busy += lease.slots.saturating_sub(lease.free_slots);
        sums.kv_leases += lease.kv_leases;
    }
}

/// The lease of an idle decode worker.
#[cfg(test)]
pub(crate) fn decode_lease(worker: forebay_schemas::ids::WorkerId) -> WorkerLease {
    WorkerLease {
        slots: 4,
        free_slots: 4,
        own_queue: true,
        ..WorkerLease::of(worker, Role::Decode, ModelKey::of("m"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::ids::WorkerId;

    fn lease(name: &str, role: Role, free_slots: u32, kv_leases: u32) -> WorkerLease {
        WorkerLease { role, free_slots, kv_leases, ..decode_lease(WorkerId::new(name).unwrap()) }
    }

    #[test]
    fn what_is_gone_counts_as_zero() {
        let mut sums = BTreeMap::new();
        let (one, two) = (lease("a", Role::Decode, 3, 0), lease("b", Role::Decode, 1, 1));
        add_up(&mut sums, [&one, &two, &lease("c", Role::Prefill, 4, 0)]);
        let of = |sums: &BTreeMap<_, _>, role| sums[&(role, ModelKey::of("m"))];
        assert_eq!(of(&sums, Role::Decode), Sums { workers: 2, slots_busy: 4, kv_leases: 1 });
        add_up(&mut sums, [&one]);
        assert_eq!(of(&sums, Role::Decode), Sums { workers: 1, slots_busy: 1, kv_leases: 0 });
        assert_eq!(of(&sums, Role::Prefill), Sums::default());
    }
}
