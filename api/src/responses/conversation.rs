//! What was said so far: by the response before, if there is one, and now.

use super::{ENDPOINT, object::Echo};
use crate::{
    Shared,
    error::{ApiError, ErrorCode},
    running::Opened,
};
use forebay_schemas::{
    ids::RequestId,
    lifecycle::Phase,
    openai::{Content, Input, InputItem, Part, ResponsesRequest, Speaker},
};
use serde::{Deserialize, Serialize};

/// One message, as the log keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Said {
    pub(super) role: Speaker,
    pub(super) text: String,
}

/// The conversation of a request, all of it: so it outlives the responses that it came from.
pub(super) async fn of(gateway: &Shared, request: &ResponsesRequest) -> Result<Vec<Said>, ApiError> {
    let said = now(request.input.as_ref())?;
    let Some(previous) = &request.previous_response_id else { return Ok(said) };
    let mut conversation = before(gateway, previous).await?;
    conversation.extend(said);
    Ok(conversation)
}

/// The conversation up to and with a stored response.
async fn before(gateway: &Shared, previous: &str) -> Result<Vec<Said>, ApiError> {
    const PARAM: &str = "previous_response_id";
    let unknown = || {
        let message = format!("there is no response {previous:?}; it may be gone, or was not to be stored");
        ApiError::of(ErrorCode::PreviousResponseNotFound, PARAM, message)
    };
    let id: RequestId = previous.parse().map_err(|_| unknown())?;
    let opened = match Opened::stored(gateway, id, ENDPOINT).await {
        Err(error) if error.code() == ErrorCode::RequestNotFound => return Err(unknown()),
        opened => opened?,
    };
    if opened.state.phase != Phase::Completed {
        let message =
            format!("response {previous} has not completed; wait for it, or go on from the one before");
        return Err(ApiError::of(ErrorCode::InvalidValue, PARAM, message));
    }
    let mut conversation = Echo::of(&opened.state).conversation;
    conversation.push(Said { role: Speaker::Assistant, text: opened.state.text });
    Ok(conversation)
}

/// What is said now.
fn now(input: Option<&Input>) -> Result<Vec<Said>, ApiError> {
    match input {
        None => Err(ApiError::of(ErrorCode::MissingParameter, "input", "input is missing; it is required")),
        Some(Input::Text(text)) => Ok(vec![Said { role: Speaker::User, text: text.clone() }]),
        Some(Input::Items(items)) if items.is_empty() => {
            Err(ApiError::of(ErrorCode::InvalidValue, "input", "input is empty; say something"))
        }
        Some(Input::Items(items)) => {
            items.iter().enumerate().map(|(index, item)| said(index, item)).collect()
        }
    }
}

fn said(index: usize, item: &InputItem) -> Result<Said, ApiError> {
    let error = |code, field: &str, what: &str| {
        let param = format!("input[{index}].{field}");
        let message = format!("{param} {what}");
        ApiError::of(code, param, message)
    };
    if let Some(kind) = item.kind.as_deref().filter(|kind| *kind != "message") {
        let what = format!("is {kind:?}, which is not supported (supported: \"message\")");
        return Err(error(ErrorCode::UnsupportedParameter, "type", &what));
    }
    let role = match item.role {
        None => return Err(error(ErrorCode::MissingParameter, "role", "is missing; say who speaks")),
        Some(Speaker::Tool | Speaker::Function) => {
            return Err(error(
                ErrorCode::UnsupportedParameter,
                "role",
                "is that of a tool; tools are not supported",
            ));
        }
        Some(role) => role,
    };
    match &item.content {
        None => Err(error(ErrorCode::MissingParameter, "content", "is missing; give a string")),
        Some(Content::Text(text)) => Ok(Said { role, text: text.clone() }),
        Some(Content::Parts(parts)) => Ok(Said { role, text: joined(index, parts)? }),
    }
}

/// The text of all parts, a line each, as in chats.
fn joined(index: usize, parts: &[Part]) -> Result<String, ApiError> {
    let text = |(at, part): (usize, &Part)| {
        let param = |field: &str| format!("input[{index}].content[{at}].{field}");
        match (part.kind.as_str(), &part.text) {
            ("input_text" | "output_text" | "text", Some(text)) => Ok(text.clone()),
            ("input_text" | "output_text" | "text", None) => {
                let param = param("text");
                let message = format!("{param} is missing; give a string");
                Err(ApiError::of(ErrorCode::MissingParameter, param, message))
            }
            (kind, _) => {
                let message = format!(
                    "content of type {kind:?} is not supported (supported: \"input_text\"); leave it out"
                );
                Err(ApiError::of(ErrorCode::UnsupportedParameter, param("type"), message))
            }
        }
    };
    Ok(parts.iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(input: Value) -> Result<Vec<Said>, (ErrorCode, Option<String>)> {
        let input: Input = serde_json::from_value(input).unwrap();
        now(Some(&input)).map_err(|error| (error.code(), error.envelope().error.param))
    }

    fn user(text: &str) -> Said {
        Said { role: Speaker::User, text: text.into() }
    }

    #[test]
    fn input_comes_as_text_or_messages() {
        assert_eq!(read(json!("hi")), Ok(vec![user("hi")]));
        let said = read(json!([
            { "role": "user", "content": "one" },
            { "type": "message", "role": "user", "content": [
                { "type": "input_text", "text": "two" }, { "type": "input_text", "text": "three" }] },
            { "type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [
                { "type": "output_text", "text": "four", "annotations": [] }] },
        ]));
        let four = Said { role: Speaker::Assistant, text: "four".into() };
        assert_eq!(said, Ok(vec![user("one"), user("two\nthree"), four]));
    }

    #[test]
    fn what_can_not_be_said_is_refused_by_name() {
        let refused =
            |input: Value, code, param: &str| assert_eq!(read(input), Err((code, Some(param.to_owned()))));
        refused(json!([]), ErrorCode::InvalidValue, "input");
        let call = json!([{ "role": "user", "content": "" }, { "type": "function_call", "name": "f" }]);
        refused(call, ErrorCode::UnsupportedParameter, "input[1].type");
        refused(json!([{ "content": "" }]), ErrorCode::MissingParameter, "input[0].role");
        refused(json!([{ "role": "tool", "content": "" }]), ErrorCode::UnsupportedParameter, "input[0].role");
        refused(json!([{ "role": "user" }]), ErrorCode::MissingParameter, "input[0].content");
        let image = json!([{ "role": "user", "content": [{ "type": "input_image", "image_url": "u" }] }]);
        refused(image, ErrorCode::UnsupportedParameter, "input[0].content[0].type");
        let nothing = json!([{ "role": "user", "content": [{ "type": "input_text" }] }]);
        refused(nothing, ErrorCode::MissingParameter, "input[0].content[0].text");
    }
}
