//! Serving, and stopping: no new connections, time for what runs, then the end for what still does.

use crate::Gateway;
use axum::{Router, body::Body, http::Request};
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
    service::TowerToHyperService,
};
use std::{io, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tower::ServiceExt;

/// Time for a request's headers, and for a connection to stay open without a request.
const HEADERS_MAX: Duration = Duration::from_secs(60);

/// Pause after a connection that could not be accepted, such as for want of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// After the grace: time for connections to send their last error, and for logs to get their last event.
const LAST_WORDS: Duration = Duration::from_secs(2);

impl Gateway {
    /// Serves until `shutdown` resolves and running requests have finished, or their grace is over.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()> + Send,
    ) -> io::Result<()> {
        let address = listener.local_addr()?;
        tracing::info!(gateway = %self.shared.config.gateway, "listening on http://{address}");
        let connections = GracefulShutdown::new();
        tokio::select! {
            () = self.accept(listener, &connections) => {}
            () = shutdown => {}
        }
        let shared = &self.shared;
        shared.draining.cancel();
        let finished = connections.shutdown();
        tokio::pin!(finished);
        if tokio::time::timeout(shared.config.grace, &mut finished).await.is_err() {
            tracing::warn!(requests = shared.admission.in_flight(), "the grace is over");
            shared.closing.cancel();
            let _ = tokio::time::timeout(LAST_WORDS, finished).await;
        }
        // Nobody is connected any more; what is detached goes on without this gateway.
        shared.closing.cancel();
        shared.keepers.close();
        let _ = tokio::time::timeout(LAST_WORDS, shared.keepers.wait()).await;
        Ok(())
    }

    /// Takes connections up to the bound; more of them wait in the kernel's backlog.
    async fn accept(&self, listener: TcpListener, connections: &GracefulShutdown) {
        let router = self.router();
        let room = Arc::new(Semaphore::new(self.shared.config.connections_max));
        loop {
            let permit = room.clone().acquire_owned().await.expect("never closed");
            match listener.accept().await {
                Ok((stream, _)) => {
                    tokio::spawn(converse(stream, router.clone(), connections.watcher(), permit));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }
}

/// One connection, for as long as it lasts.
async fn converse(stream: TcpStream, router: Router, watcher: Watcher, _permit: OwnedSemaphorePermit) {
    // A token must not wait for the next one to fill a segment.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a connection goes on with Nagle's algorithm");
    }
    let service = router.map_request(|request: Request<Incoming>| request.map(Body::new));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, "a connection broke off");
    }
}
