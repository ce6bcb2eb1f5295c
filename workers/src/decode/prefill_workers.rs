//! What a decode worker knows of the prefill workers: how many there are, and how many tasks wait for them.

use super::placement::{Limits, Prefill};
use crate::worker::Worker;
use forebay_schemas::{card::WorkerLease, task::Role};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// How often the queue's depth is asked for. Tasks queued since then are not counted: the bound is exceeded by what
/// decode workers can place within this time, which their slots limit.
const DEPTH_POLL: Duration = Duration::from_millis(200);

/// How often a request that waits for its prefill looks whether anybody is left to do it.
const WORKERS_POLL: Duration = Duration::from_millis(250);

/// Tasks that wait in the model's prefill queue, as they were counted last.
#[derive(Default)]
pub(crate) struct PrefillQueue(AtomicU64);

/// Keeps the depth of the prefill queue up to date, for as long as it is polled.
pub(crate) async fn watch_queue(worker: Arc<Worker>) {
    loop {
        match worker.streams.tasks.depth(Role::Prefill, &worker.model.key).await {
            // Those being computed are not counted: they hold up nobody but themselves.
            Ok(depth) => worker.prefill_queue.0.store(depth.pending, Ordering::Relaxed),
            Err(error) => tracing::debug!(%error, "the prefill queue can't be counted; the last count stays"),
        }
        sleep(DEPTH_POLL).await;
    }
}

impl Worker {
    /// The bounds of conditional disaggregation that count now.
    pub(super) fn limits(&self) -> Limits {
        let (live, own) = (self.live.borrow(), &self.config);
        Limits {
            max_local_prefill_length: live.max_local_prefill_length.unwrap_or(own.max_local_prefill_length),
            max_prefill_queue_size: live.max_prefill_queue_size.unwrap_or(own.max_prefill_queue_size),
        }
    }

    /// The prefill workers that a prompt could go to.
    pub(super) fn prefill(&self) -> Prefill {
        let workers = self.prefill_workers(|lease| !lease.draining);
        Prefill { workers, queue_depth: self.prefill_queue.0.load(Ordering::Relaxed) }
    }

    fn prefill_workers(&self, which: impl Fn(&WorkerLease) -> bool) -> usize {
        let model = &self.model;
        let fits = |lease: &WorkerLease| {
            lease.role == Role::Prefill && lease.model == model.key && lease.layout_hash == model.layout_hash
        };
        self.workers.borrow().values().filter(|lease| fits(lease) && which(lease)).count()
    }

    /// Resolves once there has been no prefill worker for longer than a lease lasts: none that lives, and none that
    /// is only late.
    pub(super) async fn no_prefill_worker_left(&self) {
        let lease_time = self.streams.registry.lease_time();
        let mut last_seen = Instant::now();
        while last_seen.elapsed() <= lease_time {
            sleep(WORKERS_POLL).await;
            // Those that drain still finish what they have.
            if self.prefill_workers(|_| true) > 0 {
                last_seen = Instant::now();
            }
        }
    }
}
