//! Every error that a client can see, in one table. All of them have OpenAI's shape, wherever they come from:
//! a handler, the router, a failed request's log or a panic.

use axum::{
    Json,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use forebay_schemas::{
    event::{FailureCode, RequestFailed},
    openai::{ErrorBody, ErrorEnvelope},
};
use forebay_streams::{StreamError, log::AppendError, tasks::EnqueueError};

/// Seconds that a client is asked to wait before it tries again.
const RETRY_AFTER_S: u32 = 1;

/// What OpenAI's clients go by, before the status.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// Which error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorCode {
    InvalidJson,
    InvalidType,
    InvalidValue,
    MissingParameter,
    UnsupportedParameter,
    ContextLengthExceeded,
    NoChatTemplate,
    TemplateFailed,
    ModelNotFound,
    RequestNotFound,
    PreviousResponseNotFound,
    NotFound,
    MethodNotAllowed,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
    IdempotencyKeyReused,
    TooManyRequests,
    QueueFull,
    LogFull,
    RequestCancelled,
    Internal,
    ModelUnreadable,
    EngineFailed,
    TooManyAttempts,
    Unservable,
    BackendUnavailable,
    ShuttingDown,
    DeadlineExceeded,
}

impl ErrorCode {
    /// The table: status, type and code on the wire, and whether the same request may succeed in a while.
    fn row(self) -> (u16, &'static str, &'static str, Retry) {
        const INVALID: &str = "invalid_request_error";
        const BUSY: &str = "rate_limit_error";
        const SERVER: &str = "server_error";
        use Retry::{After, No};
        match self {
            ErrorCode::InvalidJson => (400, INVALID, "invalid_json", No),
            ErrorCode::InvalidType => (400, INVALID, "invalid_type", No),
            ErrorCode::InvalidValue => (400, INVALID, "invalid_value", No),
            ErrorCode::MissingParameter => (400, INVALID, "missing_required_parameter", No),
            ErrorCode::UnsupportedParameter => (400, INVALID, "unsupported_parameter", No),
            ErrorCode::ContextLengthExceeded => (400, INVALID, "context_length_exceeded", No),
            ErrorCode::NoChatTemplate => (400, INVALID, "no_chat_template", No),
            ErrorCode::TemplateFailed => (400, INVALID, "chat_template_failed", No),
            ErrorCode::Unservable => (400, INVALID, "unservable", No),
            ErrorCode::ModelNotFound => (404, INVALID, "model_not_found", No),
            ErrorCode::PreviousResponseNotFound => (400, INVALID, "previous_response_not_found", No),
            ErrorCode::RequestNotFound => (404, INVALID, "request_not_found", No),
            ErrorCode::NotFound => (404, INVALID, "not_found", No),
            ErrorCode::MethodNotAllowed => (405, INVALID, "method_not_allowed", No),
            ErrorCode::RequestTimeout => (408, INVALID, "request_timeout", No),
            ErrorCode::RequestTooLarge => (413, INVALID, "request_too_large", No),
            ErrorCode::UnsupportedMediaType => (415, INVALID, "unsupported_media_type", No),
            ErrorCode::IdempotencyKeyReused => (422, INVALID, "idempotency_key_reused", No),
            ErrorCode::TooManyRequests => (429, BUSY, "too_many_requests", After),
            ErrorCode::QueueFull => (429, BUSY, "queue_full", After),
            ErrorCode::LogFull => (429, BUSY, "log_full", After),
            ErrorCode::RequestCancelled => (499, INVALID, "request_cancelled", No),
            ErrorCode::Internal => (500, SERVER, "internal_error", No),
            ErrorCode::ModelUnreadable => (500, SERVER, "model_unreadable", No),
            ErrorCode::EngineFailed => (500, SERVER, "engine_failed", No),
            ErrorCode::TooManyAttempts => (500, SERVER, "too_many_attempts", No),
            ErrorCode::BackendUnavailable => (503, SERVER, "backend_unavailable", After),
            ErrorCode::ShuttingDown => (503, SERVER, "shutting_down", After),
            ErrorCode::DeadlineExceeded => (504, "timeout_error", "deadline_exceeded", No),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Retry {
    No,
    After,
}

/// An error as a client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    code: ErrorCode,
    message: String,
    param: Option<String>,
}

impl ApiError {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> ApiError {
        ApiError { code, message: message.into(), param: None }
    }

    /// An error that a field of the request is to blame for.
    pub(crate) fn of(code: ErrorCode, param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError { code, message: message.into(), param: Some(param.into()) }
    }

    /// The same, with another field to blame, if `from` was.
    pub(crate) fn renamed(mut self, from: &str, to: &str) -> ApiError {
        if self.param.as_deref() == Some(from) {
            self.param = Some(to.to_owned());
        }
        self
    }

    pub(crate) fn code(&self) -> ErrorCode {
        self.code
    }

    pub(crate) fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.code.row().0).expect("the table holds valid statuses")
    }

