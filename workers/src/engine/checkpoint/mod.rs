//! A checkpoint in Hugging Face's format: `config.json` and safetensors files, mapped, never copied.
//!
//! Opening checks everything that the graph will ask for, so that a damaged or foreign checkpoint is refused
//! with one sentence that names the file and the tensor.

mod config;
mod ranges;
mod tensors;

pub use config::ModelConfig;
pub use ranges::KvRanges;
pub use tensors::{Dtype, Factors, Matrix, WeightTensor};
pub(super) use tensors::{Elements, stack};

use config::JsonFile;
use forebay_kernels::Checksum;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::OnceLock,
};
use tensors::Shard;

/// An opened checkpoint.
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    eos: Vec<u32>,
    tensors: BTreeMap<String, WeightTensor>,
    weights_hash: OnceLock<u64>,
}

/// Why a directory cannot be served. Nothing but another checkpoint helps.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file cannot be opened.
    #[error("cannot read {}: {source}", file.display())]
    Unreadable {
        /// Which file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file does not say what it must.
    #[error("{}: {problem}", file.display())]
    Malformed {
        /// Which file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A model of another kind.
    #[error("{}: the architecture is {found}; only Qwen3ForCausalLM is supported", file.display())]
    UnknownArchitecture {
        /// The config.
        file: PathBuf,
        /// The architecture it names.
        found: String,
    },
    /// A Qwen3 model with a feature that the graph does not compute.
    #[error("{}: {what} is not supported", file.display())]
    Unsupported {
        /// The config.
        file: PathBuf,
        /// Which feature.
        what: String,
    },
    /// A safetensors file was cut short, or its header is damaged.
    #[error("{}: truncated or damaged: {problem}", file.display())]
    Damaged {
        /// Which file.
        file: PathBuf,
        /// What does not add up.
        problem: String,
    },
    /// The index names a shard that is not a plain file name.
    #[error("{}: tensor {tensor} is said to be in {shard:?}, which is no file of the checkpoint", file.display())]
    BadIndex {
        /// The index.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// The name given.
        shard: String,
    },
    /// A tensor that the model needs is in none of the files, or not in the one that the index names.
    #[error("{}: tensor {tensor} is missing", file.display())]
    MissingTensor {
        /// Where it should be.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
    },
    /// A tensor's shape does not follow from the config.
    #[error("{}: tensor {tensor} has shape {found:?}, but config.json makes it {expected:?}", file.display())]
    WrongShape {
        /// Where it is.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Shape by the config.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A tensor's elements are of a kind that is not read.
    #[error("{}: tensor {tensor} holds {found}; only BF16, F16 and F32 are supported", file.display())]
    WrongDtype {
        /// Where it is.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Element type in the file.
        found: String,
    },
    /// KV in int8 was asked for, and nobody has measured how large keys and values get.
    #[error("{} is missing, without which KV can't be int8: `forebay calibrate` writes it", file.display())]
    NotCalibrated {
        /// Where it should be.
        file: PathBuf,
    },
    /// Ranges of keys and values were measured on another model.
    #[error(
        "{}: measured on other weights ({measured:?}, and these are {expected:?}); `forebay calibrate` measures anew",
        file.display()
    )]
    OtherWeights {
        /// The ranges.
        file: PathBuf,
        /// Hash of the weights that they are of.
        measured: String,
        /// Hash of the checkpoint's weights.
        expected: String,
    },
    /// A range of keys or values is no range.
    #[error("{}: tensor {tensor} holds {value}, which is no magnitude; `forebay calibrate` measures anew", file.display())]
    BadRange {
        /// The ranges.
        file: PathBuf,
        /// Which tensor.
        tensor: String,
        /// What it holds.
        value: f32,
    },
    /// More context was asked for than the model was made for.
    #[error("{}: a context of {asked} tokens was asked for, but the model was made for {limit}", file.display())]
    ContextTooLong {
        /// The config.
        file: PathBuf,
        /// Tokens asked for.
        asked: usize,
        /// The model's `max_position_embeddings`.
        limit: usize,
    },
}

impl CheckpointError {
    fn unreadable(file: &Path, source: std::io::Error) -> CheckpointError {
        CheckpointError::Unreadable { file: file.to_owned(), source }
    }
}

