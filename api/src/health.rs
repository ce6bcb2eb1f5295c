//! Whether this gateway lives, whether it can serve, and what it measures.

use crate::{
    Shared,
    error::{ApiError, ErrorCode},
    meters,
};
use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use forebay_schemas::ids::RequestId;
use forebay_streams::log::LogRef;
use serde::Serialize;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Time between two questions to the backend.
const PROBE: Duration = Duration::from_secs(2);

/// An answer this old still counts.
const RECENT: Duration = Duration::from_secs(6);

/// When the backend last answered.
pub(crate) struct Reachable {
    began: Instant,
    /// Milliseconds from `began`.
    answered_ms: AtomicU64,
}

impl Reachable {
    /// The backend has just answered.
    pub(crate) fn now() -> Reachable {
        Reachable { began: Instant::now(), answered_ms: AtomicU64::new(0) }
    }

    fn mark(&self) {
        self.answered_ms.store(self.began.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn since(&self) -> Duration {
        self.began.elapsed().saturating_sub(Duration::from_millis(self.answered_ms.load(Ordering::Relaxed)))
    }
}

/// Asks the backend something small again and again.
pub(crate) async fn probe(gateway: std::sync::Weak<Shared>) {
    let nobody = RequestId::from_parts(0, &[0; 10]);
    let mut interval = tokio::time::interval(PROBE);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let Some(gateway) = gateway.upgrade() else { return };
        let log = LogRef { gateway: gateway.config.gateway.clone(), request: nobody };
        match gateway.streams.log.last_seq(&log).await {
            Ok(_) => gateway.reachable.mark(),
            Err(error) => tracing::warn!(%error, "the request log is unreachable"),
        }
    }
}

#[derive(Serialize)]
struct Health {
    status: &'static str,
    gateway: String,
    version: &'static str,
    backend_reachable: bool,
    models_watched: bool,
    draining: bool,
    models: usize,
    requests_in_flight: usize,
    followed_logs: usize,
}

impl Health {
    fn of(gateway: &Shared) -> Health {
        let backend_reachable = gateway.reachable.since() < RECENT;
        let models_watched = gateway.models.alive();
        let draining = gateway.draining.is_cancelled();
        let ready = backend_reachable && models_watched && !draining;
        Health {
            status: if ready { "ok" } else { "not ready" },
            gateway: gateway.config.gateway.to_string(),
            version: env!("CARGO_PKG_VERSION"),
            backend_reachable,
            models_watched,
            draining,
            models: gateway.models.cards().len(),
            requests_in_flight: gateway.admission.in_flight(),
            followed_logs: gateway.hub.followed(),
        }
    }
}

/// `GET /live`: the process answers.
pub(crate) async fn live() -> &'static str {
    "ok"
}

/// `GET /ready`: requests can be served.
pub(crate) async fn ready(State(gateway): State<Arc<Shared>>) -> Response {
    let health = Health::of(&gateway);
    let status = if health.status == "ok" { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, health.status).into_response()
}

/// `GET /health`: why, and how much.
pub(crate) async fn health(State(gateway): State<Arc<Shared>>) -> Response {
    Json(Health::of(&gateway)).into_response()
}

/// `GET /metrics`: in Prometheus' text format.
pub(crate) async fn metrics(State(gateway): State<Arc<Shared>>) -> Result<Response, ApiError> {
    let handle = meters::recorder().as_ref().map_err(|error| {
        ApiError::new(ErrorCode::Internal, format!("metrics go to another recorder of this process: {error}"))
    })?;
    let id = gateway.config.gateway.to_string();
    metrics::gauge!(meters::IN_FLIGHT, "gateway" => id.clone()).set(gateway.admission.in_flight() as f64);
    metrics::gauge!(meters::FOLLOWED, "gateway" => id).set(gateway.hub.followed() as f64);
    gateway.fleet.show();
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    Ok((content_type, handle.render()).into_response())
}
