//! Whether a GPU computes what a CPU computes.

use super::{Setting, report::Report};
use anyhow::ensure;
use forebay_kernels::{
    Region,
    cuda::{
        Arena, DeviceBuffer, Direction, HostBuffer, HostSlot, Kernels, NOT_FINITE, PinBudget, PinnedRegion,
        RowDraw, Stream,
    },
    sample,
};
use forebay_schemas::{
    kv::{KvDtype, KvGeometry, KvLayout, TokenRange},
    sampling::Sampling,
};
use forebay_workers::engine::{
    Draw, Engine, KvType, Row,
    checkpoint::Checkpoint,
    cuda::CudaEngine,
    graph::Precision,
    onnx::{OnnxEngine, OnnxOptions},
};
use std::sync::Arc;
use tokenizers::Tokenizer;

const GREEDY: Sampling = Sampling::GREEDY;

/// How far logits in bf16 may be from those in fp32, as a part of their size. Eight bits of mantissa round by 0.4 %, each layer
/// several times.
const LOGITS_APART_MAX: f32 = 0.03;

/// How many of the tokens before the first one that differs must agree: the demo model's distributions are sharp.
const AGREEMENT_MIN: f64 = 0.9;

/// Tokens that are drawn after each prompt.
const TOKENS: usize = 48;

pub(super) fn check(
    setting: &Setting,
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    report: &mut Report,
) -> anyhow::Result<()> {
    let stream = setting.device.stream()?;
    report.check("tokens are drawn as by the CPU's sampler", sampler(&stream, &setting.kernels));
    report.check("KV comes back from the GPU as it went, bit for bit", kv(&stream, &setting.kernels));
    let prompts = prompts(tokenizer)?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0) + TOKENS + 2;
    let options = OnnxOptions {
        precision: Precision::F32,
        slots: 1,
        positions: longest as u32,
        ..OnnxOptions::default()
    };
    let mut cpu = OnnxEngine::with_checkpoint(checkpoint, &options)?;
    let mut cpu_int8 = OnnxEngine::with_checkpoint(checkpoint, &OnnxOptions { kv: KvType::Int8, ..options })?;
    let mut gpu_int8 = setting.engine(checkpoint, |options| {
        options.positions = longest as u32;
        options.kv = KvType::Int8;
    })?;
    let mut gpu = setting.engine(checkpoint, |options| options.positions = longest as u32)?;
    report.check("logits are those of the CPU in fp32", logits(&mut cpu, &mut gpu, &prompts));
    report.check("greedy tokens are those of the CPU in fp32", agreement(&mut cpu, &mut gpu, &prompts));
    let what = "with KV in int8, logits are those of the CPU with KV in int8";
    report.check(what, logits(&mut cpu_int8, &mut gpu_int8, &prompts));
    drop((cpu, cpu_int8, gpu_int8));
    let mut eager = setting.engine(checkpoint, |options| {
        options.positions = longest as u32;
        options.graphs = false;
    })?;
    report.check("a replayed graph computes what its steps compute", replay(&mut gpu, &mut eager, &prompts));
    report.check("another engine goes on with KV that was moved", moved(&mut gpu, &mut eager, &prompts[0]));
    Ok(())
}

fn sampler(stream: &Stream, kernels: &Kernels) -> anyhow::Result<String> {
    let (vocab, rows) = (151_936, 8);
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let mut drawn = 0;
    for round in 0..8u32 {
        let logits: Vec<f32> =
            (0..rows * vocab).map(|_| random().powi(20) * 25.0 - random() * 10.0).collect();
        let samplings: Vec<Sampling> = (0..rows)
            .map(|row| Sampling {
                temperature: if row == 0 { 0.0 } else { 0.3 + random() * 2.0 },
                top_p: if row % 3 == 1 { 1.0 } else { 0.5 + random() / 2.0 },
                top_k: if row % 2 == 1 { 0 } else { (random() * 5000.0) as u32 },
                seed: u64::from(round) * 100 + row as u64,
                min_p: if row % 4 == 3 { random() / 20.0 } else { 0.0 },
            })
            .collect();
        let draws: Vec<RowDraw> = samplings.iter().map(|sampling| RowDraw::new(sampling, round)).collect();
        let (on_gpu, of_rows) = (buffer(stream, &logits)?, buffer(stream, &draws)?);
        let tokens = DeviceBuffer::new(stream.device(), rows)?;
        stream.sample(kernels, &on_gpu, vocab as u32, &of_rows, &tokens, rows)?;
        let found = contents(stream, &tokens)?;
        for ((row, sampling), found) in logits.chunks(vocab).zip(&samplings).zip(found) {
            let expected = sample(&mut row.to_vec(), sampling, round).unwrap_or(NOT_FINITE);
            ensure!(found == expected, "token {found} and not {expected} with {sampling:?}");
            drawn += 1;
        }
    }
    Ok(format!("{drawn} of {drawn}"))
}

