//! A request that is under way: its log is begun and followed, and somebody sees to it that the log ends. Or the log
//! was begun before, here or elsewhere, and is only followed.

mod keeper;
mod opened;

use crate::{
    Shared,
    admission::Permit,
    error::{ApiError, ErrorCode},
    meters::{self, RequestMeter},
    models::Model,
    watch::Watch,
};
use forebay_schemas::{
    event::{Body, FailureCode, RequestAccepted, RequestCompleted, RequestFailed},
    ids::{ModelKey, RequestId},
    lifecycle::Lifecycle,
    sampling::Logprobs,
    task::DecodeTask,
};
use forebay_streams::{
    environment::now_us,
    follow::Follow,
    log::{AppendError, LogRef, Recorded},
    own_queues::enqueue_to,
    tasks::{EnqueueError, enqueue},
    writer::LogWriter,
};
use futures::{FutureExt, Stream, StreamExt, future::BoxFuture, stream::BoxStream};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::{Interval, MissedTickBehavior};

use keeper::Keeper;
pub(crate) use opened::Opened;

/// Events that are handed on together: more come in the next batch.
const BATCH_MAX: usize = 64;

/// Time between two attempts to read a log that the backend does not give.
const READ_RETRY: Duration = Duration::from_millis(250);

/// How long after the deadline the log may take to say so; then it is told, or the client is told anyway.
const DEADLINE_PATIENCE: Duration = Duration::from_secs(1);

/// A request under way, as a gateway reads it.
pub(crate) struct Running {
    /// As far as it was read.
    state: Lifecycle,
    /// Sequence of the last event in `state`.
    seq: u64,
    events: BoxStream<'static, Vec<Recorded>>,
    /// Of a request that was begun here. Dropped before its end, the client is gone: the request is cancelled, unless
    /// it is detached. A request that was begun elsewhere, or by another client, is nobody's here.
    keeper: Option<Keeper>,
    meter: Option<RequestMeter>,
    /// Of a request of another gateway: that one may be dead, so its worker is watched from here too.
    watching: Option<Watching>,
    stop: BoxFuture<'static, ApiError>,
    quiet: Interval,
}

/// A request of another gateway, whose worker is watched for as long as somebody reads here.
struct Watching {
    watch: Arc<Watch>,
    request: RequestId,
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.watch.forget(self.request);
    }
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
    /// More text, and how probable its tokens are, if that was asked for.
    Text(&'a str, &'a [Logprobs]),
    Completed(&'a RequestCompleted),
    Ended(ApiError),
}

