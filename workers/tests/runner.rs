//! The engine's thread and its handle.

use forebay_schemas::sampling::Sampling;
use forebay_workers::{
    engine::sim::{SimEngine, SimOptions, SimPace},
    logits::LogitsProcessors,
    runner::{Output, Runner},
    scheduler::{Budget, Sequence},
};
use std::sync::Arc;

fn runner(slots: u32) -> Runner {
    let pace = SimPace { decode_us: 20_000.0, ..SimPace::default() };
    let options = SimOptions { slots, positions: 64, vocab: 100, drawn: 10..90, pace };
    Runner::start(Box::new(SimEngine::new(options).unwrap()), Budget { chunk_tokens: 8, step_tokens: 8 })
}

fn sequence(slot: u32, remaining: u32) -> Sequence {
    Sequence {
        slot,
        tokens: vec![1, 2, 3],
        filled: 0,
        sampling: Arc::new(Sampling::GREEDY),
        next_index: 0,
        remaining,
        eos: Arc::default(),
        processors: LogitsProcessors::default(),
    }
}

/// A step that is under way when a slot is parked elsewhere may still write where it was parked before. Once `park` has
/// returned, what is copied there stays.
#[tokio::test]
async fn once_a_slot_is_parked_its_other_positions_are_safe() {
    let runner = runner(2);
    let mut outputs = runner.add(sequence(1, 40)).await.unwrap();
    for round in 0..10_u8 {
        while !matches!(outputs.recv().await, Some(Output::Token(_))) {}
        runner.park(0, 0).await;
        // Into the middle of a step.
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        runner.park(0, 8).await;
        let copied = [round; 8];
        let at = runner.card().layout.slot_offset(0, 0);
        runner.kv().write(at, &copied);
        for _ in 0..2 {
            while !matches!(outputs.recv().await, Some(Output::Token(_))) {}
        }
        let mut there = [0; 8];
        runner.kv().read(at, &mut there);
        assert_eq!(there, copied, "round {round}");
    }
}

#[tokio::test]
async fn a_sequence_brings_its_tokens_and_ends() {
    let runner = runner(1);
    let mut outputs = runner.add(sequence(0, 3)).await.unwrap();
    let mut tokens = 0;
    while let Some(output) = outputs.recv().await {
        tokens += u32::from(matches!(output, Output::Token(_)));
    }
    assert_eq!(tokens, 3);
}
