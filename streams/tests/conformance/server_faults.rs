//! What only a real server can show.

use crate::site::*;
use forebay_schemas::{
    cache_event::{CacheChange, CacheEvent},
    event::{Body, Event, RequestAccepted, RequestCancelled},
};
use forebay_streams::{
    cache_events::{CacheFollow, Heard},
    follow::Hub,
    jetstream::{self, Limits, Options},
    log::AppendError,
    server::Server,
    writer::LogWriter,
};
use std::time::Duration;

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
    let stored: Vec<Event> = streams.log.read(&log, 0).await.unwrap().into_iter().map(|r| r.event).collect();
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

/// The stream of cache events is lost and made anew, while workers go on telling.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cache_events_that_begin_anew_are_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(None, folder.path(), 0).unwrap();
    let streams = connect(&server).await;
    let of = owner("w-1");
    let worker = of.worker.clone();
    let event = move |number| CacheEvent {
        worker: worker.clone(),
        incarnation: 1,
        number,
        change: CacheChange::Removed { blocks: vec![] },
    };
    let mut last = 0;
    for number in 0..5 {
        last = streams.cache_events.tell(&of, &event(number), last).await.unwrap();
    }
    let mut follow = CacheFollow::start(streams.cache_events.clone()).await.unwrap();
    assert!(matches!(follow.next().await.unwrap(), Heard::Events(events) if events.len() == 5));
    let plain = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    plain.delete_stream("FB_KV").await.unwrap();
    // Whoever starts next makes it again.
    let streams = connect(&server).await;
    let telling = tokio::spawn(async move {
        let (mut number, mut last) = (0, 0);
        loop {
            last = streams.cache_events.tell(&of, &event(number), last).await.unwrap();
            number += 1;
            tokio::time::sleep(Duration::from_millis(700)).await;
        }
    });
    // Before as many events as there were before: then nothing would seem to be missing.
    let heard = tokio::time::timeout(Duration::from_secs(3), follow.next()).await;
    assert_eq!(heard.expect("in time").unwrap(), Heard::Anew);
    let heard = follow.next().await.unwrap();
    assert!(matches!(&heard, Heard::Events(events) if events[0].seq == 1), "{heard:?}");
    telling.abort();
}
