//! A chat that was begun before: its answer, the rest of its stream, and its end, at any gateway.

use super::{
    ENDPOINT,
    answer::{Echo, completion},
    chunks::Chunks,
};
use crate::{
    Shared,
    error::ApiError,
    identity::{self, Cursor},
    query::Wanted,
    running::{Opened, Running},
    sse,
};
use axum::{
    Json,
    extract::{Path, RawQuery, State},
    http::HeaderMap,
    response::{IntoResponse, Response},
};
use forebay_schemas::{ids::RequestId, openai::Deleted};
use std::sync::Arc;

/// `GET /v1/chat/completions/{id}`: the answer, or with `stream=true` the events after an id.
pub(crate) async fn get_chat(
    State(gateway): State<Arc<Shared>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    identity::about(&name, async |id| get(&gateway, id, query.as_deref(), &headers).await).await
}

async fn get(
    gateway: &Arc<Shared>,
    id: RequestId,
    query: Option<&str>,
    headers: &HeaderMap,
) -> Result<Response, ApiError> {
    let wanted = Wanted::read(query)?;
    if wanted.stream {
        let cursor = match wanted.starting_after {
            Some(text) => Some(Cursor::read("starting_after", &text)?),
            None => Cursor::of(headers)?,
        };
        return resume(gateway, id, cursor, None).await;
    }
    let opened = Opened::stored(gateway, id, ENDPOINT).await?;
    let mut running = Running::attach(gateway, opened).await?;
    running.completed().await?;
    Ok(Json(completion(running.state())).into_response())
}

/// `DELETE /v1/chat/completions/{id}`.
pub(crate) async fn delete_chat(State(gateway): State<Arc<Shared>>, Path(name): Path<String>) -> Response {
    let delete = async |id| {
        Opened::stored(&gateway, id, ENDPOINT).await?.delete(&gateway).await?;
        let (id, object) = (format!("chatcmpl-{id}"), "chat.completion.deleted".to_owned());
        Ok(Json(Deleted { id, object, deleted: true }).into_response())
    };
    identity::about(&name, delete).await
}

/// The stream of a request from after an event on, or all of it. It says how much there was at the end if the client
/// wants that now or, if it does not say, wanted it first.
pub(super) async fn resume(
    gateway: &Arc<Shared>,
    id: RequestId,
    cursor: Option<Cursor>,
    usage: Option<bool>,
) -> Result<Response, ApiError> {
    let cursor = cursor.map(|cursor| cursor.within(id)).transpose()?;
    let opened = Opened::of_endpoint(gateway, id, ENDPOINT).await?;
    let usage = usage.unwrap_or_else(|| Echo::of(&opened.state).include_usage);
    Ok(stream(Running::attach(gateway, opened).await?, cursor, usage))
}

/// A request as a stream, from after an event on.
pub(super) fn stream(running: Running, after: Option<Cursor>, usage: bool) -> Response {
    let chunks = Chunks::new(running.state(), usage, after);
    sse::response(running, chunks)
}
