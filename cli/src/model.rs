//! Which model: a folder, a Hugging Face id, or the built-in one.

use crate::device::{Device, DeviceArgs};
use anyhow::{Context, bail};
use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser},
};
use forebay_workers::engine::{
    Engine,
    graph::Precision,
    onnx::{OnnxEngine, OnnxOptions},
    sim::{SimEngine, SimOptions, SimPace},
};
use std::path::{Path, PathBuf};

/// Bytes of weights from which `--weights auto` quantizes to int4: to smaller models it brings rounding and little else.
const INT4_FROM_BYTES: u64 = 200 << 20;

/// Files of a Hugging Face repository that are needed, where it has them.
const HUB_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// The model, and how it is run.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelArgs {
    /// Folder with a Hugging Face checkpoint, or an id on the hub such as `Qwen/Qwen3-0.6B` (HF_HOME and
    /// HF_ENDPOINT are honoured). Without it: the small built-in demo model.
    #[arg(long, env = "FOREBAY_MODEL", value_name = "DIR|ID")]
    pub(crate) model: Option<String>,
    /// Name that clients use. Default: the id, the folder's name, or `demo`.
    #[arg(long, env = "FOREBAY_MODEL_NAME", value_name = "NAME")]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

/// How the model is run.
#[derive(Args, Clone, Debug)]
pub(crate) struct EngineArgs {
    /// `onnx` runs the model; `sim` pretends to, for load and chaos tests.
    #[arg(long, env = "FOREBAY_ENGINE", default_value = "onnx", value_parser = ["onnx", "sim"], value_name = "ENGINE")]
    pub(crate) engine: String,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Precision of the weights: int4, int8, on a CPU fp32, on a GPU bf16 or fp16, or auto (on a CPU int4, but fp32 for models
    /// under 200 MB; on a GPU bf16).
    #[arg(long, env = "FOREBAY_WEIGHTS", default_value = "auto", value_parser = ["auto", "int4", "int8", "fp32", "bf16", "fp16"], value_name = "TYPE")]
    pub(crate) weights: String,
    /// Elements that share one scale in int4 and int8: 32 is more accurate, and on a CPU 128 faster.
    #[arg(long, env = "FOREBAY_BLOCK", default_value = "32", value_parser = block_size(), value_name = "N")]
    pub(crate) block: usize,
    /// Longest context in tokens; longer ones of the model are cut to this.
    #[arg(long, env = "FOREBAY_CONTEXT", default_value_t = 4096, value_name = "TOKENS")]
    pub(crate) context: u32,
    /// Threads that compute. Default: all cores.
    #[arg(long, env = "FOREBAY_THREADS", value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Let idle compute threads spin for a moment: faster steps, but no good for several workers on the same cores.
    /// Default: true, but false where `up` runs several workers.
    #[arg(long, env = "FOREBAY_SPIN", value_name = "BOOL")]
    pub(crate) spin: Option<bool>,
    /// libonnxruntime.so, 1.31 or newer, where it is not found by itself.
    #[arg(long, env = "ORT_DYLIB_PATH", value_name = "FILE")]
    pub(crate) onnxruntime: Option<PathBuf>,
    /// Simulated microseconds of a decode step (`--engine sim`).
    #[arg(long, env = "FOREBAY_SIM_STEP_US", default_value_t = 0.0, value_name = "US")]
    pub(crate) sim_step_us: f64,
    /// Simulated microseconds that each prompt token takes to prefill (`--engine sim`).
    #[arg(long, env = "FOREBAY_SIM_PREFILL_TOKEN_US", default_value_t = 0.0, value_name = "US")]
    pub(crate) sim_prefill_token_us: f64,
}

/// Block sizes that ONNX Runtime has kernels for.
fn block_size() -> impl TypedValueParser<Value = usize> {
    PossibleValuesParser::new(["16", "32", "64", "128", "256"])
        .map(|size| size.parse().expect("one of the above"))
}

/// A model found: where its files are, and what clients call it.
#[derive(Clone, Debug)]
pub(crate) struct FoundModel {
    pub(crate) folder: PathBuf,
    pub(crate) name: String,
}

impl ModelArgs {
    /// Finds the model's files, fetching or unpacking them if need be; `data` is where the demo is unpacked to.
    pub(crate) fn find(&self, data: &Path) -> anyhow::Result<FoundModel> {
        let FoundModel { folder, name } = find_model(self.model.as_deref(), data)?;
        Ok(FoundModel { folder, name: self.name.clone().unwrap_or(name) })
    }
}

/// Finds a model's files by its folder or its id on the hub; the built-in one's without either.
pub(crate) fn find_model(model: Option<&str>, data: &Path) -> anyhow::Result<FoundModel> {
    let (folder, name) = match model {
        None => (crate::demo::unpack(&data.join("models"))?, "demo".to_owned()),
        Some(model) if Path::new(model).is_dir() => {
            let folder = std::fs::canonicalize(model)?;
            let name = folder.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
            (folder, name)
        }
        Some(model) if looks_like_path(model) => {
            bail!("no folder {model}: a model is a folder or a hub id")
        }
        Some(model) => (fetch(model)?, model.to_owned()),
    };
    Ok(FoundModel { folder, name })
}

impl EngineArgs {
    /// Opens the engine on a model with that vocabulary, with that many slots, for chunks of prompts of that many tokens.
    /// `data` is where compiled kernels are kept.
    pub(crate) fn open(
        &self,
        device: Device,
        model: &FoundModel,
        vocab: u32,
        (slots, chunk_tokens): (u32, u32),
        data: &Path,
    ) -> anyhow::Result<Box<dyn Engine>> {
        let positions = self.context + 1;
        if self.engine == "sim" {
            tracing::warn!("simulated engine: tokens mean nothing");
            let pace = SimPace {
                decode_us: self.sim_step_us,
                prefill_token_us: self.sim_prefill_token_us,
                ..SimPace::default()
            };
            // Special tokens lie at either end of a vocabulary; what is between them has text.
            let options = SimOptions { slots, positions, vocab, drawn: vocab / 4..vocab / 2, pace };
            return Ok(Box::new(SimEngine::new(options)?));
        }
        let checkpoint = forebay_workers::engine::checkpoint::Checkpoint::open(&model.folder)?;
        if let Device::Cuda(number) = device {
            return self.open_cuda(&checkpoint, number, slots, chunk_tokens, data);
        }
        let longest = checkpoint.config().positions_max as u32;
        let options = OnnxOptions {
            precision: self.precision(&model.folder)?,
            kv: self.device.kv(),
            kv_ranges: self.device.kv_ranges.clone(),
            slots,
            positions: positions.min(longest + 1),
            spin: self.spin.unwrap_or(true),
            library: self.onnxruntime.clone(),
            threads: self.threads.unwrap_or(OnnxOptions::default().threads),
        };
        Ok(Box::new(OnnxEngine::with_checkpoint(&checkpoint, &options)?))
    }

