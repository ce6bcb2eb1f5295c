//! Ending a request that nobody wants any more.

use crate::{
    Streams,
    log::{AppendError, LogRef},
    tasks::CancelSignal,
    writer::{LogWriter, WriteError},
};
use forebay_schemas::event::{Body, RequestCancelled};

/// Cancels a request, unless it has ended. The worker that has it is told at once and ends it in its own turn,
/// being the one whose appends never conflict; if there is none, or it does not answer, the end is appended
/// here. Returns whether the request was still going.
pub async fn cancel(streams: &Streams, log: &LogRef, cause: &str) -> Result<bool, WriteError> {
    let mut writer = LogWriter::open(streams.log.clone(), log.clone()).await?;
    if writer.state().phase.is_terminal() {
        return Ok(false);
    }
    if let Some(worker) = &writer.state().worker {
        let signal = CancelSignal { request: log.request, cause: cause.to_owned() };
        if let Err(error) = streams.tasks.signal_cancel(worker, &signal).await {
            tracing::debug!(%log, %error, "the worker was not told; the log will tell it");
        }
    }
    match writer.append(Body::RequestCancelled(RequestCancelled { cause: cause.to_owned() })).await {
        Ok(()) => Ok(true),
        // The worker was faster, or it appends so fast that it will read the signal before this gets in.
        Err(WriteError::Overtaken { .. } | WriteError::Append(AppendError::Conflict { .. })) => Ok(true),
        Err(error) => Err(error),
    }
}