    /// As it stands in a response, and in a stream.
    pub(crate) fn envelope(&self) -> ErrorEnvelope {
        let (_, kind, code, _) = self.code.row();
        ErrorEnvelope {
            error: ErrorBody {
                message: self.message.clone(),
                kind: kind.into(),
                param: self.param.clone(),
                code: Some(code.into()),
            },
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.envelope())).into_response();
        if self.code.row().3 == Retry::After {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_S));
        } else {
            // OpenAI's clients repeat 408 and every 5xx, unless they are told not to.
            response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        response
    }
}

impl From<&RequestFailed> for ApiError {
    fn from(failed: &RequestFailed) -> ApiError {
        let code = match failed.code {
            FailureCode::DeadlineExceeded => ErrorCode::DeadlineExceeded,
            FailureCode::QueueUnavailable => ErrorCode::BackendUnavailable,
            FailureCode::TooManyAttempts => ErrorCode::TooManyAttempts,
            FailureCode::Unservable => ErrorCode::Unservable,
            FailureCode::EngineFailed => ErrorCode::EngineFailed,
        };
        ApiError::new(code, failed.message.clone())
    }
}

impl From<&StreamError> for ApiError {
    /// What failed is for the operator's log; the client is told what to do.
    fn from(error: &StreamError) -> ApiError {
        tracing::warn!(%error, "the backend did not answer");
        ApiError::new(ErrorCode::BackendUnavailable, "the request log is unreachable; try again")
    }
}

impl From<&AppendError> for ApiError {
    fn from(error: &AppendError) -> ApiError {
        match error {
            AppendError::Unavailable(error) => error.into(),
            AppendError::Full(_) => {
                tracing::error!(%error, "no request can be accepted: raise the limit of the log stream");
                ApiError::new(ErrorCode::LogFull, "the request log is full; try again later")
            }
            AppendError::TooLarge { bytes, .. } => ApiError::of(
                ErrorCode::RequestTooLarge,
                "messages",
                format!(
                    "the prompt takes {bytes} bytes in the request log, more than it holds for one request"
                ),
            ),
            AppendError::Conflict { .. } => {
                tracing::error!(%error, "a fresh log is not empty");
                ApiError::new(ErrorCode::Internal, "the request's id is taken; try again")
            }
        }
    }
}

impl From<&EnqueueError> for ApiError {
    fn from(error: &EnqueueError) -> ApiError {
        match error {
            EnqueueError::Full { .. } => {
                ApiError::new(ErrorCode::QueueFull, format!("{error}; try again later"))
            }
            EnqueueError::Unavailable(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_pass_asks_to_come_back() {
        for (code, status, retry) in [
            (ErrorCode::QueueFull, 429, true),
            (ErrorCode::TooManyRequests, 429, true),
            (ErrorCode::BackendUnavailable, 503, true),
            (ErrorCode::ContextLengthExceeded, 400, false),
            (ErrorCode::RequestCancelled, 499, false),
            (ErrorCode::DeadlineExceeded, 504, false),
        ] {
            let response = ApiError::new(code, "no").into_response();
            assert_eq!(response.status().as_u16(), status);
            assert_eq!(response.headers().contains_key(header::RETRY_AFTER), retry);
            assert_eq!(response.headers().contains_key(SHOULD_RETRY), !retry);
        }
    }

    #[test]
    fn failures_of_requests_map_to_the_table() {
        for (failure, status) in [
            (FailureCode::DeadlineExceeded, 504),
            (FailureCode::QueueUnavailable, 503),
            (FailureCode::TooManyAttempts, 500),
            (FailureCode::Unservable, 400),
            (FailureCode::EngineFailed, 500),
        ] {
            let error = ApiError::from(&RequestFailed { code: failure, message: "why".into() });
            assert_eq!(error.status().as_u16(), status);
            assert_eq!(error.envelope().error.message, "why");
        }
    }
}
