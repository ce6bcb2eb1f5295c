//! Logs: in order, each with one author at a time.

use crate::site::*;
use forebay_schemas::{
    event::Event,
    ids::{GatewayId, RequestId},
};
use forebay_streams::{
    Streams,
    cancel::cancel,
    log::{AppendError, LogRef},
    writer::{LogWriter, WriteError},
};

pub(crate) async fn a_log_reads_back_in_order(streams: Streams) {
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

pub(crate) async fn the_fence_lets_one_author_through(streams: Streams) {
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

pub(crate) async fn an_overtaken_author_is_told(streams: Streams) {
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

pub(crate) async fn a_cancel_ends_the_log_once(streams: Streams) {
    let log = log();
    let mut writer = create(&streams, &log).await;
    writer.append(claim("w-1")).await.unwrap();
    assert!(cancel(&streams, &log, "test").await.unwrap());
    assert!(!cancel(&streams, &log, "again").await.unwrap());
    assert!(matches!(writer.append(token(0)).await, Err(WriteError::Overtaken { .. })));
    let events: Vec<Event> = streams.log.read(&log, 0).await.unwrap().into_iter().map(|r| r.event).collect();
    assert_eq!(names(&events), ["RequestAccepted", "Claimed", "RequestCancelled"]);
}

pub(crate) async fn a_request_is_begun_once_whatever_the_gateway(streams: Streams) {
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

pub(crate) async fn a_log_can_be_removed(streams: Streams) {
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
