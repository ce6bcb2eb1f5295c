//! Measures an engine on a checkpoint: load, memory, prefill and decode. `forebay bench engine` prints it.

use super::{
    Draw, Engine, EngineError, Row,
    onnx::{OnnxEngine, OnnxOptions, OpenError},
};
use serde::Serialize;
use std::{path::Path, time::Instant};

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchPlan {
    /// Prompt lengths to prefill.
    pub prefills: Vec<u32>,
    /// Tokens of one prefill call.
    pub chunk: u32,
    /// Batch sizes to decode.
    pub batches: Vec<u32>,
    /// Positions of each sequence before a decode is timed.
    pub context: u32,
    /// Timed decode steps of each batch size.
    pub steps: u32,
    /// Timed repetitions of each prefill.
    pub repeats: u32,
}

impl Default for BenchPlan {
    fn default() -> Self {
        BenchPlan {
            prefills: vec![128, 512, 2048],
            chunk: 512,
            batches: vec![1, 2, 4, 8, 16],
            context: 128,
            steps: 24,
            repeats: 3,
        }
    }
}

/// What was measured. Rates are tokens a second, from the median time.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// The card's description of the weights.
    pub weights: String,
    /// Milliseconds from a closed checkpoint to an engine.
    pub load_ms: f64,
    /// Most memory that the process ever held, in MiB, after loading.
    pub peak_rss_loaded_mib: u64,
    /// The same after everything below, KV included.
    pub peak_rss_mib: u64,
    /// (prompt length, rate).
    pub prefill: Vec<(u32, f64)>,
    /// (batch size, rate of all rows together).
    pub decode: Vec<(u32, f64)>,
}

/// Why a measurement stopped.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// No engine.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A step failed.
    #[error(transparent)]
    Step(#[from] EngineError),
}

/// Opens the checkpoint and measures. Slots and positions are raised to what the plan needs. `said` is told of every
/// figure as soon as it is known.
pub fn bench(
    dir: &Path,
    options: &OnnxOptions,
    plan: &BenchPlan,
    mut said: impl FnMut(&str),
) -> Result<BenchReport, BenchError> {
    let mut options = options.clone();
    options.slots = options.slots.max(most(&plan.batches)).max(1);
    // One untimed step comes before those that are timed, and a slot keeps one scratch position.
    options.positions = options.positions.max(most(&plan.prefills) + 1).max(plan.context + plan.steps + 3);
    let start = Instant::now();
    let mut engine = OnnxEngine::open(dir, &options)?;
    let mut report = BenchReport {
        weights: engine.card().weights.clone(),
        load_ms: start.elapsed().as_secs_f64() * 1e3,
        peak_rss_loaded_mib: peak_rss_mib(),
        peak_rss_mib: 0,
        prefill: Vec::new(),
        decode: Vec::new(),
    };
    said(&format!(
        "{}: loaded in {:.0} ms, {} MiB at most",
        report.weights, report.load_ms, report.peak_rss_loaded_mib
    ));
    for tokens in &plan.prefills {
        let rate = prefill(&mut engine, *tokens, plan)?;
        said(&format!("prefill {tokens:>5} tokens: {rate:8.1} tok/s"));
        report.prefill.push((*tokens, rate));
    }
    for batch in &plan.batches {
        let rate = decode(&mut engine, *batch, plan)?;
        said(&format!("decode  {batch:>5} rows:   {rate:8.1} tok/s"));
        report.decode.push((*batch, rate));
    }
    report.peak_rss_mib = peak_rss_mib();
    Ok(report)
}

fn most(counts: &[u32]) -> u32 {
    counts.iter().copied().max().unwrap_or(0)
}

const DRAW: Draw<'static> = Draw::greedy(0);

fn fill(engine: &mut OnnxEngine, slot: u32, tokens: u32, chunk: u32) -> Result<(), EngineError> {
    let vocab = engine.card().vocab;
    let ids: Vec<u32> = (0..tokens).map(|i| (i + slot).wrapping_mul(2_654_435_761) % vocab).collect();
    for (start, chunk) in (0..).step_by(chunk as usize).zip(ids.chunks(chunk as usize)) {
        engine.prefill(slot, start, chunk, Some(DRAW))?;
    }
    Ok(())
}

fn prefill(engine: &mut OnnxEngine, tokens: u32, plan: &BenchPlan) -> Result<f64, EngineError> {
    fill(engine, 0, tokens.min(plan.chunk), plan.chunk)?;
    let mut times = Vec::new();
    for _ in 0..plan.repeats.max(1) {
        let start = Instant::now();
        fill(engine, 0, tokens, plan.chunk)?;
        times.push(start.elapsed().as_secs_f64());
    }
    Ok(f64::from(tokens) / median(&mut times))
}

fn decode(engine: &mut OnnxEngine, batch: u32, plan: &BenchPlan) -> Result<f64, EngineError> {
    // Real KV in every slot: attention over untouched memory reads the one zero page and is faster than it should be.
    (0..batch).try_for_each(|slot| fill(engine, slot, plan.context, plan.chunk))?;
    let mut rows: Vec<Row<'_>> =
        (0..batch).map(|slot| Row { slot, position: plan.context, token: slot, draw: DRAW }).collect();
    let parked = vec![0; batch as usize];
    let (mut times, mut out) = (Vec::new(), Vec::new());
    for step in 0..plan.steps.max(1) + 1 {
        let start = Instant::now();
        engine.decode(&rows, &parked, &mut out)?;
        if step > 0 {
            times.push(start.elapsed().as_secs_f64());
        }
        for (row, sampled) in rows.iter_mut().zip(&out) {
            (row.token, row.position) = (sampled.token, row.position + 1);
        }
    }
    Ok(f64::from(batch) / median(&mut times))
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// `VmHWM`; 0 where `/proc` does not say.
fn peak_rss_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0) / 1024
}
