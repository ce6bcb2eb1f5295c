//! Who sees to it that a request's log ends: one small task for each request. It learns from the one end of a
//! channel being dropped that the client is gone, and needs nobody to tell it that the time is up. What becomes of a
//! detached request then, it reads from the log.

use crate::{Shared, admission::Permit};
use forebay_schemas::{
    event::{Body, FailureCode, RequestFailed},
    lifecycle::Phase,
};
use forebay_streams::{
    Streams,
    cancel::cancel,
    environment::in_process,
    log::LogRef,
    tasks::CancelSignal,
    writer::{LogWriter, WriteError},
};
use std::{sync::Arc, time::Duration};
use tokio::sync::oneshot;

/// Times that an ending is tried while the backend does not take it, each wait twice the last one.
const ATTEMPTS_MAX: u32 = 7;

/// The first wait: with doubling, about half a minute in all.
const RETRY_FIRST: Duration = Duration::from_millis(250);

/// The request's end of the channel. Dropped without a word, the client is gone, or (of a detached request) no longer
/// reads here.
pub(super) struct Keeper(Option<oneshot::Sender<End>>);

enum End {
    /// The log has a terminal event.
    Ended,
    /// Nobody here will read on.
    Abandoned(&'static str),
    /// The client was told to ask again, under the key of the request.
    Unheard(&'static str),
}

impl Keeper {
    /// Starts watching over a request. The permit is held until its log has ended.
    pub(super) fn spawn(
        gateway: &Arc<Shared>,
        log: LogRef,
        timeout: Duration,
        detached: bool,
        permit: Permit,
    ) -> Keeper {
        let (sender, receiver) = oneshot::channel();
        let gateway_too = gateway.clone();
        gateway.keepers.spawn(in_process(async move {
            if let Some(ending) = wait(&gateway_too, &log, timeout, detached, receiver).await {
                bring_about(&gateway_too.streams, &log, &ending).await;
            }
            gateway_too.watch.forget(log.request);
            drop(permit);
        }));
        Keeper(Some(sender))
    }

    /// The log has a terminal event.
    pub(super) fn ended(&mut self) {
        self.tell(End::Ended);
    }

    /// Nobody here will read on; the cause goes into the log, if it has not ended.
    pub(super) fn abandon(&mut self, cause: &'static str) {
        self.tell(End::Abandoned(cause));
    }

    /// The client was told that the request was not taken, whatever the log says. One with a key may be under way for
    /// somebody who asked again, or will be.
    pub(super) fn refused(&mut self, cause: &'static str, has_key: bool) {
        self.tell(if has_key { End::Unheard(cause) } else { End::Abandoned(cause) });
    }

    fn tell(&mut self, end: End) {
        if let Some(sender) = self.0.take() {
            // Nobody listens any more: the deadline has passed, and the keeper has ended the log itself.
            let _ = sender.send(end);
        }
    }
}

/// How a log is to end.
enum Ending {
    Cancelled(&'static str),
    Unheard(&'static str),
    Expired(Duration),
}

/// Waits until the request has ended (none) or is to be ended.
async fn wait(
    gateway: &Shared,
    log: &LogRef,
    timeout: Duration,
    detached: bool,
    end: oneshot::Receiver<End>,
) -> Option<Ending> {
    let time = tokio::time::sleep(timeout);
    tokio::pin!(time);
    tokio::select! {
        biased;
        end = end => match end {
            Ok(End::Ended) => None,
            Ok(End::Abandoned(cause)) => Some(Ending::Cancelled(cause)),
            Ok(End::Unheard(cause)) => Some(Ending::Unheard(cause)),
            Err(_dropped) if detached => tokio::select! {
                biased;
                () = ended(gateway, log) => None,
                () = &mut time => Some(Ending::Expired(timeout)),
                // It goes on without this gateway. Whoever is asked for it next keeps its deadline.
                () = gateway.closing.cancelled() => None,
            },
            Err(_dropped) => Some(Ending::Cancelled("client disconnected")),
        },
        () = &mut time => Some(Ending::Expired(timeout)),
    }
}

/// Resolves once the log has a terminal event.
async fn ended(gateway: &Shared, log: &LogRef) {
    let mut follow = gateway.hub.follow(log.request, 0).catching_up();
    loop {
        match follow.next().await {
            Ok(recorded) if recorded.event.body.is_terminal() => return,
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%log, %error, "a log that nobody reads can't be read; trying again");
                tokio::time::sleep(super::READ_RETRY).await;
            }
        }
    }
}

/// Ends the log, unless it has ended.
async fn bring_about(streams: &Streams, log: &LogRef, ending: &Ending) {
    let mut wait = RETRY_FIRST;
    for attempts in 1..=ATTEMPTS_MAX {
        let ended = match ending {
            Ending::Cancelled(cause) => cancel(streams, log, cause).await.map(drop),
            Ending::Unheard(cause) => give_up(streams, log, cause).await,
            Ending::Expired(timeout) => expire(streams, log, *timeout).await,
        };
        match ended {
            Ok(()) => return,
            Err(error) if attempts == ATTEMPTS_MAX => {
                tracing::error!(%log, %error, "the request could not be ended");
            }
            // A log that does not exist is tried again too: it may be about to.
            Err(error) => {
                tracing::debug!(%log, %error, "the request could not be ended yet");
                tokio::time::sleep(wait).await;
                wait *= 2;
            }
        }
    }
}

/// Ends a request that may have been begun and not queued, unless somebody works on it: then it was asked again.
async fn give_up(streams: &Streams, log: &LogRef, cause: &str) -> Result<(), WriteError> {
    let mut writer = LogWriter::open(streams.log.clone(), log.clone()).await?;
    if writer.state().phase != Phase::Queued || writer.state().attempt > 0 {
        return Ok(());
    }
    let failed = RequestFailed { code: FailureCode::QueueUnavailable, message: cause.to_owned() };
    match writer.append(Body::RequestFailed(failed)).await {
        Err(WriteError::Overtaken { .. }) => Ok(()),
        other => other,
    }
}

/// Ends a request whose time is up, unless it has ended.
pub(super) async fn expire(streams: &Streams, log: &LogRef, timeout: Duration) -> Result<(), WriteError> {
    let mut writer = LogWriter::open(streams.log.clone(), log.clone()).await?;
    if writer.state().phase.is_terminal() {
        return Ok(());
    }
    let message = deadline_message(timeout);
    let failed = RequestFailed { code: FailureCode::DeadlineExceeded, message: message.clone() };
    match writer.append(Body::RequestFailed(failed)).await {
        // It ended in this very moment.
        Err(WriteError::Overtaken { .. }) => return Ok(()),
        other => other?,
    }
    if let Some(worker) = &writer.state().worker {
        let signal = CancelSignal { request: log.request, cause: message };
        if let Err(error) = streams.tasks.signal_cancel(worker, &signal).await {
            tracing::debug!(%log, %error, "the worker was not told; the log will tell it");
        }
    }
    Ok(())
}

/// What a client reads when its time is up.
pub(super) fn deadline_message(timeout: Duration) -> String {
    format!("the request did not end within {} s", timeout.as_secs_f64())
}
