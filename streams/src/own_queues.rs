//! A queue for each decode worker beside the one that all pull from: for requests whose KV that worker has already.
//! Nothing may get stuck in one. What its worker gives back goes to the shared queue, and so does what a worker
//! leaves behind.

use crate::{
    StreamError,
    tasks::{Delivery, EnqueueError},
};
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::{
    ids::{ModelKey, WorkerId},
    task::{DecodeTask, Task},
};
use std::time::Duration;

/// Whose queue, and of which model.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Owner {
    /// The model that the worker runs.
    pub model: ModelKey,
    /// The worker.
    pub worker: WorkerId,
}

/// Queues of single decode workers. A task that is delivered from one and given back
/// ([`Verdict::Nak`](crate::tasks::Verdict::Nak) or `Later`) moves to the shared queue, at once, whoever gives it back.
#[async_trait]
pub trait OwnQueues: Send + Sync + 'static {
    /// Makes a worker's queue if it is missing. A queue that is not used for a while goes by itself.
    async fn open(&self, owner: &Owner) -> Result<(), StreamError>;

    /// Queues an encoded task for one worker; twice with one `dedup_id` (within minutes), here or in the shared queue,
    /// queues it once.
    async fn publish_to(&self, owner: &Owner, dedup_id: &str, payload: Bytes) -> Result<(), EnqueueError>;

    /// Waits up to `wait` for a task in a worker's queue. Fails if the queue is not open.
    async fn pull_own(&self, owner: &Owner, wait: Duration) -> Result<Option<Delivery>, StreamError>;

    /// Moves all that is in a worker's queue to the shared one, delivered or not, and removes the queue. Returns how many
    /// tasks were moved. Twice, or two at once, move each task once.
    async fn close(&self, owner: &Owner) -> Result<u64, StreamError>;

    /// All queues that hold tasks, whether or not their workers live.
    async fn filled(&self) -> Result<Vec<Owner>, StreamError>;
}

/// Queues a task for one worker.
pub async fn enqueue_to(
    queues: &dyn OwnQueues,
    worker: &WorkerId,
    task: &DecodeTask,
) -> Result<(), EnqueueError> {
    let owner = Owner { model: task.model.clone(), worker: worker.clone() };
    queues.publish_to(&owner, &task.dedup_id(), task.encode().into()).await
}
