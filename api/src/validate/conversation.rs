//! The messages of a request, as a chat template sees them.

use super::invalid;
use crate::error::{ApiError, ErrorCode};
use forebay_schemas::openai::{ChatRequest, Content, Message, Part, Speaker};
use serde::Serialize;
use std::borrow::Cow;

/// One message, as a chat template sees it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Turn<'a> {
    pub(crate) role: &'static str,
    pub(crate) content: Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<&'a str>,
}

/// Checks the messages.
pub(crate) fn conversation(request: &ChatRequest) -> Result<Vec<Turn<'_>>, ApiError> {
    if request.messages.is_empty() {
        return Err(invalid("messages", "messages is empty; give at least one"));
    }
    request.messages.iter().enumerate().map(|(index, message)| turn(index, message)).collect()
}

fn turn(index: usize, message: &Message) -> Result<Turn<'_>, ApiError> {
    let unsupported = |field: &str, what: &str| {
        let param = format!("messages[{index}].{field}");
        let text = format!("{param}: {what}");
        ApiError::of(ErrorCode::UnsupportedParameter, param, text)
    };
    if message.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty()) {
        return Err(unsupported("tool_calls", "tool calls are not supported"));
    }
    if message.function_call.is_some() {
        return Err(unsupported("function_call", "function calls are not supported"));
    }
    if message.audio.is_some() {
        return Err(unsupported("audio", "audio is not supported"));
    }
    let role = match message.role {
        // Templates know only the older name, and most skip a role that they do not know.
        Speaker::System | Speaker::Developer => "system",
        Speaker::User => "user",
        Speaker::Assistant => "assistant",
        Speaker::Tool | Speaker::Function => {
            return Err(unsupported("role", "tool calls are not supported, so neither are their results"));
        }
    };
    let content = match &message.content {
        Some(Content::Text(text)) => Cow::Borrowed(text.as_str()),
        Some(Content::Parts(parts)) => Cow::Owned(joined(index, parts)?),
        None => {
            let param = format!("messages[{index}].content");
            let text = format!("{param} is missing; give a string");
            return Err(ApiError::of(ErrorCode::MissingParameter, param, text));
        }
    };
    Ok(Turn {
        role,
        content,
        name: message.name.as_deref(),
        reasoning_content: message.reasoning_content.as_deref(),
    })
}

/// The text of all parts, a line each, as vLLM joins them for templates that take strings.
fn joined(index: usize, parts: &[Part]) -> Result<String, ApiError> {
    let text = |(at, part): (usize, &Part)| match (part.kind.as_str(), &part.text) {
        ("text", Some(text)) => Ok(text.clone()),
        ("text", None) => {
            let param = format!("messages[{index}].content[{at}].text");
            let message = format!("{param} is missing; give a string");
            Err(ApiError::of(ErrorCode::MissingParameter, param, message))
        }
        (kind, _) => Err(ApiError::of(
            ErrorCode::UnsupportedParameter,
            format!("messages[{index}].content[{at}].type"),
            format!("content of type {kind:?} is not supported (supported: \"text\"); leave it out"),
        )),
    };
    Ok(parts.iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"))
}
