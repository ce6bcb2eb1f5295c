//! The models that are served.

use crate::card::ModelCard;
use serde::{Deserialize, Serialize};

/// `GET /v1/models`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelList {
    /// `list`.
    pub object: String,
    /// All models, by name.
    pub data: Vec<ModelEntry>,
}

/// `GET /v1/models/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelEntry {
    /// The model's name.
    pub id: String,
    /// `model`.
    pub object: String,
    /// When it was first published, in seconds since the Unix epoch.
    pub created: u64,
    /// `forebay`.
    pub owned_by: String,
    /// vLLM's extension: most tokens of prompt and answer together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u32>,
}

impl From<&ModelCard> for ModelEntry {
    fn from(card: &ModelCard) -> ModelEntry {
        ModelEntry {
            id: card.name.clone(),
            object: "model".into(),
            created: card.created_s,
            owned_by: "forebay".into(),
            max_model_len: Some(card.context_tokens),
        }
    }
}
