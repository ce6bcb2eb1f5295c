//! Whole steps: rows that are drawn in unlike ways, one step after another with the same buffers.

use super::{buffer, stand_in};
use forebay_kernels::{Adjustments, Normalizer, adjust, cuda::RowDraws, most_probable, sample};
use forebay_schemas::sampling::Sampling;
use proptest::prelude::*;

/// A row: its logits, how it is drawn, the tokens before, and perhaps which tokens may be drawn.
type Case = (Vec<f32>, Sampling, Vec<u32>, Option<Vec<u32>>);

fn sampling(vocab: usize) -> impl Strategy<Value = Sampling> {
    let penalty = || prop_oneof![2 => Just(0.0f32), 1 => -2f32..2.0];
    let repetition = prop_oneof![2 => Just(1.0f32), 1 => 0.5f32..2.0];
    let bias = prop::collection::btree_map(0..vocab as u32 + 3, -5f32..5.0, 0..4);
    let logprobs = prop::option::of(0u32..9);
    let temperature = prop_oneof![Just(0.0f32), 0.1f32..3.0];
    (temperature, repetition, penalty(), penalty(), bias, logprobs, any::<u64>()).prop_map(
        |(temperature, repetition_penalty, frequency_penalty, presence_penalty, bias, logprobs, seed)| {
            Sampling {
                temperature,
                repetition_penalty,
                frequency_penalty,
                presence_penalty,
                logit_bias: bias.into_iter().collect(),
                logprobs,
                seed,
                ..Sampling::GREEDY
            }
        },
    )
}

fn case(vocab: usize) -> impl Strategy<Value = Option<Case>> {
    let seen = prop::collection::vec(0..vocab as u32, 0..30);
    let allowed = prop::option::of(prop::collection::vec(any::<u32>(), vocab.div_ceil(32)));
    let case = (prop::collection::vec(-20f32..20.0, vocab), sampling(vocab), seen, allowed);
    prop::option::weighted(0.8, case)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn each_row_is_drawn_as_on_the_cpu(
        (vocab, steps) in (2usize..200).prop_flat_map(|vocab| {
            (Just(vocab), prop::collection::vec(prop::collection::vec(case(vocab), 1..5), 1..4))
        }),
        index: u32,
    ) {
        let device = stand_in::device();
        let (stream, kernels) = (device.stream().unwrap(), stand_in::kernels(&device));
        let mut draws = RowDraws::new(&device, 4, vocab).unwrap();
        for step in steps {
            draws.begin(step.len()).unwrap();
            let mut logits = Vec::new();
            for (number, case) in step.iter().enumerate() {
                let Some((row, sampling, seen, allowed)) = case else {
                    // Nobody's row: whatever is there.
                    logits.extend(vec![f32::NAN; vocab]);
                    continue;
                };
                logits.extend_from_slice(row);
                let (prompt, output) = seen.split_at(seen.len() / 2);
                let adjustments = Adjustments::new(sampling, prompt, output);
                draws.set(number, (sampling, index), adjustments.as_ref(), allowed.as_deref()).unwrap();
            }
            let room = buffer(&stream, &[logits, vec![0.0; vocab * (4 - step.len())]].concat());
            draws.queue(&stream, &kernels, &room).unwrap();
            for (number, case) in step.iter().enumerate() {
                let drawn = draws.drawn(number).unwrap();
                let Some((row, sampling, seen, allowed)) = case else {
                    prop_assert!(drawn.is_none());
                    continue;
                };
                let mut adjusted = row.clone();
                let (prompt, output) = seen.split_at(seen.len() / 2);
                let adjustments = Adjustments::new(sampling, prompt, output);
                let (penalties, tokens) = adjustments.as_ref().map(|of| (of.penalties(), of.tokens())).unzip();
                let none = forebay_kernels::Penalties::NONE;
                adjust(&mut adjusted, penalties.unwrap_or(none), tokens.unwrap_or(&[]), allowed.as_deref());
                let expected = sample(&mut adjusted, sampling, index).ok();
                prop_assert_eq!(drawn.map(|drawn| drawn.token), expected);
                let (Some(drawn), Some(top)) = (drawn, sampling.logprobs) else {
                    prop_assert!(drawn.is_none_or(|drawn| drawn.told.is_none()));
                    continue;
                };
                let told = drawn.told.unwrap();
                prop_assert_eq!(told.normalizer, Normalizer::of(row));
                prop_assert_eq!(told.drawn, row[drawn.token as usize]);
                let found: Vec<(u32, f32)> = told.top.iter().map(|of| (of.token, of.logit)).collect();
                prop_assert_eq!(found, most_probable(row, top as usize));
            }
        }
    }
}
