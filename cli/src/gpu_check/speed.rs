//! How fast a GPU is: against what it could be at best, measured in the same run.

use super::{Setting, correct::map, report::Report};
use anyhow::{Context, bail};
use forebay_kernels::{
    Region,
    cuda::{Arena, DeviceBuffer, Direction, HostBuffer, HostSlot, PinBudget, PinnedRegion, Sums},
};
use forebay_schemas::kv::{KvDtype, KvGeometry, KvHandle, KvLayout, TokenRange};
use forebay_workers::engine::{
    Draw, Engine, KvMover, Row,
    checkpoint::{Checkpoint, ModelConfig},
    cuda::{CudaEngine, Provider, peak},
    graph::Precision,
    random_checkpoint,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

/// Tokens in each sequence before decoding is timed.
const CONTEXT: u32 = 512;

/// Timed steps of each batch size.
const STEPS: usize = 100;

/// Tokens of a prompt whose prefill, and the way of whose KV, are timed.
const PROMPT: u32 = 4096;

const GREEDY: Draw<'static> = Draw::greedy(0);

struct Shape {
    name: &'static str,
    config: ModelConfig,
    /// Part of the bandwidth that a step of one row should reach.
    bandwidth: f64,
}

pub(super) fn measure(setting: &Setting, shapes: &[String], report: &mut Report) -> anyhow::Result<()> {
    if shapes.iter().all(String::is_empty) {
        return Ok(());
    }
    let known = [
        Shape { name: "0.6b", config: ModelConfig::qwen3_0_6b(), bandwidth: 0.5 },
        Shape { name: "8b", config: ModelConfig::qwen3_8b(), bandwidth: 0.8 },
    ];
    let copies = copy_bandwidth(setting)?;
    report.tell("copies within its memory, read and written", &format!("{:.0} GB/s", copies / 1e9));
    let matmul = match setting.provider {
        Provider::Cuda => Some(peak::matmul_rate(setting.device.facts().ordinal)?),
        Provider::Cpu => None,
    };
    if let Some(matmul) = matmul {
        report.tell("products of 8192 × 8192 matrices in bf16", &format!("{:.0} TFLOP/s", matmul / 1e12));
    }
    pinned_copies(setting, report)?;
    copies_on_gpu(setting, report)?;
    for name in shapes {
        let Some(shape) = known.iter().find(|shape| shape.name == name) else {
            bail!("--shapes {name}: 0.6b or 8b")
        };
        let checkpoint = random(setting, shape)?;
        decode(setting, shape, &checkpoint, copies, report)?;
        prefill(setting, shape, &checkpoint, matmul, report)?;
        if shape.name == "8b" {
            int4(setting, shape, &checkpoint, copies, report)?;
        }
    }
    Ok(())
}

/// A checkpoint of that shape, made once.
fn random(setting: &Setting, shape: &Shape) -> anyhow::Result<Checkpoint> {
    let folder = setting.data.join("bench").join(format!("qwen3-{}-random", shape.name));
    if !folder.join("model.safetensors").exists() {
        println!("        making a random checkpoint in {}", folder.display());
        random_checkpoint::write(&folder, &shape.config, 1)
            .with_context(|| format!("{}", folder.display()))?;
    }
    Ok(Checkpoint::open(&folder)?)
}

fn seconds(times: usize, mut work: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let mut all = Vec::new();
    // The first one finds caches cold and memory unmapped.
    for round in 0..=times {
        let begun = Instant::now();
        work()?;
        if round > 0 {
            all.push(begun.elapsed().as_secs_f64());
        }
    }
    Ok(part(&mut all, 0.5))
}

/// What so much of the values is below.
fn part(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * part).round() as usize]
}

