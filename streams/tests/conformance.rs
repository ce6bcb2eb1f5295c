//! What every backend must do, run on each of them: in memory, and on a real nats-server.

use forebay_schemas::{
    cache::BlockHash,
    cache_event::{CacheChange, CacheEvent},
    card::{ModelCard, SamplingDefaults, WorkerLease},
    dead_letter::DeadLetter,
    event::{Body, Claimed, Event, RequestAccepted, RequestCancelled, TokensGenerated},
    ids::{GatewayId, ModelKey, RequestId, WorkerId},
    kv::LayoutHash,
    task::{DecodeTask, Role, Task},
};
use forebay_streams::{
    Streams,
    cache_events::{CacheFollow, Heard, TellError, Told, all_told},
    cancel::cancel,
    follow::{Follow, Hub},
    jetstream::{self, Limits, Options},
    log::{AppendError, LogRef},
    memory,
    own_queues::{Owner, enqueue_to},
    server::Server,
    tasks::{CancelSignal, Delivery, Depth, EnqueueError, Presence, Verdict, enqueue},
    writer::{LogWriter, WriteError},
};
use futures::StreamExt;
use std::{future::Future, time::Duration};

const ACK_WAIT: Duration = Duration::from_secs(1);
const LEASE: Duration = Duration::from_secs(1);
const QUEUE_MAX: usize = 8;

async fn on_memory<F: Future<Output = ()>>(check: impl FnOnce(Streams) -> F) {
    let limits =
        memory::Limits { queue_max: QUEUE_MAX, ack_wait: ACK_WAIT, max_deliver: 3, lease_time: LEASE };
    check(memory::streams_with(limits)).await;
}

async fn on_jetstream<F: Future<Output = ()>>(check: impl FnOnce(Streams) -> F) {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(None, folder.path(), 0).unwrap();
    check(connect(&server).await).await;
}

async fn connect(server: &Server) -> Streams {
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

macro_rules! conformance {
    ($($name:ident),+ $(,)?) => {
        mod in_memory {
            $(#[tokio::test] async fn $name() { super::on_memory(super::$name).await; })+
        }
        mod nats_server {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
              async fn $name() { super::on_jetstream(super::$name).await; })+
        }
    };
}

conformance! {
    a_log_reads_back_in_order,
    the_fence_lets_one_author_through,
    an_overtaken_author_is_told,
    a_cancel_ends_the_log_once,
    a_follower_misses_nothing,
    a_follower_of_a_stuck_client_catches_up,
    a_watch_sees_only_its_log,
    what_was_there_before_is_read_at_once,
    tasks_are_delivered_once_while_worked_on,
    an_unanswered_task_comes_again,
    a_returned_task_comes_at_once,
    a_task_is_not_delivered_for_ever,
    a_task_published_twice_is_queued_once,
    a_full_queue_refuses,
    models_outlive_and_leases_lapse,
    blobs_read_back,
    signals_reach_their_worker,
    a_request_is_begun_once_whatever_the_gateway,
    a_log_can_be_removed,
    two_followers_of_one_request_miss_nothing,
    a_task_given_back_for_later_comes_later,
    a_workers_presence_is_known,
    spent_tasks_are_found_and_settled,
    dead_letters_are_kept_and_dropped,
    an_own_queue_is_its_workers_alone,
    a_task_given_back_from_an_own_queue_moves_to_the_shared_one,
    a_closed_queue_leaves_nothing_behind,
    a_routed_task_is_queued_once,
    an_own_queue_can_be_opened_again,
    a_task_of_an_own_queue_waits_while_the_shared_one_is_full,
    cache_events_are_followed_from_what_is_kept,
    a_snapshot_replaces_what_was_told,
    a_worker_learns_that_its_events_are_gone,
}

fn gateway() -> GatewayId {
    GatewayId::new("gw-test").unwrap()
}

fn log() -> LogRef {
    LogRef { gateway: gateway(), request: RequestId::new() }
}

fn worker(name: &str) -> WorkerId {
    WorkerId::new(name).unwrap()
}

fn accepted() -> RequestAccepted {
    RequestAccepted::greedy("demo", vec![1, 2, 3], 1000)
}

fn claim(name: &str) -> Body {
    Body::Claimed(Claimed { worker: worker(name), ack_subject: "ack".into(), delivery: 1, engine: None })
}

fn token(index: u32) -> Body {
    Body::TokensGenerated(TokensGenerated {
        first_index: index,
        tokens: vec![index],
        text: format!("{index} "),
        cached_tokens: 0,
    })
}

async fn create(streams: &Streams, log: &LogRef) -> LogWriter {
    LogWriter::create(streams.log.clone(), log.clone(), accepted()).await.unwrap()
}

fn names(events: &[Event]) -> Vec<&'static str> {
    events.iter().map(|event| event.body.name()).collect()
}

