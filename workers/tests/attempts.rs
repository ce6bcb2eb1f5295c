//! A decode worker takes a request over from one that died: it goes by the log, and by its own slots.

use forebay_schemas::{
    event::{Body, Claimed, FailureCode, FinishReason, RequestAccepted, TokensGenerated},
    ids::{GatewayId, RequestId, WorkerId},
    sampling::Sampling,
    task::{DecodeTask, Role},
};
use forebay_streams::{Streams, follow::Follow, log::LogRef, memory, tasks::enqueue, writer::LogWriter};
use forebay_workers::{
    engine::{
        Engine,
        sim::{SimEngine, SimOptions, SimPace},
    },
    model::ModelText,
    worker::{self, WorkerConfig},
};
use std::{path::Path, time::Duration};
use tokio_util::sync::CancellationToken;

/// Positions of a slot; the context is one less.
const POSITIONS: u32 = 16;

fn accepted(prompt: u32, max_tokens: u32) -> RequestAccepted {
    RequestAccepted {
        model: "test".into(),
        endpoint: "chat.completions".into(),
        prompt: (10..10 + prompt).collect(),
        sampling: Sampling::GREEDY,
        max_tokens,
        stop: vec![],
        ignore_eos: true,
        timeout_ms: 60_000,
        detached: false,
        stored: false,
        fingerprint: None,
        echo: None,
    }
}

/// Begins a request, of which a worker that is gone generated some tokens, and returns how a living one ends it.
async fn taken_over(accepted: RequestAccepted, generated: u32) -> Body {
    let streams = memory::streams();
    let log = LogRef { gateway: GatewayId::new("gw").unwrap(), request: RequestId::new() };
    let mut writer = LogWriter::create(streams.log.clone(), log.clone(), accepted).await.unwrap();
    let dead = Claimed {
        worker: WorkerId::new("dead").unwrap(),
        ack_subject: "gone".into(),
        delivery: 1,
        engine: None,
    };
    writer.append(Body::Claimed(dead)).await.unwrap();
    if generated > 0 {
        let tokens =
            TokensGenerated { first_index: 0, tokens: vec![20; generated as usize], text: String::new() };
        writer.append(Body::TokensGenerated(tokens)).await.unwrap();
    }
    let stop = CancellationToken::new();
    let worker = tokio::spawn(run_worker(streams.clone(), log.clone(), stop.clone()));
    let mut follow = Follow::watch(streams.log.clone(), log, writer.seq()).await.unwrap();
    let end = loop {
        let body = follow.next().await.unwrap().event.body;
        if body.is_terminal() {
            break body;
        }
    };
    stop.cancel();
    worker.await.unwrap();
    end
}

async fn run_worker(streams: Streams, log: LogRef, stop: CancellationToken) {
    let text =
        ModelText::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/gqa1-tied-bf16"))
            .unwrap();
    let pace = SimPace::default();
    let options = SimOptions { slots: 2, positions: POSITIONS, vocab: 100, drawn: 10..90, pace };
    let engine = SimEngine::new(options).unwrap();
    let card = text.card("test", engine.card(), &streams).await.unwrap();
    let task = DecodeTask { request: log.request, gateway: log.gateway, model: card.key.clone() };
    enqueue(&*streams.tasks, &task).await.unwrap();
    let sockets = tempfile::tempdir().unwrap();
    let config = WorkerConfig {
        role: Role::Decode,
        max_local_prefill_length: 0,
        chunk_tokens: 8,
        kv_lease: Duration::from_secs(5),
        attempts_max: 5,
        prefill_patience: Duration::from_secs(5),
        grace: Duration::from_secs(5),
        socket_folder: sockets.path().to_owned(),
    };
    worker::run(config, Box::new(engine), card, text.tokenizer, streams, stop).await.unwrap();
}

#[tokio::test]
async fn what_was_generated_in_full_is_completed_even_where_the_context_ends() {
    let end = taken_over(accepted(10, 5), 5).await;
    let Body::RequestCompleted(done) = end else { panic!("{end:?}") };
    assert_eq!((done.reason, done.usage.completion_tokens), (FinishReason::Length, 5));
}

#[tokio::test]
async fn what_was_begun_goes_on() {
    let end = taken_over(accepted(10, 5), 3).await;
    let Body::RequestCompleted(done) = end else { panic!("{end:?}") };
    assert_eq!((done.reason, done.usage.completion_tokens), (FinishReason::Length, 5));
}

#[tokio::test]
async fn a_prompt_too_long_for_the_slots_fails_at_once() {
    let end = taken_over(accepted(POSITIONS, 5), 0).await;
    let Body::RequestFailed(failed) = end else { panic!("{end:?}") };
    assert_eq!(failed.code, FailureCode::Unservable);
    assert!(failed.message.contains("context"), "{}", failed.message);
}