fn kv(stream: &Stream, kernels: &Kernels) -> anyhow::Result<String> {
    let geometry = KvGeometry { layers: 4, kv_heads: 8, head_dim: 128, dtype: KvDtype::Bf16 };
    let layout = KvLayout { geometry, slots: 2, positions: 1024 };
    let device = stream.device();
    let arena = Arena::new(device, layout, 2 * layout.region_bytes() + (64 << 20))?;
    let mut bytes_moved = 0;
    // Short pieces go by the kernel, long ones by the copy engines.
    for tokens in [TokenRange { start: 7, count: 16 }, TokenRange { start: 100, count: 900 }] {
        let source = Region::create("source", layout.region_bytes())?;
        let bytes: Vec<u8> = (0..source.len()).map(|at| (at * 31 + at / 251) as u8).collect();
        source.write(0, &bytes);
        let target = Region::create("target", layout.region_bytes())?;
        let [source, target] = [source, target]
            .map(|region| PinnedRegion::new(device, Arc::new(region), PinBudget::new(usize::MAX)));
        arena.grow(1, tokens.end())?;
        let host = |region, slot| HostSlot { region, layout: &layout, slot };
        let planes = 0..2 * geometry.layers;
        stream.move_kv(kernels, Direction::In, (&arena, 1), host(&source, 0), tokens, planes.clone())?;
        stream.move_kv(kernels, Direction::Out, (&arena, 1), host(&target, 1), tokens, planes.clone())?;
        stream.synchronize()?;
        let mut found = vec![0; target.region().len()];
        target.region().read(0, &mut found);
        let mut expected = vec![0; bytes.len()];
        for ((from, length), (into, _)) in
            layout.pieces(0, tokens, planes.clone()).zip(layout.pieces(1, tokens, planes))
        {
            expected[into..into + length].copy_from_slice(&bytes[from..from + length]);
            bytes_moved += length;
        }
        ensure!(found == expected, "{} tokens came back otherwise", tokens.count);
    }
    Ok(format!("{bytes_moved} bytes each way"))
}

fn prompts(tokenizer: &Tokenizer) -> anyhow::Result<Vec<Vec<u32>>> {
    let texts = [
        "What is a forebay?",
        "The code of amber is 4, that of basalt is 7, that of cedar is 2. What is the code of basalt?",
        "alpha = 12, beta = 93, gamma = 50, delta = 7, what is gamma?",
        "Tell me how water gets from a river to a turbine.",
    ];
    let encode = |text: &&str| tokenizer.encode(*text, false).map(|encoding| encoding.get_ids().to_vec());
    texts.iter().map(encode).collect::<Result<_, _>>().map_err(|error| anyhow::anyhow!("{error}"))
}

fn logits(cpu: &mut dyn Engine, gpu: &mut dyn Engine, prompts: &[Vec<u32>]) -> anyhow::Result<String> {
    let draw = Draw { sampling: &GREEDY, index: 0 };
    let (mut error, mut size) = (0.0, 0.0);
    for prompt in prompts {
        cpu.prefill(0, 0, prompt, Some(draw))?;
        gpu.prefill(0, 0, prompt, Some(draw))?;
        let (expected, found) = (cpu.row_logits(0), gpu.row_logits(0));
        let (Some(expected), Some(found)) = (expected, found) else { anyhow::bail!("there are no logits") };
        for (expected, found) in expected.iter().zip(found) {
            error += (expected - found).powi(2);
            size += expected.powi(2);
        }
    }
    let apart = (error / size).sqrt();
    ensure!(apart <= LOGITS_APART_MAX, "{apart:.4} of their size apart, more than {LOGITS_APART_MAX}");
    Ok(format!("{apart:.4} of their size apart"))
}

fn agreement(cpu: &mut dyn Engine, gpu: &mut dyn Engine, prompts: &[Vec<u32>]) -> anyhow::Result<String> {
    let (mut agreed, mut all) = (0, 0);
    for prompt in prompts {
        let (expected, found) = (answer(cpu, 0, prompt)?, answer(gpu, 0, prompt)?);
        agreed += expected.iter().zip(&found).take_while(|(expected, found)| expected == found).count();
        all += expected.len();
    }
    let part = agreed as f64 / all as f64;
    ensure!(part >= AGREEMENT_MIN, "{agreed} of {all} until the first that differs");
    Ok(format!("{agreed} of {all} until the first that differs"))
}

