//! The part of OpenAI's HTTP API that Forebay speaks, as types for serde and nothing else: the gateway checks
//! requests against a model, clients in this workspace read answers with the same types.
//!
//! <https://platform.openai.com/docs/api-reference/chat>, and [`ResponsesRequest`] for the newer form of the same.

mod answer;
mod error;
mod models;
mod request;
mod responses;

pub use answer::{
    AssistantMessage, ChatChunk, ChatCompletion, Choice, ChoiceLogprobs, ChunkChoice, ContentLogprob,
    Deleted, Delta, PromptTokensDetails, TokenUsage, TopLogprob,
};
pub use error::{ErrorBody, ErrorEnvelope};
pub use models::{ModelEntry, ModelList};
pub use request::{ChatRequest, Content, Message, Part, Speaker, Stop, StreamOptions};
pub use responses::{
    IncompleteDetails, Input, InputItem, InputTokensDetails, OutputMessage, OutputText, OutputTokensDetails,
    ResponseError, ResponseObject, ResponseStatus, ResponseUsage, ResponsesRequest,
};
