//! KV in int8: how far it is from fp32, what stays exact, and what a checkpoint without good ranges is told.

mod parity_support;

use forebay_schemas::kv::{KvDtype, TokenRange};
use forebay_workers::engine::{
    Engine, KvType, Row,
    calibrate::{compare, measure},
    checkpoint::{Checkpoint, CheckpointError, KvRanges},
    graph::Precision,
    onnx::{OnnxEngine, OnnxOptions, OpenError},
};
use parity_support::{CASES, Reference, alone, continued, dir, greedy, logits_apart, open, options};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const INT4: Precision = Precision::Int4 { block: 32 };

/// Ranges of a reference checkpoint, measured over its prompts and their answers.
struct Measured {
    folder: TempDir,
    case: &'static str,
    ranges: KvRanges,
}

impl Measured {
    fn of(case: &'static str) -> Measured {
        let mut text = Vec::new();
        for prompt in Reference::read(case).prompts {
            text.extend([prompt.ids, prompt.greedy].concat());
        }
        let ranges = measure(&mut open(case, Precision::F32), &text, 64, |_| {}).unwrap();
        assert_eq!(ranges.tokens, text.len() as u64);
        let measured = Measured { folder: tempfile::tempdir().unwrap(), case, ranges };
        measured.write();
        measured
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join(KvRanges::FILE)
    }

    fn checkpoint(&self) -> Checkpoint {
        Checkpoint::open(&dir(self.case)).unwrap()
    }

    fn write(&self) {
        self.ranges.write(&self.checkpoint(), &self.file()).unwrap();
    }

    fn open(&self, precision: Precision) -> OnnxEngine {
        int8(&self.checkpoint(), precision, &self.file()).unwrap()
    }

    /// What opening an engine says, without the folder.
    fn refusal(&self) -> String {
        let error = int8(&self.checkpoint(), Precision::F32, &self.file()).err().expect("the ranges are bad");
        error.to_string().replace(&format!("{}/", self.folder.path().display()), "")
    }
}

fn int8(checkpoint: &Checkpoint, precision: Precision, file: &Path) -> Result<OnnxEngine, OpenError> {
    let options = OnnxOptions { kv: KvType::Int8, kv_ranges: Some(file.to_owned()), ..options(precision) };
    OnnxEngine::with_checkpoint(checkpoint, &options)
}

/// Random weights: nothing in them is redundant, and int8 shows more than in a trained model. The bound is a third above what
/// was measured.
#[test]
fn logits_stay_close_to_fp32() {
    for case in CASES {
        let measured = Measured::of(case);
        let reference = Reference::read(case);
        let mut engine = measured.open(Precision::F32);
        assert_eq!(engine.card().layout.geometry.dtype, KvDtype::Int8);
        let (mut square, mut error) = (0.0, 0.0);
        for (number, prompt) in reference.prompts.iter().enumerate() {
            engine.prefill(0, 0, &prompt.ids, Some(greedy(0))).unwrap();
            for (x, exact) in engine.logits().iter().zip(reference.logits(&format!("last_logits.{number}"))) {
                square += exact * exact;
                error += (x - exact) * (x - exact);
            }
        }
        let relative = (error / square).sqrt();
        eprintln!("{case}: logits off by {relative:.4} of their size");
        assert!(relative < 0.029, "{case}: logits off by {relative} of their size");
    }
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo")
}

/// The built-in model comes with its ranges, and answers as with KV in fp32.
#[test]
fn the_demo_model_says_the_same() {
    let tokenizer = tokenizers::Tokenizer::from_file(demo().join("tokenizer.json")).unwrap();
    let pairs = "river is 42. stone is 17. cloud is 88. lamp is 31. bridge is 64. apple is 55. winter is 90.";
    let questions = [
        "What is a forebay?".to_owned(),
        "What is 7 plus 15?".to_owned(),
        format!("{pairs} What is cloud?"),
        format!("{pairs} What is winter?"),
    ];
    for precision in [Precision::F32, INT4] {
        let exact = options(precision);
        let quantized = OnnxOptions { kv: KvType::Int8, ..exact.clone() };
        let mut exact = OnnxEngine::open(&demo(), &exact).unwrap();
        let mut quantized = OnnxEngine::open(&demo(), &quantized).unwrap();
        let geometry = |engine: &OnnxEngine| engine.card().layout.geometry;
        assert_eq!(geometry(&exact).bytes_per_token(), 4 * geometry(&quantized).bytes_per_token());
        for question in &questions {
            let chat = format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n");
            let prompt = tokenizer.encode(chat, false).unwrap().get_ids().to_vec();
            let expected = alone(&mut exact, 0, &prompt, 40);
            let end = expected.iter().position(|token| exact.card().eos.contains(token)).unwrap_or(39);
            let found = alone(&mut quantized, 0, &prompt, 40);
            assert_eq!(found[..=end], expected[..=end], "{precision}: {question}");
            let text = [&prompt[..], &expected[..=end]].concat();
            let apart = compare(&mut exact, &mut quantized, &text).unwrap();
            eprintln!("{precision}: {question:.30}: {apart:?}");
            assert!(apart.logits < 0.05, "{precision}: {question}: {apart:?}");
        }
    }
}

