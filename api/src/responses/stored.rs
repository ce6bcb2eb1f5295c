//! A response that was begun before: what it is now, the rest of its stream, and its end, at any gateway.

use super::{ENDPOINT, events::Events, object::object};
use crate::{
    Shared,
    error::{ApiError, ErrorCode},
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

/// `GET /v1/responses/{id}`: what it is now, or with `stream=true` the events after a number.
pub(crate) async fn get_response(
    State(gateway): State<Arc<Shared>>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let get = async |id| {
        let wanted = Wanted::read(query.as_deref())?;
        if wanted.stream {
            let after = after(id, wanted.starting_after.as_deref(), &headers)?;
            return resume(&gateway, id, after).await;
        }
        let opened = Opened::stored(&gateway, id, ENDPOINT).await?;
        Ok(Json(object(&opened.state)).into_response())
    };
    identity::about(&name, get).await
}

/// `POST /v1/responses/{id}/cancel`. One that has ended stays as it is.
pub(crate) async fn cancel_response(
    State(gateway): State<Arc<Shared>>,
    Path(name): Path<String>,
) -> Response {
    let cancel = async |id| {
        let opened = Opened::of_endpoint(&gateway, id, ENDPOINT).await?;
        let ended = opened.end(&gateway, "cancelled by the client").await?;
        Ok(Json(object(&ended.state)).into_response())
    };
    identity::about(&name, cancel).await
}

/// `DELETE /v1/responses/{id}`.
pub(crate) async fn delete_response(
    State(gateway): State<Arc<Shared>>,
    Path(name): Path<String>,
) -> Response {
    let delete = async |id| {
        Opened::stored(&gateway, id, ENDPOINT).await?.delete(&gateway).await?;
        let (id, object) = (format!("resp_{id}"), "response".to_owned());
        Ok(Json(Deleted { id, object, deleted: true }).into_response())
    };
    identity::about(&name, delete).await
}

/// The number of the last event that the client has read: in the query, or in the header as the whole id.
fn after(id: RequestId, starting_after: Option<&str>, headers: &HeaderMap) -> Result<Option<u64>, ApiError> {
    if let Some(text) = starting_after {
        let number = text.parse().map_err(|_| {
            let message = format!("starting_after is {text:?}; give the sequence_number of an event");
            ApiError::of(ErrorCode::InvalidValue, "starting_after", message)
        })?;
        return Ok(Some(number));
    }
    let cursor = Cursor::of(headers)?.map(|cursor| cursor.within(id)).transpose()?;
    Ok(cursor.map(|cursor| cursor.seq))
}

/// The stream of a response after the event with a number, or all of it.
pub(super) async fn resume(
    gateway: &Arc<Shared>,
    id: RequestId,
    after: Option<u64>,
) -> Result<Response, ApiError> {
    let opened = Opened::of_endpoint(gateway, id, ENDPOINT).await?;
    Ok(stream(Running::attach(gateway, opened).await?, after))
}

/// A request as a stream, after the event with a number.
pub(super) fn stream(running: Running, after: Option<u64>) -> Response {
    let events = Events::new(running.state(), after);
    sse::response(running, events)
}