/// Tokens after a prompt, alone.
fn answer(engine: &mut dyn Engine, slot: u32, prompt: &[u32]) -> anyhow::Result<Vec<u32>> {
    let first = engine.prefill(slot, 0, prompt, Some(Draw { sampling: &GREEDY, index: 0 }))?;
    let mut tokens = vec![first.expect("a token was asked for").token];
    go_on(engine, slot, prompt.len(), &mut tokens)?;
    Ok(tokens)
}

fn go_on(engine: &mut dyn Engine, slot: u32, prompt: usize, tokens: &mut Vec<u32>) -> anyhow::Result<()> {
    let mut out = Vec::new();
    while tokens.len() < TOKENS {
        let draw = Draw { sampling: &GREEDY, index: tokens.len() as u32 };
        let position = (prompt + tokens.len() - 1) as u32;
        let row = Row { slot, position, token: tokens[tokens.len() - 1], draw };
        engine.decode(&[row], &vec![0; slot as usize], &mut out)?;
        tokens.push(out[0].token);
    }
    Ok(())
}

/// Several rows together, each with its logits.
fn replay(graphs: &mut CudaEngine, eager: &mut CudaEngine, prompts: &[Vec<u32>]) -> anyhow::Result<String> {
    let rows = prompts.len().min(3);
    let engines: [&mut dyn Engine; 2] = [graphs, eager];
    let mut all = Vec::new();
    for engine in engines {
        let mut seen = Vec::new();
        let mut tokens = Vec::new();
        for (slot, prompt) in (0..).zip(&prompts[..rows]) {
            let draw = Draw { sampling: &GREEDY, index: 0 };
            tokens.push(engine.prefill(slot, 0, prompt, Some(draw))?.expect("a token was asked for").token);
        }
        let mut out = Vec::new();
        for index in 1..TOKENS as u32 {
            let row = |(slot, token): (usize, &u32)| Row {
                slot: slot as u32,
                position: prompts[slot].len() as u32 + index - 1,
                token: *token,
                draw: Draw { sampling: &GREEDY, index },
            };
            let batch: Vec<Row<'_>> = tokens.iter().enumerate().map(row).collect();
            engine.decode(&batch, &vec![0; rows], &mut out)?;
            tokens = out.iter().map(|sampled| sampled.token).collect();
            for row in 0..rows {
                let logits = engine.row_logits(row).expect("engines on GPUs have logits");
                seen.extend(logits.iter().map(|logit| logit.to_bits()));
            }
        }
        all.push(seen);
    }
    let differ = all[0].iter().zip(&all[1]).filter(|(one, other)| one != other).count();
    ensure!(differ == 0, "{differ} of {} logits differ", all[0].len());
    Ok(format!("all bits of {} logits", all[0].len()))
}

fn moved(first: &mut dyn Engine, second: &mut dyn Engine, prompt: &[u32]) -> anyhow::Result<String> {
    let expected = answer(first, 1, prompt)?;
    let tokens = TokenRange { start: 0, count: prompt.len() as u32 };
    let (Some(from), Some(into)) = (first.mover(), second.mover()) else {
        anyhow::bail!("there is nothing to move")
    };
    from.save(1, tokens)?;
    let (one, other) = (first.card().layout, second.card().layout);
    let planes = 0..2 * one.geometry.layers;
    let mut piece = Vec::new();
    for ((from, bytes), (into, _)) in
        one.pieces(1, tokens, planes.clone()).zip(other.pieces(1, tokens, planes))
    {
        piece.resize(bytes, 0);
        first.kv().read(from, &mut piece);
        second.kv().write(into, &piece);
    }
    second.reserve(1, tokens.count)?;
    into.load(1, tokens)?;
    let mut found = vec![expected[0]];
    go_on(second, 1, prompt.len(), &mut found)?;
    ensure!(found == expected, "{found:?} and not {expected:?}");
    Ok(format!("{} tokens are the same", expected.len()))
}

fn buffer<T: forebay_kernels::cuda::Plain>(stream: &Stream, data: &[T]) -> anyhow::Result<DeviceBuffer<T>> {
    let mut host = HostBuffer::new(stream.device(), data.len())?;
    host.data()?.copy_from_slice(data);
    let buffer = DeviceBuffer::new(stream.device(), data.len())?;
    stream.copy_in(&mut host, data.len(), &buffer, 0)?;
    Ok(buffer)
}

fn contents<T: forebay_kernels::cuda::Plain>(
    stream: &Stream,
    buffer: &DeviceBuffer<T>,
) -> anyhow::Result<Vec<T>> {
    let mut host = HostBuffer::new(stream.device(), buffer.len())?;
    stream.copy_out(buffer, buffer.len(), &mut host)?;
    Ok(host.data()?.to_vec())
}
