//! The engine against transformers, and against itself: whatever way a sequence is cut, batched or moved, its
//! tokens stay the same. References: `tests/reference/`.

mod parity_support;

use forebay_schemas::{kv::TokenRange, sampling::Sampling};
use forebay_workers::engine::{
    Draw, Engine, EngineError, Row,
    graph::Precision,
    sim::{SimEngine, SimOptions, SimPace},
};
use parity_support::{CASES, Reference, alone, greedy, logits_apart, open};

const INT4: Precision = Precision::Int4 { block: 32 };

#[test]
fn fp32_agrees_with_transformers() {
    for case in CASES {
        let reference = Reference::read(case);
        let mut engine = open(case, Precision::F32);
        for (number, prompt) in reference.prompts.iter().enumerate() {
            let tokens = alone(&mut engine, 0, &prompt.ids, 64);
            assert_eq!(tokens, prompt.greedy, "{case}: prompt {number}");
            engine.prefill(0, 0, &prompt.ids, Some(greedy(0))).unwrap();
            let apart = logits_apart(engine.logits(), &reference.logits(&format!("last_logits.{number}")));
            assert!(apart < 1e-4, "{case}: logits of prompt {number} are {apart} apart");
        }
        let all = reference.logits("all_logits.1");
        for (position, expected) in all.chunks_exact(engine.card().vocab as usize).enumerate() {
            engine.prefill(0, 0, &reference.prompts[1].ids[..=position], Some(greedy(0))).unwrap();
            let apart = logits_apart(engine.logits(), expected);
            assert!(apart < 1e-4, "{case}: logits at position {position} are {apart} apart");
        }
    }
}

/// Random weights are the worst case of rounding: nothing in them is redundant. The bounds are a third above what was
/// measured, and tell a wrong layout (an error of 1 and more) from rounding.
#[test]
fn quantized_weights_stay_close() {
    for (precision, bound) in [
        (Precision::Int8 { block: 32 }, 0.04),
        (Precision::Int8 { block: 128 }, 0.05),
        (INT4, 0.45),
        (Precision::Int4 { block: 128 }, 0.6),
    ] {
        for case in CASES {
            let reference = Reference::read(case);
            let mut engine = open(case, precision);
            let (mut square, mut error) = (0.0, 0.0);
            for (number, prompt) in reference.prompts.iter().enumerate() {
                engine.prefill(0, 0, &prompt.ids, Some(greedy(0))).unwrap();
                for (x, exact) in
                    engine.logits().iter().zip(reference.logits(&format!("last_logits.{number}")))
                {
                    square += exact * exact;
                    error += (x - exact) * (x - exact);
                }
            }
            let relative = (error / square).sqrt();
            eprintln!("{case}, {precision}: logits off by {relative:.3} of their size");
            assert!(relative < bound, "{case}, {precision}: logits off by {relative} of their size");
        }
    }
}

#[test]
fn chunked_prefill_equals_whole_prefill() {
    for case in CASES {
        let reference = Reference::read(case);
        let prompt = &reference.prompts[3];
        let mut engine = open(case, Precision::F32);
        let whole = alone(&mut engine, 0, &prompt.ids, 1);
        let logits = engine.logits().to_vec();
        for chunk in [1, 7, 32, 64] {
            let mut first = None;
            for (number, tokens) in prompt.ids.chunks(chunk).enumerate() {
                first = engine.prefill(1, (number * chunk) as u32, tokens, Some(greedy(0))).unwrap();
            }
            let apart = logits_apart(engine.logits(), &logits);
            assert!(apart < 1e-4, "{case}: chunks of {chunk} are {apart} apart");
            assert_eq!(first.unwrap().token, whole[0]);
        }
    }
}

