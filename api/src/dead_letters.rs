//! Tasks that no worker gets any more, because they were delivered as often as they may be: their requests are ended
//! here, visibly and once. Any gateway does it for all of them.

use forebay_schemas::{
    dead_letter::DeadLetter,
    event::{Body, FailureCode, KvLost, RequestFailed},
    ids::ModelKey,
    lifecycle::Phase,
    task::{DecodeTask, PrefillTask, Role, Task},
};
use forebay_streams::{
    Streams,
    dead_letters::Spent,
    environment::now_us,
    log::LogRef,
    writer::{LogWriter, WriteError},
};
use std::time::Duration;

/// How long one look for spent tasks waits.
const WAIT: Duration = Duration::from_secs(20);

/// Pause after something failed.
const PAUSE: Duration = Duration::from_secs(2);

/// Ends the requests of spent tasks, for as long as the gateway lives.
pub(crate) async fn settle(streams: Streams) {
    loop {
        let settled = match streams.dead_letters.spent(WAIT).await {
            Ok(None) => continue,
            Ok(Some(spent)) => settle_one(&streams, &spent).await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = settled {
            tracing::debug!(error, "a spent task was not dealt with; trying again");
            tokio::time::sleep(PAUSE).await;
        }
    }
}

async fn settle_one(streams: &Streams, spent: &Spent) -> Result<(), WriteError> {
    let Some((log, model)) = task_of(spent) else {
        tracing::error!(role = spent.role.as_str(), "a spent task is not readable; dropped");
        return Ok(streams.dead_letters.settle(spent).await?);
    };
    let reason = format!("its {} task was delivered {} times", spent.role.as_str(), spent.deliveries);
    let code = match LogWriter::open(streams.log.clone(), log.clone()).await {
        Ok(writer) if writer.state().phase.is_terminal() => {
            let given_up = RequestFailed { code: FailureCode::TooManyAttempts, message: reason.clone() };
            if writer.state().failure.as_ref() != Some(&given_up) {
                return Ok(streams.dead_letters.settle(spent).await?);
            }
            // Ended here, or by a gateway that died, before its letter was kept.
            Some(given_up.code)
        }
        Ok(writer) => end(writer, spent.role, reason.clone()).await?,
        Err(WriteError::Missing(_) | WriteError::Corrupt { .. }) => None,
        Err(error) => return Err(error),
    };
    tracing::warn!(%log, reason, "a task is given up");
    let letter = DeadLetter {
        request: log.request,
        gateway: log.gateway,
        model,
        role: spent.role,
        code,
        reason,
        attempts: spent.deliveries,
        time_us: now_us(),
    };
    streams.dead_letters.bury(&letter).await?;
    Ok(streams.dead_letters.settle(spent).await?)
}

/// A decode task that is given up ends its request; a prefill task sends the decode worker to do it itself.
async fn end(mut writer: LogWriter, role: Role, reason: String) -> Result<Option<FailureCode>, WriteError> {
    let (body, code) = match role {
        Role::Decode => {
            let code = FailureCode::TooManyAttempts;
            (Body::RequestFailed(RequestFailed { code, message: reason }), Some(code))
        }
        Role::Prefill if matches!(writer.state().phase, Phase::PrefillQueued | Phase::Prefilling) => {
            (Body::KvLost(KvLost { reason }), None)
        }
        Role::Prefill => return Ok(None),
    };
    match writer.append(body).await {
        Ok(()) => Ok(code),
        // The decode worker goes on without it.
        Err(WriteError::Overtaken { .. }) if role == Role::Prefill => Ok(None),
        // It went on in this very moment, and has time to end until the task is found again. Nobody else gets it.
        Err(error) => Err(error),
    }
}

fn task_of(spent: &Spent) -> Option<(LogRef, ModelKey)> {
    match spent.role {
        Role::Decode => {
            let task = DecodeTask::decode(&spent.payload).ok()?;
            Some((LogRef { gateway: task.gateway, request: task.request }, task.model))
        }
        Role::Prefill => {
            let task = PrefillTask::decode(&spent.payload).ok()?;
            Some((LogRef { gateway: task.gateway, request: task.request }, task.model))
        }
    }
}
