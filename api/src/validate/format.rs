//! The format that an answer is held to.

use super::invalid;
use crate::error::{ApiError, ErrorCode};
use forebay_schemas::{
    format::{FormatError, Formats},
    openai::ChatRequest,
    sampling::OutputFormat,
};
use std::sync::LazyLock;
use tokio::sync::Semaphore;

/// Formats that are looked at at once: some schemas take a moment.
static TURNS: Semaphore = Semaphore::const_new(1);

/// What a request asks for.
pub(super) fn format(request: &ChatRequest) -> Result<Option<OutputFormat>, ApiError> {
    let Some(asked) = request.response_format.as_ref().filter(|asked| !asked.is_null()) else {
        return Ok(None);
    };
    let format = match asked["type"].as_str() {
        Some("text") => return Ok(None),
        Some("json_object") => OutputFormat::JsonObject,
        Some("json_schema") => OutputFormat::JsonSchema { schema: asked["json_schema"]["schema"].clone() },
        _ => {
            let message = format!(
                "the format has the type {}; there are text, json_object and json_schema",
                asked["type"]
            );
            return Err(ApiError::of(ErrorCode::UnsupportedParameter, "response_format", message));
        }
    };
    if request.ignore_eos == Some(true) {
        let message = "an answer that is held to a format ends by itself; leave ignore_eos out";
        return Err(invalid("ignore_eos", message));
    }
    Ok(Some(format))
}

/// Whether workers can follow it. They compile it for their tokens; here single bytes will do.
pub(super) async fn check(format: OutputFormat) -> Result<(), ApiError> {
    static FORMATS: LazyLock<Result<Formats, FormatError>> = LazyLock::new(Formats::of_bytes);
    let _turn = TURNS.acquire().await.expect("never closed");
    let compile = move || {
        let formats = FORMATS.as_ref().map_err(Clone::clone)?;
        formats.compile(&format).map(drop)
    };
    let compiled = forebay_streams::environment::off_thread(compile).await;
    compiled.map_err(|error: FormatError| {
        invalid("response_format", format!("no answer can be held to this format: {error}"))
    })
}
