//! The log: one ordered sequence of events for each request, extended by compare-and-append.

use crate::StreamError;
use async_trait::async_trait;
use forebay_schemas::{
    event::Event,
    ids::{GatewayId, RequestId},
};
use futures::stream::BoxStream;
use std::{fmt, time::Duration};
use tokio::time::Instant;

/// Which log: the request, and the gateway that answers it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LogRef {
    /// The gateway that accepted the request.
    pub gateway: GatewayId,
    /// The request.
    pub request: RequestId,
}

impl fmt::Display for LogRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.gateway, self.request)
    }
}

/// An event that is in the log.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// Its sequence in the stream: growing along a log, with holes where other logs have events.
    pub seq: u64,
    /// The event.
    pub event: Event,
}

/// A recorded event as it comes live.
#[derive(Clone, Debug, PartialEq)]
pub struct Live {
    /// Which log it extends.
    pub log: LogRef,
    /// The sequence of the event before it in the same log, 0 if it is the first. If the follower has not
    /// seen that one, it missed something.
    pub previous: u64,
    /// The event.
    pub recorded: Recorded,
}

/// Why an event was not appended.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// The log goes on after the sequence that the author knew: read what is new, and decide again.
    #[error("the log of {log} has events after sequence {after}")]
    Conflict {
        /// Which log.
        log: LogRef,
        /// The last sequence known to the author.
        after: u64,
    },
    /// The stream is at its limit: nothing is appended until something is removed.
    #[error("the log stream is full: {0}")]
    Full(String),
    /// The event is larger than the backend takes (1 MiB by NATS' default). It never will fit.
    #[error("an event of {bytes} bytes is too large for the log of {log}")]
    TooLarge {
        /// Which log.
        log: LogRef,
        /// Size of the encoded event.
        bytes: usize,
    },
    /// The backend did not answer within the patience of the connection; the event is not in the log, or it
    /// is unknown whether it is.
    #[error(transparent)]
    Unavailable(#[from] StreamError),
}

/// Why one try at an append has no sequence.
pub enum Refusal {
    /// For good, as far as this append goes.
    Final(AppendError),
    /// No answer: it may be stored or not.
    Unknown(String),
}

/// How long an append is tried while the backend does not answer: long enough for a restart or an election.
const APPEND_PATIENCE: Duration = Duration::from_secs(60);

/// The first pause between two tries; doubles up to [`APPEND_PAUSE_MAX`].
const APPEND_PAUSE: Duration = Duration::from_millis(20);

/// The longest pause between two tries.
const APPEND_PAUSE_MAX: Duration = Duration::from_millis(500);

/// Tries an append until it is answered, or patience ends. If a try was stored and only its answer got lost, the
/// next one conflicts with it: the author finds its own event in the log.
pub async fn persist<F: Future<Output = Result<u64, Refusal>>>(
    log: &LogRef,
    mut attempt: impl FnMut() -> F,
) -> Result<u64, AppendError> {
    let give_up = Instant::now() + APPEND_PATIENCE;
    let mut pause = APPEND_PAUSE;
    loop {
        let trouble = match attempt().await {
            Ok(seq) => return Ok(seq),
            Err(Refusal::Final(error)) => return Err(error),
            Err(Refusal::Unknown(trouble)) => trouble,
        };
        if Instant::now() + pause > give_up {
            return Err(StreamError::new(format!("appending to the log of {log}"), trouble).into());
        }
        tracing::debug!(%log, trouble, "append not answered; trying again");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(APPEND_PAUSE_MAX);
    }
}

/// Logs of requests.
#[async_trait]
pub trait EventLog: Send + Sync + 'static {
    /// Appends the event if the log's last sequence is `after` (0: the log is empty), and returns the event's
    /// sequence. At most one append a log may be outstanding. See [`persist`].
    async fn append(&self, log: &LogRef, after: u64, event: &Event) -> Result<u64, AppendError>;

    /// Appends the first event of a request, if no gateway has a log of that request yet.
    async fn begin(&self, log: &LogRef, event: &Event) -> Result<u64, AppendError>;

    /// Removes a log with all its events, for good.
    async fn remove(&self, log: &LogRef) -> Result<(), StreamError>;

    /// All events of a log after a sequence, in order.
    async fn read(&self, log: &LogRef, after: u64) -> Result<Vec<Recorded>, StreamError>;

    /// The sequence of a log's last event, 0 if it has none.
    async fn last_seq(&self, log: &LogRef) -> Result<u64, StreamError>;

    /// Which log a request has, whichever gateway accepted it.
    async fn find(&self, request: RequestId) -> Result<Option<LogRef>, StreamError>;

    /// Events of all logs of a gateway, live, from now on. Accepted events only; some may be missing, which
    /// shows in [`Live::previous`] or not at all (the last ones): see [`crate::follow`].
    async fn tail(&self, gateway: &GatewayId) -> Result<BoxStream<'static, Live>, StreamError>;

    /// Events of one log, live, from now on; as incomplete as [`EventLog::tail`].
    async fn watch(&self, log: &LogRef) -> Result<BoxStream<'static, Live>, StreamError>;

    /// Events of all logs, live, from now on; as incomplete as [`EventLog::tail`].
    async fn tail_all(&self) -> Result<BoxStream<'static, Live>, StreamError>;
}
