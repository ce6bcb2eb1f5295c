//! The engine alone: load, memory, prefill, decode.

use crate::config::data_folder;
use anyhow::Context;
use clap::Args;
use forebay_workers::engine::{
    KvType,
    bench::{BenchPlan, bench},
    checkpoint::ModelConfig,
    graph::Precision,
    onnx::OnnxOptions,
    random_checkpoint,
};
use std::path::{Path, PathBuf};

#[derive(Args, Clone, Debug)]
pub(crate) struct EngineBenchArgs {
    /// A checkpoint of yours instead of a random one of Qwen3-0.6B's shape.
    #[arg(long, value_name = "DIR")]
    pub(super) model: Option<PathBuf>,
    /// Block sizes of int4 to measure.
    #[arg(long, value_delimiter = ',', default_value = "32,128", value_name = "N,…")]
    pub(super) blocks: Vec<usize>,
    /// Threads that compute. Default: all cores.
    #[arg(long, value_name = "N")]
    pub(super) threads: Option<usize>,
    /// Prompts to prefill, in tokens.
    #[arg(long, value_delimiter = ',', default_value = "128,512,2048", value_name = "N,…")]
    prefill: Vec<u32>,
    /// Batches to decode.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16", value_name = "N,…")]
    batch: Vec<u32>,
    /// Tokens in each sequence before decoding is timed.
    #[arg(long, default_value_t = 128, value_name = "N")]
    at: u32,
    /// How keys and values are held: auto (fp32) or int8, for which `forebay calibrate` must have measured the checkpoint.
    #[arg(long, default_value = "auto", value_parser = ["auto", "int8"], value_name = "TYPE")]
    kv_type: String,
    /// libonnxruntime.so, where it is not found by itself.
    #[arg(long, env = "ORT_DYLIB_PATH", value_name = "FILE")]
    onnxruntime: Option<PathBuf>,
}

pub(crate) fn run(args: &EngineBenchArgs) -> anyhow::Result<()> {
    let folder = match &args.model {
        Some(folder) => folder.clone(),
        None => random_model()?,
    };
    // Peak memory is a process's: each block size gets one of its own.
    if args.blocks.len() > 1 {
        return args.blocks.iter().try_for_each(|block| run_alone(args, &folder, *block));
    }
    for block in &args.blocks {
        let options = OnnxOptions {
            precision: Precision::Int4 { block: *block },
            kv: if args.kv_type == "int8" { KvType::Int8 } else { KvType::Auto },
            threads: args.threads.unwrap_or(OnnxOptions::default().threads),
            library: args.onnxruntime.clone(),
            ..OnnxOptions::default()
        };
        let plan = BenchPlan {
            prefills: args.prefill.clone(),
            batches: args.batch.clone(),
            context: args.at,
            ..BenchPlan::default()
        };
        println!("\n# Engine ({})\n", folder.file_name().unwrap_or_default().to_string_lossy());
        let report = bench(&folder, &options, &plan, |line| println!("{line}"))?;
        println!("peak memory {} MiB", report.peak_rss_mib);
    }
    Ok(())
}

fn run_alone(args: &EngineBenchArgs, folder: &Path, block: usize) -> anyhow::Result<()> {
    let list = |numbers: &[u32]| numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let mut command = std::process::Command::new(std::env::current_exe()?);
    command.args(["bench", "engine", "--blocks", &block.to_string(), "--model"]).arg(folder);
    command.args([
        "--prefill",
        &list(&args.prefill),
        "--batch",
        &list(&args.batch),
        "--at",
        &args.at.to_string(),
        "--kv-type",
        &args.kv_type,
    ]);
    if let Some(threads) = args.threads {
        command.args(["--threads", &threads.to_string()]);
    }
    if let Some(library) = &args.onnxruntime {
        command.arg("--onnxruntime").arg(library);
    }
    let status = command.status().context("measuring in a process of its own")?;
    anyhow::ensure!(status.success(), "the measurement ended with {status}");
    Ok(())
}

/// A random checkpoint of Qwen3-0.6B's shape with a tokenizer of one word a token, made on first use (1.2 GB).
pub(super) fn random_model() -> anyhow::Result<PathBuf> {
    let folder = data_folder(None).join("bench").join("qwen3-0.6b-random");
    let config = ModelConfig::qwen3_0_6b();
    if !folder.join("model.safetensors").exists() {
        eprintln!("making a random checkpoint of Qwen3-0.6B's shape in {} (once)", folder.display());
        random_checkpoint::write(&folder, &config, 1)
            .with_context(|| format!("writing {}", folder.display()))?;
    }
    write_tokenizer(&folder, config.vocab)?;
    Ok(folder)
}

/// The words of the random checkpoint's tokenizer.
pub(super) fn random_model_words(vocab: usize) -> impl Iterator<Item = String> {
    (0..vocab).map(|id| format!("w{id}"))
}

fn write_tokenizer(folder: &Path, vocab: usize) -> anyhow::Result<()> {
    let words: serde_json::Map<String, serde_json::Value> =
        random_model_words(vocab).enumerate().map(|(id, word)| (word, id.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "model": { "type": "WordLevel", "vocab": words, "unk_token": "w0" },
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string())?;
    let template = "{% for message in messages %}{{ message['content'] }} {% endfor %}";
    std::fs::write(
        folder.join("tokenizer_config.json"),
        serde_json::json!({ "chat_template": template }).to_string(),
    )?;
    Ok(())
}
