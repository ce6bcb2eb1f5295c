//! Queues of tasks: one for each role and model, pulled by workers that have room, redelivered until
//! acknowledged.

use crate::StreamError;
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::{
    ids::{ModelKey, RequestId, WorkerId},
    task::{Role, Task},
};
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Why a task was not queued.
#[derive(Debug, thiserror::Error)]
pub enum EnqueueError {
    /// The queue is at its limit.
    #[error("the {role} queue of model {model} is full", role = .role.as_str())]
    Full {
        /// Which queue.
        role: Role,
        /// Which model's.
        model: ModelKey,
    },
    /// The backend did not answer.
    #[error(transparent)]
    Unavailable(#[from] StreamError),
}

/// How much work waits, as KEDA's NATS JetStream scaler counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Depth {
    /// Tasks that were not delivered yet.
    pub pending: u64,
    /// Tasks delivered and not acknowledged yet.
    pub ack_pending: u64,
}

impl Depth {
    /// What KEDA calls lag.
    pub fn lag(&self) -> u64 {
        self.pending + self.ack_pending
    }
}

/// What can be said of a delivered task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Done: its outcome is in the log.
    Ack,
    /// Not here: redeliver at once.
    Nak,
    /// Not now: redeliver after a while.
    Later(Duration),
    /// Still at it: don't redeliver yet.
    Progress,
}

/// A task, delivered. Until it is acknowledged it will be delivered again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The task, encoded.
    pub payload: Bytes,
    /// Where verdicts go. Anybody may send one there.
    pub ack_subject: String,
    /// How often it has been delivered, this time included.
    pub delivery: u64,
}

/// A request to stop working on a request, sent straight to the worker that has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelSignal {
    /// Which request.
    pub request: RequestId,
    /// Why, for the log.
    pub cause: String,
}

/// What came of asking whether a worker is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It answered.
    Answers,
    /// Its connection is open, but it did not answer in time: busy, frozen, or cut off.
    Silent,
    /// It has no connection: it has ended, or is about to connect again.
    Gone,
}

/// Queues of tasks, and the one signal that does not wait in a queue.
#[async_trait]
pub trait Tasks: Send + Sync + 'static {
    /// Makes the model's queues and their consumers if they are missing, and checks them.
    async fn ensure(&self, model: &ModelKey) -> Result<(), StreamError>;

    /// Queues an encoded task; twice with one `dedup_id` (within minutes) queues it once.
    async fn publish(
        &self,
        role: Role,
        model: &ModelKey,
        dedup_id: &str,
        payload: Bytes,
    ) -> Result<(), EnqueueError>;

    /// Waits up to `wait` for a task.
    async fn pull(
        &self,
        role: Role,
        model: &ModelKey,
        wait: Duration,
    ) -> Result<Option<Delivery>, StreamError>;

    /// Says something of a delivered task.
    async fn answer(&self, ack_subject: &str, verdict: Verdict) -> Result<(), StreamError>;

    /// After how long without a verdict a task is delivered again. Workers send progress three times as often.
    fn ack_wait(&self) -> Duration;

    /// How often a task is delivered at most: a backstop. What counts is how often it was claimed in vain.
    fn max_deliver(&self) -> u64;

    /// How much work waits.
    async fn depth(&self, role: Role, model: &ModelKey) -> Result<Depth, StreamError>;

    /// How many more tasks all queues of a role are sure to take, now. 0: some of them refuse.
    async fn room(&self, role: Role) -> Result<u64, StreamError>;

    /// Tells a worker to stop. Best effort: the log decides.
    async fn signal_cancel(&self, worker: &WorkerId, signal: &CancelSignal) -> Result<(), StreamError>;

    /// Asks whether a worker is there, and waits up to `wait` for an answer.
    async fn presence(&self, worker: &WorkerId, wait: Duration) -> Result<Presence, StreamError>;

    /// Signals for a worker, from now on. For as long as they are read, the worker answers [`Tasks::presence`].
    async fn cancel_signals(
        &self,
        worker: &WorkerId,
    ) -> Result<BoxStream<'static, CancelSignal>, StreamError>;
}

/// Queues a task.
pub async fn enqueue<T: Task>(tasks: &dyn Tasks, task: &T) -> Result<(), EnqueueError> {
    tasks.publish(T::ROLE, task.model(), &task.dedup_id(), task.encode().into()).await
}