/// Why a request was not begun.
pub(crate) enum NotStarted {
    /// A request of this id was begun before.
    Taken,
    Refused(ApiError),
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
    ) -> Result<Running, NotStarted> {
        let log = LogRef { gateway: gateway.config.gateway.clone(), request };
        let timeout = Duration::from_millis(accepted.timeout_ms);
        let meter = model.meters.request(began, accepted.prompt.len());
        let has_key = accepted.fingerprint.is_some();
        let events = batches(recorded(gateway.hub.follow(request, 0)));
        // Before the log begins: if the client goes while it does, somebody must still end it.
        let mut keeper = Keeper::spawn(gateway, log.clone(), timeout, accepted.detached, permit);
        let mut writer = match LogWriter::create(gateway.streams.log.clone(), log, accepted).await {
            Ok(writer) => writer,
            Err(AppendError::Conflict { .. }) => {
                keeper.ended();
                return Err(NotStarted::Taken);
            }
            Err(error) => {
                match error {
                    AppendError::Unavailable(_) => {
                        keeper.refused("the gateway can't tell whether it is in the log", has_key);
                    }
                    _ => keeper.ended(),
                }
                return Err(NotStarted::Refused(ApiError::from(&error)));
            }
        };
        if let Err(error) = queue(gateway, writer.log(), &writer.state().accepted).await {
            let failed = RequestFailed { code: FailureCode::QueueUnavailable, message: error.to_string() };
            match writer.append(Body::RequestFailed(failed)).await {
                Ok(()) => keeper.ended(),
                Err(_) => keeper.refused("the queue did not take the request", has_key),
            }
            return Err(NotStarted::Refused(ApiError::from(&error)));
        }
        let stop = stop(gateway, timeout, tokio::time::sleep(timeout + DEADLINE_PATIENCE));
        Ok(Running {
            state: writer.state().clone(),
            seq: writer.seq(),
            events,
            keeper: Some(keeper),
            meter: Some(meter),
            watching: None,
            stop,
            quiet: quiet(gateway),
        })
    }

    /// Reads a request that was begun before, from its first event on, wherever it runs.
    pub(crate) async fn attach(gateway: &Arc<Shared>, opened: Opened) -> Result<Running, ApiError> {
        let Opened { log, events, state } = opened;
        let (first, last) = (events.first().expect("a state has events"), events.last().expect("see above"));
        let (seq, read_to) = (first.seq, last.seq);
        let begun = Lifecycle::begin(&first.event).map_err(|_| opened::damaged(log.request))?;
        let later = if state.phase.is_terminal() {
            futures::stream::pending().boxed()
        } else if log.gateway == gateway.config.gateway {
            recorded(gateway.hub.follow(log.request, read_to).catching_up()).boxed()
        } else {
            let follow = Follow::watch(gateway.streams.log.clone(), log.clone(), read_to).await;
            recorded(follow.map_err(|error| ApiError::from(&error))?.catching_up()).boxed()
        };
        let timeout = Duration::from_millis(state.accepted.timeout_ms);
        let foreign = log.gateway != gateway.config.gateway && !state.phase.is_terminal();
        let watching = foreign.then(|| Watching { watch: gateway.watch.clone(), request: log.request });
        let left = Duration::from_micros(state.deadline_us().saturating_sub(now_us()));
        let stop = stop(gateway, timeout, ended_by_now(gateway.clone(), log, left, timeout));
        let events = batches(futures::stream::iter(events).chain(later));
        let quiet = quiet(gateway);
        Ok(Running { state: begun, seq, events, keeper: None, meter: None, watching, stop, quiet })
    }

    /// What comes next. After a terminal event, or `Stopped`, nothing does.
    pub(crate) async fn next(&mut self) -> Step {
        tokio::select! {
            biased;
            events = self.events.next() => self.fold(events.expect("following a log never ends")),
            error = &mut self.stop => {
                if !self.state.accepted.detached {
                    self.abandon("gateway shut down");
                }
                Step::Stopped(error)
            }
            _ = self.quiet.tick() => Step::Quiet,
        }
    }

    /// Waits for a good end. If the client does not wait, this is dropped.
    pub(crate) async fn completed(&mut self) -> Result<(), ApiError> {
        loop {
            let events = match self.next().await {
                Step::Events(events) => events,
                Step::Quiet => continue,
                Step::Stopped(error) => return Err(error),
            };
            match events.last().and_then(|last| News::of(&last.event.body)) {
                Some(News::Completed(_)) => return Ok(()),
                Some(News::Ended(error)) => return Err(error),
                Some(News::Text(..)) | None => {}
            }
        }
    }

    /// Whether this is how the request began, not a later reading of it.
    pub(crate) fn began_here(&self) -> bool {
        self.keeper.is_some()
    }

    /// The request as far as it was read.
    pub(crate) fn state(&self) -> &Lifecycle {
        &self.state
    }

    fn fold(&mut self, events: Vec<Recorded>) -> Step {
        let before = self.state.tokens.len();
        for recorded in events.iter().filter(|recorded| recorded.seq > self.seq) {
            if let Err(error) = self.state.apply(&recorded.event) {
                let request = self.state.request;
                tracing::error!(%request, %error, "a log that makes no sense is not served any further");
                self.abandon("its log makes no sense");
                return Step::Stopped(opened::damaged(request));
            }
            if let Some(Watching { watch, .. }) = &self.watching {
                watch.observe(&recorded.event);
            }
        }
        self.seq = events.last().map_or(self.seq, |last| last.seq);
        if let Some(meter) = &mut self.meter {
            meter.tokens(self.state.tokens.len() - before);
        }
        if let Some(keeper) = self.keeper.as_mut().filter(|_| self.state.phase.is_terminal()) {
            keeper.ended();
        }
        Step::Events(events)
    }

    fn abandon(&mut self, cause: &'static str) {
        if let Some(keeper) = &mut self.keeper {
            keeper.abandon(cause);
        }
    }
}

