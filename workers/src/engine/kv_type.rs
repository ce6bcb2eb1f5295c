//! How keys and values are held, and what brings those that are held in int8 into its range.
//!
//! ONNX Runtime's fast kernels for quantized KV want one scale for all of it. Channels differ by orders of magnitude, so the
//! weights before and after the KV are multiplied instead, once, while the graph is built:
//!
//! - A key is normalized, multiplied by the norm's weights and turned by its position, which mixes channel c with channel
//!   c + head_dim / 2. The weights of both are multiplied by f, those of the queries by 1 / f; no product of a query and a key
//!   changes.
//! - The values of a head are multiplied by g in the rows of `v_proj`, and by 1 / g in the columns of `o_proj` that the head's
//!   queries have. A factor for each head, and not for each channel, leaves blocks of quantized weights what they are.
//!
//! f and g are such that the largest magnitude that `forebay calibrate` has seen, and a bit more, is the largest code. The runtime
//! clamps what is beyond.

use super::checkpoint::{Checkpoint, CheckpointError, KvRanges, ModelConfig};
use forebay_schemas::{ids::fnv1a, kv::KvDtype};
use std::path::Path;

/// How keys and values are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// As what is computed with: fp32 on a CPU, bf16 or fp16 on a GPU.
    #[default]
    Auto,
    /// One byte, by the ranges that `forebay calibrate` has measured.
    Int8,
    /// One byte, on a GPU.
    Fp8,
}

/// What a code of 1 stands for: with this, stretched keys and values reach to 2 at most, where fp16 and bf16 have room.
const SCALE: f32 = 1.0 / 64.0;

/// The largest code.
const CODE_MAX: f32 = 127.0;

/// How much larger than what was seen keys and values may get before they are clamped. Over 40,000 tokens of other chats, 22 of the demo
/// model's 80 ranges were exceeded by more than a tenth, and 7 by more than a quarter. It costs a third of a bit.
const HEADROOM: f32 = 1.25;

/// Keys and values as a graph has them.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kv<'a> {
    /// As they are, in a type of floating point.
    Plain(KvDtype),
    /// Rounded to fp8, as they are: normalized keys are far from the largest number, 448, and so are values.
    Fp8,
    /// Rounded to int8, after these factors.
    Int8(&'a KvFactors),
}

impl<'a> Kv<'a> {
    /// Type of an element.
    pub(super) fn dtype(self) -> KvDtype {
        match self {
            Kv::Plain(dtype) => dtype,
            Kv::Fp8 => KvDtype::F8,
            Kv::Int8(_) => KvDtype::Int8,
        }
    }

    /// What a code of 1 stands for, if there are codes.
    pub(super) fn scale(self) -> Option<f32> {
        match self {
            Kv::Plain(_) => None,
            Kv::Fp8 => Some(1.0),
            Kv::Int8(_) => Some(SCALE),
        }
    }

    /// The factors of a layer.
    pub(super) fn factors(self, layer: usize) -> Option<&'a LayerFactors> {
        match self {
            Kv::Int8(factors) => Some(&factors.layers[layer]),
            Kv::Plain(_) | Kv::Fp8 => None,
        }
    }
}

/// What brings keys and values into the range of int8.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct KvFactors {
    layers: Vec<LayerFactors>,
}

/// The factors of one layer, as they are used.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LayerFactors {
    /// Of the norm of queries, `[head_dim]`.
    pub(super) query: Vec<f32>,
    /// Of the norm of keys, `[head_dim]`.
    pub(super) key: Vec<f32>,
    /// Of the rows of `v_proj`, `[kv_heads · head_dim]`.
    pub(super) value: Vec<f32>,
    /// Of the columns of `o_proj`, `[heads · head_dim]`.
    pub(super) output: Vec<f32>,
}

