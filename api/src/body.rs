//! Reading a request's body: bounded in bytes and time, and every mistake in it said by name.

use crate::error::{ApiError, ErrorCode};
use axum::{
    extract::Request,
    http::{
        HeaderMap,
        header::{CONTENT_LENGTH, CONTENT_TYPE},
    },
};
use serde::de::DeserializeOwned;
use std::time::Duration;

/// How long a client may take to send a body.
const READ_MAX: Duration = Duration::from_secs(30);

/// A body of JSON.
pub(crate) async fn json<T: DeserializeOwned>(http: Request, bytes_max: usize) -> Result<T, ApiError> {
    check(http.headers(), bytes_max)?;
    let read = axum::body::to_bytes(http.into_body(), bytes_max);
    match tokio::time::timeout(READ_MAX, read).await {
        Ok(Ok(bytes)) => parse(&bytes),
        Ok(Err(error)) if is_length_limit(&error) => Err(too_large(bytes_max)),
        Ok(Err(error)) => Err(ApiError::new(ErrorCode::InvalidJson, format!("the body broke off: {error}"))),
        Err(_) => {
            let message = format!("the body took over {} s; send it faster", READ_MAX.as_secs());
            Err(ApiError::new(ErrorCode::RequestTimeout, message))
        }
    }
}

/// What can be said before the body is read: a client that sends all of it first may never read the answer.
fn check(headers: &HeaderMap, bytes_max: usize) -> Result<(), ApiError> {
    let header = |name| headers.get(&name).and_then(|value| value.to_str().ok());
    let content_type = header(CONTENT_TYPE).unwrap_or("missing");
    if !is_json(content_type) {
        return Err(ApiError::new(
            ErrorCode::UnsupportedMediaType,
            format!("the content type is {content_type}; send application/json"),
        ));
    }
    let announced = header(CONTENT_LENGTH).and_then(|bytes| bytes.parse::<usize>().ok());
    if announced.is_some_and(|bytes| bytes > bytes_max) { Err(too_large(bytes_max)) } else { Ok(()) }
}

fn too_large(bytes_max: usize) -> ApiError {
    ApiError::new(
        ErrorCode::RequestTooLarge,
        format!("the body is over {bytes_max} bytes; send a shorter one"),
    )
}

fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

fn is_length_limit(error: &axum::Error) -> bool {
    // axum hides the type of the limit's error (`http_body_util::LengthLimitError`).
    std::error::Error::source(error).is_some_and(|source| source.to_string().contains("length limit"))
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let parsed = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        misread(&path, error.inner())
    })?;
    json.end().map_err(|error| misread(".", &error))?;
    Ok(parsed)
}

/// Names the field, as far as serde's words give it away.
fn misread(path: &str, error: &serde_json::Error) -> ApiError {
    if !error.is_data() {
        return ApiError::new(ErrorCode::InvalidJson, format!("the body is not valid JSON: {error}"));
    }
    let text = error.to_string();
    let path = if path == "." { "" } else { path };
    if let Some(field) = text.strip_prefix("missing field `").and_then(|rest| rest.split('`').next()) {
        let param = if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") };
        return ApiError::of(
            ErrorCode::MissingParameter,
            &param,
            format!("{param} is missing; it is required"),
        );
    }
    if path.is_empty() {
        return ApiError::new(ErrorCode::InvalidType, format!("the body is not a request: {text}"));
    }
    let code =
        if text.starts_with("invalid type") { ErrorCode::InvalidType } else { ErrorCode::InvalidValue };
    ApiError::of(code, path, format!("{path}: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::openai::ChatRequest;

    fn error(json: &str) -> (ErrorCode, Option<String>) {
        let error = parse::<ChatRequest>(json.as_bytes()).unwrap_err();
        (error.code(), error.envelope().error.param)
    }

    #[test]
    fn mistakes_are_named() {
        let named = |code, param: &str| (code, Some(param.to_owned()));
        assert_eq!(error("{"), (ErrorCode::InvalidJson, None));
        assert_eq!(error("[]").0, ErrorCode::InvalidType);
        assert_eq!(error("3").0, ErrorCode::InvalidType);
        assert_eq!(error(r#"{"messages": []}"#), named(ErrorCode::MissingParameter, "model"));
        assert_eq!(error(r#"{"model": 3}"#), named(ErrorCode::InvalidType, "model"));
        assert_eq!(error(r#"{"max_tokens": "5"}"#), named(ErrorCode::InvalidType, "max_tokens"));
        assert_eq!(error(r#"{"max_tokens": -5}"#), named(ErrorCode::InvalidValue, "max_tokens"));
        assert_eq!(error(r#"{"stop": [1]}"#), named(ErrorCode::InvalidType, "stop[0]"));
        let role = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "king"}]}"#;
        assert_eq!(error(role), named(ErrorCode::InvalidValue, "messages[1].role"));
        let content = r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}"#;
        assert_eq!(error(content), named(ErrorCode::InvalidType, "messages[0].content[0].text"));
        assert_eq!(error(r#"{"model": "m", "messages": []} x"#), (ErrorCode::InvalidJson, None));
    }

    #[test]
    fn json_has_more_than_one_name() {
        assert!(is_json("application/json; charset=utf-8") && is_json("application/vnd.api+json"));
        assert!(!is_json("text/plain") && !is_json("nothing"));
    }
}
