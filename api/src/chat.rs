//! `POST /v1/chat/completions`, in the order of one request: who it is → read → [`asking::begin`] → answer, whole or as
//! it comes. And what can be asked of it afterwards.

mod answer;
mod chunks;
mod stored;

use crate::{
    Shared,
    asking::{self, Asked},
    body,
    error::ApiError,
    identity::{self, Cursor, Key},
};
use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use forebay_schemas::{ids::RequestId, openai::ChatRequest};
use forebay_streams::environment;
use std::{sync::Arc, time::Instant};

use answer::{Echo, completion};
pub(crate) use stored::{delete_chat, get_chat};

/// As logs say it.
const ENDPOINT: &str = "chat.completions";

/// The handler.
pub(crate) async fn chat(State(gateway): State<Arc<Shared>>, http: Request) -> Response {
    let mut id = environment::request_id();
    let answer = respond(&gateway, &mut id, http).await;
    identity::named(id, answer)
}

async fn respond(gateway: &Arc<Shared>, id: &mut RequestId, http: Request) -> Result<Response, ApiError> {
    let began = Instant::now();
    let (key, cursor) = (Key::of(http.headers())?, Cursor::of(http.headers())?);
    let request: Arc<ChatRequest> = Arc::new(body::json(http, gateway.config.body_bytes_max).await?);
    let usage = request.stream_options.and_then(|options| options.include_usage) == Some(true);
    if let Some(cursor) = cursor {
        *id = cursor.request;
        return stored::resume(gateway, cursor.request, Some(cursor), Some(usage)).await;
    }
    let stored = request.store == Some(true);
    let metadata = request.metadata.clone().filter(|_| stored);
    let asked = Asked {
        endpoint: ENDPOINT,
        detached: stored || key.is_some(),
        stored,
        echo: Echo { include_usage: usage, metadata, ..Echo::default() }.to_map(),
        key: key.map(|key| (key, identity::fingerprint(ENDPOINT, request.as_ref()))),
        request: request.clone(),
    };
    let mut running = asking::begin(gateway, id, asked, began).await?;
    if request.stream == Some(true) {
        return Ok(stored::stream(running, None, usage));
    }
    running.completed().await?;
    Ok(Json(completion(running.state())).into_response())
}
