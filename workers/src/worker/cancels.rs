//! Requests that run here, so that a cancel finds them.

use super::Worker;
use forebay_schemas::ids::RequestId;
use futures::StreamExt;
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// Pause before signals that ended are asked for again.
const SIGNALS_PAUSE: Duration = Duration::from_millis(500);

impl Worker {
    /// Notes that a request runs here, so that a cancel finds it.
    pub(crate) fn enter(&self, request: RequestId) -> CancelFlag {
        let flag = CancelFlag::default();
        self.running.lock().expect("no panics while held").insert(request, flag.clone());
        flag
    }

    /// Notes that it no longer does.
    pub(crate) fn leave(&self, request: RequestId, flag: &CancelFlag) {
        let mut running = self.running.lock().expect("no panics while held");
        // A newer attempt at the same request, in another slot, has its own.
        if running.get(&request).is_some_and(|current| Arc::ptr_eq(&current.cause, &flag.cause)) {
            running.remove(&request);
        }
    }

    pub(super) async fn hear_cancels(self: Arc<Self>) {
        loop {
            match self.streams.tasks.cancel_signals(&self.id).await {
                Ok(mut signals) => {
                    while let Some(signal) = signals.next().await {
                        let flag =
                            self.running.lock().expect("no panics while held").get(&signal.request).cloned();
                        if let Some(flag) = flag {
                            flag.raise(signal.cause);
                        }
                    }
                }
                Err(error) => tracing::debug!(%error, "no cancel signals; the log still tells"),
            }
            tokio::time::sleep(SIGNALS_PAUSE).await;
        }
    }
}

/// Raised when a request is no longer wanted; carries the cause.
#[derive(Clone, Default)]
pub(crate) struct CancelFlag {
    raised: CancellationToken,
    cause: Arc<Mutex<String>>,
}

impl CancelFlag {
    fn raise(&self, cause: String) {
        *self.cause.lock().expect("no panics while held") = cause;
        self.raised.cancel();
    }

    /// Waits until the request is no longer wanted, and says why.
    pub(crate) async fn raised(&self) -> String {
        self.raised.cancelled().await;
        self.cause.lock().expect("no panics while held").clone()
    }
}
