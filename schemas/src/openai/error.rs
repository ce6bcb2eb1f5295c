//! How every error looks.

use serde::{Deserialize, Serialize};

/// The body of an error response, and of an error event within a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorEnvelope {
    /// The error.
    pub error: ErrorBody,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// In words.
    pub message: String,
    /// Which kind, such as `invalid_request_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Which field of the request is to blame, if one is.
    pub param: Option<String>,
    /// Which error exactly, such as `context_length_exceeded`.
    pub code: Option<String>,
}
