//! What a worker says of itself to all others, again and again: that it lives, and what it has room for.

use super::Worker;
use crate::kv::shm;
use forebay_schemas::card::WorkerLease;
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::time::Instant;

/// How often it is looked whether the number of free slots is still what the lease says; also the shortest time between
/// two renewals for that.
const SLOTS_LOOK: Duration = Duration::from_millis(25);

/// So many tokens to prefill, more or less than the lease says, are worth renewing it for.
const PREFILL_NEWS: u32 = 256;

/// How peers read its KV.
pub(super) struct Ways {
    pub(super) socket: String,
    pub(super) tcp: Option<String>,
    pub(super) nixl: bool,
}

impl Worker {
    /// Renews the worker's lease several times within its time, at once when the worker is told to stop, and soon when it
    /// has another number of free slots, or much more or less to prefill: gateways route by that.
    pub(super) async fn hold_lease(self: Arc<Self>, kv: Ways) {
        let host = shm::host_id();
        let pause = self.streams.registry.lease_time() / 4;
        loop {
            let lease = WorkerLease {
                worker: self.id.clone(),
                incarnation: self.incarnation,
                role: self.config.role,
                model: self.model.key.clone(),
                layout_hash: self.model.layout_hash,
                slots: self.slots.total(),
                free_slots: self.slots.free(),
                host: host.clone(),
                kv_socket: kv.socket.clone(),
                kv_tcp: kv.tcp.clone(),
                kv_nixl: kv.nixl,
                active_tokens: self.runner.active_tokens(),
                prefill_tokens: self.runner.prefill_tokens(),
                draining: self.stop.is_cancelled(),
                kv_leases: self.leases.held(),
                own_queue: self.has_own_queue.load(Ordering::Relaxed),
            };
            if let Err(error) = self.streams.registry.renew(&lease).await {
                tracing::warn!(%error, "the worker's lease was not renewed");
            }
            let stops = async {
                match lease.draining {
                    true => std::future::pending().await,
                    false => self.stop.cancelled().await,
                }
            };
            tokio::select! {
                biased;
                () = stops => {}
                () = self.slots_change(&lease, pause) => {}
            }
        }
    }

    /// Resolves when a lease says something of the slots that is no longer so, or after `most`.
    pub(super) async fn slots_change(&self, lease: &WorkerLease, most: Duration) {
        let until = Instant::now() + most;
        loop {
            tokio::time::sleep(SLOTS_LOOK).await;
            let own_queue = self.has_own_queue.load(Ordering::Relaxed);
            if (self.slots.free(), own_queue) != (lease.free_slots, lease.own_queue)
                || self.runner.prefill_tokens().abs_diff(lease.prefill_tokens) >= PREFILL_NEWS
                || Instant::now() >= until
            {
                return;
            }
        }
    }
}
