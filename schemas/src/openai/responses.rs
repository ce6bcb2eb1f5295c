//! The Responses API: one answer, kept by default, with the conversation so far on the server.
//!
//! <https://platform.openai.com/docs/api-reference/responses>

use super::request::{Content, Either, Speaker, Stop, TextOrList};
use crate::event::Usage;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// `POST /v1/responses`. Fields that can change nothing here are among the others.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ResponsesRequest {
    /// The name of a model card.
    pub model: String,
    /// What is said now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<Input>,
    /// What the model is told first; not kept for the next turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instructions: Option<String>,
    /// A stored response whose conversation goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous_response_id: Option<String>,
    /// Most tokens to generate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_output_tokens: Option<u32>,
    /// 0 to 2; 0 is greedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Above 0, up to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Whether the answer comes as server-sent events.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<bool>,
    /// Answer at once, and go on without the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub background: Option<bool>,
    /// Whether the response can be asked for later; true unless it is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<bool>,
    /// Shown with the response.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Map<String, Value>>,
    /// vLLM's extension, as in chats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<i64>,
    /// vLLM's extension, as in chats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// vLLM's extension, as in chats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// vLLM's extension, as in chats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<Stop>,
    /// vLLM's extension, as in chats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ignore_eos: Option<bool>,
    /// vLLM's extension, as in chats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Only an empty list is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<Value>>,
    /// Only `"none"` and `"auto"` are served: without tools they are the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_choice: Option<Value>,
    /// `format`: what the answer must be, as `response_format` of chats, with the fields of `json_schema` beside its `type`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<Map<String, Value>>,
    /// Only `"disabled"` is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truncation: Option<Value>,
    /// Only 0 is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_logprobs: Option<u32>,
    /// Only an empty list is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub include: Option<Vec<Value>>,
    /// vLLM's extension: KV of prefixes is shared only between requests of equal salts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_salt: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

/// What is said: a string from the user, or a list of messages.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Input {
    /// The user's words.
    Text(String),
    /// Messages, oldest first.
    Items(Vec<InputItem>),
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Input, D::Error> {
        Ok(match deserializer.deserialize_any(TextOrList(std::marker::PhantomData))? {
            Either::Text(text) => Input::Text(text),
            Either::List(items) => Input::Items(items),
        })
    }
}

/// One item of a conversation, of which only messages are served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InputItem {
    /// `message` unless it is said.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Who speaks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<Speaker>,
    /// A string, or parts of type `input_text` or `output_text`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
}

/// Where a response is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResponseStatus {
    /// No worker has had it yet.
    Queued,
    /// It is worked on.
    InProgress,
    /// Whole.
    Completed,
    /// It came to a bound.
    Incomplete,
    /// There will be no (further) answer.
    Failed,
    /// No longer wanted.
    Cancelled,
}

/// A response.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResponseObject {
    /// `resp_` and the request's id.
    pub id: String,
    /// `response`.
    pub object: String,
    /// When the request was accepted, in seconds since the Unix epoch.
    pub created_at: u64,
    /// Where it is.
    pub status: ResponseStatus,
    /// Whether it goes on without its client.
    pub background: bool,
    /// Why it failed.
    pub error: Option<ResponseError>,
    /// Why it is incomplete.
    pub incomplete_details: Option<IncompleteDetails>,
    /// As in the request.
    pub instructions: Option<String>,
    /// As in the request.
    pub max_output_tokens: Option<u32>,
    /// As in the request.
    pub metadata: Map<String, Value>,
    /// The model's name.
    pub model: String,
    /// One message, once there is some text or the end.
    pub output: Vec<OutputMessage>,
    /// OpenAI's default; there are no tools.
    pub parallel_tool_calls: bool,
    /// As in the request.
    pub previous_response_id: Option<String>,
    /// Whether it can be asked for later.
    pub store: bool,
    /// As it is used.
    pub temperature: f32,
    /// Plain text.
    pub text: Value,
    /// `auto`; there are no tools.
    pub tool_choice: String,
    /// None.
    pub tools: Vec<Value>,
    /// As it is used.
    pub top_p: f32,
    /// `disabled`.
    pub truncation: String,
    /// Tokens counted, once it has ended.
    pub usage: Option<ResponseUsage>,
}

/// Why a response failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResponseError {
    /// As in every error.
    pub code: String,
    /// In words.
    pub message: String,
}

/// Why a response is incomplete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncompleteDetails {
    /// `max_output_tokens`.
    pub reason: String,
}

/// What the model said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutputMessage {
    /// `msg_` and the request's id.
    pub id: String,
    /// `message`.
    #[serde(rename = "type")]
    pub kind: String,
    /// As that of the response.
    pub status: ResponseStatus,
    /// `assistant`.
    pub role: String,
    /// One part.
    pub content: Vec<OutputText>,
}

/// The text of a message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutputText {
    /// `output_text`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text.
    pub text: String,
    /// None.
    pub annotations: Vec<Value>,
    /// None.
    pub logprobs: Vec<Value>,
}

impl OutputText {
    /// A text.
    pub fn new(text: impl Into<String>) -> OutputText {
        OutputText { kind: "output_text".into(), text: text.into(), annotations: vec![], logprobs: vec![] }
    }
}

/// Tokens counted, by the names of the Responses API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResponseUsage {
    /// Tokens of the prompt.
    pub input_tokens: u32,
    /// Where the prompt's tokens came from.
    pub input_tokens_details: InputTokensDetails,
    /// Tokens generated.
    pub output_tokens: u32,
    /// What they were for.
    pub output_tokens_details: OutputTokensDetails,
    /// Both.
    pub total_tokens: u32,
}

/// Where the prompt's tokens came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputTokensDetails {
    /// Tokens whose KV was found in a prefix cache.
    pub cached_tokens: u32,
}

/// What tokens were for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputTokensDetails {
    /// Not told apart: 0.
    pub reasoning_tokens: u32,
}

impl From<Usage> for ResponseUsage {
    fn from(usage: Usage) -> ResponseUsage {
        ResponseUsage {
            input_tokens: usage.prompt_tokens,
            input_tokens_details: InputTokensDetails { cached_tokens: usage.cached_tokens },
            output_tokens: usage.completion_tokens,
            output_tokens_details: OutputTokensDetails { reasoning_tokens: 0 },
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
        }
    }
}
