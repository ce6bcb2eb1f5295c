//! How the next token is chosen. Everything here is logged with the request, so that a request continued on
//! another worker draws the same numbers.

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
}

/// What most requests leave as it is takes no room in their events.
fn is_zero(number: &f32) -> bool {
    *number == 0.0
}

impl Sampling {
    /// Always the most probable token.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0, min_p: 0.0 };
}