    fn precision(&self, folder: &Path) -> anyhow::Result<Precision> {
        Ok(match self.weights.as_str() {
            "int4" => Precision::Int4 { block: self.block },
            "int8" => Precision::Int8 { block: self.block },
            "fp32" => Precision::F32,
            "bf16" | "fp16" => bail!("--weights {} is for GPUs: a CPU has int4, int8 and fp32", self.weights),
            _ if weight_bytes(folder)? < INT4_FROM_BYTES => Precision::F32,
            _ => Precision::Int4 { block: self.block },
        })
    }
}

fn weight_bytes(folder: &Path) -> anyhow::Result<u64> {
    let files = std::fs::read_dir(folder).with_context(|| format!("model folder {}", folder.display()))?;
    let weights =
        files.flatten().filter(|file| file.path().extension().is_some_and(|end| end == "safetensors"));
    Ok(weights.filter_map(|file| std::fs::metadata(file.path()).ok()).map(|file| file.len()).sum())
}

fn looks_like_path(model: &str) -> bool {
    model.starts_with(['/', '.', '~']) || model.matches('/').count() != 1
}

/// Fetches a repository from the hub (or finds it in the cache), and returns the folder of its snapshot.
fn fetch(id: &str) -> anyhow::Result<PathBuf> {
    let problem = || format!("fetching {id} from the Hugging Face hub (HF_ENDPOINT names a mirror)");
    let api = hf_hub::api::sync::ApiBuilder::from_env().with_progress(true).build().with_context(problem)?;
    let cached = hf_hub::Cache::from_env().model(id.to_owned());
    let repo = api.model(id.to_owned());
    // What lies in the cache is used as it is, so that a machine without network serves what it has.
    let get = |file: &str| cached.get(file).map_or_else(|| repo.get(file), Ok);
    let config = get("config.json").with_context(problem)?;
    for file in &HUB_FILES[1..] {
        // Not every repository has every file; what is needed and missing is said when the model is opened.
        let _ = get(file);
    }
    let folder = config.parent().expect("a file has a folder").to_owned();
    for shard in shards(&folder)? {
        get(&shard).with_context(problem)?;
    }
    Ok(folder)
}

fn shards(folder: &Path) -> anyhow::Result<Vec<String>> {
    let Ok(index) = std::fs::read(folder.join("model.safetensors.index.json")) else {
        return Ok(vec!["model.safetensors".to_owned()]);
    };
    let index: serde_json::Value = serde_json::from_slice(&index).context("model.safetensors.index.json")?;
    let map = index["weight_map"].as_object().context("model.safetensors.index.json has no weight_map")?;
    let mut shards: Vec<String> =
        map.values().filter_map(|shard| shard.as_str().map(str::to_owned)).collect();
    shards.sort();
    shards.dedup();
    Ok(shards)
}
