//! An answer: whole, or as the chunks of a stream.

use crate::{
    event::{FinishReason, Usage},
    sampling::{Logprobs, TokenLogprob},
};
use serde::{Deserialize, Serialize};

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatCompletion {
    /// `chatcmpl-` and the request's id.
    pub id: String,
    /// `chat.completion`.
    pub object: String,
    /// When the request was accepted, in seconds since the Unix epoch.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// What produced it: changes when the same seed could give another answer.
    pub system_fingerprint: Option<String>,
    /// One choice.
    pub choices: Vec<Choice>,
    /// Tokens counted.
    pub usage: TokenUsage,
    /// What the client gave with a request that is stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<serde_json::Map<String, serde_json::Value>>,
}

/// The answer to `DELETE` of something stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// What was deleted.
    pub id: String,
    /// Its kind.
    pub object: String,
    /// Always.
    pub deleted: bool,
}

/// The answer within a [`ChatCompletion`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// 0.
    pub index: u32,
    /// The answer.
    pub message: AssistantMessage,
    /// How probable its tokens are, if the client asked.
    pub logprobs: Option<ChoiceLogprobs>,
    /// Why it ended.
    pub finish_reason: Option<FinishReason>,
}

/// How probable tokens are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChoiceLogprobs {
    /// One entry for each token of the text.
    pub content: Vec<ContentLogprob>,
    /// Never given.
    pub refusal: Option<serde_json::Value>,
}

impl ChoiceLogprobs {
    /// As the log says it.
    pub fn of(logprobs: &[Logprobs]) -> ChoiceLogprobs {
        let top = |logprobs: &Logprobs| logprobs.top.iter().map(TopLogprob::of).collect();
        let content = logprobs
            .iter()
            .map(|logprobs| ContentLogprob {
                drawn: TopLogprob::of(&logprobs.drawn),
                top_logprobs: top(logprobs),
            })
            .collect();
        ChoiceLogprobs { content, refusal: None }
    }
}

/// A token of the text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContentLogprob {
    /// The token.
    #[serde(flatten)]
    pub drawn: TopLogprob,
    /// The most probable ones at its place, most probable first.
    pub top_logprobs: Vec<TopLogprob>,
}

/// A token, and how probable it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob {
    /// Its text, with U+FFFD for what is only a part of a character.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its text in UTF-8.
    pub bytes: Option<Vec<u8>>,
}

impl TopLogprob {
    fn of(logprob: &TokenLogprob) -> TopLogprob {
        TopLogprob {
            token: String::from_utf8_lossy(&logprob.bytes).into_owned(),
            logprob: logprob.logprob,
            bytes: Some(logprob.bytes.clone()),
        }
    }
}

/// What the model said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AssistantMessage {
    /// `assistant`.
    pub role: String,
    /// The text.
    pub content: Option<String>,
    /// Never given.
    pub refusal: Option<String>,
}

/// One event of a stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatChunk {
    /// The same in every chunk: `chatcmpl-` and the request's id.
    pub id: String,
    /// `chat.completion.chunk`.
    pub object: String,
    /// When the request was accepted, in seconds since the Unix epoch.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// As in [`ChatCompletion`].
    pub system_fingerprint: Option<String>,
    /// One choice; none in the chunk that carries the usage.
    pub choices: Vec<ChunkChoice>,
    /// Tokens counted, in the last chunk, if the client asked.
    #[serde(default)]
    pub usage: Option<TokenUsage>,
}

/// What a chunk adds to the answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChunkChoice {
    /// 0.
    pub index: u32,
    /// What is new.
    pub delta: Delta,
    /// How probable the new tokens are, if the client asked.
    pub logprobs: Option<ChoiceLogprobs>,
    /// Why it ended, in exactly one chunk.
    pub finish_reason: Option<FinishReason>,
}

/// What is new.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta {
    /// `assistant`, in the first chunk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// More text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Tokens counted, by OpenAI's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenUsage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Both.
    pub total_tokens: u32,
    /// Where the prompt's tokens came from.
    #[serde(default)]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
}

/// Where the prompt's tokens came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptTokensDetails {
    /// Tokens whose KV was found in a prefix cache.
    #[serde(default)]
    pub cached_tokens: u32,
}

impl From<Usage> for TokenUsage {
    fn from(usage: Usage) -> TokenUsage {
        TokenUsage {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details: Some(PromptTokensDetails { cached_tokens: usage.cached_tokens }),
        }
    }
}
