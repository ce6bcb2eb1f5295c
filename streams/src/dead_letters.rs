//! Tasks that nobody could do: kept with their reason until a person decides.

use crate::StreamError;
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::{dead_letter::DeadLetter, ids::RequestId, task::Role};
use std::time::Duration;

/// A task that was delivered as often as it may be, without a verdict: found by the backend, not by a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spent {
    /// Which queue it is in, where no worker gets it any more.
    pub role: Role,
    /// The task, encoded.
    pub payload: Bytes,
    /// How often it was delivered.
    pub deliveries: u64,
    /// What [`DeadLetters::settle`] takes.
    pub receipt: Receipt,
}

/// Names a spent task to the backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// Where the finding is acknowledged.
    pub(crate) ack_subject: String,
    /// Sequence of the task within its queue's stream.
    pub(crate) seq: u64,
}

/// Dead letters.
#[async_trait]
pub trait DeadLetters: Send + Sync + 'static {
    /// Keeps a dead letter. One for each request and role: a newer one replaces it.
    async fn bury(&self, letter: &DeadLetter) -> Result<(), StreamError>;

    /// All that are kept, oldest first.
    async fn list(&self) -> Result<Vec<DeadLetter>, StreamError>;

    /// Forgets those of a request. Returns how many there were.
    async fn drop_letter(&self, request: RequestId) -> Result<u64, StreamError>;

    /// Waits up to `wait` for a spent task. Each is found once, by one caller; again if it is not settled in time.
    async fn spent(&self, wait: Duration) -> Result<Option<Spent>, StreamError>;

    /// Takes a spent task out of its queue: its request has ended.
    async fn settle(&self, spent: &Spent) -> Result<(), StreamError>;
}
