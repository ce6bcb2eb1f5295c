//! The format that an answer is held to.

use super::invalid;
use crate::error::{ApiError, ErrorCode};
use forebay_schemas::{openai::ChatRequest, sampling::OutputFormat};
use llguidance::{
    ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, InferenceCapabilities},
};
use serde_json::{Value, json};

/// Bytes of a schema.
const SCHEMA_BYTES_MAX: usize = 64 << 10;

pub(super) fn format(request: &ChatRequest) -> Result<Option<OutputFormat>, ApiError> {
    let Some(asked) = &request.response_format else { return Ok(None) };
    let format = match asked["type"].as_str() {
        Some("text") => return Ok(None),
        Some("json_object") => OutputFormat::JsonObject,
        Some("json_schema") => OutputFormat::JsonSchema { schema: schema(&asked["json_schema"]["schema"])? },
        _ => {
            let message = format!(
                "response_format has the type {}; there are text, json_object and json_schema",
                asked["type"]
            );
            return Err(ApiError::of(ErrorCode::UnsupportedParameter, "response_format", message));
        }
    };
    if request.ignore_eos == Some(true) {
        return Err(invalid(
            "ignore_eos",
            "with a response_format an answer ends by itself; leave ignore_eos out",
        ));
    }
    Ok(Some(format))
}

/// A schema that workers will know how to follow. They compile it for their tokens; here single bytes will do.
fn schema(schema: &Value) -> Result<Value, ApiError> {
    if !schema.is_object() {
        let shape = json!({ "type": "json_schema", "json_schema": { "name": "…", "schema": {} } });
        return Err(invalid("response_format", format!("json_schema.schema is not an object; send {shape}")));
    }
    let bytes = schema.to_string().len();
    if bytes > SCHEMA_BYTES_MAX {
        let message = format!("the schema has {bytes} bytes; give at most {SCHEMA_BYTES_MAX}");
        return Err(invalid("response_format", message));
    }
    let bytes = ApproximateTokEnv::single_byte_env();
    let compiled =
        ParserFactory::new(&bytes, InferenceCapabilities::default(), &[]).and_then(|mut factory| {
            factory.quiet().create_parser(TopLevelGrammar::from_json_schema(schema.clone()))
        });
    match compiled {
        Ok(_) => Ok(schema.clone()),
        Err(error) => {
            Err(invalid("response_format", format!("no answer can be held to this schema: {error}")))
        }
    }
}
