//! The answer in one piece.

use forebay_schemas::{
    lifecycle::Lifecycle,
    openai::{AssistantMessage, ChatCompletion, Choice, ChoiceLogprobs},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What the log says of a chat besides what workers need.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Echo {
    /// See `asking`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) system_fingerprint: Option<String>,
    /// The client wanted the usage at the end of its stream.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) include_usage: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) metadata: Option<Map<String, Value>>,
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

/// A request that has completed.
pub(super) fn completion(state: &Lifecycle) -> ChatCompletion {
    let echo = Echo::of(state);
    let message =
        AssistantMessage { role: "assistant".into(), content: Some(state.text.clone()), refusal: None };
    let told = state.accepted.sampling.logprobs.is_some();
    let logprobs = told.then(|| ChoiceLogprobs::of(&state.logprobs));
    ChatCompletion {
        id: format!("chatcmpl-{}", state.request),
        object: "chat.completion".into(),
        created: state.accepted_us / 1_000_000,
        model: state.accepted.model.clone(),
        system_fingerprint: echo.system_fingerprint,
        choices: vec![Choice { index: 0, message, logprobs, finish_reason: state.finish }],
        usage: state.usage().into(),
        metadata: echo.metadata,
    }
}