/// Queues the task of a request, for the worker that can answer it soonest or for all. Twice does no harm.
pub(crate) async fn queue(
    gateway: &Shared,
    log: &LogRef,
    accepted: &RequestAccepted,
) -> Result<(), EnqueueError> {
    let model = ModelKey::of(&accepted.model);
    // A model that has no card any more may still have workers.
    let route = gateway.models.card(&accepted.model).ok().map(|card| {
        let route = gateway.routing.route(log.request, &card, accepted);
        meters::routed(&accepted.model, &route);
        route
    });
    let task = DecodeTask { request: log.request, gateway: log.gateway.clone(), model };
    let queued = match route.and_then(|route| route.worker) {
        Some(worker) => enqueue_to(gateway.streams.own_queues.as_ref(), &worker, &task).await,
        None => enqueue(gateway.streams.tasks.as_ref(), &task).await,
    };
    if let Err(EnqueueError::Full { .. }) = queued {
        gateway.room.is_full();
    }
    queued
}

impl News<'_> {
    /// What an event means to the client, if anything.
    pub(crate) fn of(body: &Body) -> Option<News<'_>> {
        match body {
            Body::PrefillCompleted(prefill) => Some(News::Text(&prefill.text, prefill.logprobs.as_slice())),
            Body::TokensGenerated(generated) => Some(News::Text(&generated.text, &generated.logprobs)),
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

/// The events of a log, one by one. While the backend is away it waits: the request lives in the log, not in this
/// connection.
fn recorded(follow: Follow) -> impl Stream<Item = Recorded> + Send + 'static {
    futures::stream::unfold(follow, |mut follow| async move {
        loop {
            match follow.next().await {
                Ok(recorded) => return Some((recorded, follow)),
                Err(error) => {
                    tracing::warn!(%error, "a followed log can't be read; trying again");
                    tokio::time::sleep(READ_RETRY).await;
                }
            }
        }
    })
}

/// Events, all that are at hand together.
fn batches(events: impl Stream<Item = Recorded> + Send + 'static) -> BoxStream<'static, Vec<Recorded>> {
    events.ready_chunks(BATCH_MAX).boxed()
}

fn quiet(gateway: &Shared) -> Interval {
    let mut quiet = tokio::time::interval((gateway.config.keep_alive / 2).max(Duration::from_millis(1)));
    quiet.set_missed_tick_behavior(MissedTickBehavior::Delay);
    quiet
}

/// Resolves when the client must be told that there is no more to come: it is `late` and the log does not say so, or
/// the gateway ends.
fn stop(
    gateway: &Arc<Shared>,
    timeout: Duration,
    late: impl Future<Output = ()> + Send + 'static,
) -> BoxFuture<'static, ApiError> {
    let closing = gateway.closing.clone();
    async move {
        tokio::select! {
            biased;
            () = late => ApiError::new(ErrorCode::DeadlineExceeded, keeper::deadline_message(timeout)),
            () = closing.cancelled_owned() => ApiError::new(
                ErrorCode::ShuttingDown,
                "the gateway is shutting down; go on at another one, or send the request again",
            ),
        }
    }
    .boxed()
}

/// Waits for the deadline of a request that another gateway accepted, and ends it if nobody has: that gateway may be dead.
async fn ended_by_now(gateway: Arc<Shared>, log: LogRef, left: Duration, timeout: Duration) {
    tokio::time::sleep(left + DEADLINE_PATIENCE).await;
    if let Err(error) = keeper::expire(&gateway.streams, &log, timeout).await {
        tracing::warn!(%log, %error, "a request that is past its deadline could not be ended");
    }
    tokio::time::sleep(DEADLINE_PATIENCE).await;
}
