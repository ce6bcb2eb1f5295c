//! The decode worker: owns a request from claim to end.
//!
//! pull → claim → prefill, here or remotely → generate → complete → acknowledge. Everything that happens is an
//! event in the request's log before anybody acts on it; a worker that finds itself overtaken there stops. One that
//! is told to stop hands its sequences over, KV and all (`handover`).

mod attempt;
mod handover;
mod placement;
mod prefill_workers;
mod remote;

use crate::{
    engine::EngineError,
    kv::Slot,
    runner::EngineStopped,
    worker::{NO_LOG_PAUSE, NO_LOG_TRIES, Worker},
};
use attempt::{Attempt, Outcome};
use forebay_schemas::{
    event::{Body, FailureCode, ReleaseCause, Released, RequestCancelled, RequestFailed},
    format::FormatError,
    lifecycle::Lifecycle,
    task::{DecodeTask, Role, Task},
};
use forebay_streams::{
    StreamError,
    environment::{self, in_process, now_us, off_thread},
    log::LogRef,
    tasks::{Delivery, Verdict},
    writer::{LogWriter, WriteError},
};
pub(crate) use handover::SharedPlaces;
pub(crate) use prefill_workers::{PrefillQueue, watch_queue};
use std::{sync::Arc, time::Duration};
use tokio::{sync::Semaphore, task::JoinSet};
use tokio_util::sync::CancellationToken;

/// Pause before a request that failed here is tried again, here or elsewhere.
const FAILED_PAUSE: Duration = Duration::from_millis(200);

/// How much later than the gateway a worker ends a request whose time is up: clocks differ, and the gateway is first
/// unless it is dead.
const DEADLINE_MARGIN: Duration = Duration::from_secs(1);

/// Pulls from the shared queue that a worker has waiting at once. The server serves those that wait in their order: with one
/// for each slot, a burst would go to one worker while others are idle.
pub(crate) const PULLS_MAX: usize = 1;

