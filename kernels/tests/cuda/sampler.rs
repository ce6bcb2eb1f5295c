//! Drawing tokens: the kernel against the CPU's sampler.

use super::{buffer, contents, stand_in};
use forebay_kernels::{
    cuda::{DeviceBuffer, NOT_FINITE, RowDraw},
    exp, sample,
};
use forebay_schemas::sampling::Sampling;
use proptest::prelude::*;

/// Tokens, and what is left of the logits.
fn run_sample(logits: &[f32], vocab: usize, draws: &[RowDraw]) -> (Vec<u32>, Vec<f32>) {
    let device = stand_in::device();
    let (stream, kernels) = (device.stream().unwrap(), stand_in::kernels(&device));
    let (logits, rows) = (buffer(&stream, logits), buffer(&stream, draws));
    let tokens = DeviceBuffer::new(&device, draws.len()).unwrap();
    stream.sample(&kernels, &logits, vocab as u32, &rows, &tokens, draws.len()).unwrap();
    (contents(&stream, &tokens), contents(&stream, &logits))
}

fn expected(logits: &[f32], sampling: &Sampling, index: u32) -> u32 {
    sample(&mut logits.to_vec(), sampling, index).unwrap_or(NOT_FINITE)
}

fn sampling() -> impl Strategy<Value = Sampling> {
    let temperature = prop_oneof![Just(0.0f32), 0.1f32..3.0];
    let top_p = prop_oneof![Just(1.0f32), Just(0.5), 0.01f32..1.0];
    let top_k = prop_oneof![Just(0u32), 1u32..40, 1u32..900];
    let min_p = prop_oneof![4 => Just(0.0f32), 1 => 0.0f32..1.0, 1 => Just(1.0)];
    (temperature, top_p, top_k, any::<u64>(), min_p).prop_map(|(temperature, top_p, top_k, seed, min_p)| {
        Sampling { temperature, top_p, top_k, seed, min_p, ..Sampling::GREEDY }
    })
}

/// A row of logits: a few with nearly all of the mass, many alike, or all of them.
fn row() -> impl Strategy<Value = Vec<f32>> {
    let row = |logit: BoxedStrategy<f32>| prop::collection::vec(logit, 1..700);
    let any = prop_oneof![9 => -20f32..20.0, 1 => Just(-60.0), 1 => Just(f32::NEG_INFINITY)];
    let ties = (-3i32..3).prop_map(|x| x as f32 / 2.0);
    prop_oneof![
        row(any.boxed()),
        row(ties.boxed()),
        (0f32..1.0, 1usize..700).prop_map(|(logit, count)| vec![logit; count])
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_sampler_draws_what_the_cpu_draws(
        logits in row(),
        draws in prop::collection::vec((sampling(), any::<u32>()), 1..4),
        shift in 0usize..30,
    ) {
        let vocab = logits.len();
        let mut rows = vec![0.0; vocab * draws.len()];
        for (number, row) in rows.chunks_mut(vocab).enumerate() {
            row.copy_from_slice(&logits);
            row.rotate_left(number * shift % vocab);
        }
        let expected: Vec<u32> = rows
            .chunks(vocab)
            .zip(&draws)
            .map(|(row, (sampling, index))| expected(row, sampling, *index))
            .collect();
        let on_gpu: Vec<RowDraw> = draws.iter().map(|(sampling, index)| RowDraw::new(sampling, *index)).collect();
        let weights = |row: &[f32], temperature: f32| -> Vec<u32> {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter().map(|logit| exp((logit - max) / temperature).to_bits()).collect()
        };
        let (tokens, after) = run_sample(&rows, vocab, &on_gpu);
        prop_assert_eq!(tokens, expected);
        for ((row, before), (sampling, _)) in after.chunks(vocab).zip(rows.chunks(vocab)).zip(&draws) {
            if sampling.temperature > 0.0 {
                let found: Vec<u32> = row.iter().map(|weight| weight.to_bits()).collect();
                prop_assert_eq!(found, weights(before, sampling.temperature), "every bit of every weight");
            }
        }
    }

}

#[test]
fn a_vocabulary_of_a_real_model_is_drawn_from_alike() {
    let vocab = 151_936;
    let logits: Vec<f32> =
        (0..vocab).map(|id| ((id * 7919 % 100_003) as f32 / 100_003.0).powi(40) * 30.0 - 15.0).collect();
    for (temperature, top_p, top_k) in
        [(0.0, 1.0, 0), (1.0, 1.0, 0), (0.7, 0.9, 0), (1.3, 0.95, 50), (2.5, 0.999, 9000)]
    {
        let of = |seed| Sampling { temperature, top_p, top_k, seed, ..Sampling::GREEDY };
        let rows = [&logits[..], &logits[..]].concat();
        let draws = [RowDraw::new(&of(1), 3), RowDraw::new(&of(2), 4)];
        let (drawn, _) = run_sample(&rows, vocab, &draws);
        assert_eq!(drawn, [expected(&logits, &of(1), 3), expected(&logits, &of(2), 4)], "{:?}", of(1));
    }
}

#[test]
fn logits_that_are_no_numbers_are_told() {
    let draw =
        RowDraw::new(&Sampling { temperature: 1.0, top_p: 0.9, top_k: 5, seed: 1, ..Sampling::GREEDY }, 0);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut rows = vec![0.5; 40];
        rows[27] = bad;
        assert_eq!(run_sample(&rows, 20, &[draw, draw]).0[1], NOT_FINITE);
    }
    assert_eq!(run_sample(&[f32::NEG_INFINITY; 20], 20, &[draw]).0, [NOT_FINITE]);
}