/// Bytes a second that a copy within the GPU's memory reads and writes.
fn copy_bandwidth(setting: &Setting) -> anyhow::Result<f64> {
    let bytes = (setting.device.free_bytes()? / 8).min(4 << 30);
    let stream = setting.device.stream()?;
    let [from, into] = [(); 2].map(|()| DeviceBuffer::<u8>::new(&setting.device, bytes));
    let (from, into) = (from?, into?);
    let time = seconds(10, || {
        stream.copy_within(&from, &into)?;
        Ok(stream.synchronize()?)
    })?;
    Ok(2.0 * bytes as f64 / time)
}

/// A slot of the 8b shape with a prompt's KV.
fn prompt_layout(setting: &Setting) -> KvLayout {
    let stand_in = setting.provider == Provider::Cpu;
    let layers = if stand_in { 1 } else { 36 };
    let geometry = KvGeometry { layers, kv_heads: 8, head_dim: 128, dtype: KvDtype::Bf16 };
    KvLayout { geometry, slots: 1, positions: if stand_in { 64 } else { PROMPT } }
}

/// The way of a prompt's KV from another arena's memory, mapped as another process would, against one plain copy of as many bytes;
/// and how fast it is summed.
fn copies_on_gpu(setting: &Setting, report: &mut Report) -> anyhow::Result<()> {
    let layout = prompt_layout(setting);
    let tokens = TokenRange { start: 0, count: layout.positions };
    let (device, bytes) = (&setting.device, layout.region_bytes());
    let stream = device.stream()?;
    let arena = || Arena::new(device, layout, bytes + (256 << 20));
    let (source, target) = (Arc::new(arena()?), arena()?);
    if source.shared_granule().is_none() {
        report.tell("KV from GPU to GPU", "this driver gives memory to no other process");
        return Ok(());
    }
    source.grow(0, tokens.count)?;
    target.grow(0, tokens.count)?;
    let [from, into] = [(); 2].map(|()| DeviceBuffer::<u8>::new(device, bytes));
    let (from, into) = (from?, into?);
    let plain = seconds(10, || {
        stream.copy_within(&from, &into)?;
        Ok(stream.synchronize()?)
    })?;
    let begun = Instant::now();
    let shared = map(&source, 0, tokens.count)?;
    let mapping = begun.elapsed().as_secs_f64();
    let planes = 0..2 * layout.geometry.layers;
    let moved = seconds(10, || {
        let kernels = &setting.kernels;
        stream.move_kv(kernels, Direction::In, (&target, 0), &shared, tokens, planes.clone())?;
        Ok(stream.synchronize()?)
    })?;
    let mut sums = Sums::new(device, &layout)?;
    let summed = seconds(10, || {
        stream.sum_kv(&setting.kernels, (&target, 0), tokens, &mut sums)?;
        Ok(sums.of_groups(KvHandle::PLANES_PER_CHECKSUM).map(drop)?)
    })?;
    let rate = |time: f64| bytes as f64 / time / 1e9;
    let text = format!("{:.0} of {:.0} GB/s", rate(moved), rate(plain));
    report.at_least(
        "KV from another arena of this GPU, of a plain copy within it",
        0.8,
        plain / moved,
        &text,
    );
    report.tell("sums of KV on the GPU", &format!("{:.0} GB/s", rate(summed)));
    report.tell("mapping a slot of another arena, once", &format!("{:.1} ms", mapping * 1e3));
    Ok(())
}

