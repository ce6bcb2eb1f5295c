//! Penalties, bias, masks and probabilities: the kernels against their references, bit for bit.

#![allow(unsafe_code)]

use super::{buffer, contents, stand_in};
use forebay_kernels::{
    Normalizer, Penalties, TokenAdjustment, adjust,
    cuda::{DeviceBuffer, NOT_FINITE, Probable, RowAdjustment, RowTold},
    most_probable,
};
use proptest::prelude::*;

/// A row: its logits, penalties, adjustments of some of its tokens, and perhaps a mask.
type Case = (Vec<f32>, Penalties, Vec<TokenAdjustment>, Option<Vec<u32>>);

fn case(vocab: usize) -> impl Strategy<Value = Case> {
    let logit = prop_oneof![8 => -30f32..30.0, 1 => Just(0.0), 1 => Just(f32::NEG_INFINITY)];
    let penalties = (0.5f32..2.0, -2f32..2.0, -2f32..2.0)
        .prop_map(|(repetition, frequency, presence)| Penalties { repetition, frequency, presence });
    // Some tokens are outside the vocabulary.
    let tokens = prop::collection::btree_map(0..vocab as u32 + 3, (0u32..5, 0u32..2, -5f32..5.0), 0..40);
    let tokens = tokens.prop_map(|tokens| {
        let adjustment = |(token, (count, seen, bias))| TokenAdjustment { token, count, seen, bias };
        tokens.into_iter().map(adjustment).collect()
    });
    let mask = prop::option::of(prop::collection::vec(any::<u32>(), vocab.div_ceil(32)));
    (prop::collection::vec(logit, vocab), penalties, tokens, mask)
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn logits_are_adjusted_as_on_the_cpu(cases in (1usize..300).prop_flat_map(|vocab| prop::collection::vec(case(vocab), 1..4))) {
        let vocab = cases[0].0.len();
        let words = vocab.div_ceil(32);
        let (mut logits, mut rows, mut tokens, mut masks) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut expected = Vec::new();
        for (row, penalties, adjustments, mask) in &cases {
            let mut adjusted = row.clone();
            adjust(&mut adjusted, *penalties, adjustments, mask.as_deref());
            expected.extend(bits(&adjusted));
            let (first, count) = (tokens.len() as u32, adjustments.len() as u32);
            rows.push(RowAdjustment { penalties: *penalties, first, count, masked: mask.is_some().into() });
            logits.extend_from_slice(row);
            tokens.extend_from_slice(adjustments);
            masks.extend(mask.clone().unwrap_or_else(|| vec![0; words]));
        }
        let device = stand_in::device();
        let (stream, kernels) = (device.stream().unwrap(), stand_in::kernels(&device));
        let (on_gpu, how) = (buffer(&stream, &logits), buffer(&stream, &rows));
        let (tokens, masks) = (buffer(&stream, &tokens), buffer(&stream, &masks));
        // SAFETY: rows say where their tokens are, and all have a mask.
        unsafe { stream.adjust(&kernels, (&on_gpu, vocab as u32), &how, &tokens, &masks, rows.len()) }.unwrap();
        prop_assert_eq!(bits(&contents(&stream, &on_gpu)), expected);
    }

    #[test]
    fn probabilities_are_those_of_the_cpu(
        // Halves make ties common.
        rows in (1usize..300).prop_flat_map(|vocab| prop::collection::vec(
            prop::collection::vec(prop_oneof![3 => -30f32..30.0, 3 => (-9i32..9).prop_map(|x| x as f32 / 2.0), 1 => Just(f32::NEG_INFINITY)], vocab),
            1..4,
        )),
        tops in prop::collection::vec(prop::option::of(0usize..21), 4),
        drawn in prop::collection::vec(any::<prop::sample::Index>(), 4),
    ) {
        let (vocab, count) = (rows[0].len(), rows.len());
        let tops: Vec<Option<usize>> = tops[..count].iter().map(|top| top.map(|top| top.min(vocab))).collect();
        let width = tops.iter().flatten().max().unwrap_or(&0) + 1;
        let told: Vec<RowTold> =
            tops.iter().map(|top| RowTold { top: top.unwrap_or(0) as u32, told: top.is_some().into() }).collect();
        let drawn: Vec<u32> = drawn[..count].iter().map(|at| at.index(vocab) as u32).collect();
        let device = stand_in::device();
        let (stream, kernels) = (device.stream().unwrap(), stand_in::kernels(&device));
        let (logits, told) = (buffer(&stream, &rows.concat()), buffer(&stream, &told));
        let tokens = buffer(&stream, &drawn);
        let normalizers = DeviceBuffer::<Normalizer>::new(&device, count).unwrap();
        let probable = DeviceBuffer::<Probable>::new(&device, count * width).unwrap();
        let (of, told) = ((&logits, vocab as u32), (&told, width as u32));
        // SAFETY: no row has more than the widest.
        unsafe { stream.probabilities(&kernels, of, told, &tokens, (&normalizers, &probable), count) }.unwrap();
        let (normalizers, probable) = (contents(&stream, &normalizers), contents(&stream, &probable));
        for (number, row) in rows.iter().enumerate() {
            let Some(top) = tops[number] else { continue };
            prop_assert_eq!(normalizers[number], Normalizer::of(row));
            let told = &probable[number * width..][..top + 1];
            let found: Vec<(u32, f32)> = told.iter().map(|probable| (probable.token, probable.logit)).collect();
            prop_assert_eq!(found[0], (drawn[number], row[drawn[number] as usize]));
            if row.iter().any(|logit| logit.is_finite()) {
                prop_assert_eq!(&found[1..], most_probable(row, top));
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_has_no_probabilities() {
    let device = stand_in::device();
    let (stream, kernels) = (device.stream().unwrap(), stand_in::kernels(&device));
    let logits =
        buffer(&stream, &[1.0, f32::NAN, 2.0, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY]);
    let told = buffer(&stream, &[RowTold { top: 1, told: 1 }; 2]);
    let drawn = buffer(&stream, &[NOT_FINITE; 2]);
    let normalizers = DeviceBuffer::<Normalizer>::new(&device, 2).unwrap();
    let probable = DeviceBuffer::<Probable>::new(&device, 4).unwrap();
    // SAFETY: no row has more than the widest.
    unsafe { stream.probabilities(&kernels, (&logits, 3), (&told, 2), &drawn, (&normalizers, &probable), 2) }
        .unwrap();
    assert!(contents(&stream, &normalizers).iter().all(|normalizer| normalizer.logprob(1.0).is_nan()));
}