impl Checkpoint {
    /// Opens a directory with `config.json` and `model.safetensors`, or `model.safetensors.index.json` and the
    /// shards that it names. Checks that every tensor of the model is there, of the right shape, and readable.
    pub fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
        let file = JsonFile::read(dir.join("config.json"))?;
        let config = file.model()?;
        let generation = dir.join("generation_config.json");
        let generation = if generation.exists() { JsonFile::read(generation)?.eos()? } else { None };
        let eos = match generation {
            Some(eos) => eos,
            None => file.eos()?.unwrap_or_default(),
        };
        let shards = open_shards(dir)?;
        let mut tensors = BTreeMap::new();
        for (name, shape) in tensors_of(&config) {
            tensors.insert(name.clone(), shards.find(&name, &shape)?);
        }
        Ok(Checkpoint { dir: dir.to_owned(), config, eos, tensors, weights_hash: OnceLock::new() })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Tokens that end an output, from `generation_config.json` or else `config.json`.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// One of the model's tensors by its name in the files.
    ///
    /// # Panics
    /// If the model has no tensor of that name: only a bug in the graph can ask for it.
    pub fn tensor(&self, name: &str) -> &WeightTensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{name} is no tensor of the model"))
    }

    /// Refuses a context that the model was not made for.
    pub fn check_context(&self, tokens: usize) -> Result<(), CheckpointError> {
        let limit = self.config.positions_max;
        if tokens <= limit {
            return Ok(());
        }
        Err(CheckpointError::ContextTooLong { file: self.dir.join("config.json"), asked: tokens, limit })
    }

    /// CRC-64/NVME over the name, element type, shape and bytes of every tensor of the model, in order of names:
    /// the same however the tensors are spread over files.
    pub fn weights_hash(&self) -> u64 {
        // Reads all of the weights.
        *self.weights_hash.get_or_init(|| {
            let mut sum = Checksum::default();
            for (name, tensor) in &self.tensors {
                sum.update(format!("{name} {} {:?}\n", tensor.dtype(), tensor.shape()).as_bytes());
                sum.update(tensor.bytes());
                tensor.release();
            }
            sum.value()
        })
    }
}

/// Every tensor of the model and its shape.
pub(super) fn tensors_of(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, q, kv, inner) = (config.hidden, config.q_width(), config.kv_width(), config.intermediate);
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![config.vocab, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if !config.tied {
        all.push(("lm_head.weight".to_owned(), vec![config.vocab, hidden]));
    }
    for layer in 0..config.layers {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![q, hidden]),
            ("self_attn.k_proj", vec![kv, hidden]),
            ("self_attn.v_proj", vec![kv, hidden]),
            ("self_attn.q_norm", vec![config.head_dim]),
            ("self_attn.k_norm", vec![config.head_dim]),
            ("self_attn.o_proj", vec![hidden, q]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
        ] {
            all.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    all
}

/// The weight files, and which of them holds which tensor where an index says so.
struct Shards {
    index: Option<JsonFile>,
    shards: BTreeMap<String, Shard>,
}

fn open_shards(dir: &Path) -> Result<Shards, CheckpointError> {
    let single = "model.safetensors";
    let index = dir.join("model.safetensors.index.json");
    if dir.join(single).exists() || !index.exists() {
        let shards = BTreeMap::from([(single.to_owned(), Shard::open(dir.join(single))?)]);
        return Ok(Shards { index: None, shards });
    }
    let index = JsonFile::read(index)?;
    let Some(map) = index.get("weight_map").and_then(|map| map.as_object()) else {
        return Err(index.malformed("weight_map is missing"));
    };
    let mut shards = BTreeMap::new();
    for (tensor, shard) in map {
        let name = shard.as_str().unwrap_or_default();
        // Only names within the directory: an index must not make us map files elsewhere.
        if name.is_empty() || Path::new(name).file_name() != Some(name.as_ref()) {
            let (file, tensor, shard) = (index.path().to_owned(), tensor.clone(), shard.to_string());
            return Err(CheckpointError::BadIndex { file, tensor, shard });
        }
        if !shards.contains_key(name) {
            shards.insert(name.to_owned(), Shard::open(dir.join(name))?);
        }
    }
    Ok(Shards { index: Some(index), shards })
}

impl Shards {
    fn find(&self, tensor: &str, shape: &[usize]) -> Result<WeightTensor, CheckpointError> {
        let missing =
            |file: &Path| CheckpointError::MissingTensor { file: file.to_owned(), tensor: tensor.to_owned() };
        let shard = match &self.index {
            None => self.shards.values().next().expect("a checkpoint without an index has one file"),
            Some(index) => {
                let named =
                    index.get("weight_map").and_then(|map| map.get(tensor)).and_then(|name| name.as_str());
                &self.shards[named.ok_or_else(|| missing(index.path()))?]
            }
        };
        shard.tensor(tensor, shape)?.ok_or_else(|| missing(shard.path()))
    }
}
