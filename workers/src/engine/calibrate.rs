//! Measures how large keys and values get, for KV in int8; and what that costs. `forebay calibrate` prints it.

use super::{Draw, Engine, EngineError, Row, checkpoint::KvRanges, onnx::OnnxEngine};
use forebay_schemas::kv::{KvDtype, TokenRange};

/// Ranges below this are written as this: a channel that is always 0 divides nothing by 0.
const RANGE_MIN: f32 = 1e-6;

/// Runs a text, cut into sequences of the engine's context, in calls of `chunk` tokens, and takes the largest magnitudes
/// of all keys and values. `said` hears how many tokens were run.
///
/// # Panics
/// If the engine's KV is not fp32.
pub fn measure(
    engine: &mut OnnxEngine,
    text: &[u32],
    chunk: usize,
    mut said: impl FnMut(usize),
) -> Result<KvRanges, EngineError> {
    let (layout, context) = (engine.card().layout, engine.card().context_limit);
    let geometry = layout.geometry;
    assert_eq!(geometry.dtype, KvDtype::F32, "ranges are measured on KV in fp32");
    let width = (geometry.kv_heads * geometry.head_dim) as usize;
    let empty = || [vec![RANGE_MIN; width], vec![RANGE_MIN; width]];
    let mut layers: Vec<[Vec<f32>; 2]> = (0..geometry.layers).map(|_| empty()).collect();
    let (mut done, mut piece) = (0, Vec::new());
    for sequence in text.chunks(context.max(1) as usize) {
        for (start, tokens) in (0..).step_by(chunk).zip(sequence.chunks(chunk)) {
            engine.prefill(0, start, tokens, None)?;
            done += tokens.len();
            said(done);
        }
        let tokens = TokenRange { start: 0, count: sequence.len() as u32 };
        let heads = layout.pieces(0, tokens, 0..2 * geometry.layers);
        for (number, (at, bytes)) in heads.enumerate() {
            piece.resize(bytes, 0);
            engine.kv().read(at, &mut piece);
            let (plane, head) = (number / geometry.kv_heads as usize, number % geometry.kv_heads as usize);
            let head_dim = geometry.head_dim as usize;
            let largest = &mut layers[plane / 2][plane % 2][head * head_dim..][..head_dim];
            for position in piece.chunks_exact(4 * head_dim) {
                for (largest, four) in largest.iter_mut().zip(position.chunks_exact(4)) {
                    let value = f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
                    *largest = largest.max(value.abs());
                }
            }
        }
    }
    Ok(KvRanges { layers, tokens: done as u64 })
}

/// How far two engines of one model are apart on a text.
#[derive(Clone, Copy, Debug, Default)]
pub struct Apart {
    /// The root of the mean squared difference of their logits, as a part of the logits' own.
    pub logits: f64,
    /// Positions after which both think the same token the likeliest.
    pub agreed: usize,
    /// All positions.
    pub positions: usize,
}

/// Runs a text on both, the first half as a prompt and the rest token by token, and compares the logits of the rest.
///
/// # Panics
/// If the text has less than two tokens, or an engine has no logits.
pub fn compare(exact: &mut dyn Engine, other: &mut dyn Engine, text: &[u32]) -> Result<Apart, EngineError> {
    let (prompt, rest) = text.split_at(text.len() / 2);
    exact.prefill(0, 0, prompt, None)?;
    other.prefill(0, 0, prompt, None)?;
    let (mut error, mut size, mut apart) = (0.0, 0.0, Apart::default());
    let mut out = Vec::new();
    for (position, token) in (prompt.len() as u32..).zip(rest) {
        let row = Row { slot: 0, position, token: *token, draw: Draw::greedy(0) };
        exact.decode(&[row], &[], &mut out)?;
        let expected = out[0].token;
        other.decode(&[row], &[], &mut out)?;
        apart.agreed += usize::from(out[0].token == expected);
        apart.positions += 1;
        let found = other.row_logits(0).expect("engines that compute have logits");
        let expected = exact.row_logits(0).expect("engines that compute have logits");
        for (exact, other) in expected.iter().zip(found) {
            error += f64::from(exact - other).powi(2);
            size += f64::from(*exact).powi(2);
        }
    }
    apart.logits = (error / size).sqrt();
    Ok(apart)
}