/// Rows join and leave, slots are free, half prefilled, or idle: each sequence draws what it draws alone.
fn batch_equals_alone(mut engine: impl Engine, prompts: &[Vec<u32>], sampling: &Sampling) {
    const TOKENS: usize = 24;
    let draw = |index| Draw::new(sampling, index);
    let mut expected = Vec::new();
    for prompt in prompts {
        let mut tokens = vec![engine.prefill(3, 0, prompt, Some(draw(0))).unwrap().unwrap().token];
        let mut out = Vec::new();
        while tokens.len() < TOKENS {
            let (position, token) = ((prompt.len() + tokens.len() - 1) as u32, tokens[tokens.len() - 1]);
            let row = Row { slot: 3, position, token, draw: draw(tokens.len() as u32) };
            engine.decode(&[row], &[0, 0, 0], &mut out).unwrap();
            tokens.push(out[0].token);
        }
        expected.push(tokens);
    }
    // Sequence i lives in slot 3 − i, is prefilled in two chunks at steps 3·i and 3·i + 1, decodes from then on,
    // and pauses at every seventh step.
    let mut drawn: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
    let mut filled = vec![0u32; 4];
    let mut out = Vec::new();
    for step in 0..200 {
        let mut decoding: Vec<usize> = Vec::new();
        for (i, prompt) in prompts.iter().enumerate().rev() {
            let (slot, half) = (3 - i as u32, prompt.len() / 2);
            if step == 3 * i && half > 0 {
                engine.prefill(slot, 0, &prompt[..half], None).unwrap();
                filled[slot as usize] = half as u32;
            } else if step == 3 * i + 1 {
                let first =
                    engine.prefill(slot, half as u32, &prompt[half..], Some(draw(0))).unwrap().unwrap();
                filled[slot as usize] = prompt.len() as u32;
                drawn[i].push(first.token);
            } else if step > 3 * i && drawn[i].len() < TOKENS && (step + i) % 7 != 0 {
                decoding.push(i);
            }
        }
        let rows: Vec<Row<'_>> = decoding
            .iter()
            .map(|i| Row {
                slot: 3 - *i as u32,
                position: filled[3 - i],
                token: drawn[*i][drawn[*i].len() - 1],
                draw: draw(drawn[*i].len() as u32),
            })
            .collect();
        engine.decode(&rows, &filled, &mut out).unwrap();
        for (i, sampled) in decoding.iter().zip(&out) {
            drawn[*i].push(sampled.token);
            filled[3 - i] += 1;
        }
    }
    assert_eq!(drawn, expected);
}

#[test]
fn a_ragged_batch_draws_what_each_row_draws_alone() {
    let sampled = Sampling { temperature: 1.0, top_p: 0.95, top_k: 50, seed: 7, ..Sampling::GREEDY };
    for case in CASES {
        let prompts: Vec<Vec<u32>> =
            Reference::read(case).prompts.into_iter().map(|prompt| prompt.ids).collect();
        for precision in [Precision::F32, INT4] {
            batch_equals_alone(open(case, precision), &prompts, &Sampling::GREEDY);
            batch_equals_alone(open(case, precision), &prompts, &sampled);
        }
        let sim =
            SimOptions { slots: 4, positions: 200, vocab: 384, drawn: 3..200, pace: SimPace::default() };
        batch_equals_alone(SimEngine::new(sim).unwrap(), &prompts, &sampled);
    }
}

/// The largest distance between the logits of four rows of unlike length decoded together and each of them alone.
fn together_and_alone_apart(case: &str, precision: Precision) -> f32 {
    let reference = Reference::read(case);
    let mut engine = open(case, precision);
    let vocab = engine.card().vocab as usize;
    let rows: Vec<Row<'_>> = (0..4)
        .map(|slot| {
            let prompt = &reference.prompts[slot as usize];
            engine.prefill(slot, 0, &prompt.ids, None).unwrap();
            Row { slot, position: prompt.ids.len() as u32, token: prompt.greedy[0], draw: greedy(1) }
        })
        .collect();
    let mut out = Vec::new();
    engine.decode(&rows, &[0; 4], &mut out).unwrap();
    let together = engine.logits().to_vec();
    let parked: Vec<u32> = rows.iter().map(|row| row.position).collect();
    let apart = rows.iter().zip(together.chunks_exact(vocab)).map(|(row, together)| {
        engine.decode(&[*row], &parked, &mut out).unwrap();
        logits_apart(engine.logits(), together)
    });
    apart.fold(0.0, f32::max)
}

