//! `POST /v1/responses`: the same as a chat, told in another form, kept unless the client says otherwise, and able to go
//! on without it. And what can be asked of it afterwards.

mod conversation;
mod events;
mod object;
mod stored;
mod unsupported;

use crate::{
    Shared,
    asking::{self, Asked},
    body,
    error::{ApiError, ErrorCode},
    identity::{self, Cursor, Key},
    running::Opened,
};
use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use forebay_schemas::{
    ids::RequestId,
    openai::{ChatRequest, Message, ResponsesRequest, Speaker},
};
use forebay_streams::environment;
use serde_json::{Value, json};
use std::{sync::Arc, time::Instant};

use conversation::Said;
use object::{Echo, object};
pub(crate) use stored::{cancel_response, delete_response, get_response};

/// As logs say it.
const ENDPOINT: &str = "responses";

/// The handler.
pub(crate) async fn responses(State(gateway): State<Arc<Shared>>, http: Request) -> Response {
    let mut id = environment::request_id();
    let answer = respond(&gateway, &mut id, http).await;
    identity::named(id, answer)
}

async fn respond(gateway: &Arc<Shared>, id: &mut RequestId, http: Request) -> Result<Response, ApiError> {
    let began = Instant::now();
    let (key, cursor) = (Key::of(http.headers())?, Cursor::of(http.headers())?);
    let request: ResponsesRequest = body::json(http, gateway.config.body_bytes_max).await?;
    if let Some(cursor) = cursor {
        *id = cursor.request;
        return stored::resume(gateway, cursor.request, Some(cursor.seq)).await;
    }
    let (stored, background) = (request.store != Some(false), request.background == Some(true));
    check(&request, stored, background)?;
    let conversation = conversation::of(gateway, &request).await?;
    let asked = Asked {
        endpoint: ENDPOINT,
        request: Arc::new(chat(&request, &conversation)),
        detached: stored || background || key.is_some(),
        stored,
        key: key.map(|key| (key, identity::fingerprint(ENDPOINT, &request))),
        echo: Echo {
            background,
            format: request.text.and_then(|mut text| text.remove("format")),
            instructions: request.instructions,
            max_output_tokens: request.max_output_tokens,
            metadata: request.metadata,
            previous_response_id: request.previous_response_id,
            // For the next turn, which can't be asked for otherwise.
            conversation: if stored { conversation } else { Vec::new() },
        }
        .to_map(),
    };
    let begun = asking::begin(gateway, id, asked, began).await;
    let mut running =
        begun.map_err(|error| error.renamed("messages", "input").renamed("response_format", "text"))?;
    if request.stream == Some(true) {
        return Ok(stored::stream(running, None));
    }
    if background {
        // One that was sent before under the same key is further on.
        let known = match running.began_here() {
            true => None,
            false => Opened::find(gateway, *id).await?,
        };
        let state = known.as_ref().map_or(running.state(), |known| &known.state);
        return Ok(Json(object(state)).into_response());
    }
    running.completed().await?;
    Ok(Json(object(running.state())).into_response())
}

fn check(request: &ResponsesRequest, stored: bool, background: bool) -> Result<(), ApiError> {
    unsupported::refuse(request)?;
    if background && !stored {
        let message = "a response in the background can only be had later: leave store out, or background";
        return Err(ApiError::of(ErrorCode::InvalidValue, "store", message));
    }
    if request.max_output_tokens == Some(0) {
        let message = "max_output_tokens is 0; ask for at least one token";
        return Err(ApiError::of(ErrorCode::InvalidValue, "max_output_tokens", message));
    }
    Ok(())
}

/// The same as a chat.
fn chat(request: &ResponsesRequest, conversation: &[Said]) -> ChatRequest {
    let instructions = request.instructions.iter().map(|text| Message::text(Speaker::System, text));
    let said = conversation.iter().map(|said| Message::text(said.role, &said.text));
    ChatRequest {
        model: request.model.clone(),
        messages: instructions.chain(said).collect(),
        max_completion_tokens: request.max_output_tokens,
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        min_p: request.min_p,
        seed: request.seed,
        stop: request.stop.clone(),
        ignore_eos: request.ignore_eos,
        cache_salt: request.cache_salt.clone(),
        chat_template_kwargs: request.chat_template_kwargs.clone(),
        response_format: request.text.as_ref().and_then(|text| text.get("format")).map(nested),
        ..ChatRequest::default()
    }
}

/// A format as chats have it: what makes a schema is in a field of its own there.
fn nested(format: &Value) -> Value {
    match format["type"].as_str() {
        Some("json_schema") => json!({ "type": "json_schema", "json_schema": format }),
        _ => format.clone(),
    }
}
