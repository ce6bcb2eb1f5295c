//! The text side of a Hugging Face checkpoint: tokenizer, chat template, generation defaults. Published as the
//! model's card, so that gateways need no copy of the checkpoint.

use crate::engine::EngineCard;
use bytes::Bytes;
use forebay_schemas::{
    card::{ModelCard, SamplingDefaults},
    ids::ModelKey,
};
use forebay_streams::{StreamError, Streams, environment};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use tokenizers::Tokenizer;

/// Why the text side of a checkpoint is unusable.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file is missing or can't be read.
    #[error("{path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {problem}")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// Tokenizer, template and defaults of a checkpoint.
pub struct ModelText {
    /// The tokenizer, ready for use.
    pub tokenizer: Arc<Tokenizer>,
    tokenizer_json: Bytes,
    chat_template: Option<String>,
    special_tokens: Vec<(String, String)>,
    defaults: SamplingDefaults,
}

impl ModelText {
    /// Reads `tokenizer.json` and what there is of `tokenizer_config.json`, `chat_template.jinja` and
    /// `generation_config.json`.
    pub fn open(folder: &Path) -> Result<ModelText, TextError> {
        let path = folder.join("tokenizer.json");
        let tokenizer_json =
            std::fs::read(&path).map_err(|source| TextError::Read { path: path.clone(), source })?;
        let tokenizer = Tokenizer::from_bytes(&tokenizer_json)
            .map_err(|error| TextError::Malformed { path, problem: error.to_string() })?;
        let settings = optional_json(&folder.join("tokenizer_config.json"))?;
        let template_file = std::fs::read_to_string(folder.join("chat_template.jinja")).ok();
        let generation = optional_json(&folder.join("generation_config.json"))?;
        Ok(ModelText {
            tokenizer: Arc::new(tokenizer),
            tokenizer_json: tokenizer_json.into(),
            chat_template: template_file.or_else(|| default_template(&settings["chat_template"])),
            special_tokens: special_tokens(&settings),
            defaults: sampling_defaults(&generation),
        })
    }

    /// Stores the tokenizer where gateways find it, and makes the card of the model as `engine` runs it.
    pub async fn card(
        &self,
        name: &str,
        engine: &EngineCard,
        streams: &Streams,
    ) -> Result<ModelCard, StreamError> {
        let now_s = environment::now_us() / 1_000_000;
        let earlier = streams.catalog.models().await?.borrow().get(name).cloned();
        Ok(ModelCard {
            name: name.to_owned(),
            key: ModelKey::of(name),
            created_s: earlier.map_or(now_s, |card| card.created_s),
            vocab_size: engine.vocab,
            context_tokens: engine.context_limit,
            eos_token_ids: engine.eos.clone(),
            tokenizer: streams.catalog.put_blob(self.tokenizer_json.clone()).await?,
            chat_template: self.chat_template.clone(),
            special_tokens: self.special_tokens.clone(),
            defaults: self.defaults,
            layout_hash: engine.layout_hash,
            weights: engine.weights.clone(),
        })
    }
}

/// A JSON file that may be missing, which reads as null.
fn optional_json(path: &Path) -> Result<Value, TextError> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| TextError::Malformed { path: path.to_owned(), problem: error.to_string() }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(source) => Err(TextError::Read { path: path.to_owned(), source }),
    }
}

/// The template as a string, or the one named `default` of a list.
fn default_template(value: &Value) -> Option<String> {
    if let Some(text) = value.as_str() {
        return Some(text.to_owned());
    }
    let named = value.as_array()?.iter().find(|entry| entry["name"] == "default")?;
    named["template"].as_str().map(str::to_owned)
}

fn special_tokens(settings: &Value) -> Vec<(String, String)> {
    let names = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
    let text = |value: &Value| value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned);
    names.iter().filter_map(|name| Some(((*name).to_owned(), text(&settings[*name])?))).collect()
}

/// OpenAI's defaults, but for what the checkpoint's authors recommend.
fn sampling_defaults(generation: &Value) -> SamplingDefaults {
    let greedy = generation["do_sample"] == Value::Bool(false);
    let number = |name: &str, default: f64| generation[name].as_f64().unwrap_or(default) as f32;
    SamplingDefaults {
        temperature: if greedy { 0.0 } else { number("temperature", 1.0) },
        top_p: number("top_p", 1.0),
        top_k: generation["top_k"].as_u64().unwrap_or(0) as u32,
        repetition_penalty: number("repetition_penalty", 1.0),
    }
}
