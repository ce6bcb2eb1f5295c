//! Who follows logs misses nothing.

use crate::site::*;
use forebay_schemas::event::Event;
use forebay_streams::{
    Streams,
    cancel::cancel,
    follow::{Follow, Hub},
    log::LogRef,
    writer::LogWriter,
};
use std::time::Duration;

pub(crate) async fn a_follower_misses_nothing(streams: Streams) {
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

pub(crate) async fn a_follower_of_a_stuck_client_catches_up(streams: Streams) {
    let hub = Hub::start(streams.log.clone(), gateway(), |_| {}).await.unwrap();
    let log = log();
    let stuck = hub.follow(log.request, 0);
    // Far more events than wait for one follower, none of which is taken meanwhile.
    write_a_life(&streams, &log, 500).await;
    let followed = follow_to_end(stuck).await;
    assert_eq!(followed.len(), 503);
}

pub(crate) async fn a_watch_sees_only_its_log(streams: Streams) {
    let (log, other) = (log(), log());
    let writer = create(&streams, &log).await;
    let follow = Follow::watch(streams.log.clone(), log.clone(), writer.seq()).await.unwrap();
    write_a_life(&streams, &other, 10).await;
    cancel(&streams, &log, "test").await.unwrap();
    assert_eq!(names(&follow_to_end(follow).await), ["RequestCancelled"]);
}

pub(crate) async fn what_was_there_before_is_read_at_once(streams: Streams) {
    let hub = Hub::start(streams.log.clone(), gateway(), |_| {}).await.unwrap();
    let log = log();
    write_a_life(&streams, &log, 3).await;
    let began = tokio::time::Instant::now();
    assert_eq!(follow_to_end(hub.follow(log.request, 0).catching_up()).await.len(), 6);
    let watch = Follow::watch(streams.log.clone(), log, 0).await.unwrap();
    assert_eq!(follow_to_end(watch.catching_up()).await.len(), 6);
    assert!(began.elapsed() < Duration::from_millis(300), "{:?}", began.elapsed());
}

pub(crate) async fn two_followers_of_one_request_miss_nothing(streams: Streams) {
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
