//! A log against an engine: what is equal, and what parts where.

use forebay_schemas::{
    event::{Body, Claimed, Event, FinishReason, RequestAccepted, TokensGenerated},
    ids::{RequestId, WorkerId},
    lifecycle::Lifecycle,
    sampling::Sampling,
};
use forebay_workers::{
    engine::{
        Draw, Engine, Row,
        onnx::{OnnxEngine, OnnxOptions},
        sim::{SimEngine, SimOptions, SimPace},
    },
    logits::LogitsProcessors,
    model::ModelText,
    replay::{self, Comparison},
};
use std::path::{Path, PathBuf};

const PROMPT: [u32; 7] = [11, 12, 13, 14, 15, 16, 17];

fn sim() -> SimEngine {
    let pace = SimPace::default();
    SimEngine::new(SimOptions { slots: 1, positions: 64, vocab: 300, drawn: 100..200, pace }).unwrap()
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo")
}

fn onnx() -> OnnxEngine {
    let options = OnnxOptions { slots: 2, positions: 64, threads: 1, ..OnnxOptions::default() };
    OnnxEngine::open(&demo(), &options).unwrap()
}

fn log(sampling: &Sampling, tokens: &[u32]) -> Lifecycle {
    let accepted = RequestAccepted {
        sampling: sampling.clone(),
        ignore_eos: true,
        ..RequestAccepted::greedy("demo", PROMPT.to_vec(), 12)
    };
    let claimed = Claimed {
        worker: WorkerId::new("worker").unwrap(),
        ack_subject: "ack".into(),
        delivery: 1,
        engine: None,
    };
    let generated = TokensGenerated {
        first_index: 0,
        tokens: tokens.to_vec(),
        text: "…".into(),
        cached_tokens: 0,
        logprobs: Vec::new(),
    };
    let bodies = [
        (0, Body::RequestAccepted(accepted)),
        (1, Body::Claimed(claimed)),
        (1, Body::TokensGenerated(generated)),
    ];
    let request = RequestId::new();
    let events = bodies.map(|(attempt, body)| Event { request, attempt, time_us: 1, body });
    Lifecycle::fold(&events[..if tokens.is_empty() { 2 } else { 3 }]).unwrap().unwrap()
}

/// What a worker generates: in another slot, with its own way to ask.
fn generate(engine: &mut dyn Engine, slot: u32, sampling: &Sampling, count: u32) -> Vec<u32> {
    let draw = |index| Draw::new(sampling, index);
    let parked = [0; 2];
    engine.prefill(slot, 0, &PROMPT[..4], None).unwrap();
    let mut tokens = vec![engine.prefill(slot, 4, &PROMPT[4..], Some(draw(0))).unwrap().unwrap().token];
    let mut out = Vec::new();
    for index in 1..count {
        let (position, token) = (PROMPT.len() as u32 + index - 1, tokens[index as usize - 1]);
        engine.decode(&[Row { slot, position, token, draw: draw(index) }], &parked, &mut out).unwrap();
        tokens.push(out[0].token);
    }
    tokens
}

fn warm() -> Sampling {
    Sampling { temperature: 0.9, top_p: 0.9, top_k: 40, seed: 7, ..Sampling::GREEDY }
}

#[test]
fn a_simulated_log_is_equal_and_has_no_logits() {
    let mut engine = sim();
    let mut tokens = generate(&mut engine, 0, &warm(), 12);
    let comparison =
        replay::compare(&mut engine, &log(&warm(), &tokens), LogitsProcessors::default(), 3).unwrap();
    assert_eq!(comparison, Comparison { tokens: 12, differing: 0, first: None });
    let was = std::mem::replace(&mut tokens[5], 99);
    let comparison =
        replay::compare(&mut engine, &log(&warm(), &tokens), LogitsProcessors::default(), 3).unwrap();
    let first = comparison.first.unwrap();
    assert_eq!((first.index, first.logged, first.drawn, first.logits), (5, 99, was, None));
    // Its tokens depend on all before: everything after the changed one differs too.
    assert_eq!((comparison.tokens, comparison.differing), (12, 7));
}

#[test]
fn a_log_of_the_model_is_equal_however_it_was_drawn() {
    let mut engine = onnx();
    for sampling in [Sampling::GREEDY, warm()] {
        let tokens = generate(&mut engine, 1, &sampling, 12);
        let comparison =
            replay::compare(&mut engine, &log(&sampling, &tokens), LogitsProcessors::default(), 4).unwrap();
        assert_eq!(comparison, Comparison { tokens: 12, differing: 0, first: None });
    }
}

#[test]
fn a_changed_token_shows_with_both_logits() {
    let mut engine = onnx();
    let mut tokens = generate(&mut engine, 1, &Sampling::GREEDY, 12);
    let was = std::mem::replace(&mut tokens[11], 400);
    let comparison =
        replay::compare(&mut engine, &log(&Sampling::GREEDY, &tokens), LogitsProcessors::default(), 4)
            .unwrap();
    assert_eq!((comparison.tokens, comparison.differing), (12, 1));
    let first = comparison.first.unwrap();
    assert_eq!((first.index, first.logged, first.drawn), (11, 400, was));
    assert!(first.logits.unwrap().margin() > 0.0, "{first:?}");
}

#[test]
fn a_log_without_tokens_has_nothing_to_compare() {
    assert_eq!(
        replay::compare(&mut sim(), &log(&warm(), &[]), LogitsProcessors::default(), 4).unwrap(),
        Comparison::default()
    );
}

#[test]
fn text_and_end_follow_from_the_tokens() {
    let text = ModelText::open(&demo()).unwrap();
    let tokens = text.tokenizer.encode("A forebay is a basin.", false).unwrap().get_ids().to_vec();
    let of = |tokens: &[u32]| replay::output(text.tokenizer.clone(), [2].into(), &log(&warm(), tokens));
    assert_eq!(of(&tokens), ("A forebay is a basin.".to_owned(), None));
    let long: Vec<u32> = tokens.iter().copied().cycle().take(12).collect();
    assert_eq!(of(&long).1, Some(FinishReason::Length));
}
