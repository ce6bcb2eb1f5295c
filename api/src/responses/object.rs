//! A response as an object: a function of the log.

use super::conversation::Said;
use crate::error::ApiError;
use forebay_schemas::{
    event::FinishReason,
    lifecycle::{Lifecycle, Phase},
    openai::{IncompleteDetails, OutputMessage, OutputText, ResponseError, ResponseObject, ResponseStatus},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// What the log says of a response besides what workers need.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Echo {
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) background: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) format: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) instructions: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) max_output_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) metadata: Option<Map<String, Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) previous_response_id: Option<String>,
    /// All that was said, without the instructions and the answer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) conversation: Vec<Said>,
}

impl Echo {
    /// Of a request.
    pub(super) fn of(state: &Lifecycle) -> Echo {
        let echo = state.accepted.echo.as_ref();
        echo.and_then(|echo| Echo::deserialize(echo).ok()).unwrap_or_default()
    }

    pub(super) fn to_map(&self) -> Map<String, Value> {
        let Ok(Value::Object(map)) = serde_json::to_value(self) else {
            unreachable!("a struct is an object")
        };
        map
    }
}

/// A response as far as its log goes.
pub(super) fn object(state: &Lifecycle) -> ResponseObject {
    let status = status(state);
    let ended = state.phase.is_terminal();
    let incomplete = IncompleteDetails { reason: "max_output_tokens".into() };
    ResponseObject {
        error: state.failure.as_ref().map(|failed| {
            let error = ApiError::from(failed).envelope().error;
            ResponseError { code: error.code.unwrap_or_default(), message: error.message }
        }),
        incomplete_details: (status == ResponseStatus::Incomplete).then_some(incomplete),
        output: if state.text.is_empty() && state.phase != Phase::Completed {
            vec![]
        } else {
            vec![message(state, vec![OutputText::new(&state.text)])]
        },
        usage: ended.then(|| state.usage().into()),
        ..without_output(state, status)
    }
}

/// A response before there is anything of it.
pub(super) fn without_output(state: &Lifecycle, status: ResponseStatus) -> ResponseObject {
    let (echo, accepted) = (Echo::of(state), &state.accepted);
    ResponseObject {
        id: format!("resp_{}", state.request),
        object: "response".into(),
        created_at: state.accepted_us / 1_000_000,
        status,
        background: echo.background,
        error: None,
        incomplete_details: None,
        instructions: echo.instructions,
        max_output_tokens: echo.max_output_tokens,
        metadata: echo.metadata.unwrap_or_default(),
        model: accepted.model.clone(),
        output: vec![],
        parallel_tool_calls: true,
        previous_response_id: echo.previous_response_id,
        store: accepted.stored,
        temperature: accepted.sampling.temperature,
        text: json!({ "format": echo.format.unwrap_or_else(|| json!({ "type": "text" })) }),
        tool_choice: "auto".into(),
        tools: vec![],
        top_p: accepted.sampling.top_p,
        truncation: "disabled".into(),
        usage: None,
    }
}

/// The one message of a response, with these parts.
pub(super) fn message(state: &Lifecycle, content: Vec<OutputText>) -> OutputMessage {
    let status = match status(state) {
        ResponseStatus::Queued | ResponseStatus::InProgress => ResponseStatus::InProgress,
        ResponseStatus::Completed => ResponseStatus::Completed,
        // Messages know no other end.
        _ => ResponseStatus::Incomplete,
    };
    OutputMessage { id: message_id(state), kind: "message".into(), status, role: "assistant".into(), content }
}

pub(super) fn message_id(state: &Lifecycle) -> String {
    format!("msg_{}", state.request)
}

fn status(state: &Lifecycle) -> ResponseStatus {
    match state.phase {
        Phase::Completed if state.finish == Some(FinishReason::Length) => ResponseStatus::Incomplete,
        Phase::Completed => ResponseStatus::Completed,
        Phase::Failed => ResponseStatus::Failed,
        Phase::Cancelled => ResponseStatus::Cancelled,
        // A request that was given back waits again, but it has begun.
        _ if state.attempt == 0 => ResponseStatus::Queued,
        _ => ResponseStatus::InProgress,
    }
}
