//! What workers tell of their caches.

use crate::site::*;
use forebay_schemas::{
    cache::BlockHash,
    cache_event::{CacheChange, CacheEvent},
};
use forebay_streams::{
    Streams,
    cache_events::{CacheFollow, Heard, TellError, Told, all_told},
    own_queues::Owner,
};
use std::time::Duration;

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

pub(crate) async fn cache_events_are_followed_from_what_is_kept(streams: Streams) {
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

pub(crate) async fn a_snapshot_replaces_what_was_told(streams: Streams) {
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

pub(crate) async fn a_worker_learns_that_its_events_are_gone(streams: Streams) {
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