/// However a sequence is cut and with whomever it runs: its logits are the same, but for codes that rounding has put beside each
/// other.
#[test]
fn decode_equals_prefill_and_a_batch_its_rows() {
    for case in CASES {
        let measured = Measured::of(case);
        let reference = Reference::read(case);
        for (precision, bound) in [(Precision::F32, 0.02), (INT4, 0.05)] {
            let mut engine = measured.open(precision);
            let prompt = &reference.prompts[3].ids;
            engine.prefill(0, 0, prompt, Some(greedy(0))).unwrap();
            let whole = engine.logits().to_vec();
            let half = prompt.len() / 2;
            engine.prefill(1, 0, &prompt[..half], None).unwrap();
            let mut out = Vec::new();
            for (position, token) in prompt.iter().enumerate().skip(half) {
                let row = Row { slot: 1, position: position as u32, token: *token, draw: greedy(0) };
                engine.decode(&[row], &[prompt.len() as u32], &mut out).unwrap();
            }
            let apart = logits_apart(engine.logits(), &whole);
            eprintln!("{case}, {precision}: decoded and prefilled logits are {apart:e} apart");
            assert!(apart < bound, "{case}, {precision}: {apart}");

            let rows: Vec<Row<'_>> = (0..4)
                .map(|slot| {
                    let prompt = &reference.prompts[slot as usize];
                    engine.prefill(slot, 0, &prompt.ids, None).unwrap();
                    Row { slot, position: prompt.ids.len() as u32, token: prompt.greedy[0], draw: greedy(1) }
                })
                .collect();
            engine.decode(&rows, &[0; 4], &mut out).unwrap();
            let together = engine.logits().to_vec();
            let parked: Vec<u32> = rows.iter().map(|row| row.position).collect();
            for (row, together) in rows.iter().zip(together.chunks_exact(together.len() / 4)) {
                engine.decode(&[*row], &parked, &mut out).unwrap();
                assert_eq!(engine.logits(), together, "{case}, {precision}: slot {}", row.slot);
            }
        }
    }
}

#[test]
fn kv_moved_to_another_engine_continues_alike() {
    for case in CASES {
        let measured = Measured::of(case);
        let (mut prefill, mut decode) = (measured.open(INT4), measured.open(INT4));
        assert_eq!(prefill.card().layout_hash, decode.card().layout_hash);
        let layout = prefill.card().layout;
        for prompt in &Reference::read(case).prompts {
            let expected = alone(&mut prefill, 0, &prompt.ids, 64);
            let tokens = TokenRange { start: 0, count: prompt.ids.len() as u32 };
            let planes = 0..2 * layout.geometry.layers;
            let pieces = layout.pieces(0, tokens, planes.clone()).zip(layout.pieces(2, tokens, planes));
            for ((from, bytes), (into, _)) in pieces {
                let mut piece = vec![0; bytes];
                prefill.kv().read(from, &mut piece);
                decode.kv().write(into, &piece);
            }
            assert_eq!(continued(&mut decode, 2, prompt.ids.len(), expected[0], 64), expected, "{case}");
        }
    }
}

/// The codes of the first `count` tokens of slot 0.
fn codes(engine: &OnnxEngine, count: u32) -> Vec<i8> {
    let layout = engine.card().layout;
    let mut codes = Vec::new();
    for (at, bytes) in layout.pieces(0, TokenRange { start: 0, count }, 0..2 * layout.geometry.layers) {
        let mut piece = vec![0; bytes];
        engine.kv().read(at, &mut piece);
        codes.extend(piece.into_iter().map(|byte| byte as i8));
    }
    codes
}

/// Keys and values far beyond their ranges become the largest codes; they don't wrap around.
#[test]
fn what_is_beyond_the_ranges_is_clamped() {
    let mut measured = Measured::of(CASES[0]);
    let prompt = &Reference::read(CASES[0]).prompts[1].ids;
    let count = prompt.len() as u32;
    let mut engine = measured.open(Precision::F32);
    engine.prefill(0, 0, prompt, None).unwrap();
    let good = codes(&engine, count);
    let largest = good.iter().map(|code| code.unsigned_abs()).max().unwrap();
    assert!((90..=102).contains(&largest), "with headroom, {largest} is the largest of 127");
    for range in measured.ranges.layers.iter_mut().flatten().flatten() {
        *range /= 1000.0;
    }
    measured.write();
    let mut engine = measured.open(Precision::F32);
    engine.prefill(0, 0, prompt, None).unwrap();
    let clamped = codes(&engine, count);
    let mut full = 0;
    // The first layer's keys and values follow from the tokens alone: only their scale has changed.
    let first = good.len() / measured.ranges.layers.len();
    for (good, clamped) in good.iter().zip(&clamped).take(first).filter(|(good, _)| good.unsigned_abs() > 1) {
        assert_eq!(good.signum(), clamped.signum(), "{good} has become {clamped}");
        assert!(matches!(clamped, 127 | -127 | -128), "{good} has become {clamped}");
        full += 1;
    }
    assert!(full > 100, "{full} codes are clamped");
}

