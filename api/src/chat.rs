//! `POST /v1/chat/completions`, in the order of one request: read → validate → admit → render and tokenize →
//! begin its log and queue it → answer, whole or as it comes.

use crate::{Shared, answer, body, error::ApiError, running::Running, sse, validate};
use axum::{
    extract::{Request, State},
    http::{HeaderName, HeaderValue},
    response::{IntoResponse, Response},
};
use forebay_schemas::{ids::RequestId, openai::ChatRequest};
use forebay_streams::environment;
use std::{sync::Arc, time::Instant};

/// Every answer carries its request's id, errors too: it finds the log.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The handler.
pub(crate) async fn chat(State(gateway): State<Arc<Shared>>, http: Request) -> Response {
    let id = environment::request_id();
    let mut response = respond(&gateway, id, http).await.unwrap_or_else(IntoResponse::into_response);
    let value = HeaderValue::try_from(id.to_string()).expect("an id is hexadecimal");
    response.headers_mut().insert(REQUEST_ID, value);
    response
}

async fn respond(gateway: &Arc<Shared>, id: RequestId, http: Request) -> Result<Response, ApiError> {
    let began = Instant::now();
    let request: Arc<ChatRequest> = Arc::new(body::json(http, gateway.config.body_bytes_max).await?);
    let model = gateway.models.get(&request.model).await?;
    let params = validate::params(&request, &model.card, drawn_seed())?;
    let permit = gateway.admission.admit()?;
    let prompt = model.prompt(&request).await?;
    let accepted = params.accept(&model.card, prompt, gateway.config.request_timeout)?;
    let running = Running::start(gateway, &model, id, accepted, permit, began).await?;
    if request.stream == Some(true) {
        let options = request.stream_options.unwrap_or_default();
        Ok(sse::response(running, &model, options))
    } else {
        answer::whole(running, &model).await
    }
}

/// A seed for a client that gave none: in the log, and small enough to be sent as `seed` to repeat the answer.
fn drawn_seed() -> u64 {
    environment::random() >> 11
}