impl KvFactors {
    /// Those that KV of this type needs: none but for int8. Ranges are read from `file`, or else from the checkpoint's folder.
    pub(super) fn wanted(
        kv: KvType,
        checkpoint: &Checkpoint,
        file: Option<&Path>,
    ) -> Result<Option<KvFactors>, CheckpointError> {
        match kv {
            KvType::Int8 => Ok(Some(KvFactors::new(&KvRanges::read(checkpoint, file)?, checkpoint.config()))),
            KvType::Auto | KvType::Fp8 => Ok(None),
        }
    }

    fn new(ranges: &KvRanges, config: &ModelConfig) -> KvFactors {
        let layers = ranges.layers.iter().map(|[keys, values]| LayerFactors::new(keys, values, config));
        KvFactors { layers: layers.collect() }
    }

    /// A hash of all factors: KV that was made with others means something else.
    pub(super) fn hash(&self) -> u64 {
        let numbers = self.layers.iter().flat_map(|layer| layer.key.iter().chain(&layer.value));
        let bytes: Vec<u8> = numbers.flat_map(|number| number.to_le_bytes()).collect();
        fnv1a(&bytes)
    }
}

impl LayerFactors {
    /// Of the largest magnitudes of keys and of values, each `[kv_heads, head_dim]`.
    fn new(keys: &[f32], values: &[f32], config: &ModelConfig) -> LayerFactors {
        let (width, half) = (config.head_dim, config.head_dim / 2);
        let factor = |largest: f32| SCALE * CODE_MAX / (HEADROOM * largest);
        let largest_of = |channel: usize| {
            let heads = keys.chunks_exact(width);
            heads.map(|head| head[channel].max(head[channel + half])).fold(0.0, f32::max)
        };
        let pairs: Vec<f32> = (0..half).map(|channel| factor(largest_of(channel))).collect();
        let key = [&pairs[..], &pairs].concat();
        let heads: Vec<f32> =
            values.chunks_exact(width).map(|head| factor(head.iter().copied().fold(0.0, f32::max))).collect();
        let queries = config.heads / config.kv_heads;
        let each = |factors: &[f32], times: usize| -> Vec<f32> {
            factors.iter().flat_map(|factor| std::iter::repeat_n(*factor, times)).collect()
        };
        let inverse = |factors: &[f32]| -> Vec<f32> { factors.iter().map(|factor| 1.0 / factor).collect() };
        LayerFactors {
            query: inverse(&key),
            key,
            value: each(&heads, width),
            output: each(&inverse(&heads), queries * width),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_that_was_seen_is_within_the_codes() {
        let config = ModelConfig {
            hidden: 64,
            layers: 1,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            ..ModelConfig::qwen3_0_6b()
        };
        let mut keys = vec![1.0; 32];
        // Channel 3 of one head, and its partner under rotation in the other.
        (keys[3], keys[16 + 11]) = (40.0, 50.0);
        let mut values = vec![0.01; 32];
        values[16] = 2.0;
        let ranges = KvRanges { layers: vec![[keys, values]], tokens: 1 };
        let factors = KvFactors::new(&ranges, &config);
        let layer = &factors.layers[0];
        let code = |largest: f32, factor: f32| largest * factor / SCALE;
        let full = CODE_MAX / HEADROOM;
        for channel in [3, 11] {
            assert!((code(50.0, layer.key[channel]) - full).abs() < 1e-3);
            assert!((layer.key[channel] * layer.query[channel] - 1.0).abs() < 1e-6);
        }
        assert!((code(1.0, layer.key[0]) - full).abs() < 1e-3);
        // The two query heads of a KV head follow each other.
        for (head, largest) in [(0, 0.01), (1, 2.0)] {
            assert!((code(largest, layer.value[head * 16 + 5]) - full).abs() < 1e-3);
            for column in head * 32..(head + 1) * 32 {
                assert!((layer.output[column] * layer.value[head * 16] - 1.0).abs() < 1e-6);
            }
        }
        let mut other = ranges;
        other.layers[0][1][7] = 0.02;
        assert_ne!(KvFactors::new(&other, &config).hash(), factors.hash());
    }
}
