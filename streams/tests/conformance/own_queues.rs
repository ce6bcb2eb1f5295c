//! Queues of one worker each.

use crate::site::*;
use forebay_schemas::{
    ids::RequestId,
    task::{DecodeTask, Role, Task},
};
use forebay_streams::{
    Streams,
    own_queues::{Owner, enqueue_to},
    tasks::{Delivery, Verdict, enqueue},
};
use std::time::Duration;

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

pub(crate) async fn an_own_queue_is_its_workers_alone(streams: Streams) {
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

pub(crate) async fn a_task_given_back_from_an_own_queue_moves_to_the_shared_one(streams: Streams) {
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

pub(crate) async fn a_closed_queue_leaves_nothing_behind(streams: Streams) {
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

pub(crate) async fn a_routed_task_is_queued_once(streams: Streams) {
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

pub(crate) async fn an_own_queue_can_be_opened_again(streams: Streams) {
    let mine = owner("w-1");
    streams.own_queues.open(&mine).await.unwrap();
    streams.own_queues.close(&mine).await.unwrap();
    // What is routed meanwhile waits.
    enqueue_to(&*streams.own_queues, &mine.worker, &task()).await.unwrap();
    streams.own_queues.open(&mine).await.unwrap();
    streams.own_queues.open(&mine).await.unwrap();
    assert!(pull_own(&streams, &mine, 5000).await.is_some());
}

pub(crate) async fn a_task_of_an_own_queue_waits_while_the_shared_one_is_full(streams: Streams) {
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
