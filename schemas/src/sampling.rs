//! How the next token is chosen, and what is told of it. Everything here is logged with the request, so that a request
//! continued on another worker draws the same tokens.

use serde::{Deserialize, Serialize};

/// Sampling parameters of one request, after defaults were filled in and ranges checked by the gateway.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Logits are divided by this; 0 means greedy (the largest logit, the lowest token id among equals).
    pub temperature: f32,
    /// Nucleus: keep the smallest set of most probable tokens whose probabilities add up to this. 1 keeps all.
    pub top_p: f32,
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Key of the counter-based generator. The gateway draws one if the client gave none.
    pub seed: u64,
    /// Keep tokens with at least this part of the largest probability; 0 keeps all.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub min_p: f32,
    /// Positive logits of tokens that the prompt or the output has are divided by this, negative ones multiplied
    /// (Keskar et al., "CTRL", 2019). 1 changes nothing.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub repetition_penalty: f32,
    /// Subtracted from a token's logit once for each time that the output has it, as at OpenAI.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub frequency_penalty: f32,
    /// Subtracted from a token's logit if the output has it, as at OpenAI.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub presence_penalty: f32,
    /// Added to the logits of these tokens. Sorted by token, each named once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logit_bias: Vec<(u32, f32)>,
    /// How probable each token is, is told, and so many of the most probable ones at its place. None: nothing is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
}

/// What most requests leave as it is takes no room in their events.
fn is_zero(number: &f32) -> bool {
    *number == 0.0
}

fn is_one(number: &f32) -> bool {
    *number == 1.0
}

fn one() -> f32 {
    1.0
}

impl Sampling {
    /// Always the most probable token.
    pub const GREEDY: Sampling = Sampling {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        seed: 0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        logit_bias: Vec::new(),
        logprobs: None,
    };
}

/// How probable a token is to the model: before penalties, bias, temperature and all that narrows the choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Its id.
    pub token: u32,
    /// Its text, which may be a part of a character.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// What is told of one place in an output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Logprobs {
    /// The token that was drawn.
    pub drawn: TokenLogprob,
    /// The most probable ones, most probable first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<TokenLogprob>,
}

/// What an output must be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputFormat {
    /// A JSON object.
    JsonObject,
    /// JSON of a schema.
    JsonSchema {
        /// In JSON Schema.
        schema: serde_json::Value,
    },
}
