//! A decode worker takes a request over from one that died: it goes by the log, and by its own slots.

use forebay_kernels::Region;
use forebay_schemas::{
    event::{Body, Claimed, FailureCode, FinishReason, RequestAccepted, TokensGenerated},
    ids::{GatewayId, RequestId, WorkerId},
    task::{DecodeTask, Role},
};
use forebay_streams::{Streams, follow::Follow, log::LogRef, memory, tasks::enqueue, writer::LogWriter};
use forebay_workers::{
    engine::{
        Draw, Engine, EngineCard, EngineError, Row, Sampled,
        sim::{SimEngine, SimOptions, SimPace},
    },
    kv::KvOptions,
    model::ModelText,
    worker::{self, WorkerConfig},
};
use std::{path::Path, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// Positions of a slot; the context is one less.
const POSITIONS: u32 = 16;

fn accepted(prompt: u32, max_tokens: u32) -> RequestAccepted {
    RequestAccepted {
        ignore_eos: true,
        ..RequestAccepted::greedy("test", (10..10 + prompt).collect(), max_tokens)
    }
}

/// Begins a request, of which a worker that is gone generated some tokens, and returns how a living one ends it.
async fn taken_over(accepted: RequestAccepted, generated: u32) -> Body {
    ended(memory::streams(), accepted, 1, generated, sim()).await
}

fn sim() -> Box<dyn Engine> {
    let pace = SimPace::default();
    let options = SimOptions { slots: 2, positions: POSITIONS, vocab: 100, drawn: 10..90, pace };
    Box::new(SimEngine::new(options).unwrap())
}

/// The same after that many claims by workers that are gone.
async fn ended(
    streams: Streams,
    accepted: RequestAccepted,
    claims: u32,
    generated: u32,
    engine: Box<dyn Engine>,
) -> Body {
    let log = LogRef { gateway: GatewayId::new("gw").unwrap(), request: RequestId::new() };
    let mut writer = LogWriter::create(streams.log.clone(), log.clone(), accepted).await.unwrap();
    for _ in 0..claims {
        let worker = WorkerId::new("dead").unwrap();
        let dead = Claimed { worker, ack_subject: "gone".into(), delivery: 1, engine: None };
        writer.append(Body::Claimed(dead)).await.unwrap();
    }
    if generated > 0 {
        let tokens = TokensGenerated {
            first_index: 0,
            tokens: vec![20; generated as usize],
            text: String::new(),
            cached_tokens: 0,
            logprobs: Vec::new(),
        };
        writer.append(Body::TokensGenerated(tokens)).await.unwrap();
    }
    let stop = CancellationToken::new();
    let worker = tokio::spawn(run_worker(streams.clone(), log.clone(), stop.clone(), engine));
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

async fn run_worker(streams: Streams, log: LogRef, stop: CancellationToken, engine: Box<dyn Engine>) {
    let text =
        ModelText::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/gqa1-tied-bf16"))
            .unwrap();
    let card = text.card("test", engine.card(), &streams).await.unwrap();
    let task = DecodeTask { request: log.request, gateway: log.gateway, model: card.key.clone() };
    enqueue(&*streams.tasks, &task).await.unwrap();
    let sockets = tempfile::tempdir().unwrap();
    let config = WorkerConfig {
        role: Role::Decode,
        max_local_prefill_length: 0,
        max_prefill_queue_size: 64,
        chunk_tokens: 8,
        step_tokens: 8,
        cache_bytes: 1 << 20,
        overlap: true,
        kv_lease: Duration::from_secs(5),
        attempts_max: 5,
        prefill_patience: Duration::from_secs(5),
        grace: Duration::from_secs(5),
        socket_folder: sockets.path().to_owned(),
        kv: KvOptions::default(),
    };
    worker::run(config, engine, card, text.tokenizer, streams, stop).await.unwrap();
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

/// An engine that fails at every prefill, as one with a bad card would.
struct Broken(Box<dyn Engine>);

impl Engine for Broken {
    fn card(&self) -> &EngineCard {
        self.0.card()
    }

    fn kv(&self) -> &Arc<Region> {
        self.0.kv()
    }

    fn prefill(
        &mut self,
        _slot: u32,
        _start: u32,
        _tokens: &[u32],
        _draw: Option<Draw<'_>>,
    ) -> Result<Option<Sampled>, EngineError> {
        Err(EngineError::Runtime("out of luck".into()))
    }

    fn decode(
        &mut self,
        rows: &[Row<'_>],
        parked: &[u32],
        out: &mut Vec<Sampled>,
    ) -> Result<(), EngineError> {
        self.0.decode(rows, parked, out)
    }
}

#[tokio::test]
async fn what_fails_again_and_again_fails_once_and_is_kept() {
    let streams = memory::streams();
    let end = ended(streams.clone(), accepted(10, 5), 0, 0, Box::new(Broken(sim()))).await;
    let Body::RequestFailed(failed) = end else { panic!("{end:?}") };
    assert_eq!(failed.code, FailureCode::EngineFailed);
    assert!(failed.message.contains("out of luck"), "{}", failed.message);
    let letters = streams.dead_letters.list().await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!((letters[0].attempts, letters[0].code), (5, Some(FailureCode::EngineFailed)));
    assert_eq!(letters[0].reason, failed.message);
    // Every attempt is in the log with its reason.
    let log = streams.log.find(letters[0].request).await.unwrap().unwrap();
    let events = streams.log.read(&log, 0).await.unwrap();
    let given_back = events.iter().filter(|recorded| matches!(recorded.event.body, Body::Released(_)));
    assert_eq!(given_back.count(), 4);
}

/// A request that ends every worker that takes it is not tried for ever.
#[tokio::test]
async fn a_poisonous_request_is_given_up() {
    let streams = memory::streams();
    let end = ended(streams.clone(), accepted(10, 5), 5, 0, sim()).await;
    let Body::RequestFailed(failed) = end else { panic!("{end:?}") };
    assert_eq!(failed.code, FailureCode::TooManyAttempts);
    assert_eq!(streams.dead_letters.list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn attempts_that_brought_tokens_do_not_count() {
    let end = ended(memory::streams(), accepted(10, 5), 9, 3, sim()).await;
    assert!(matches!(end, Body::RequestCompleted(_)), "{end:?}");
}
