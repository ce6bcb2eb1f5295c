//! Shared queues: a task is done once, or comes again.

use crate::site::*;
use forebay_schemas::{
    dead_letter::DeadLetter,
    ids::{ModelKey, RequestId},
    task::{DecodeTask, Role, Task},
};
use forebay_streams::{
    Streams,
    tasks::{CancelSignal, Depth, EnqueueError, Presence, Verdict, enqueue},
};
use futures::StreamExt;
use std::time::Duration;

pub(crate) async fn tasks_are_delivered_once_while_worked_on(streams: Streams) {
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

pub(crate) async fn an_unanswered_task_comes_again(streams: Streams) {
    streams.tasks.ensure(&model()).await.unwrap();
    enqueue(&*streams.tasks, &task()).await.unwrap();
    let first = pull(&streams, 1000).await.unwrap();
    let second = pull(&streams, 4000).await.unwrap();
    assert_eq!((first.delivery, second.delivery), (1, 2));
    assert_eq!(first.payload, second.payload);
}

pub(crate) async fn a_returned_task_comes_at_once(streams: Streams) {
    streams.tasks.ensure(&model()).await.unwrap();
    enqueue(&*streams.tasks, &task()).await.unwrap();
    let first = pull(&streams, 1000).await.unwrap();
    streams.tasks.answer(&first.ack_subject, Verdict::Nak).await.unwrap();
    let second = pull(&streams, ACK_WAIT.as_millis() as u64 / 2).await.expect("before the ack wait is over");
    assert_eq!(second.delivery, 2);
}

pub(crate) async fn a_task_is_not_delivered_for_ever(streams: Streams) {
    streams.tasks.ensure(&model()).await.unwrap();
    enqueue(&*streams.tasks, &task()).await.unwrap();
    for _ in 0..3 {
        let delivery = pull(&streams, 1000).await.unwrap();
        streams.tasks.answer(&delivery.ack_subject, Verdict::Nak).await.unwrap();
    }
    assert_eq!(pull(&streams, 300).await, None);
}

pub(crate) async fn a_task_published_twice_is_queued_once(streams: Streams) {
    streams.tasks.ensure(&model()).await.unwrap();
    let task = task();
    enqueue(&*streams.tasks, &task).await.unwrap();
    enqueue(&*streams.tasks, &task).await.unwrap();
    assert_eq!(
        streams.tasks.depth(Role::Decode, &model()).await.unwrap(),
        Depth { pending: 1, ack_pending: 0 }
    );
}

pub(crate) async fn a_full_queue_refuses(streams: Streams) {
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

pub(crate) async fn signals_reach_their_worker(streams: Streams) {
    let mut mine = streams.tasks.cancel_signals(&worker("w-1")).await.unwrap();
    let signal = CancelSignal { request: RequestId::new(), cause: "test".into() };
    let other = CancelSignal { request: RequestId::new(), cause: "other".into() };
    streams.tasks.signal_cancel(&worker("w-2"), &other).await.unwrap();
    streams.tasks.signal_cancel(&worker("w-1"), &signal).await.unwrap();
    let received = tokio::time::timeout(Duration::from_secs(5), mine.next()).await.unwrap().unwrap();
    assert_eq!(received, signal);
}

pub(crate) async fn a_task_given_back_for_later_comes_later(streams: Streams) {
    let task = queued(&streams).await;
    let pull = async |wait| streams.tasks.pull(Role::Decode, &task.model, wait).await.unwrap();
    let first = pull(Duration::from_secs(5)).await.expect("a task");
    streams.tasks.answer(&first.ack_subject, Verdict::Later(Duration::from_millis(600))).await.unwrap();
    assert_eq!(pull(Duration::from_millis(200)).await, None);
    assert_eq!(pull(Duration::from_secs(5)).await.expect("the task again").delivery, 2);
}

pub(crate) async fn a_workers_presence_is_known(streams: Streams) {
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

pub(crate) async fn spent_tasks_are_found_and_settled(streams: Streams) {
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

pub(crate) async fn dead_letters_are_kept_and_dropped(streams: Streams) {
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