#[test]
fn a_ragged_batch_has_the_logits_of_each_row_alone_bit_for_bit() {
    for case in CASES {
        for precision in [Precision::F32, INT4, Precision::Int8 { block: 32 }] {
            assert_eq!(together_and_alone_apart(case, precision), 0.0, "{case}, {precision}");
        }
        // ONNX Runtime's kernels for longer blocks sum in another order for one row than for several.
        let block_128 = Precision::Int4 { block: 128 };
        let apart = together_and_alone_apart(case, block_128);
        assert!(apart < 1e-4, "{case}, {block_128}: {apart}");
    }
}

/// Copies the KV of `tokens` of a slot of one engine into a slot of another.
fn move_kv(from: (&dyn Engine, u32), into: (&dyn Engine, u32), tokens: u32) {
    let (source, target) = (from.0.card().layout, into.0.card().layout);
    assert_eq!(from.0.card().layout_hash, into.0.card().layout_hash);
    let range = TokenRange { start: 0, count: tokens };
    let planes = 0..2 * source.geometry.layers;
    for (a, b) in source.pieces(from.1, range, planes.clone()).zip(target.pieces(into.1, range, planes)) {
        let mut bytes = vec![0; a.1];
        from.0.kv().read(a.0, &mut bytes);
        into.0.kv().write(b.0, &bytes);
    }
}

#[test]
fn kv_moved_to_another_engine_continues_alike() {
    for case in CASES {
        let reference = Reference::read(case);
        for precision in [Precision::F32, INT4] {
            let (mut prefill, mut decode) = (open(case, precision), open(case, precision));
            for prompt in &reference.prompts {
                let expected = alone(&mut prefill, 0, &prompt.ids, 64);
                move_kv((&prefill, 0), (&decode, 2), prompt.ids.len() as u32);
                let continued = parity_support::continued(&mut decode, 2, prompt.ids.len(), expected[0], 64);
                assert_eq!(continued, expected, "{case} {precision}");
            }
        }
    }
    let options =
        SimOptions { slots: 3, positions: 90, vocab: 500, drawn: 100..400, pace: SimPace::default() };
    let mut prefill = SimEngine::new(options.clone()).unwrap();
    let mut decode = SimEngine::new(SimOptions { slots: 5, positions: 300, ..options }).unwrap();
    let expected = alone(&mut prefill, 1, &[1, 2, 3], 64);
    move_kv((&prefill, 1), (&decode, 2), 3);
    assert_eq!(parity_support::continued(&mut decode, 2, 3, expected[0], 64), expected);
    move_kv((&prefill, 1), (&decode, 4), 2);
    assert_ne!(parity_support::continued(&mut decode, 4, 2, expected[0], 64), expected, "a token is missing");
}

#[test]
fn steps_that_a_request_can_spoil_are_errors() {
    let mut engine = open(CASES[0], Precision::F32);
    let limit = engine.card().context_limit;
    let long = vec![3; limit as usize + 1];
    assert!(matches!(engine.prefill(0, 0, &long, None), Err(EngineError::ContextFull { .. })));
    assert!(engine.prefill(0, 0, &long[1..], None).is_ok());
    let row = Row { slot: 0, position: limit, token: 3, draw: greedy(0) };
    assert!(matches!(engine.decode(&[row], &[], &mut Vec::new()), Err(EngineError::ContextFull { .. })));
    let error = engine.prefill(1, 0, &[5, 100_000], None).unwrap_err();
    assert_eq!(error.to_string(), "slot 1: token 100000 is outside the vocabulary of 288");
    // A full slot can still be parked: its scratch position is the one beyond the context.
    engine.prefill(1, 0, &[5], None).unwrap();
    let row = Row { slot: 1, position: 1, token: 5, draw: greedy(0) };
    engine.decode(&[row], &[limit], &mut Vec::new()).unwrap();
}