async fn a_log_reads_back_in_order(streams: Streams) {
    let (log, other) = (log(), log());
    let mut writer = create(&streams, &log).await;
    create(&streams, &other).await;
    writer.append(claim("w-1")).await.unwrap();
    for index in 0..700 {
        writer.append(token(index)).await.unwrap();
    }
    let all = streams.log.read(&log, 0).await.unwrap();
    assert_eq!(all.len(), 702);
    assert!(all.windows(2).all(|pair| pair[0].seq < pair[1].seq));
    assert_eq!(all[701].event.body, token(699));
    let part = streams.log.read(&log, all[700].seq).await.unwrap();
    assert_eq!(part, all[701..]);
    assert_eq!(streams.log.last_seq(&log).await.unwrap(), all[701].seq);
    assert_eq!(streams.log.find(log.request).await.unwrap(), Some(log.clone()));
    assert_eq!(streams.log.find(RequestId::new()).await.unwrap(), None);
    let again = LogWriter::open(streams.log.clone(), log).await.unwrap();
    assert_eq!(again.state(), writer.state());
}

async fn the_fence_lets_one_author_through(streams: Streams) {
    let log = log();
    let writer = create(&streams, &log).await;
    let event = |name: &str| Event { request: log.request, attempt: 1, time_us: 1, body: claim(name) };
    let (a, b) = (event("w-a"), event("w-b"));
    let (a, b) =
        tokio::join!(streams.log.append(&log, writer.seq(), &a), streams.log.append(&log, writer.seq(), &b));
    let refused = match (a, b) {
        (Ok(_), Err(error)) | (Err(error), Ok(_)) => error,
        other => panic!("exactly one append must succeed: {other:?}"),
    };
    assert!(matches!(refused, AppendError::Conflict { .. }), "{refused}");
    assert_eq!(streams.log.read(&log, 0).await.unwrap().len(), 2);
}

async fn an_overtaken_author_is_told(streams: Streams) {
    let log = log();
    create(&streams, &log).await;
    let mut old = LogWriter::open(streams.log.clone(), log.clone()).await.unwrap();
    old.append(claim("w-old")).await.unwrap();
    old.append(token(0)).await.unwrap();
    let mut new = LogWriter::open(streams.log.clone(), log.clone()).await.unwrap();
    new.append(claim("w-new")).await.unwrap();
    let refused = old.append(token(1)).await.unwrap_err();
    assert!(matches!(refused, WriteError::Overtaken { .. }), "{refused}");
    new.append(token(1)).await.unwrap();
    assert_eq!(new.state().tokens, [0, 1]);
    assert_eq!(new.state().attempt, 2);
}

async fn a_cancel_ends_the_log_once(streams: Streams) {
    let log = log();
    let mut writer = create(&streams, &log).await;
    writer.append(claim("w-1")).await.unwrap();
    assert!(cancel(&streams, &log, "test").await.unwrap());
    assert!(!cancel(&streams, &log, "again").await.unwrap());
    assert!(matches!(writer.append(token(0)).await, Err(WriteError::Overtaken { .. })));
    let events: Vec<Event> = streams.log.read(&log, 0).await.unwrap().into_iter().map(|r| r.event).collect();
    assert_eq!(names(&events), ["RequestAccepted", "Claimed", "RequestCancelled"]);
}

