//! The log of a request as it was found: of any gateway, under way or ended.

use super::{DEADLINE_PATIENCE, keeper};
use crate::{
    Shared,
    error::{ApiError, ErrorCode},
};
use forebay_schemas::{event::RequestAccepted, ids::RequestId, lifecycle::Lifecycle};
use forebay_streams::{
    StreamError,
    cancel::cancel,
    environment::now_us,
    log::{LogRef, Recorded},
    writer::WriteError,
};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

/// How long a worker that was told to stop may take to say so in the log.
const LAST_WORD: Duration = Duration::from_secs(5);

/// How often a log is looked for before there is none: a server of the cluster that lags may not have it yet.
const FIND_TRIES: u32 = 4;

/// Time between two of these.
const FIND_PAUSE: Duration = Duration::from_millis(100);

/// Time between two looks at a log that is about to end.
const LOOK: Duration = Duration::from_millis(10);

/// A log as it was read, from its first event on.
pub(crate) struct Opened {
    pub(crate) log: LogRef,
    pub(crate) events: Vec<Recorded>,
    pub(crate) state: Lifecycle,
}

impl Opened {
    /// The log of a request, whichever gateway accepted it.
    pub(crate) async fn find(gateway: &Shared, request: RequestId) -> Result<Option<Opened>, ApiError> {
        let log = gateway.streams.log.find(request).await.map_err(|error| ApiError::from(&error))?;
        match log {
            Some(log) => Opened::read(gateway, log).await,
            None => Ok(None),
        }
    }

    /// The same for a request that its client says was begun.
    pub(crate) async fn find_begun(gateway: &Shared, request: RequestId) -> Result<Option<Opened>, ApiError> {
        for _ in 1..FIND_TRIES {
            if let Some(opened) = Opened::find(gateway, request).await? {
                return Ok(Some(opened));
            }
            tokio::time::sleep(FIND_PAUSE).await;
        }
        Opened::find(gateway, request).await
    }

    /// The log of a request that this endpoint took. One that is past its deadline and goes on is ended first: the
    /// gateway that accepted it may be dead.
    pub(crate) async fn of_endpoint(
        gateway: &Shared,
        request: RequestId,
        endpoint: &str,
    ) -> Result<Opened, ApiError> {
        let opened = Opened::find_begun(gateway, request).await?;
        let opened = opened.filter(|opened| opened.accepted().endpoint == endpoint);
        let opened = opened.ok_or_else(|| unknown(request))?;
        let patience_us = DEADLINE_PATIENCE.as_micros() as u64;
        if opened.state.phase.is_terminal() || now_us() < opened.state.deadline_us() + patience_us {
            return Ok(opened);
        }
        let timeout = Duration::from_millis(opened.accepted().timeout_ms);
        keeper::expire(&gateway.streams, &opened.log, timeout)
            .await
            .map_err(|error| unwritten(&error, request))?;
        Opened::read(gateway, opened.log).await?.ok_or_else(|| unknown(request))
    }

    /// The same, if its answer is to be kept.
    pub(crate) async fn stored(
        gateway: &Shared,
        request: RequestId,
        endpoint: &str,
    ) -> Result<Opened, ApiError> {
        let opened = Opened::of_endpoint(gateway, request, endpoint).await?;
        if opened.accepted().stored { Ok(opened) } else { Err(unknown(request)) }
    }

    pub(crate) fn accepted(&self) -> &RequestAccepted {
        &self.state.accepted
    }

    /// Cancels it if it has not ended, and waits for its end.
    pub(crate) async fn end(self, gateway: &Arc<Shared>, cause: &str) -> Result<Opened, ApiError> {
        if self.state.phase.is_terminal() {
            return Ok(self);
        }
        let request = self.state.request;
        cancel(&gateway.streams, &self.log, cause).await.map_err(|error| unwritten(&error, request))?;
        let patience = Instant::now() + LAST_WORD;
        loop {
            let opened = Opened::read(gateway, self.log.clone()).await?.ok_or_else(|| unknown(request))?;
            if opened.state.phase.is_terminal() || Instant::now() > patience {
                return Ok(opened);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Removes it for good. What still runs is cancelled first.
    pub(crate) async fn delete(self, gateway: &Arc<Shared>) -> Result<(), ApiError> {
        let ended = self.end(gateway, "deleted by the client").await?;
        gateway.streams.log.remove(&ended.log).await.map_err(|error| ApiError::from(&error))
    }

    async fn read(gateway: &Shared, log: LogRef) -> Result<Option<Opened>, ApiError> {
        let events = gateway.streams.log.read(&log, 0).await.map_err(|error| ApiError::from(&error))?;
        let state = Lifecycle::fold(events.iter().map(|recorded| &recorded.event)).map_err(|error| {
            tracing::error!(%log, %error, "a log that makes no sense is not served");
            damaged(log.request)
        })?;
        Ok(state.map(|state| Opened { log, events, state }))
    }
}

/// Why a log could not be ended, to the client.
fn unwritten(error: &WriteError, request: RequestId) -> ApiError {
    match error {
        WriteError::Append(error) => error.into(),
        WriteError::Read(error) => error.into(),
        WriteError::Missing(_) => unknown(request),
        WriteError::Overtaken { .. } | WriteError::Corrupt { .. } => {
            ApiError::from(&StreamError::new("ending a request", error))
        }
    }
}

/// Nobody has a log of it, or not for this client.
fn unknown(request: RequestId) -> ApiError {
    let message = format!("there is no request {request} here; it may be gone, or was not to be stored");
    ApiError::new(ErrorCode::RequestNotFound, message)
}

/// What a client reads of a log that can't be understood.
pub(super) fn damaged(request: RequestId) -> ApiError {
    ApiError::new(ErrorCode::Internal, format!("the log of request {request} is damaged"))
}
