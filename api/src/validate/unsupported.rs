//! Fields that would change the answer, and that no worker honours.

use crate::error::{ApiError, ErrorCode};
use forebay_schemas::openai::ChatRequest;

/// Fields that are not served at all, of OpenAI and of vLLM. What is neither here nor below (`user`, `metadata`, a
/// field that nobody knows) does not change an answer.
const UNSERVED: [&str; 15] = [
    "prediction",
    "verbosity",
    "best_of",
    "use_beam_search",
    "length_penalty",
    "bad_words",
    "allowed_token_ids",
    "prompt_logprobs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "continue_final_message",
    "add_generation_prompt",
];

/// Refuses the first field that can't be honoured, unless its value asks for nothing.
pub(super) fn refuse(request: &ChatRequest) -> Result<(), ApiError> {
    let r = request;
    let checks = [
        ("n", r.n.is_some_and(|n| n != 1), "only 1: send the request several times"),
        ("tools", r.tools.as_ref().is_some_and(|tools| !tools.is_empty()), "only an empty list"),
        ("tool_choice", r.tool_choice.as_ref().is_some_and(|choice| choice != "none"), "only \"none\""),
        (
            "functions",
            r.functions.as_ref().is_some_and(|functions| !functions.is_empty()),
            "only an empty list",
        ),
        ("function_call", r.function_call.as_ref().is_some_and(|call| call != "none"), "only \"none\""),
        ("min_tokens", r.min_tokens.is_some_and(|n| n != 0), "only 0"),
        (
            "stop_token_ids",
            r.stop_token_ids.as_ref().is_some_and(|ids| !ids.is_empty()),
            "only an empty list; use stop",
        ),
        (
            "modalities",
            r.modalities.as_ref().is_some_and(|kinds| kinds.iter().any(|kind| kind != "text")),
            "only [\"text\"]",
        ),
        ("audio", r.audio.is_some(), "none"),
        ("web_search_options", r.web_search_options.is_some(), "none"),
    ];
    if let Some(param) =
        UNSERVED.into_iter().find(|name| r.others.get(*name).is_some_and(|value| !value.is_null()))
    {
        let message = format!("{param} is not supported; leave it out");
        return Err(ApiError::of(ErrorCode::UnsupportedParameter, param, message));
    }
    match checks.into_iter().find(|(_, asks, _)| *asks) {
        None => Ok(()),
        Some((param, _, served)) => Err(ApiError::of(
            ErrorCode::UnsupportedParameter,
            param,
            format!("this value of {param} is not supported (supported: {served}); leave it out"),
        )),
    }
}
