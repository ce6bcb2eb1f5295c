//! References and the shortest way to run a sequence.

// Each test binary uses a part of this.
#![allow(dead_code)]

use forebay_workers::engine::{
    Draw, Engine, Row,
    graph::Precision,
    onnx::{OnnxEngine, OnnxOptions},
};
use safetensors::SafeTensors;
use serde::Deserialize;
use std::path::{Path, PathBuf};

pub(crate) const CASES: [&str; 4] =
    ["gqa1-tied-bf16", "gqa2-untied-fp32-sharded", "gqa4-tied-fp16", "gqa2-untied-bf16-ragged"];

#[derive(Deserialize)]
pub(crate) struct Prompt {
    pub(crate) ids: Vec<u32>,
    pub(crate) greedy: Vec<u32>,
}

pub(crate) struct Reference {
    pub prompts: Vec<Prompt>,
    tensors: Vec<u8>,
}

pub(crate) fn dir(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference").join(case)
}

impl Reference {
    pub(crate) fn read(case: &str) -> Reference {
        #[derive(Deserialize)]
        struct File {
            prompts: Vec<Prompt>,
        }
        let json = std::fs::read(dir(case).join("reference.json")).unwrap();
        let tensors = std::fs::read(dir(case).join("reference.safetensors")).unwrap();
        Reference { prompts: serde_json::from_slice::<File>(&json).unwrap().prompts, tensors }
    }

    pub(crate) fn logits(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.tensors).unwrap();
        let bytes = file.tensor(name).unwrap().data();
        bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
    }
}

pub(crate) fn open(case: &str, precision: Precision) -> OnnxEngine {
    OnnxEngine::open(&dir(case), &options(precision)).unwrap()
}

pub(crate) fn options(precision: Precision) -> OnnxOptions {
    OnnxOptions { precision, slots: 4, positions: 200, threads: 2, spin: false, ..OnnxOptions::default() }
}

pub(crate) fn greedy(index: u32) -> Draw<'static> {
    Draw::greedy(index)
}

/// `count` tokens after a prompt, in one slot, nothing else running.
pub(crate) fn alone(engine: &mut dyn Engine, slot: u32, prompt: &[u32], count: usize) -> Vec<u32> {
    let first = engine.prefill(slot, 0, prompt, Some(greedy(0))).unwrap().unwrap();
    continued(engine, slot, prompt.len(), first.token, count)
}

/// `count` tokens with `first`, which was drawn after `filled` positions.
pub(crate) fn continued(
    engine: &mut dyn Engine,
    slot: u32,
    filled: usize,
    first: u32,
    count: usize,
) -> Vec<u32> {
    let (mut tokens, mut out) = (vec![first], Vec::new());
    while tokens.len() < count {
        let (position, token) = ((filled + tokens.len() - 1) as u32, tokens[tokens.len() - 1]);
        let row = Row { slot, position, token, draw: greedy(tokens.len() as u32) };
        engine.decode(&[row], &vec![0; slot as usize], &mut out).unwrap();
        tokens.push(out[0].token);
    }
    tokens
}

pub(crate) fn logits_apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
