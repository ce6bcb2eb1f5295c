//! `forebay calibrate`: how large a model's keys and values get, for KV in int8.

use crate::{
    config::{data_folder, init_logging},
    model::find_model,
};
use anyhow::{Context, bail, ensure};
use clap::Args;
use forebay_schemas::kv::KvDtype;
use forebay_workers::{
    engine::{
        Engine, KvType,
        calibrate::{compare, measure},
        checkpoint::{Checkpoint, KvRanges},
        graph::Precision,
        onnx::{OnnxEngine, OnnxOptions},
    },
    model::ModelText,
};
use std::{path::PathBuf, time::Instant};

/// Prose, code, tables, chats and other languages.
const TEXT: &str = include_str!("calibrate/text.txt");

/// Tokens of a text's end that are not measured, but tell what int8 costs: half of them follow the other half.
const CHECKED: usize = 256;

/// Tokens of a sequence. Each begins anew, with a first token of its own: those have keys and values unlike all others.
const SEQUENCE: usize = 2048;

/// Tokens of one call, between two signs of life.
const CHUNK: usize = 256;

const WHY: &str = "\
KV in int8 takes a quarter of the memory of fp32, and half of bf16: longer contexts, more sequences at once, less to move \
between workers. Its steps must reach as far as keys and values do, and no further. So this runs a text through the model, on \
the CPU, and writes the largest magnitudes of each layer, head and channel into kv_ranges.safetensors in the model's folder, \
where workers look for it. Larger ones that come up later are clamped. At the end it says how much int8 changes.\n\n\
In fp32 the model takes 4 bytes for each parameter; with --weights int8 a quarter of that, and the ranges are nearly the \
same. Nothing is written before all is measured: Ctrl-C leaves what was there.";

#[derive(Args, Debug)]
#[command(after_help = WHY)]
pub(crate) struct CalibrateArgs {
    /// Folder with a Hugging Face checkpoint, or an id on the hub. Without it: the built-in model, which has its ranges; --out says
    /// where to write others.
    #[arg(env = "FOREBAY_MODEL", value_name = "DIR|ID")]
    model: Option<String>,
    /// A text like those that the model will read and write. Default: a built-in one of prose, code, chats and other languages.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of the text that are run at most.
    #[arg(long, default_value_t = 8192, value_name = "N")]
    tokens: usize,
    /// Where to write, if not into the model's folder. --kv-ranges tells workers.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Precision of the weights that are run.
    #[arg(long, default_value = "fp32", value_parser = ["fp32", "int8", "int4"], value_name = "TYPE")]
    weights: String,
    /// Threads that compute. Default: all cores.
    #[arg(long, env = "FOREBAY_THREADS", value_name = "N")]
    threads: Option<usize>,
    /// libonnxruntime.so, 1.31 or newer, where it is not found by itself.
    #[arg(long, env = "ORT_DYLIB_PATH", value_name = "FILE")]
    onnxruntime: Option<PathBuf>,
    /// Folder for unpacked models.
    #[arg(long, env = "FOREBAY_DATA", value_name = "DIR")]
    data: Option<PathBuf>,
}

pub(crate) fn run(args: &CalibrateArgs) -> anyhow::Result<()> {
    init_logging("warn");
    if args.model.is_none() && args.out.is_none() {
        bail!("the built-in model has its ranges; --out FILE says where to write others");
    }
    let model = find_model(args.model.as_deref(), &data_folder(args.data.clone()))?;
    let checkpoint = Checkpoint::open(&model.folder)?;
    let file = args.out.clone().unwrap_or_else(|| model.folder.join(KvRanges::FILE));
    let text = tokens(args, &ModelText::open(&model.folder)?)?;
    let (measured, checked) = text.split_at(text.len() - CHECKED);

    let mut options = options(args, &checkpoint, measured.len());
    let mut exact = OnnxEngine::with_checkpoint(&checkpoint, &options)?;
    println!("{}: {}", model.name, exact.card().weights);
    let (begun, mut said) = (Instant::now(), 0);
    let ranges = measure(&mut exact, measured, CHUNK, |done| {
        let tenth = 10 * done / measured.len();
        if tenth > said {
            said = tenth;
            println!("{done:>6} of {} tokens", measured.len());
        }
    })?;
    let infinite = ranges.layers.iter().flatten().flatten().any(|largest| !largest.is_finite());
    ensure!(!infinite, "the model computes keys or values that are no numbers: nothing was written");
    ranges.write(&checkpoint, &file).with_context(|| format!("writing {}", file.display()))?;
    println!("measured in {:.1} s", begun.elapsed().as_secs_f64());
    for (what, plane) in [("keys", 0), ("values", 1)] {
        let largest = ranges.layers.iter().map(|layer| layer[plane].iter().copied().fold(0.0, f32::max));
        let (layer, largest) = largest.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or_default();
        println!("largest {what}: {largest:.2}, in layer {layer}");
    }

    (options.kv, options.kv_ranges) = (KvType::Int8, Some(file.clone()));
    let mut int8 = OnnxEngine::with_checkpoint(&checkpoint, &options)?;
    let geometry = int8.card().layout.geometry;
    let bytes = |dtype: KvDtype| geometry.bytes_per_token() * dtype.bytes();
    println!(
        "KV of a token: {} bytes in int8, {} in bf16, {} in fp32",
        bytes(KvDtype::Int8),
        bytes(KvDtype::Bf16),
        bytes(KvDtype::F32)
    );
    let apart = compare(&mut exact, &mut int8, checked)?;
    println!(
        "after {} tokens that were not measured: logits are {:.2} % of their size apart, and {} likeliest tokens are the same",
        apart.positions,
        100.0 * apart.logits,
        apart.agreed
    );
    match args.out {
        Some(_) => println!("wrote {}: serve it with --kv-type int8 --kv-ranges FILE", file.display()),
        None => println!("wrote {}: serve it with --kv-type int8", file.display()),
    }
    Ok(())
}

/// The text, or its beginning.
fn tokens(args: &CalibrateArgs, model: &ModelText) -> anyhow::Result<Vec<u32>> {
    let text = match &args.text {
        Some(file) => std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?,
        None => TEXT.to_owned(),
    };
    let encoding = model.tokenizer.encode(text, false).map_err(|error| anyhow::anyhow!("{error}"))?;
    let all = encoding.get_ids();
    let tokens = &all[..all.len().min(args.tokens)];
    ensure!(
        tokens.len() >= 2 * CHECKED,
        "{} tokens of text are too few to measure: at least {} are needed",
        tokens.len(),
        2 * CHECKED
    );
    Ok(tokens.to_vec())
}

fn options(args: &CalibrateArgs, checkpoint: &Checkpoint, measured: usize) -> OnnxOptions {
    let context = measured.clamp(CHECKED, SEQUENCE).min(checkpoint.config().positions_max);
    OnnxOptions {
        precision: match args.weights.as_str() {
            "int4" => Precision::Int4 { block: 32 },
            "int8" => Precision::Int8 { block: 32 },
            _ => Precision::F32,
        },
        slots: 1,
        positions: context as u32 + 1,
        threads: args.threads.unwrap_or(OnnxOptions::default().threads),
        library: args.onnxruntime.clone(),
        ..OnnxOptions::default()
    }
}