async fn follow_to_end(mut follow: Follow) -> Vec<Event> {
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

async fn write_a_life(streams: &Streams, log: &LogRef, tokens: u32) {
    let mut writer = create(streams, log).await;
    writer.append(claim("w-1")).await.unwrap();
    for index in 0..tokens {
        writer.append(token(index)).await.unwrap();
    }
    writer.append(Body::RequestCancelled(RequestCancelled { cause: "end".into() })).await.unwrap();
}

async fn a_follower_misses_nothing(streams: Streams) {
    let hub = Hub::start(streams.log.clone(), gateway(), |_| {}).await.unwrap();
    let logs: Vec<LogRef> = (0..8).map(|_| log()).collect();
    let followers: Vec<_> =
        logs.iter().map(|log| tokio::spawn(follow_to_end(hub.follow(log.request, 0)))).collect();
    futures::future::join_all(logs.iter().map(|log| write_a_life(&streams, log, 100))).await;
    for (log, follower) in logs.iter().zip(followers) {
        let followed = follower.await.unwrap();
        let stored: Vec<Event> =
            streams.log.read(log, 0).await.unwrap().into_iter().map(|r| r.event).collect();
        assert_eq!(followed, stored);
    }
    assert_eq!(hub.followed(), 0);
}

async fn a_follower_of_a_stuck_client_catches_up(streams: Streams) {
    let hub = Hub::start(streams.log.clone(), gateway(), |_| {}).await.unwrap();
    let log = log();
    let stuck = hub.follow(log.request, 0);
    // Far more events than wait for one follower, none of which is taken meanwhile.
    write_a_life(&streams, &log, 500).await;
    let followed = follow_to_end(stuck).await;
    assert_eq!(followed.len(), 503);
}

async fn a_watch_sees_only_its_log(streams: Streams) {
    let (log, other) = (log(), log());
    let writer = create(&streams, &log).await;
    let follow = Follow::watch(streams.log.clone(), log.clone(), writer.seq()).await.unwrap();
    write_a_life(&streams, &other, 10).await;
    cancel(&streams, &log, "test").await.unwrap();
    assert_eq!(names(&follow_to_end(follow).await), ["RequestCancelled"]);
}

fn model() -> ModelKey {
    ModelKey::of("test/model")
}

fn task() -> DecodeTask {
    DecodeTask { request: RequestId::new(), gateway: gateway(), model: model() }
}

/// A task in its queue.
async fn queued(streams: &Streams) -> DecodeTask {
    streams.tasks.ensure(&model()).await.unwrap();
    let task = task();
    enqueue(&*streams.tasks, &task).await.unwrap();
    task
}

async fn pull(streams: &Streams, wait_ms: u64) -> Option<forebay_streams::tasks::Delivery> {
    streams.tasks.pull(Role::Decode, &model(), Duration::from_millis(wait_ms)).await.unwrap()
}

async fn what_was_there_before_is_read_at_once(streams: Streams) {
    let hub = Hub::start(streams.log.clone(), gateway(), |_| {}).await.unwrap();
    let log = log();
    write_a_life(&streams, &log, 3).await;
    let began = tokio::time::Instant::now();
    assert_eq!(follow_to_end(hub.follow(log.request, 0).catching_up()).await.len(), 6);
    let watch = Follow::watch(streams.log.clone(), log, 0).await.unwrap();
    assert_eq!(follow_to_end(watch.catching_up()).await.len(), 6);
    assert!(began.elapsed() < Duration::from_millis(300), "{:?}", began.elapsed());
}

async fn tasks_are_delivered_once_while_worked_on(streams: Streams) {
    streams.tasks.ensure(&model()).await.unwrap();
    assert_eq!(pull(&streams, 50).await, None);
    let waiting = tokio::spawn({
        let streams = streams.clone();
        async move { pull(&streams, 5000).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let task = task();
    enqueue(&*streams.tasks, &task).await.unwrap();
    let delivery = waiting.await.unwrap().unwrap();
    assert_eq!(DecodeTask::decode(&delivery.payload).unwrap(), task);
    assert_eq!(delivery.delivery, 1);
    assert_eq!(
        streams.tasks.depth(Role::Decode, &model()).await.unwrap(),
        Depth { pending: 0, ack_pending: 1 }
    );
    for _ in 0..4 {
        tokio::time::sleep(ACK_WAIT / 2).await;
        streams.tasks.answer(&delivery.ack_subject, Verdict::Progress).await.unwrap();
    }
    assert_eq!(pull(&streams, 50).await, None, "a task in progress is not delivered again");
    streams.tasks.answer(&delivery.ack_subject, Verdict::Ack).await.unwrap();
    assert_eq!(pull(&streams, 1500).await, None);
    assert_eq!(streams.tasks.depth(Role::Decode, &model()).await.unwrap().lag(), 0);
}

async fn an_unanswered_task_comes_again(streams: Streams) {
    streams.tasks.ensure(&model()).await.unwrap();
    enqueue(&*streams.tasks, &task()).await.unwrap();
    let first = pull(&streams, 1000).await.unwrap();
    let second = pull(&streams, 4000).await.unwrap();
    assert_eq!((first.delivery, second.delivery), (1, 2));
    assert_eq!(first.payload, second.payload);
}

async fn a_returned_task_comes_at_once(streams: Streams) {
    streams.tasks.ensure(&model()).await.unwrap();
    enqueue(&*streams.tasks, &task()).await.unwrap();
    let first = pull(&streams, 1000).await.unwrap();
    streams.tasks.answer(&first.ack_subject, Verdict::Nak).await.unwrap();
    let second = pull(&streams, ACK_WAIT.as_millis() as u64 / 2).await.expect("before the ack wait is over");
    assert_eq!(second.delivery, 2);
}

async fn a_task_is_not_delivered_for_ever(streams: Streams) {
    streams.tasks.ensure(&model()).await.unwrap();
    enqueue(&*streams.tasks, &task()).await.unwrap();
    for _ in 0..3 {
        let delivery = pull(&streams, 1000).await.unwrap();
        streams.tasks.answer(&delivery.ack_subject, Verdict::Nak).await.unwrap();
    }
    assert_eq!(pull(&streams, 300).await, None);
}

async fn a_task_published_twice_is_queued_once(streams: Streams) {
    streams.tasks.ensure(&model()).await.unwrap();
    let task = task();
    enqueue(&*streams.tasks, &task).await.unwrap();
    enqueue(&*streams.tasks, &task).await.unwrap();
    assert_eq!(
        streams.tasks.depth(Role::Decode, &model()).await.unwrap(),
        Depth { pending: 1, ack_pending: 0 }
    );
}

async fn a_full_queue_refuses(streams: Streams) {
    streams.tasks.ensure(&model()).await.unwrap();
    for free in (1..=QUEUE_MAX as u64).rev() {
        assert_eq!(streams.tasks.room(Role::Decode).await.unwrap(), free);
        enqueue(&*streams.tasks, &task()).await.unwrap();
    }
    assert_eq!(streams.tasks.room(Role::Decode).await.unwrap(), 0);
    let refused = enqueue(&*streams.tasks, &task()).await.unwrap_err();
    assert!(matches!(refused, EnqueueError::Full { .. }), "{refused}");
    let delivery = pull(&streams, 1000).await.unwrap();
    streams.tasks.answer(&delivery.ack_subject, Verdict::Ack).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(streams.tasks.room(Role::Decode).await.unwrap(), 1);
    enqueue(&*streams.tasks, &task()).await.unwrap();
    assert_eq!(streams.tasks.room(Role::Prefill).await.unwrap(), QUEUE_MAX as u64);
}

async fn models_outlive_and_leases_lapse(streams: Streams) {
    let card = ModelCard {
        name: "test/model".into(),
        key: model(),
        created_s: 1,
        vocab_size: 100,
        context_tokens: 64,
        eos_token_ids: vec![2],
        tokenizer: streams.catalog.put_blob("tokenizer".into()).await.unwrap(),
        chat_template: None,
        special_tokens: vec![],
        defaults: SamplingDefaults { temperature: 1.0, top_p: 1.0, top_k: 0 },
        layout_hash: LayoutHash(7),
        weights: "fp32".into(),
    };
    let lease = WorkerLease {
        worker: worker("w-1"),
        incarnation: 1,
        role: Role::Decode,
        model: model(),
        layout_hash: LayoutHash(7),
        slots: 4,
        free_slots: 4,
        host: "here".into(),
        kv_socket: String::new(),
        kv_tcp: None,
        kv_nixl: false,
        active_tokens: 0,
        prefill_tokens: 0,
        draining: false,
        kv_leases: 0,
        own_queue: false,
    };
    streams.catalog.publish_model(&card).await.unwrap();
    streams.registry.renew(&lease).await.unwrap();
    let mut models = streams.catalog.models().await.unwrap();
    let mut workers = streams.registry.workers().await.unwrap();
    assert_eq!(*models.wait_for(|all| !all.is_empty()).await.unwrap()["test/model"], card);
    assert_eq!(*workers.wait_for(|all| !all.is_empty()).await.unwrap()[&worker("w-1")], lease);
    let lapsed = tokio::time::timeout(LEASE * 3, workers.wait_for(|all| all.is_empty())).await.is_ok();
    assert!(lapsed, "a lease that is not renewed lapses");
    streams.registry.renew(&lease).await.unwrap();
    workers.wait_for(|all| !all.is_empty()).await.unwrap();
    streams.registry.resign(&worker("w-1")).await.unwrap();
    let resigned = tokio::time::timeout(LEASE / 2, workers.wait_for(|all| all.is_empty())).await.is_ok();
    assert!(resigned, "a worker that resigns is gone at once");
    assert_eq!(models.borrow().len(), 1, "the model stays");
}

async fn blobs_read_back(streams: Streams) {
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
    let blob = streams.catalog.put_blob(bytes.clone().into()).await.unwrap();
    assert_eq!(streams.catalog.put_blob(bytes.clone().into()).await.unwrap(), blob);
    assert_eq!(streams.catalog.get_blob(&blob).await.unwrap(), bytes);
    let mut other = blob;
    other.name = "0".repeat(64);
    assert!(streams.catalog.get_blob(&other).await.is_err());
}

async fn signals_reach_their_worker(streams: Streams) {
    let mut mine = streams.tasks.cancel_signals(&worker("w-1")).await.unwrap();
    let signal = CancelSignal { request: RequestId::new(), cause: "test".into() };
    let other = CancelSignal { request: RequestId::new(), cause: "other".into() };
    streams.tasks.signal_cancel(&worker("w-2"), &other).await.unwrap();
    streams.tasks.signal_cancel(&worker("w-1"), &signal).await.unwrap();
    let received = tokio::time::timeout(Duration::from_secs(5), mine.next()).await.unwrap().unwrap();
    assert_eq!(received, signal);
}

/// What only a real server can show.
mod server_faults {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn appends_wait_for_a_server_that_restarts() {
        let folder = tempfile::tempdir().unwrap();
        let mut server = Server::start(None, folder.path(), 0).unwrap();
        let streams = connect(&server).await;
        let log = log();
        let hub = Hub::start(streams.log.clone(), gateway(), |_| {}).await.unwrap();
        let follower = tokio::spawn(follow_to_end(hub.follow(log.request, 0)));
        let mut writer = create(&streams, &log).await;
        writer.append(claim("w-1")).await.unwrap();
        let author = tokio::spawn(async move {
            for index in 0..3000 {
                writer.append(token(index)).await.unwrap();
            }
            writer.append(Body::RequestCancelled(RequestCancelled { cause: "end".into() })).await.unwrap();
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!author.is_finished(), "the server must die while the log is written");
        let _server = tokio::task::spawn_blocking(move || {
            server.kill();
            std::thread::sleep(Duration::from_millis(500));
            server.restart().unwrap();
            server
        })
        .await
        .unwrap();
        author.await.unwrap();
        let followed = follower.await.unwrap();
        assert_eq!(followed.len(), 3003);
        let stored: Vec<Event> =
            streams.log.read(&log, 0).await.unwrap().into_iter().map(|r| r.event).collect();
        assert_eq!(followed, stored);
    }

    #[tokio::test]
    async fn a_request_larger_than_a_message_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::start(None, folder.path(), 0).unwrap();
        let streams = connect(&server).await;
        let long = RequestAccepted { prompt: vec![u32::MAX; 300_000], ..accepted() };
        let refused = LogWriter::create(streams.log.clone(), log(), long).await.err().unwrap();
        assert!(matches!(refused, AppendError::TooLarge { .. }), "{refused}");
    }

    #[tokio::test]
    async fn a_server_without_jetstream_is_said_with_what_to_do() {
        let program = forebay_streams::server::find_tool("FOREBAY_NATS_SERVER", "nats-server").unwrap();
        let port = forebay_streams::server::free_port().unwrap();
        let mut plain = std::process::Command::new(program)
            .args(["-a", "127.0.0.1", "-p", &port.to_string()])
            .spawn()
            .unwrap();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let options = Options {
            url: format!("nats://127.0.0.1:{port}"),
            name: "test".into(),
            inbox_prefix: "_INBOX.test".into(),
            credentials: None,
            limits: Limits::default(),
        };
        let error = jetstream::connect(options).await.err().unwrap().to_string();
        plain.kill().unwrap();
        plain.wait().unwrap();
        assert!(error.contains("no JetStream") && error.contains("-js"), "{error}");
    }

    #[tokio::test]
    async fn no_server_is_said_with_what_to_do() {
        let options = Options {
            url: "nats://127.0.0.1:1".into(),
            name: "test".into(),
            inbox_prefix: "_INBOX.test".into(),
            credentials: None,
            limits: Limits::default(),
        };
        let error = jetstream::connect(options).await.err().unwrap().to_string();
        assert!(error.contains("no NATS server answers at nats://127.0.0.1:1"), "{error}");
        assert!(error.contains("forebay up"), "{error}");
    }
}

async fn a_request_is_begun_once_whatever_the_gateway(streams: Streams) {
    let first = log();
    let second = LogRef { gateway: GatewayId::new("gw-other").unwrap(), ..first.clone() };
    LogWriter::create(streams.log.clone(), first.clone(), accepted()).await.unwrap();
    for again in [&first, &second] {
        let refused = LogWriter::create(streams.log.clone(), again.clone(), accepted()).await;
        assert!(matches!(refused, Err(AppendError::Conflict { .. })));
    }
    assert_eq!(streams.log.find(first.request).await.unwrap(), Some(first));
    // Another request of the same gateways is none of its business.
    LogWriter::create(streams.log.clone(), log(), accepted()).await.unwrap();
}

async fn a_log_can_be_removed(streams: Streams) {
    let (gone, stays) = (log(), log());
    for log in [&gone, &stays] {
        LogWriter::create(streams.log.clone(), log.clone(), accepted()).await.unwrap();
    }
    streams.log.remove(&gone).await.unwrap();
    assert_eq!(streams.log.find(gone.request).await.unwrap(), None);
    assert_eq!(streams.log.read(&stays, 0).await.unwrap().len(), 1);
    let open = LogWriter::open(streams.log.clone(), gone).await;
    assert!(matches!(open, Err(WriteError::Missing(_))));
}

async fn two_followers_of_one_request_miss_nothing(streams: Streams) {
    let hub = Hub::start(streams.log.clone(), gateway(), |_| {}).await.unwrap();
    let log = log();
    let (mut one, mut two) = (hub.follow(log.request, 0), hub.follow(log.request, 0));
    let mut writer = LogWriter::create(streams.log.clone(), log.clone(), accepted()).await.unwrap();
    one.next().await.unwrap();
    drop(one);
    writer.append(claim("w")).await.unwrap();
    for name in ["RequestAccepted", "Claimed"] {
        assert_eq!(two.next().await.unwrap().event.body.name(), name);
    }
    assert_eq!(hub.followed(), 1);
    drop(two);
    assert_eq!(hub.followed(), 0);
}

async fn a_task_given_back_for_later_comes_later(streams: Streams) {
    let task = queued(&streams).await;
    let pull = async |wait| streams.tasks.pull(Role::Decode, &task.model, wait).await.unwrap();
    let first = pull(Duration::from_secs(5)).await.expect("a task");
    streams.tasks.answer(&first.ack_subject, Verdict::Later(Duration::from_millis(600))).await.unwrap();
    assert_eq!(pull(Duration::from_millis(200)).await, None);
    assert_eq!(pull(Duration::from_secs(5)).await.expect("the task again").delivery, 2);
}

async fn a_workers_presence_is_known(streams: Streams) {
    let worker = worker("worker-1");
    let presence = async || streams.tasks.presence(&worker, Duration::from_secs(2)).await.unwrap();
    assert_eq!(presence().await, Presence::Gone);
    let mut signals = streams.tasks.cancel_signals(&worker).await.unwrap();
    let reading = tokio::spawn(async move { signals.next().await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(presence().await, Presence::Answers);
    reading.abort();
    let _ = reading.await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(presence().await, Presence::Gone);
}

async fn spent_tasks_are_found_and_settled(streams: Streams) {
    let task = queued(&streams).await;
    let pull = async || streams.tasks.pull(Role::Decode, &task.model, Duration::from_secs(2)).await.unwrap();
    for _ in 0..3 {
        let delivery = pull().await.expect("a task");
        streams.tasks.answer(&delivery.ack_subject, Verdict::Nak).await.unwrap();
    }
    assert_eq!(pull().await, None);
    let spent = async |wait| streams.dead_letters.spent(Duration::from_secs(wait)).await.unwrap();
    let found = spent(10).await.expect("a spent task");
    assert_eq!((found.role, DecodeTask::decode(&found.payload).unwrap()), (Role::Decode, task));
    streams.dead_letters.settle(&found).await.unwrap();
    assert_eq!(spent(1).await, None);
}

async fn dead_letters_are_kept_and_dropped(streams: Streams) {
    let letter = |request, reason: &str| DeadLetter {
        request,
        gateway: gateway(),
        model: ModelKey::of("m"),
        role: Role::Decode,
        code: None,
        reason: reason.into(),
        attempts: 5,
        time_us: 1,
    };
    let (one, two) = (RequestId::new(), RequestId::new());
    let letters = &streams.dead_letters;
    for (request, reason) in [(one, "first"), (two, "other"), (one, "second")] {
        letters.bury(&letter(request, reason)).await.unwrap();
    }
    assert_eq!(letters.list().await.unwrap(), [letter(two, "other"), letter(one, "second")]);
    assert_eq!(letters.drop_letter(one).await.unwrap(), 1);
    assert_eq!(letters.drop_letter(one).await.unwrap(), 0);
    assert_eq!(letters.list().await.unwrap(), [letter(two, "other")]);
}

fn owner(name: &str) -> Owner {
    Owner { model: model(), worker: worker(name) }
}

async fn pull_own(streams: &Streams, owner: &Owner, wait_ms: u64) -> Option<Delivery> {
    streams.own_queues.pull_own(owner, Duration::from_millis(wait_ms)).await.unwrap()
}

/// A task in the own queue of a worker.
async fn routed(streams: &Streams, to: &Owner) -> DecodeTask {
    streams.tasks.ensure(&model()).await.unwrap();
    streams.own_queues.open(to).await.unwrap();
    let task = task();
    enqueue_to(&*streams.own_queues, &to.worker, &task).await.unwrap();
    task
}

async fn an_own_queue_is_its_workers_alone(streams: Streams) {
    let (mine, other) = (owner("w-1"), owner("w-2"));
    let task = routed(&streams, &mine).await;
    streams.own_queues.open(&other).await.unwrap();
    assert_eq!(pull(&streams, 100).await, None);
    assert_eq!(pull_own(&streams, &other, 100).await, None);
    assert_eq!(streams.own_queues.filled().await.unwrap(), std::slice::from_ref(&mine));
    // Autoscalers look at the shared queue.
    assert_eq!(streams.tasks.depth(Role::Decode, &model()).await.unwrap().lag(), 0);
    let delivery = pull_own(&streams, &mine, 5000).await.expect("a task");
    assert_eq!(DecodeTask::decode(&delivery.payload).unwrap(), task);
    for _ in 0..4 {
        tokio::time::sleep(ACK_WAIT / 2).await;
        streams.tasks.answer(&delivery.ack_subject, Verdict::Progress).await.unwrap();
    }
    assert_eq!(pull_own(&streams, &mine, 50).await, None, "a task in progress is not delivered again");
    streams.tasks.answer(&delivery.ack_subject, Verdict::Ack).await.unwrap();
    assert_eq!(pull_own(&streams, &mine, 1500).await, None);
    assert_eq!(streams.own_queues.filled().await.unwrap(), []);
}

async fn a_task_given_back_from_an_own_queue_moves_to_the_shared_one(streams: Streams) {
    let mine = owner("w-1");
    for verdict in [Verdict::Nak, Verdict::Later(Duration::from_millis(200))] {
        let task = routed(&streams, &mine).await;
        let delivery = pull_own(&streams, &mine, 5000).await.expect("a task");
        // Whoever gives it back, and however often.
        for _ in 0..2 {
            streams.tasks.answer(&delivery.ack_subject, verdict).await.unwrap();
        }
        let again = pull(&streams, 5000).await.expect("the task");
        assert_eq!(DecodeTask::decode(&again.payload).unwrap(), task);
        assert_eq!(again.delivery, 1);
        streams.tasks.answer(&again.ack_subject, Verdict::Ack).await.unwrap();
        streams.tasks.answer(&delivery.ack_subject, verdict).await.unwrap();
        assert_eq!(pull(&streams, 300).await, None);
        assert_eq!(streams.own_queues.filled().await.unwrap(), []);
    }
}

async fn a_closed_queue_leaves_nothing_behind(streams: Streams) {
    let gone = owner("w-gone");
    let tasks = [routed(&streams, &gone).await, routed(&streams, &gone).await, routed(&streams, &gone).await];
    let delivered = pull_own(&streams, &gone, 5000).await.expect("a task");
    let (one, two) = tokio::join!(streams.own_queues.close(&gone), streams.own_queues.close(&gone));
    assert!(one.unwrap() + two.unwrap() >= 3);
    assert_eq!(streams.own_queues.filled().await.unwrap(), []);
    // A gateway that has not heard of the end gives back what was delivered there.
    streams.tasks.answer(&delivered.ack_subject, Verdict::Nak).await.unwrap();
    let mut found = Vec::new();
    while let Some(delivery) = pull(&streams, 500).await {
        found.push(DecodeTask::decode(&delivery.payload).unwrap().request);
        streams.tasks.answer(&delivery.ack_subject, Verdict::Ack).await.unwrap();
    }
    let mut expected: Vec<RequestId> = tasks.iter().map(|task| task.request).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    assert!(streams.own_queues.pull_own(&gone, Duration::from_millis(100)).await.is_err());
    assert_eq!(streams.own_queues.close(&gone).await.unwrap(), 0);
}

async fn a_routed_task_is_queued_once(streams: Streams) {
    let mine = owner("w-1");
    let task = routed(&streams, &mine).await;
    enqueue_to(&*streams.own_queues, &mine.worker, &task).await.unwrap();
    // A client that asks again, at a gateway that does not know where it went.
    enqueue(&*streams.tasks, &task).await.unwrap();
    assert_eq!(pull(&streams, 200).await, None);
    let delivery = pull_own(&streams, &mine, 5000).await.expect("a task");
    streams.tasks.answer(&delivery.ack_subject, Verdict::Ack).await.unwrap();
    assert_eq!(pull_own(&streams, &mine, 200).await, None);
}

async fn an_own_queue_can_be_opened_again(streams: Streams) {
    let mine = owner("w-1");
    streams.own_queues.open(&mine).await.unwrap();
    streams.own_queues.close(&mine).await.unwrap();
    // What is routed meanwhile waits.
    enqueue_to(&*streams.own_queues, &mine.worker, &task()).await.unwrap();
    streams.own_queues.open(&mine).await.unwrap();
    streams.own_queues.open(&mine).await.unwrap();
    assert!(pull_own(&streams, &mine, 5000).await.is_some());
}

async fn a_task_of_an_own_queue_waits_while_the_shared_one_is_full(streams: Streams) {
    let mine = owner("w-1");
    routed(&streams, &mine).await;
    while streams.tasks.room(Role::Decode).await.unwrap() > 0 {
        enqueue(&*streams.tasks, &task()).await.unwrap();
    }
    let delivery = pull_own(&streams, &mine, 5000).await.expect("a task");
    streams.tasks.answer(&delivery.ack_subject, Verdict::Nak).await.unwrap();
    while let Some(other) = pull(&streams, 300).await {
        streams.tasks.answer(&other.ack_subject, Verdict::Ack).await.unwrap();
    }
    if let Some(again) = pull_own(&streams, &mine, 3000).await {
        streams.tasks.answer(&again.ack_subject, Verdict::Nak).await.unwrap();
        assert!(pull(&streams, 3000).await.is_some());
    }
    assert_eq!(streams.own_queues.filled().await.unwrap(), []);
}

fn stored(of: &Owner, number: u64) -> CacheEvent {
    let blocks = vec![BlockHash::from_bytes([number as u8; 16])];
    CacheEvent { worker: of.worker.clone(), incarnation: 1, number, change: CacheChange::Stored { blocks } }
}

fn snapshot(of: &Owner, number: u64, part: u32) -> CacheEvent {
    let change = CacheChange::Snapshot { blocks: vec![], part, parts: 2 };
    CacheEvent { worker: of.worker.clone(), incarnation: 1, number, change }
}

fn events(told: Vec<Told>) -> Vec<CacheEvent> {
    told.into_iter().map(|told| told.event.expect("readable")).collect()
}

async fn hear(follow: &mut CacheFollow, count: usize) -> Vec<CacheEvent> {
    let mut all = Vec::new();
    while all.len() < count {
        match tokio::time::timeout(Duration::from_secs(20), follow.next()).await.unwrap().unwrap() {
            Heard::Events(told) => all.extend(events(told)),
            Heard::Anew => panic!("nothing began anew"),
        }
    }
    all
}

async fn cache_events_are_followed_from_what_is_kept(streams: Streams) {
    let cache = &streams.cache_events;
    let (one, two) = (owner("w-1"), owner("w-2"));
    let first = cache.tell(&one, &stored(&one, 0), 0).await.unwrap();
    let second = cache.tell(&two, &stored(&two, 0), 0).await.unwrap();
    let mut follow = CacheFollow::start(cache.clone()).await.unwrap();
    assert_eq!(hear(&mut follow, 2).await, [stored(&one, 0), stored(&two, 0)]);
    let (mut last, mut expected) = (first, Vec::new());
    for number in 1..=300 {
        last = cache.tell(&one, &stored(&one, number), last).await.unwrap();
        expected.push(stored(&one, number));
    }
    cache.tell(&two, &stored(&two, 1), second).await.unwrap();
    expected.push(stored(&two, 1));
    assert_eq!(hear(&mut follow, 301).await, expected);
    assert_eq!(all_told(cache.as_ref(), &one).await.unwrap().len(), 301);
    let idle = tokio::time::timeout(Duration::from_secs(3), follow.next()).await;
    assert!(idle.is_err(), "nothing more was told: {idle:?}");
}

async fn a_snapshot_replaces_what_was_told(streams: Streams) {
    let cache = &streams.cache_events;
    let (mine, other) = (owner("w-1"), owner("w-2"));
    cache.tell(&other, &stored(&other, 0), 0).await.unwrap();
    let last = cache.tell(&mine, &stored(&mine, 0), 0).await.unwrap();
    cache.tell(&mine, &stored(&mine, 1), last).await.unwrap();
    // Whatever the author knows of it.
    let last = cache.tell(&mine, &snapshot(&mine, 2, 0), 0).await.unwrap();
    let last = cache.tell(&mine, &snapshot(&mine, 3, 1), last).await.unwrap();
    cache.tell(&mine, &stored(&mine, 4), last).await.unwrap();
    let kept = events(all_told(cache.as_ref(), &mine).await.unwrap());
    assert_eq!(kept, [snapshot(&mine, 2, 0), snapshot(&mine, 3, 1), stored(&mine, 4)]);
    assert_eq!(events(all_told(cache.as_ref(), &other).await.unwrap()), [stored(&other, 0)]);
}

async fn a_worker_learns_that_its_events_are_gone(streams: Streams) {
    let cache = &streams.cache_events;
    let mine = owner("w-1");
    let last = cache.tell(&mine, &stored(&mine, 0), 0).await.unwrap();
    cache.forget(&mine).await.unwrap();
    assert_eq!(all_told(cache.as_ref(), &mine).await.unwrap(), []);
    assert_eq!(cache.last_told().await.unwrap(), last);
    let refused = cache.tell(&mine, &stored(&mine, 1), last).await.unwrap_err();
    assert!(matches!(refused, TellError::Overtaken(_)), "{refused}");
    cache.tell(&mine, &snapshot(&mine, 1, 0), last).await.unwrap();
    assert_eq!(all_told(cache.as_ref(), &mine).await.unwrap().len(), 1);
}
