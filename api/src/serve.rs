//! Serving, and stopping: no new connections, time for what runs, then the end for what still does.

use crate::Gateway;
use axum::serve::ListenerExt;
use std::{future::IntoFuture, io, time::Duration};
use tokio::net::TcpListener;

/// After the grace: time for connections to send their last error, and for logs to get their last event.
const LAST_WORDS: Duration = Duration::from_secs(5);

impl Gateway {
    /// Serves until `shutdown` resolves and running requests have finished, or their grace is over.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        // A token must not wait for the next one to fill a segment.
        let listener = listener.tap_io(|connection| {
            if let Err(error) = connection.set_nodelay(true) {
                tracing::debug!(%error, "a connection goes on with Nagle's algorithm");
            }
        });
        let (draining, closing) = (self.shared.draining.clone(), self.shared.closing.clone());
        let told = draining.clone();
        let signal = async move {
            shutdown.await;
            told.cancel();
        };
        let serving = axum::serve(listener, self.router()).with_graceful_shutdown(signal).into_future();
        let grace = async {
            draining.cancelled().await;
            tokio::time::sleep(self.shared.config.grace).await;
        };
        tokio::pin!(serving);
        let served = tokio::select! {
            served = &mut serving => served,
            () = grace => {
                tracing::warn!(requests = self.shared.admission.in_flight(), "the grace is over");
                closing.cancel();
                tokio::time::timeout(LAST_WORDS, &mut serving).await.unwrap_or(Ok(()))
            }
        };
        self.shared.keepers.close();
        let _ = tokio::time::timeout(LAST_WORDS, self.shared.keepers.wait()).await;
        served
    }
}