/// The way of a prompt's KV between the GPU and a pinned region, against one plain copy of as many pinned bytes.
fn pinned_copies(setting: &Setting, report: &mut Report) -> anyhow::Result<()> {
    let layout = prompt_layout(setting);
    let (tokens, layers) = (TokenRange { start: 0, count: layout.positions }, layout.geometry.layers);
    let stream = setting.device.stream()?;
    let arena = Arena::new(&setting.device, layout, layout.region_bytes() + (256 << 20))?;
    arena.grow(0, tokens.count)?;
    let region = Arc::new(Region::create("gpu-check", layout.region_bytes())?);
    let region = PinnedRegion::new(&setting.device, region, PinBudget::new(usize::MAX));
    let bytes = layout.region_bytes();
    let (mut host, device) =
        (HostBuffer::<u8>::new(&setting.device, bytes)?, DeviceBuffer::new(&setting.device, bytes)?);
    let out = seconds(10, || {
        stream.copy_out(&device, bytes, &mut host)?;
        Ok(stream.synchronize()?)
    })?;
    let r#in = seconds(10, || {
        stream.copy_in(&mut host, bytes, &device, 0)?;
        Ok(stream.synchronize()?)
    })?;
    let mut both = 0.0;
    for (what, direction, plain) in
        [("from the GPU", Direction::Out, out), ("to the GPU", Direction::In, r#in)]
    {
        let time = seconds(10, || {
            let host = HostSlot { region: &region, layout: &layout, slot: 0 };
            stream.move_kv(&setting.kernels, direction, (&arena, 0), host, tokens, 0..2 * layers)?;
            Ok(stream.synchronize()?)
        })?;
        both += time;
        let rate = |time: f64| bytes as f64 / time / 1e9;
        let text = format!("{:.1} of {:.1} GB/s", rate(time), rate(plain));
        report.at_least(&format!("KV {what}, of a plain copy of pinned memory"), 0.9, plain / time, &text);
    }
    let what = format!("KV of {} tokens of the 8b shape to the host and back", tokens.count);
    report.tell(&what, &format!("{:.1} ms", both * 1e3));
    Ok(())
}

fn fill(engine: &mut CudaEngine, slot: u32, tokens: u32) -> anyhow::Result<()> {
    let vocab = engine.card().vocab;
    let ids: Vec<u32> = (0..tokens).map(|i| (i + slot).wrapping_mul(2_654_435_761) % vocab).collect();
    engine.prefill(slot, 0, &ids, Some(GREEDY))?;
    Ok(())
}

/// Seconds of steps of so many rows.
fn steps(engine: &mut CudaEngine, batch: u32) -> anyhow::Result<Vec<f64>> {
    (0..batch).try_for_each(|slot| fill(engine, slot, CONTEXT))?;
    let row = |slot| Row { slot, position: CONTEXT, token: slot, draw: GREEDY };
    let mut rows: Vec<Row<'_>> = (0..batch).map(row).collect();
    let (parked, mut out, mut times) = (vec![0; batch as usize], Vec::new(), Vec::new());
    for step in 0..=STEPS {
        let begun = Instant::now();
        engine.decode(&rows, &parked, &mut out)?;
        if step > 0 {
            times.push(begun.elapsed().as_secs_f64());
        }
        for (row, sampled) in rows.iter_mut().zip(&out) {
            (row.token, row.position) = (sampled.token, row.position + 1);
        }
    }
    Ok(times)
}

/// Positions that [`steps`] needs.
const POSITIONS: u32 = CONTEXT + STEPS as u32 + 3;

fn decode(
    setting: &Setting,
    shape: &Shape,
    checkpoint: &Checkpoint,
    copies: f64,
    report: &mut Report,
) -> anyhow::Result<()> {
    let name = shape.name;
    let mut engine = setting.engine(checkpoint, |options| {
        (options.slots, options.positions, options.chunk_tokens) = (64, POSITIONS, CONTEXT);
    })?;
    for batch in [1, 8, 32, 64] {
        let mut times = steps(&mut engine, batch)?;
        let (half, most) = (part(&mut times, 0.5), part(&mut times, 0.99));
        if batch == 1 {
            let bytes = engine.step_bytes(CONTEXT + STEPS as u32 / 2) as f64;
            let text = format!("{:.0} of {:.0} GB/s", bytes / half / 1e9, copies / 1e9);
            report.at_least(
                &format!("{name}, {}: bandwidth that a step of one row reaches", engine.card().weights),
                shape.bandwidth,
                bytes / half / copies,
                &text,
            );
        }
        report.tell(
            &format!("{name}: decode, {batch} at once"),
            &format!(
                "{:.0} tok/s, {:.2} ms a step, p99 {:.2} of the median",
                f64::from(batch) / half,
                half * 1e3,
                most / half
            ),
        );
    }
    drop(engine);
    let mut engine = setting.engine(checkpoint, |options| {
        (options.slots, options.positions, options.chunk_tokens) = (1, POSITIONS, CONTEXT);
        options.graphs = false;
    })?;
    let half = part(&mut steps(&mut engine, 1)?, 0.5);
    report.tell(&format!("{name}: a step of one row without a graph"), &format!("{:.2} ms", half * 1e3));
    Ok(())
}

/// Multiplications and additions of a prompt's prefill.
fn prompt_flops(config: &ModelConfig, tokens: u64) -> f64 {
    let qkv = config.hidden * (config.q_width() + 2 * config.kv_width());
    let rest = config.hidden * (config.q_width() + 3 * config.intermediate);
    // Past the attention of the last layer only one token goes on.
    let matrices = config.layers * (qkv + rest) - rest;
    // Each token looks at those before it, on average half of them, for keys and for values.
    let scores = 2 * config.layers as u64 * config.q_width() as u64 * tokens;
    2.0 * tokens as f64 * matrices as f64 + tokens as f64 * scores as f64
}

fn prefill(
    setting: &Setting,
    shape: &Shape,
    checkpoint: &Checkpoint,
    matmul: Option<f64>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let name = shape.name;
    let mut engine = setting.engine(checkpoint, |options| {
        (options.slots, options.positions, options.chunk_tokens) = (2, PROMPT + 2, 2048);
    })?;
    let alone = seconds(5, || fill(&mut engine, 0, PROMPT))?;
    let rate = format!("{:.0} tok/s", f64::from(PROMPT) / alone);
    match matmul {
        Some(matmul) => {
            let reached = prompt_flops(&shape.config, PROMPT.into()) / alone;
            let text = format!("{rate}, {:.0} TFLOP/s", reached / 1e12);
            let what = format!("{name}: prefill of {PROMPT} tokens, of the rate of products");
            report.at_least(&what, 0.5, reached / matmul, &text);
        }
        None => report.tell(&format!("{name}: prefill of {PROMPT} tokens"), &rate),
    }
    // What a prefill worker does: KV of one prompt leaves while the next is computed.
    fill(&mut engine, 1, PROMPT)?;
    let mover = engine.mover().context("there is nothing to move")?;
    let beside = while_moving(&mover, || seconds(5, || fill(&mut engine, 0, PROMPT)))?;
    let text = format!("{:.1} and {:.1} ms", alone * 1e3, beside * 1e3);
    report.at_most(&format!("{name}: prefill is slower while KV leaves"), 0.05, beside / alone - 1.0, &text);
    Ok(())
}

/// Says that it is over when it is dropped.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs work while another slot's KV is moved again and again.
fn while_moving<T>(mover: &Arc<dyn KvMover>, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let over = AtomicBool::new(false);
    let tokens = TokenRange { start: 0, count: PROMPT };
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                mover.save(1, tokens)?;
            }
            anyhow::Ok(())
        });
        // Moving ends with the work, even if that panics.
        let outcome = {
            let _over = Over(&over);
            work()
        };
        moving.join().expect("moving does not panic")?;
        outcome
    })
}

fn int4(
    setting: &Setting,
    shape: &Shape,
    checkpoint: &Checkpoint,
    copies: f64,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut engine = setting.engine(checkpoint, |options| {
        options.precision = Precision::Int4 { block: 32 };
        (options.slots, options.positions, options.chunk_tokens) = (1, POSITIONS, CONTEXT);
    })?;
    let half = part(&mut steps(&mut engine, 1)?, 0.5);
    let bytes = engine.step_bytes(CONTEXT + STEPS as u32 / 2) as f64;
    report.tell(
        &format!("{}, int4: decode, 1 at once", shape.name),
        &format!(
            "{:.0} tok/s, {:.2} ms a step, {:.1} % of the bandwidth",
            1.0 / half,
            half * 1e3,
            100.0 * bytes / half / copies
        ),
    );
    Ok(())
}
