//! Fields that would change a response, and that no worker honours.

use crate::error::{ApiError, ErrorCode};
use forebay_schemas::openai::ResponsesRequest;
use serde_json::Value;

/// Fields that are not served at all, of OpenAI and of vLLM, and fields of chats that somebody may try here. What is
/// neither here nor below (`user`, `service_tier`, a field that nobody knows) does not change an answer.
const UNSERVED: [&str; 16] = [
    "conversation",
    "prompt",
    "reasoning",
    "context_management",
    "moderation",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "response_format",
    "structured_outputs",
    "logprobs",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "n",
];

/// Refuses the first field that can't be honoured, unless its value asks for nothing.
pub(super) fn refuse(request: &ResponsesRequest) -> Result<(), ApiError> {
    let r = request;
    let given = |name: &&str| r.others.get(*name).is_some_and(|value| !value.is_null());
    if let Some(param) = UNSERVED.into_iter().find(given) {
        let message = format!("{param} is not supported; leave it out");
        return Err(ApiError::of(ErrorCode::UnsupportedParameter, param, message));
    }
    let checks = [
        ("tools", r.tools.as_ref().is_some_and(|tools| !tools.is_empty()), "only an empty list"),
        (
            "tool_choice",
            r.tool_choice.as_ref().is_some_and(|choice| choice != "none" && choice != "auto"),
            "only \"none\" and \"auto\"",
        ),
        ("text", r.text.as_ref().is_some_and(asks_for_more), "only {\"format\": …}"),
        ("truncation", r.truncation.as_ref().is_some_and(|how| how != "disabled"), "only \"disabled\""),
        ("top_logprobs", r.top_logprobs.is_some_and(|n| n > 0), "only 0"),
        ("include", r.include.as_ref().is_some_and(|include| !include.is_empty()), "only an empty list"),
    ];
    match checks.into_iter().find(|(_, asks, _)| *asks) {
        None => Ok(()),
        Some((param, _, served)) => Err(ApiError::of(
            ErrorCode::UnsupportedParameter,
            param,
            format!("this value of {param} is not supported (supported: {served}); leave it out"),
        )),
    }
}

fn asks_for_more(text: &serde_json::Map<String, Value>) -> bool {
    text.iter().any(|(name, value)| name != "format" && !value.is_null())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refused(more: Value) -> Option<String> {
        let mut request = json!({ "model": "demo", "input": "hi" });
        let Value::Object(more) = more else { panic!("fields") };
        request.as_object_mut().unwrap().extend(more);
        let request: ResponsesRequest = serde_json::from_value(request).unwrap();
        refuse(&request).err().map(|error| error.envelope().error.param.unwrap())
    }

    #[test]
    fn what_changes_an_answer_is_refused_by_name() {
        for (name, value) in [
            ("tools", json!([{ "type": "web_search" }])),
            ("tool_choice", json!("required")),
            ("text", json!({ "verbosity": "low" })),
            ("truncation", json!("auto")),
            ("top_logprobs", json!(2)),
            ("include", json!(["message.output_text.logprobs"])),
            ("reasoning", json!({ "effort": "low" })),
            ("conversation", json!("conv_1")),
            ("prompt", json!({ "id": "p" })),
            ("max_tokens", json!(3)),
        ] {
            assert_eq!(refused(json!({ name: value })).as_deref(), Some(name));
        }
    }

    #[test]
    fn what_changes_nothing_is_let_through() {
        let nothing = json!({
            "tools": [], "tool_choice": "auto", "text": { "format": { "type": "text" } }, "truncation": "disabled",
            "top_logprobs": 0, "include": [], "reasoning": null, "user": "u", "service_tier": "auto",
            "parallel_tool_calls": true, "prompt_cache_key": "k", "unheard_of": 1,
        });
        assert_eq!(refused(nothing), None);
    }
}
