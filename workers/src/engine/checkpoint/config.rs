//! `config.json`: the shape of the model, or a refusal that names what is not supported.

use super::CheckpointError;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Shape and constants of a Qwen3 model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head: a multiple of 16.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Rows of the embedding: token ids are below this.
    pub vocab: usize,
    /// Most positions that the model was made for.
    pub positions_max: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Added to the mean square in every RMS norm.
    pub norm_epsilon: f32,
    /// Whether the embedding is also the output projection.
    pub tied: bool,
}

impl ModelConfig {
    /// Width of all query heads.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads, which is that of all value heads.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// A JSON file of the checkpoint.
pub(super) struct JsonFile {
    path: PathBuf,
    json: Value,
}

impl JsonFile {
    pub(super) fn read(path: PathBuf) -> Result<JsonFile, CheckpointError> {
        let bytes = std::fs::read(&path).map_err(|source| CheckpointError::unreadable(&path, source))?;
        match serde_json::from_slice(&bytes) {
            Ok(json) => Ok(JsonFile { path, json }),
            Err(error) => Err(CheckpointError::Malformed { file: path, problem: error.to_string() }),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn malformed(&self, problem: impl Into<String>) -> CheckpointError {
        CheckpointError::Malformed { file: self.path.clone(), problem: problem.into() }
    }

    fn unsupported(&self, what: impl Into<String>) -> CheckpointError {
        CheckpointError::Unsupported { file: self.path.clone(), what: what.into() }
    }

    fn number(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number > 0.0 => Ok(Some(number)),
                _ => Err(self.malformed(format!("{key} is {value}, not a positive number"))),
            },
        }
    }

    fn size_or(&self, key: &str, default: Option<usize>) -> Result<usize, CheckpointError> {
        match self.number(key)?.or(default.map(|size| size as f64)) {
            // Sizes multiply to bytes: the bound keeps every product within 64 bits.
            Some(size) if size.fract() == 0.0 && size < 16_777_216.0 => Ok(size as usize),
            Some(size) => Err(self.malformed(format!("{key} is {size}, which is no size"))),
            None => Err(self.malformed(format!("{key} is missing"))),
        }
    }

    fn size(&self, key: &str) -> Result<usize, CheckpointError> {
        self.size_or(key, None)
    }

    fn flag(&self, key: &str) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    /// Token ids under `eos_token_id`: one, a list, or none.
    pub(super) fn eos(&self) -> Result<Option<Vec<u32>>, CheckpointError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.get("eos_token_id") {
            None => return Ok(None),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(one) => id(one).map(|id| vec![id]),
        };
        ids.map(Some).ok_or_else(|| self.malformed("eos_token_id is neither a token id nor a list of them"))
    }

    /// The model's shape; refuses what the graph does not compute.
    pub(super) fn model(&self) -> Result<ModelConfig, CheckpointError> {
        self.check_architecture()?;
        self.check_features()?;
        let (hidden, heads) = (self.size("hidden_size")?, self.size("num_attention_heads")?);
        let config = ModelConfig {
            hidden,
            layers: self.size("num_hidden_layers")?,
            heads,
            kv_heads: self.size_or("num_key_value_heads", Some(heads))?,
            head_dim: self.size_or("head_dim", Some(hidden / heads))?,
            intermediate: self.size("intermediate_size")?,
            vocab: self.size("vocab_size")?,
            positions_max: self.size_or("max_position_embeddings", Some(32_768))?,
            rope_theta: self.rope_theta()?,
            norm_epsilon: self.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            tied: self.flag("tie_word_embeddings"),
        };
        if !config.heads.is_multiple_of(config.kv_heads) {
            let (heads, kv_heads) = (config.heads, config.kv_heads);
            return Err(self.malformed(format!(
                "{heads} attention heads do not share {kv_heads} key-value heads evenly"
            )));
        }
        if !config.head_dim.is_multiple_of(16) {
            return Err(
                self.unsupported(format!("head_dim {}, which is not a multiple of 16,", config.head_dim))
            );
        }
        Ok(config)
    }

    fn check_architecture(&self) -> Result<(), CheckpointError> {
        let names = self.get("architectures").and_then(Value::as_array).cloned().unwrap_or_default();
        if names.iter().any(|name| name == "Qwen3ForCausalLM") {
            return Ok(());
        }
        let found = match names.first().or(self.get("model_type")) {
            Some(name) => name.as_str().unwrap_or("of an unreadable name").to_owned(),
            None => "none".to_owned(),
        };
        Err(CheckpointError::UnknownArchitecture { file: self.path.clone(), found })
    }

    fn check_features(&self) -> Result<(), CheckpointError> {
        for key in ["attention_bias", "use_sliding_window"] {
            if self.flag(key) {
                return Err(self.unsupported(key));
            }
        }
        if let Some(activation) = self.get("hidden_act").filter(|activation| *activation != "silu") {
            return Err(self.unsupported(format!("hidden_act {activation}")));
        }
        let layer_types = self.get("layer_types").and_then(Value::as_array);
        if let Some(other) =
            layer_types.and_then(|types| types.iter().find(|layer| *layer != "full_attention"))
        {
            return Err(self.unsupported(format!("layer type {other}")));
        }
        if self.get("quantization_config").is_some() {
            return Err(
                self.unsupported("a quantized checkpoint (quantization_config): give the original weights")
            );
        }
        Ok(())
    }

    /// `rope_theta` from `rope_parameters`, or from the top level as before transformers 5.
    fn rope_theta(&self) -> Result<f64, CheckpointError> {
        let mut theta = self.number("rope_theta")?;
        for rope in ["rope_scaling", "rope_parameters"].into_iter().filter_map(|key| self.get(key)) {
            let kind = rope.get("rope_type").or(rope.get("type"));
            if let Some(kind) = kind.filter(|kind| *kind != "default") {
                return Err(self.unsupported(format!("rope scaling of type {kind}")));
            }
            if let Some(value) = rope.get("rope_theta") {
                let value = value.as_f64().filter(|theta| *theta > 0.0);
                theta = Some(value.ok_or_else(|| self.malformed("rope_theta is not a positive number"))?);
            }
        }
        Ok(theta.unwrap_or(10_000.0))
    }
}
