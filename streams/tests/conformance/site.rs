//! Backends to check, and what is put into them.

use forebay_schemas::{
    event::{Body, Claimed, Event, RequestAccepted, RequestCancelled, TokensGenerated},
    ids::{GatewayId, ModelKey, RequestId, WorkerId},
    task::{DecodeTask, Role},
};
use forebay_streams::{
    Streams,
    follow::Follow,
    jetstream::{self, Limits, Options},
    log::LogRef,
    memory,
    own_queues::Owner,
    server::Server,
    tasks::enqueue,
    writer::LogWriter,
};
use std::{future::Future, time::Duration};

pub(crate) const ACK_WAIT: Duration = Duration::from_secs(1);
pub(crate) const LEASE: Duration = Duration::from_secs(1);
pub(crate) const QUEUE_MAX: usize = 8;

pub(crate) async fn on_memory<F: Future<Output = ()>>(check: impl FnOnce(Streams) -> F) {
    let limits =
        memory::Limits { queue_max: QUEUE_MAX, ack_wait: ACK_WAIT, max_deliver: 3, lease_time: LEASE };
    check(memory::streams_with(limits)).await;
}

pub(crate) async fn on_jetstream<F: Future<Output = ()>>(check: impl FnOnce(Streams) -> F) {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(None, folder.path(), 0).unwrap();
    check(connect(&server).await).await;
}

pub(crate) async fn connect(server: &Server) -> Streams {
    let limits = Limits {
        queue_max: QUEUE_MAX as u64,
        ack_wait: ACK_WAIT,
        max_deliver: 3,
        lease_time: LEASE,
        log_bytes: 64 << 20,
        ..Limits::default()
    };
    let options = Options {
        url: server.url(),
        name: "conformance".into(),
        inbox_prefix: "_INBOX.test".into(),
        credentials: None,
        limits,
    };
    jetstream::connect(options).await.unwrap()
}

pub(crate) fn gateway() -> GatewayId {
    GatewayId::new("gw-test").unwrap()
}

pub(crate) fn log() -> LogRef {
    LogRef { gateway: gateway(), request: RequestId::new() }
}

pub(crate) fn worker(name: &str) -> WorkerId {
    WorkerId::new(name).unwrap()
}

pub(crate) fn accepted() -> RequestAccepted {
    RequestAccepted::greedy("demo", vec![1, 2, 3], 1000)
}

pub(crate) fn claim(name: &str) -> Body {
    Body::Claimed(Claimed { worker: worker(name), ack_subject: "ack".into(), delivery: 1, engine: None })
}

pub(crate) fn token(index: u32) -> Body {
    Body::TokensGenerated(TokensGenerated {
        first_index: index,
        tokens: vec![index],
        text: format!("{index} "),
        cached_tokens: 0,
        logprobs: Vec::new(),
    })
}

pub(crate) async fn create(streams: &Streams, log: &LogRef) -> LogWriter {
    LogWriter::create(streams.log.clone(), log.clone(), accepted()).await.unwrap()
}

pub(crate) fn names(events: &[Event]) -> Vec<&'static str> {
    events.iter().map(|event| event.body.name()).collect()
}

pub(crate) async fn follow_to_end(mut follow: Follow) -> Vec<Event> {
    let mut events = Vec::new();
    loop {
        let recorded = tokio::time::timeout(Duration::from_secs(20), follow.next()).await.unwrap().unwrap();
        let end = recorded.event.body.is_terminal();
        events.push(recorded.event);
        if end {
            return events;
        }
    }
}

pub(crate) async fn write_a_life(streams: &Streams, log: &LogRef, tokens: u32) {
    let mut writer = create(streams, log).await;
    writer.append(claim("w-1")).await.unwrap();
    for index in 0..tokens {
        writer.append(token(index)).await.unwrap();
    }
    writer.append(Body::RequestCancelled(RequestCancelled { cause: "end".into() })).await.unwrap();
}

pub(crate) fn model() -> ModelKey {
    ModelKey::of("test/model")
}

pub(crate) fn task() -> DecodeTask {
    DecodeTask { request: RequestId::new(), gateway: gateway(), model: model() }
}

/// A task in its queue.
pub(crate) async fn queued(streams: &Streams) -> DecodeTask {
    streams.tasks.ensure(&model()).await.unwrap();
    let task = task();
    enqueue(&*streams.tasks, &task).await.unwrap();
    task
}

pub(crate) async fn pull(streams: &Streams, wait_ms: u64) -> Option<forebay_streams::tasks::Delivery> {
    streams.tasks.pull(Role::Decode, &model(), Duration::from_millis(wait_ms)).await.unwrap()
}

pub(crate) fn owner(name: &str) -> Owner {
    Owner { model: model(), worker: worker(name) }
}
