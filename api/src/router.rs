//! Which path leads where, and what holds for all of them: every request is counted, and every error, a panic's
//! too, has OpenAI's shape.

use crate::{
    Gateway, Shared, chat,
    error::{ApiError, ErrorCode},
    health, meters, models, responses,
};
use axum::{
    Router,
    extract::{MatchedPath, Request},
    http::{Method, Uri},
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use std::{any::Any, sync::Arc};
use tower_http::catch_panic::CatchPanicLayer;

impl Gateway {
    /// The gateway's routes, to serve or to nest.
    pub fn router(&self) -> axum::Router {
        let routes: Router<Arc<Shared>> = Router::new()
            .route("/v1/chat/completions", post(chat::chat))
            .route("/v1/chat/completions/{id}", get(chat::get_chat).delete(chat::delete_chat))
            .route("/v1/responses", post(responses::responses))
            .route("/v1/responses/{id}", get(responses::get_response).delete(responses::delete_response))
            .route("/v1/responses/{id}/cancel", post(responses::cancel_response))
            .route("/v1/models", get(models::list_models))
            .route("/v1/models/{*name}", get(models::get_model))
            .route("/live", get(health::live))
            .route("/ready", get(health::ready))
            .route("/health", get(health::health))
            .route("/metrics", get(health::metrics));
        routes
            .fallback(not_found)
            .method_not_allowed_fallback(method_not_allowed)
            .layer(CatchPanicLayer::custom(panicked))
            .layer(from_fn(counted))
            .with_state(self.shared.clone())
    }
}

async fn not_found(uri: Uri) -> ApiError {
    let message = format!("there is nothing at {}; chat completions are at /v1/chat/completions", uri.path());
    ApiError::new(ErrorCode::NotFound, message)
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::new(ErrorCode::MethodNotAllowed, format!("{} does not take {method}", uri.path()))
}

/// By value: that is how the layer hands it over.
#[expect(clippy::needless_pass_by_value)]
fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    tracing::error!(panic = text, "a handler panicked");
    ApiError::new(ErrorCode::Internal, "the gateway failed at this request; its log says more")
        .into_response()
}

async fn counted(path: Option<MatchedPath>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    meters::answered(path.as_ref().map_or("none", MatchedPath::as_str), response.status().as_u16());
    response
}
