//! How a worker gets its tasks, from the shared queue and from its own, and what it says of them.

use super::Worker;
use forebay_schemas::task::Role;
use forebay_streams::{
    environment,
    log::LogRef,
    own_queues::Owner,
    tasks::{Delivery, Verdict},
};
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Pause after a pull that failed.
const PULL_PAUSE: Duration = Duration::from_millis(500);

/// How often a worker that stops looks whether its pulls are over.
const PULLS_POLL: Duration = Duration::from_millis(10);

/// Pause before a task that came to a worker that stops is delivered again: not at once, or its other pulls, which are
/// not over yet, would get it.
const BACK_PAUSE: Duration = Duration::from_millis(50);

/// Deliveries after which a task whose log can't be found is dropped: the log has expired or was removed, or was never
/// begun.
pub(crate) const NO_LOG_TRIES: u64 = 8;

/// Pause between them: on a cluster, the server that answered may lag behind.
pub(crate) const NO_LOG_PAUSE: Duration = Duration::from_millis(250);

/// How long a worker that ends waits for word that its lease is over.
pub(super) const RESIGN_MAX: Duration = Duration::from_millis(500);

impl Worker {
    /// Makes this worker's own queue. Without one it gets its tasks from the shared queue.
    pub(super) async fn open_own(&self, owner: &Owner) {
        match self.streams.own_queues.open(owner).await {
            Ok(()) => self.has_own_queue.store(true, Ordering::Relaxed),
            Err(error) => tracing::warn!(%error, "no queue of its own for this worker; trying again"),
        }
    }

    /// Passes on what still comes into the own queue of a worker that stops: from a gateway that has not heard of it yet.
    pub(super) async fn pass_on(self: Arc<Self>) {
        self.stop.cancelled().await;
        let owner = self.owner();
        loop {
            self.pull_own(&owner, &self.stop).await;
        }
    }

    /// Leaves what is in this worker's own queue to others, and takes back what was told of its cache.
    pub(super) async fn bow_out(&self) {
        if self.config.role != Role::Decode {
            return;
        }
        let owner = self.owner();
        let closed = self.streams.own_queues.close(&owner);
        let forgotten = self.streams.cache_events.forget(&owner);
        let both = async { (closed.await, forgotten.await) };
        if !matches!(tokio::time::timeout(RESIGN_MAX, both).await, Ok((Ok(_), Ok(())))) {
            tracing::debug!("the own queue is left to the gateways");
        }
    }

    /// Names this worker's own queue.
    pub(crate) fn owner(&self) -> Owner {
        Owner { model: self.model.key.clone(), worker: self.id.clone() }
    }

    /// The next task, or none when the worker is to stop.
    pub(crate) async fn next_task(&self, stop: &CancellationToken) -> Option<Delivery> {
        while !stop.is_cancelled() {
            if let Some(delivery) = self.pull(stop).await {
                return Some(delivery);
            }
        }
        None
    }

    /// One pull from the queue that all workers share; none if it brought nothing that is for this worker.
    pub(crate) async fn pull(&self, stop: &CancellationToken) -> Option<Delivery> {
        let _pulling = Pulling::begin(&self.pulling);
        match self.streams.tasks.pull(self.config.role, &self.model.key, self.pull_wait()).await {
            // A pull is never dropped: what it brings would come again only after the ack wait.
            Ok(Some(delivery)) if stop.is_cancelled() => {
                self.answer(&delivery, Verdict::Later(BACK_PAUSE)).await;
                None
            }
            Ok(delivery) => delivery,
            Err(error) => {
                tracing::debug!(%error, "pull failed; trying again");
                tokio::time::sleep(PULL_PAUSE).await;
                None
            }
        }
    }

    /// One pull from this worker's own queue. Nothing of it stays with a worker that stops: it moves to the shared queue.
    pub(crate) async fn pull_own(&self, owner: &Owner, stop: &CancellationToken) -> Option<Delivery> {
        // A pull that is begun when the worker stops brings nothing that it keeps.
        let _pulling = (!stop.is_cancelled()).then(|| Pulling::begin(&self.pulling));
        match self.streams.own_queues.pull_own(owner, self.pull_wait()).await {
            Ok(Some(delivery)) if stop.is_cancelled() => {
                self.answer(&delivery, Verdict::Nak).await;
                None
            }
            Ok(delivery) => delivery,
            Err(error) => {
                // A gateway that took this worker for dead has closed the queue, or the server is away.
                tracing::debug!(%error, "pull from the own queue failed; opening it again");
                self.open_own(owner).await;
                tokio::time::sleep(PULL_PAUSE).await;
                None
            }
        }
    }

    /// Waits until nothing more can be delivered to a worker that was told to stop.
    pub(crate) async fn pulls_over(&self) {
        self.stop.cancelled().await;
        // A watch would wake its waiters in random order, and a simulation not repeat itself.
        while *self.pulling.borrow() > 0 {
            tokio::time::sleep(PULLS_POLL).await;
        }
    }

    /// How long one pull waits at the server. The pulls of a worker that hangs must be over before its tasks are
    /// given to others, or they would take them again.
    pub(super) fn pull_wait(&self) -> Duration {
        self.streams.tasks.ack_wait().min(self.streams.registry.lease_time()) / 2
    }

    /// Keeps a delivered task from being delivered again for as long as the guard lives.
    pub(crate) fn keep_alive(&self, delivery: &Delivery) -> KeepAlive {
        let (tasks, subject) = (self.streams.tasks.clone(), delivery.ack_subject.clone());
        KeepAlive(environment::spawn(async move {
            loop {
                tokio::time::sleep(tasks.ack_wait() / 3).await;
                let _ = tasks.answer(&subject, Verdict::Progress).await;
            }
        }))
    }

    /// Whether a log is gone, as far as several looks at it tell. A task's deliveries do not: others may have given it
    /// back unread, and one read may be answered by a server that lags.
    pub(crate) async fn has_no_log(&self, log: &LogRef) -> bool {
        for _ in 0..NO_LOG_TRIES {
            tokio::time::sleep(NO_LOG_PAUSE).await;
            if !matches!(self.streams.log.last_seq(log).await, Ok(0)) {
                return false;
            }
        }
        true
    }

    /// Says how a delivered task went. An answer that gets lost costs a redelivery.
    pub(crate) async fn answer(&self, delivery: &Delivery, verdict: Verdict) {
        if let Err(error) = self.streams.tasks.answer(&delivery.ack_subject, verdict).await {
            tracing::debug!(%error, "a verdict was not sent; the task will come again");
        }
    }
}

/// A loop that may be given a task at any moment.
struct Pulling<'a>(&'a watch::Sender<u32>);

impl Pulling<'_> {
    fn begin(pulls: &watch::Sender<u32>) -> Pulling<'_> {
        pulls.send_modify(|pulls| *pulls += 1);
        Pulling(pulls)
    }
}

impl Drop for Pulling<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|pulls| *pulls -= 1);
    }
}

/// See [`Worker::keep_alive`].
pub(crate) struct KeepAlive(tokio::task::JoinHandle<()>);

impl Drop for KeepAlive {
    fn drop(&mut self) {
        self.0.abort();
    }
}
