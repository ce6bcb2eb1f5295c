//! The answer in one piece, once the request has ended.

use crate::{
    error::ApiError,
    models::Model,
    running::{News, Running, Step},
};
use axum::{
    Json,
    response::{IntoResponse, Response},
};
use forebay_schemas::{
    event::RequestCompleted,
    lifecycle::Lifecycle,
    openai::{AssistantMessage, ChatCompletion, Choice},
};

/// Waits for the end of a request. If the client does not, this future is dropped, and the request cancelled.
pub(crate) async fn whole(mut running: Running, model: &Model) -> Result<Response, ApiError> {
    loop {
        let events = match running.next().await {
            Step::Events(events) => events,
            Step::Quiet => continue,
            Step::Stopped(error) => return Err(error),
        };
        match events.last().and_then(|last| News::of(&last.event.body)) {
            Some(News::Completed(completed)) => {
                return Ok(Json(completion(running.state(), model, completed)).into_response());
            }
            Some(News::Ended(error)) => return Err(error),
            Some(News::Text(_)) | None => {}
        }
    }
}

fn completion(state: &Lifecycle, model: &Model, completed: &RequestCompleted) -> ChatCompletion {
    let message =
        AssistantMessage { role: "assistant".into(), content: Some(state.text.clone()), refusal: None };
    ChatCompletion {
        id: format!("chatcmpl-{}", state.request),
        object: "chat.completion".into(),
        created: state.accepted_us / 1_000_000,
        model: state.accepted.model.clone(),
        system_fingerprint: Some(model.fingerprint.clone()),
        choices: vec![Choice { index: 0, message, logprobs: None, finish_reason: Some(completed.reason) }],
        usage: completed.usage.into(),
    }
}
