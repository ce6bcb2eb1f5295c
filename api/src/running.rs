//! A request that is under way: its log is begun and followed, and somebody sees to it that the log ends.

mod keeper;

use crate::{
    Shared,
    admission::Permit,
    error::{ApiError, ErrorCode},
    meters::RequestMeter,
    models::Model,
};
use forebay_schemas::{
    event::{Body, FailureCode, RequestAccepted, RequestCompleted, RequestFailed},
    ids::RequestId,
    lifecycle::Lifecycle,
    task::DecodeTask,
};
use forebay_streams::{
    follow::Follow,
    log::{AppendError, LogRef, Recorded},
    tasks::enqueue,
    writer::LogWriter,
};
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::BoxStream};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::{Interval, MissedTickBehavior};

use keeper::Keeper;

/// Events that are handed on together: more come in the next batch.
const BATCH_MAX: usize = 64;

/// Time between two attempts to read a log that the backend does not give.
const READ_RETRY: Duration = Duration::from_millis(250);

/// How long after the deadline the log may take to say so; then the client is told anyway.
const DEADLINE_PATIENCE: Duration = Duration::from_secs(1);

/// A request under way, as its gateway reads it. Dropped before its end, it is cancelled: the client is gone.
pub(crate) struct Running {
    events: BoxStream<'static, Vec<Recorded>>,
    writer: LogWriter,
    keeper: Keeper,
    meter: RequestMeter,
    stop: BoxFuture<'static, ApiError>,
    quiet: Interval,
}

/// What comes next of a request.
pub(crate) enum Step {
    /// Events, at least one.
    Events(Vec<Recorded>),
    /// Nothing for a while.
    Quiet,
    /// There is no more to come from here, whatever the log says later.
    Stopped(ApiError),
}

/// What an event means to the client.
pub(crate) enum News<'a> {
    Text(&'a str),
    Completed(&'a RequestCompleted),
    Ended(ApiError),
}

impl Running {
    /// Accepts a request: begins its log and queues it. From here on it reaches exactly one terminal event.
    pub(crate) async fn start(
        gateway: &Arc<Shared>,
        model: &Model,
        request: RequestId,
        accepted: RequestAccepted,
        permit: Permit,
        began: Instant,
    ) -> Result<Running, ApiError> {
        let log = LogRef { gateway: gateway.config.gateway.clone(), request };
        let timeout = Duration::from_millis(accepted.timeout_ms);
        let meter = model.meters.request(began, accepted.prompt.len());
        let events = batches(gateway.hub.follow(request, 0));
        // Before the log begins: if the client goes while it does, somebody must still end it.
        let mut keeper = Keeper::spawn(gateway, log.clone(), timeout, permit);
        let mut writer = match LogWriter::create(gateway.streams.log.clone(), log, accepted).await {
            Ok(writer) => writer,
            Err(error) => {
                match error {
                    AppendError::Unavailable(_) => {
                        keeper.abandon("the gateway can't tell whether it is in the log");
                    }
                    AppendError::Full(_) | AppendError::TooLarge { .. } | AppendError::Conflict { .. } => {
                        keeper.ended();
                    }
                }
                return Err(ApiError::from(&error));
            }
        };
        let task =
            DecodeTask { request, gateway: gateway.config.gateway.clone(), model: model.card.key.clone() };
        if let Err(error) = enqueue(gateway.streams.tasks.as_ref(), &task).await {
            let failed = RequestFailed { code: FailureCode::QueueUnavailable, message: error.to_string() };
            match writer.append(Body::RequestFailed(failed)).await {
                Ok(()) => keeper.ended(),
                Err(_) => keeper.abandon("the queue did not take the request"),
            }
            return Err(ApiError::from(&error));
        }
        let mut quiet = tokio::time::interval((gateway.config.keep_alive / 2).max(Duration::from_millis(1)));
        quiet.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Running { events, writer, keeper, meter, stop: stop(gateway, timeout), quiet })
    }

    /// What comes next. After a terminal event, or `Stopped`, nothing does.
    pub(crate) async fn next(&mut self) -> Step {
        tokio::select! {
            biased;
            events = self.events.next() => self.fold(events.expect("following a log never ends")),
            error = &mut self.stop => {
                self.keeper.abandon("gateway shut down");
                Step::Stopped(error)
            }
            _ = self.quiet.tick() => Step::Quiet,
        }
    }

    /// The request as far as it was read.
    pub(crate) fn state(&self) -> &Lifecycle {
        self.writer.state()
    }

    fn fold(&mut self, events: Vec<Recorded>) -> Step {
        let before = self.state().tokens.len();
        for recorded in &events {
            if let Err(error) = self.writer.observe(recorded.seq, &recorded.event) {
                tracing::error!(%error, "a log that makes no sense is not served any further");
                self.keeper.abandon("its log makes no sense");
                let message = format!("the log of request {} is damaged", self.state().request);
                return Step::Stopped(ApiError::new(ErrorCode::Internal, message));
            }
        }
        self.meter.tokens(self.state().tokens.len() - before);
        if self.state().phase.is_terminal() {
            self.keeper.ended();
        }
        Step::Events(events)
    }
}

impl News<'_> {
    /// What an event means to the client, if anything.
    pub(crate) fn of(body: &Body) -> Option<News<'_>> {
        match body {
            Body::PrefillCompleted(prefill) => Some(News::Text(&prefill.text)),
            Body::TokensGenerated(generated) => Some(News::Text(&generated.text)),
            Body::RequestCompleted(completed) => Some(News::Completed(completed)),
            Body::RequestFailed(failed) => Some(News::Ended(ApiError::from(failed))),
            Body::RequestCancelled(cancelled) => Some(News::Ended(ApiError::new(
                ErrorCode::RequestCancelled,
                format!("the request was cancelled: {}", cancelled.cause),
            ))),
            Body::RequestAccepted(_)
            | Body::Claimed(_)
            | Body::PrefillQueued(_)
            | Body::PrefillClaimed(_)
            | Body::KvReady(_)
            | Body::KvTransferred(_)
            | Body::KvLost(_)
            | Body::Released(_) => None,
        }
    }
}

/// The events of a log, with all that are at hand together. While the backend is away it waits: the request
/// lives in the log, not in this connection.
fn batches(follow: Follow) -> BoxStream<'static, Vec<Recorded>> {
    let next = |mut follow: Follow| async move {
        loop {
            match follow.next().await {
                Ok(recorded) => return Some((recorded, follow)),
                Err(error) => {
                    tracing::warn!(%error, "a followed log can't be read; trying again");
                    tokio::time::sleep(READ_RETRY).await;
                }
            }
        }
    };
    futures::stream::unfold(follow, next).ready_chunks(BATCH_MAX).boxed()
}

/// Resolves when the client must be told that there is no more to come: the deadline has passed and the log
/// does not say so, or the gateway ends.
fn stop(gateway: &Arc<Shared>, timeout: Duration) -> BoxFuture<'static, ApiError> {
    let closing = gateway.closing.clone();
    async move {
        tokio::select! {
            biased;
            () = tokio::time::sleep(timeout + DEADLINE_PATIENCE) => {
                ApiError::new(ErrorCode::DeadlineExceeded, keeper::deadline_message(timeout))
            }
            () = closing.cancelled_owned() => {
                ApiError::new(ErrorCode::ShuttingDown, "the gateway is shutting down; send the request again")
            }
        }
    }
    .boxed()
}