#[test]
fn other_ranges_are_another_layout() {
    let mut measured = Measured::of(CASES[0]);
    let hash = |engine: OnnxEngine| engine.card().layout_hash;
    let plain = hash(open(CASES[0], Precision::F32));
    let first = hash(measured.open(Precision::F32));
    assert_eq!(hash(measured.open(Precision::F32)), first);
    assert_ne!(first, plain);
    measured.ranges.layers[1][0].iter_mut().for_each(|range| *range *= 1.5);
    measured.write();
    assert_ne!(hash(measured.open(Precision::F32)), first);
    assert_eq!(hash(open(CASES[0], Precision::F32)), plain);
}

#[test]
fn ranges_are_written_and_read_alike() {
    let measured = Measured::of(CASES[1]);
    let bytes = std::fs::read(measured.file()).unwrap();
    assert_eq!(KvRanges::read(&measured.checkpoint(), Some(&measured.file())).unwrap(), measured.ranges);
    measured.write();
    assert_eq!(std::fs::read(measured.file()).unwrap(), bytes);
    assert_eq!(std::fs::read_dir(measured.folder.path()).unwrap().count(), 1, "nothing is left beside it");
}

#[test]
fn bad_ranges_are_refused_by_name() {
    let mut measured = Measured::of(CASES[0]);
    let file = measured.file();
    let whole = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert_eq!(
        measured.refusal(),
        "kv_ranges.safetensors is missing, without which KV can't be int8: `forebay calibrate` writes it"
    );
    for keep in [0, 8, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&file, &whole[..keep]).unwrap();
        let said = measured.refusal();
        assert!(said.starts_with("kv_ranges.safetensors: truncated or damaged: "), "{keep} bytes: {said}");
    }
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        measured.ranges.layers[1][1][3] = bad;
        measured.write();
        assert_eq!(
            measured.refusal(),
            format!(
                "kv_ranges.safetensors: tensor model.layers.1.self_attn.v_absmax holds {bad}, which is no magnitude; `forebay \
                 calibrate` measures anew"
            )
        );
    }
    let other = Measured::of(CASES[2]);
    std::fs::copy(other.file(), &file).unwrap();
    let said = measured.refusal();
    assert!(said.starts_with("kv_ranges.safetensors: measured on other weights (\""), "{said}");
    assert!(said.ends_with("`forebay calibrate` measures anew"), "{said}");

    measured = Measured::of(CASES[0]);
    measured.ranges.layers.pop();
    measured.write();
    assert!(measured.refusal().ends_with("_absmax is missing"), "{}", measured.refusal());
    // The header says that a tensor is wider than it is.
    let text = String::from_utf8_lossy(&whole).into_owned();
    let shape = text.split("\"shape\":").nth(1).unwrap().split(']').next().unwrap().to_owned() + "]";
    let swapped: Vec<&str> = shape.trim_matches(['[', ']']).split(',').rev().collect();
    let swapped = format!("[{}]", swapped.join(","));
    let at = whole.windows(shape.len()).position(|window| window == shape.as_bytes()).unwrap();
    let mut changed = whole;
    changed[at..at + shape.len()].copy_from_slice(swapped.as_bytes());
    std::fs::write(measured.file(), changed).unwrap();
    let said = measured.refusal();
    assert!(said.contains("_absmax has shape") && said.contains("config.json makes it"), "{said}");
}

#[test]
fn fp8_is_for_gpus() {
    let options = OnnxOptions { kv: KvType::Fp8, ..options(Precision::F32) };
    let error = OnnxEngine::open(&dir(CASES[0]), &options).err().unwrap();
    assert!(matches!(error, OpenError::Fp8OnCpu));
    assert_eq!(error.to_string(), "KV in fp8 is for GPUs: a CPU has fp32 (auto) and int8");
}

/// Without KV in int8 nobody looks at the file.
#[test]
fn a_damaged_file_hurts_nobody_else() {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(dir(CASES[0])).unwrap().flatten() {
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    std::fs::write(copy.path().join(KvRanges::FILE), "no ranges").unwrap();
    assert!(OnnxEngine::open(copy.path(), &options(Precision::F32)).is_ok());
    let options = OnnxOptions { kv: KvType::Int8, ..options(Precision::F32) };
    let error = OnnxEngine::open(copy.path(), &options).err().unwrap();
    assert!(matches!(error, OpenError::Checkpoint(CheckpointError::Damaged { .. })), "{error}");
}
