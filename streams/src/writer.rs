//! Extending a log as its author: fenced, one append at a time, every conflict read and understood.

use crate::{
    StreamError,
    environment::now_us,
    log::{AppendError, EventLog, LogRef, Recorded},
};
use forebay_schemas::{
    event::{Body, Event, RequestAccepted},
    lifecycle::{Illegal, Lifecycle},
};
use std::{sync::Arc, time::Duration};

/// How often an append that keeps meeting other authors' events is decided again.
const CONFLICTS_MAX: u32 = 32;

/// The first pause after a conflict with nothing to read: a replica that answers reads lags behind the leader. Doubles
/// with each conflict, up to [`STALE_READ_PAUSE_MAX`].
const STALE_READ_PAUSE: Duration = Duration::from_millis(2);

/// The longest such pause.
const STALE_READ_PAUSE_MAX: Duration = Duration::from_millis(250);

/// How often a log that must be there is read before the answer is that nobody can tell.
const STALE_READS_MAX: u32 = 16;

/// One author's hold on a log: what it knows of it, and where it would append.
pub struct LogWriter {
    backend: Arc<dyn EventLog>,
    log: LogRef,
    state: Lifecycle,
    seq: u64,
}

/// Why an author can't go on.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Somebody else's event made this one impossible: a newer claim, or the end of the request. The author
    /// must drop the request.
    #[error("{log}: overtaken: {illegal}")]
    Overtaken {
        /// Which log.
        log: LogRef,
        /// What no longer fits.
        illegal: Illegal,
    },
    /// The log could not be extended.
    #[error(transparent)]
    Append(#[from] AppendError),
    /// The log could not be read.
    #[error(transparent)]
    Read(#[from] StreamError),
    /// There is no such log: it expired, or was never begun, or (on a cluster) the server that answered lags behind.
    #[error("{0}: no events in the log")]
    Missing(LogRef),
    /// It holds events that do not fit together.
    #[error("{log}: {problem}")]
    Corrupt {
        /// Which log.
        log: LogRef,
        /// What is wrong with it.
        problem: String,
    },
}

impl LogWriter {
    /// Begins a log. The request counts as accepted once this returns. A conflict means that the request has a log
    /// already, which another client or gateway began.
    pub async fn create(
        backend: Arc<dyn EventLog>,
        log: LogRef,
        accepted: RequestAccepted,
    ) -> Result<LogWriter, AppendError> {
        let event = Event {
            request: log.request,
            attempt: 0,
            time_us: now_us(),
            body: Body::RequestAccepted(accepted),
        };
        let seq = match backend.begin(&log, &event).await {
            // Perhaps with its own append, whose answer was lost.
            Err(conflict @ AppendError::Conflict { .. }) => {
                let first = first_event(&*backend, &log).await?;
                first.filter(|first| first.event == event).ok_or(conflict)?.seq
            }
            other => other?,
        };
        let state = Lifecycle::begin(&event).expect("the event is RequestAccepted");
        Ok(LogWriter { backend, log, state, seq })
    }

    /// Opens a log to continue it.
    pub async fn open(backend: Arc<dyn EventLog>, log: LogRef) -> Result<LogWriter, WriteError> {
        let recorded = backend.read(&log, 0).await?;
        let corrupt = |problem: String| WriteError::Corrupt { log: log.clone(), problem };
        let state = Lifecycle::fold(recorded.iter().map(|r| &r.event))
            .map_err(|illegal| corrupt(illegal.to_string()))?
            .ok_or_else(|| WriteError::Missing(log.clone()))?;
        let seq = recorded.last().expect("a state has events").seq;
        Ok(LogWriter { backend, log, state, seq })
    }

    /// Which log.
    pub fn log(&self) -> &LogRef {
        &self.log
    }

    /// The request as far as this author knows.
    pub fn state(&self) -> &Lifecycle {
        &self.state
    }

    /// The sequence of the last event known.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Takes note of an event that somebody else appended and this author followed.
    pub fn observe(&mut self, seq: u64, event: &Event) -> Result<(), WriteError> {
        if seq > self.seq {
            self.state.apply(event).map_err(|illegal| self.corrupt(&illegal))?;
            self.seq = seq;
        }
        Ok(())
    }

    /// Appends an event of the current attempt, or, for `Claimed`, of the next. On a conflict it reads what is
    /// new, and tries again if the event still fits.
    pub async fn append(&mut self, body: Body) -> Result<(), WriteError> {
        let attempt = self.state.attempt + u32::from(matches!(body, Body::Claimed(_)));
        let mut event = Event { request: self.log.request, attempt, time_us: now_us(), body };
        for conflicts in 0..CONFLICTS_MAX {
            self.state
                .check(&event)
                .map_err(|illegal| WriteError::Overtaken { log: self.log.clone(), illegal })?;
            match self.backend.append(&self.log, self.seq, &event).await {
                Ok(seq) => return self.observe(seq, &event),
                Err(AppendError::Conflict { .. }) => {
                    let news = self.catch_up().await?;
                    // An append whose answer was lost conflicts with itself when it is repeated.
                    if news.iter().any(|recorded| recorded.event == event) {
                        return self.still_current(&event);
                    }
                    if news.is_empty() {
                        let pause = STALE_READ_PAUSE * 2_u32.pow(conflicts.min(10));
                        tokio::time::sleep(pause.min(STALE_READ_PAUSE_MAX)).await;
                    }
                }
                Err(error) => return Err(error.into()),
            }
            // An ending belongs to whatever attempt is current; work belongs to its own.
            if matches!(event.body, Body::RequestCancelled(_) | Body::RequestFailed(_)) {
                event.attempt = self.state.attempt;
            }
        }
        Err(AppendError::Conflict { log: self.log.clone(), after: self.seq }.into())
    }

    /// An own event that was only found by reading may have been followed by a newer claim. To go on would be to work
    /// under another author's attempt.
    fn still_current(&self, event: &Event) -> Result<(), WriteError> {
        if self.state.attempt == event.attempt {
            return Ok(());
        }
        let (found, expected) = (event.attempt, self.state.attempt);
        let illegal = Illegal::Attempt { event: event.body.name(), found, expected };
        Err(WriteError::Overtaken { log: self.log.clone(), illegal })
    }

    /// Reads what others appended.
    pub async fn catch_up(&mut self) -> Result<Vec<Recorded>, WriteError> {
        let news = self.backend.read(&self.log, self.seq).await?;
        for recorded in &news {
            self.observe(recorded.seq, &recorded.event)?;
        }
        Ok(news)
    }

    fn corrupt(&self, illegal: &Illegal) -> WriteError {
        WriteError::Corrupt { log: self.log.clone(), problem: illegal.to_string() }
    }
}

/// The first event of a request's log, if it is this log and not one at another gateway.
async fn first_event(backend: &dyn EventLog, log: &LogRef) -> Result<Option<Recorded>, StreamError> {
    for reads in 0..STALE_READS_MAX {
        if let Some(first) = backend.read(log, 0).await?.into_iter().next() {
            return Ok(Some(first));
        }
        if backend.find(log.request).await?.is_some_and(|found| found != *log) {
            return Ok(None);
        }
        let pause = STALE_READ_PAUSE * 2_u32.pow(reads.min(10));
        tokio::time::sleep(pause.min(STALE_READ_PAUSE_MAX)).await;
    }
    Err(StreamError::new(
        format!("reading the log of {log}"),
        "it was begun, and no server that answers has it",
    ))
}