/// Why a request did not end here.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    /// The log can't be extended by this worker (any more).
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The log can't be read.
    #[error(transparent)]
    Read(#[from] StreamError),
    /// Another worker claimed the request.
    #[error("attempt {0} has begun elsewhere")]
    ClaimedElsewhere(u32),
    /// The engine refused or failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Nothing can be generated in the format that is asked for.
    #[error("the output's format: {0}")]
    Format(#[from] FormatError),
    /// The engine is gone.
    #[error(transparent)]
    Stopped(#[from] EngineStopped),
}

/// One slot's loop. Its pulls, and tasks that run, are together no more than there are slots; a task from the worker's
/// own queue takes its slot at once, though, and counts when a pull is over.
pub(crate) async fn serve(
    worker: Arc<Worker>,
    stop: CancellationToken,
    room: Arc<Semaphore>,
    turn: Arc<Semaphore>,
) {
    while !stop.is_cancelled() {
        let _one = room.acquire().await.expect("never closed");
        if stop.is_cancelled() {
            return;
        }
        let pulled = {
            let _turn = turn.acquire().await.expect("never closed");
            if stop.is_cancelled() {
                return;
            }
            worker.pull(&stop).await
        };
        let Some(delivery) = pulled else { continue };
        match worker.slots.take() {
            Some(slot) => work(&worker, &delivery, slot).await,
            None => worker.answer(&delivery, Verdict::Nak).await,
        }
    }
}

/// The loop of the worker's own queue. It always pulls: what there is no room for must not wait here while others could
/// take it.
pub(crate) async fn serve_own(worker: Arc<Worker>, stop: CancellationToken, room: Arc<Semaphore>) {
    let owner = worker.owner();
    let mut running = JoinSet::new();
    while !stop.is_cancelled() {
        while running.try_join_next().is_some() {}
        let Some(delivery) = worker.pull_own(&owner, &stop).await else { continue };
        match worker.slots.take() {
            Some(slot) => {
                running.spawn(in_process(work_own(worker.clone(), delivery, slot, room.clone())));
            }
            None => worker.answer(&delivery, Verdict::Nak).await,
        }
    }
    while running.join_next().await.is_some() {}
}

async fn work_own(worker: Arc<Worker>, delivery: Delivery, slot: Slot, room: Arc<Semaphore>) {
    let counts = async {
        let _one = room.acquire().await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        () = work(&worker, &delivery, slot) => {}
        () = counts => {}
    }
}

async fn work(worker: &Arc<Worker>, delivery: &Delivery, slot: Slot) {
    let Ok(task) = DecodeTask::decode(&delivery.payload) else {
        tracing::error!("a decode task is not readable; dropped");
        return worker.answer(delivery, Verdict::Ack).await;
    };
    let log = LogRef { gateway: task.gateway, request: task.request };
    if let Some(verdict) = see_through(worker, delivery, &log, slot).await {
        worker.answer(delivery, verdict).await;
    }
}

/// Takes a request to its end, or as far as it goes here, and says what becomes of the task. None: say nothing (more),
/// since the task is in other hands, and an acknowledgement from here would take it from them.
async fn see_through(worker: &Arc<Worker>, delivery: &Delivery, log: &LogRef, slot: Slot) -> Option<Verdict> {
    let slot = Arc::new(slot);
    let alive = worker.keep_alive(delivery);
    let unwanted = worker.enter(log.request);
    let attempt = Attempt { worker, log, slot: &slot };
    let outcome = match take_up(worker, delivery, log).await {
        Ok(writer) => {
            let deadline = time_left(writer.state());
            tokio::select! {
                biased;
                outcome = attempt.run(writer, delivery) => outcome,
                cause = unwanted.raised() => end(worker, log, |_| cancelled(cause)).await,
                () = tokio::time::sleep(deadline) => end(worker, log, expired).await,
            }
        }
        Err(verdict) => {
            worker.leave(log.request, &unwanted);
            return verdict;
        }
    };
    worker.leave(log.request, &unwanted);
    worker.runner.remove(slot.index()).await;
    let verdict = match outcome {
        Ok(Outcome::Ended) => Some(Verdict::Ack),
        Ok(Outcome::Left(sealed)) => {
            // Whoever takes over may do so at once; the slot is theirs to read until they have.
            drop(alive);
            worker.answer(delivery, Verdict::Nak).await;
            if let Some(sealed) = sealed {
                let released = sealed.over().await;
                tracing::info!(%log, released, "handed over");
            }
            None
        }
        Err(error) => failed(worker, log, &error).await,
    };
    worker.unused(&slot).await;
    // Only then: a scratch write at the beginning would spoil what is being kept.
    worker.runner.free(slot.index()).await;
    verdict
}

/// Opens a task's log, or says what becomes of a task whose request can't be, or must not be, tried (again).
async fn take_up(
    worker: &Arc<Worker>,
    delivery: &Delivery,
    log: &LogRef,
) -> Result<LogWriter, Option<Verdict>> {
    let mut writer = open(worker, delivery, log).await.map_err(Some)?;
    if writer.state().phase.is_terminal() {
        return Err(Some(Verdict::Ack));
    }
    match hopeless(writer.state(), worker.config.attempts_max) {
        Some(failed) => Err(fail(worker, &mut writer, failed.code, failed.message).await),
        None => Ok(writer),
    }
}

/// Why a request must not be tried (again), if so.
fn hopeless(state: &Lifecycle, attempts_max: u32) -> Option<RequestFailed> {
    if now_us() > state.deadline_us() {
        let timeout_ms = state.accepted.timeout_ms;
        let message = format!("no worker took the request within its {timeout_ms} ms");
        return Some(RequestFailed { code: FailureCode::DeadlineExceeded, message });
    }
    let tried = state.fruitless;
    (tried >= attempts_max).then(|| {
        let message = format!("{tried} attempts in a row ended without a token");
        RequestFailed { code: FailureCode::TooManyAttempts, message }
    })
}

/// Opens a task's log, or says what becomes of a task whose log can't be opened.
async fn open(worker: &Worker, delivery: &Delivery, log: &LogRef) -> Result<LogWriter, Verdict> {
    match LogWriter::open(worker.streams.log.clone(), log.clone()).await {
        Ok(writer) => Ok(writer),
        Err(WriteError::Corrupt { problem, .. }) => {
            tracing::error!(%log, problem, "a log is not readable; its task is dropped");
            let reason = format!("its log is not readable: {problem}");
            worker.bury(log, Role::Decode, None, reason, delivery.delivery).await;
            Err(Verdict::Ack)
        }
        Err(WriteError::Missing(_)) if delivery.delivery >= NO_LOG_TRIES && worker.has_no_log(log).await => {
            tracing::warn!(%log, "a task without a log is dropped");
            Err(Verdict::Ack)
        }
        // Another server of the cluster may have it already.
        Err(WriteError::Missing(_)) => Err(Verdict::Later(NO_LOG_PAUSE)),
        Err(error) => {
            tracing::warn!(%log, %error, "giving the task back");
            Err(Verdict::Later(FAILED_PAUSE))
        }
    }
}

/// Time until a worker may say that a request's time is up.
fn time_left(state: &Lifecycle) -> Duration {
    Duration::from_micros(state.deadline_us().saturating_sub(now_us())) + DEADLINE_MARGIN
}

fn cancelled(cause: String) -> Body {
    Body::RequestCancelled(RequestCancelled { cause })
}

fn expired(state: &Lifecycle) -> Body {
    let message = format!("the request did not end within {} s", state.accepted.timeout_ms as f64 / 1e3);
    Body::RequestFailed(RequestFailed { code: FailureCode::DeadlineExceeded, message })
}

/// Ends a request that need not, or must not, go on.
async fn end(
    worker: &Arc<Worker>,
    log: &LogRef,
    ending: impl FnOnce(&Lifecycle) -> Body,
) -> Result<Outcome, RequestError> {
    let mut writer = LogWriter::open(worker.streams.log.clone(), log.clone()).await?;
    release(worker, writer.state());
    if !writer.state().phase.is_terminal() {
        let body = ending(writer.state());
        writer.append(body).await?;
    }
    Ok(Outcome::Ended)
}

/// What becomes of a task whose request did not end here.
async fn failed(worker: &Arc<Worker>, log: &LogRef, error: &RequestError) -> Option<Verdict> {
    let mut writer = match LogWriter::open(worker.streams.log.clone(), log.clone()).await {
        Ok(writer) if writer.state().phase.is_terminal() => {
            release(worker, writer.state());
            return Some(Verdict::Ack);
        }
        Ok(writer) => writer,
        Err(_) => return Some(Verdict::Later(FAILED_PAUSE)),
    };
    // The newer attempt may be this worker's own: a task comes again to one that hung for too long, in another of
    // its slots. To give it back from here would take it from there.
    let overtaken = matches!(
        error,
        RequestError::Write(WriteError::Overtaken { .. }) | RequestError::ClaimedElsewhere(_)
    );
    // An append that failed says nothing of who owns the request: it may have been the claim.
    let unsure = matches!(error, RequestError::Write(WriteError::Append(_)));
    let elsewhere = writer.state().worker.as_ref().is_some_and(|owner| *owner != worker.id);
    if overtaken || (elsewhere && !unsure) {
        tracing::info!(%log, %error, "a newer attempt goes on with the request");
        return None;
    }
    let code = match error {
        RequestError::Engine(EngineError::ContextFull { .. } | EngineError::UnknownToken { .. })
        | RequestError::Format(_) => FailureCode::Unservable,
        RequestError::Engine(_) if writer.state().fruitless >= worker.config.attempts_max => {
            FailureCode::EngineFailed
        }
        RequestError::Engine(_) => return give_back(worker, &mut writer, error).await,
        _ => {
            tracing::warn!(%log, %error, "giving the request back");
            return Some(Verdict::Later(FAILED_PAUSE));
        }
    };
    tracing::warn!(%log, %error, "the request failed");
    fail(worker, &mut writer, code, error.to_string()).await
}

/// Leaves a request that failed here to be tried again; the log says why.
async fn give_back(worker: &Worker, writer: &mut LogWriter, error: &RequestError) -> Option<Verdict> {
    tracing::warn!(log = %writer.log(), %error, "the attempt failed; giving the request back");
    let (cause, reason) = (ReleaseCause::Failed, error.to_string());
    let released = Released { worker: worker.id.clone(), cause, reason, kv: None, cached_tokens: 0 };
    // If the log can't be extended now, the task comes back all the same.
    let _ = writer.append(Body::Released(released)).await;
    Some(Verdict::Later(FAILED_PAUSE))
}

/// Ends a request for good, and keeps a dead letter of it if it was tried again and again.
async fn fail(
    worker: &Worker,
    writer: &mut LogWriter,
    code: FailureCode,
    message: String,
) -> Option<Verdict> {
    let body = Body::RequestFailed(RequestFailed { code, message: message.clone() });
    if writer.append(body).await.is_err() {
        return Some(Verdict::Later(FAILED_PAUSE));
    }
    if matches!(code, FailureCode::EngineFailed | FailureCode::TooManyAttempts) {
        let attempts = u64::from(writer.state().attempt);
        worker.bury(writer.log(), Role::Decode, Some(code), message, attempts).await;
    }
    Some(Verdict::Ack)
}

/// Gives back sealed KV that nobody will read (any more). Best effort, and not waited for: the lease ends by itself.
fn release(worker: &Arc<Worker>, state: &Lifecycle) {
    let Some(first) = state.kv.first().cloned() else { return };
    let worker = worker.clone();
    let give_back = move || {
        if let Ok(transport) = worker.transport(&first)
            && transport.claim(&first).is_ok()
        {
            transport.release(&first);
        }
    };
    environment::spawn(off_thread(give_back));
}
