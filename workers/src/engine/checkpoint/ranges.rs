//! `kv_ranges.safetensors`: how large keys and values get, as `forebay calibrate` has measured it.
//!
//! For each layer the largest magnitudes of its keys (after the rotary embedding) and of its values, in fp32,
//! `[kv_heads, head_dim]`: `model.layers.N.self_attn.k_absmax` and `.v_absmax`. Its metadata says on which weights they were
//! measured, and over how many tokens.

use super::{Checkpoint, CheckpointError, tensors::Shard};
use std::{
    io,
    path::{Path, PathBuf},
};

/// The largest magnitudes of keys and values.
#[derive(Clone, Debug, PartialEq)]
pub struct KvRanges {
    /// For each layer those of its keys and of its values, `[kv_heads, head_dim]`.
    pub layers: Vec<[Vec<f32>; 2]>,
    /// Tokens that they were measured over.
    pub tokens: u64,
}

/// Names of the tensors of a layer, keys first.
fn names(layer: usize) -> [String; 2] {
    ["k", "v"].map(|kv| format!("model.layers.{layer}.self_attn.{kv}_absmax"))
}

impl KvRanges {
    /// The file's name in a checkpoint's folder.
    pub const FILE: &str = "kv_ranges.safetensors";

    /// Reads those of a checkpoint, from `file` or else from its folder, and checks that they are of this checkpoint.
    pub fn read(checkpoint: &Checkpoint, file: Option<&Path>) -> Result<KvRanges, CheckpointError> {
        let file = file.map_or_else(|| checkpoint.dir().join(KvRanges::FILE), Path::to_owned);
        let shard = Shard::open(file.clone()).map_err(|error| match error {
            CheckpointError::Unreadable { file, source } if source.kind() == io::ErrorKind::NotFound => {
                CheckpointError::NotCalibrated { file }
            }
            other => other,
        })?;
        let said = |key: &str| shard.notes().get(key).cloned().unwrap_or_default();
        let (measured, expected) = (said("weights"), format!("{:016x}", checkpoint.weights_hash()));
        if measured != expected {
            return Err(CheckpointError::OtherWeights { file, measured, expected });
        }
        let layers = (0..checkpoint.config().layers).map(|layer| {
            let [k, v] = names(layer);
            Ok([range(&shard, &k, checkpoint)?, range(&shard, &v, checkpoint)?])
        });
        let layers = layers.collect::<Result<_, CheckpointError>>()?;
        Ok(KvRanges { layers, tokens: said("tokens").parse().unwrap_or(0) })
    }

    /// Writes them for a checkpoint, aside first, so that nobody sees half a file. The same ranges give the same bytes.
    pub fn write(&self, checkpoint: &Checkpoint, file: &Path) -> io::Result<()> {
        let config = checkpoint.config();
        let mut header = serde_json::Map::new();
        let notes = serde_json::json!({
            "tokens": self.tokens.to_string(),
            "weights": format!("{:016x}", checkpoint.weights_hash()),
        });
        header.insert("__metadata__".to_owned(), notes);
        let mut data: Vec<u8> = Vec::new();
        for (layer, ranges) in self.layers.iter().enumerate() {
            for (name, range) in names(layer).into_iter().zip(ranges) {
                let start = data.len();
                data.extend(range.iter().flat_map(|largest| largest.to_le_bytes()));
                let info = serde_json::json!({
                    "dtype": "F32",
                    "shape": [config.kv_heads, config.head_dim],
                    "data_offsets": [start, data.len()],
                });
                header.insert(name, info);
            }
        }
        let mut header = serde_json::Value::from(header).to_string();
        // The data begins at a multiple of 8.
        header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
        let parts = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data];
        let mut aside = PathBuf::from(file).into_os_string();
        aside.push(format!(".{}", std::process::id()));
        std::fs::write(&aside, parts.concat())?;
        std::fs::rename(&aside, file)
    }
}

fn range(shard: &Shard, tensor: &str, checkpoint: &Checkpoint) -> Result<Vec<f32>, CheckpointError> {
    let (config, file) = (checkpoint.config(), shard.path());
    let Some(found) = shard.tensor(tensor, &[config.kv_heads, config.head_dim])? else {
        return Err(CheckpointError::MissingTensor { file: file.to_owned(), tensor: tensor.to_owned() });
    };
    let range = found.to_f32();
    match range.iter().find(|largest| !(largest.is_finite() && **largest > 0.0)) {
        Some(value) => {
            let (file, tensor) = (file.to_owned(), tensor.to_owned());
            Err(CheckpointError::BadRange { file, tensor, value: *value })
        }
        None => Ok(range),
    }
}
