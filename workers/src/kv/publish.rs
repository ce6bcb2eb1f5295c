//! Tells routers what is in this worker's prefix cache: all of it from time to time, and what changes in between.

use super::{BlockCache, Change, Drained};
use forebay_schemas::{
    cache::BlockHash,
    cache_event::{CacheChange, CacheEvent, EVENT_BLOCKS_MAX},
};
use forebay_streams::{
    cache_events::{CacheEvents, TellError},
    own_queues::Owner,
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::Instant;

/// How often the cache is asked what has changed. Changes of that time become one event.
const LOOK: Duration = Duration::from_millis(25);

/// Pause after an event that may not have been kept.
const TROUBLE_PAUSE: Duration = Duration::from_millis(500);

/// Events after which all is told anew, so that a router that starts has little to read.
const EVENTS_MAX: u32 = 1000;

/// Time after which all is told anew: well before the stream forgets what was told last.
const SNAPSHOT_AGE: Duration = Duration::from_secs(300);

/// Tells what is in a cache, for as long as it is polled.
pub(crate) async fn publish(events: Arc<dyn CacheEvents>, of: Owner, incarnation: u64, cache: BlockCache) {
    let mut teller = Teller { of, incarnation, number: 0, after: 0, due: Due::at_once() };
    loop {
        let changes = match teller.due.is(Instant::now()) {
            true => CacheChange::snapshot(&cache.snapshot()),
            false => match cache.drain() {
                Drained::Changes(changes) => net(&changes),
                Drained::Lost => CacheChange::snapshot(&cache.snapshot()),
            },
        };
        for change in changes {
            if let Err(error) = teller.tell(events.as_ref(), change).await {
                tracing::debug!(%error, "telling anew what is in the prefix cache");
                teller.due = Due::at_once();
                tokio::time::sleep(TROUBLE_PAUSE).await;
                break;
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What this life of the worker has told.
struct Teller {
    of: Owner,
    incarnation: u64,
    /// Of the next event. One that may have been kept is not used again.
    number: u64,
    /// Where the last event is.
    after: u64,
    due: Due,
}

impl Teller {
    async fn tell(&mut self, events: &dyn CacheEvents, change: CacheChange) -> Result<(), TellError> {
        match change {
            CacheChange::Snapshot { part: 0, .. } => self.due = Due::after(Instant::now()),
            _ => self.due.events += 1,
        }
        let (worker, incarnation) = (self.of.worker.clone(), self.incarnation);
        let event = CacheEvent { worker, incarnation, number: self.number, change };
        self.number += 1;
        self.after = events.tell(&self.of, &event, self.after).await?;
        Ok(())
    }
}

/// When all is to be told.
struct Due {
    /// None: now.
    last: Option<Instant>,
    /// Events since.
    events: u32,
}

impl Due {
    fn at_once() -> Due {
        Due { last: None, events: 0 }
    }

    fn after(last: Instant) -> Due {
        Due { last: Some(last), events: 0 }
    }

    fn is(&self, now: Instant) -> bool {
        self.events >= EVENTS_MAX || self.last.is_none_or(|last| now - last >= SNAPSHOT_AGE)
    }
}

/// What several changes come to: of each block only its last one counts.
fn net(changes: &[Change]) -> Vec<CacheChange> {
    let mut last: BTreeMap<BlockHash, bool> = BTreeMap::new();
    for change in changes {
        match *change {
            Change::Stored(hash) => last.insert(hash, true),
            Change::Removed(hash) => last.insert(hash, false),
        };
    }
    let of = |stored| -> Vec<BlockHash> {
        last.iter().filter(|(_, is)| **is == stored).map(|(hash, _)| *hash).collect()
    };
    let (stored, removed) = (of(true), of(false));
    let removed = removed.chunks(EVENT_BLOCKS_MAX).map(|part| CacheChange::Removed { blocks: part.to_vec() });
    let stored = stored.chunks(EVENT_BLOCKS_MAX).map(|part| CacheChange::Stored { blocks: part.to_vec() });
    removed.chain(stored).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::SlotOf;
    use forebay_kernels::Region;
    use forebay_schemas::{
        cache::BLOCK_TOKENS,
        ids::{ModelKey, WorkerId},
        kv::{KvDtype, KvGeometry, KvLayout},
    };
    use forebay_streams::{cache_events::all_told, memory};

    fn hash(index: u8) -> BlockHash {
        BlockHash::from_bytes([index; 16])
    }

    #[test]
    fn of_each_block_only_the_last_change_counts() {
        let changes = [
            Change::Stored(hash(1)),
            Change::Removed(hash(2)),
            Change::Removed(hash(1)),
            Change::Stored(hash(2)),
            Change::Stored(hash(3)),
        ];
        let removed = CacheChange::Removed { blocks: vec![hash(1)] };
        let stored = CacheChange::Stored { blocks: vec![hash(2), hash(3)] };
        assert_eq!(net(&changes), [removed, stored]);
        assert_eq!(net(&[]), []);
    }

    #[test]
    fn all_is_told_at_the_start_after_many_events_and_after_a_while() {
        let now = Instant::now();
        assert!(Due::at_once().is(now));
        let mut due = Due::after(now);
        assert!(!due.is(now + SNAPSHOT_AGE / 2));
        assert!(due.is(now + SNAPSHOT_AGE));
        due.events = EVENTS_MAX;
        assert!(due.is(now));
    }

    /// A cache of a few blocks, and a slot to store from.
    fn cache() -> (BlockCache, Region, KvLayout) {
        let geometry = KvGeometry { layers: 1, kv_heads: 1, head_dim: 4, dtype: KvDtype::F32 };
        let layout = KvLayout { geometry, slots: 1, positions: 4 * BLOCK_TOKENS };
        let slot = Region::create("publish-test", layout.region_bytes()).unwrap();
        (BlockCache::new(&layout, 1 << 20).unwrap(), slot, layout)
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_stored_is_told_and_told_anew_when_it_is_gone() {
        let streams = memory::streams();
        let of = Owner { model: ModelKey::of("m"), worker: WorkerId::new("w").unwrap() };
        let (cache, region, layout) = cache();
        let slot = SlotOf { region: &region, layout: &layout, slot: 0 };
        let told = async || {
            let told = all_told(streams.cache_events.as_ref(), &of).await.unwrap();
            told.into_iter().map(|told| told.event.unwrap()).collect::<Vec<_>>()
        };
        let publishing = tokio::spawn(publish(streams.cache_events.clone(), of.clone(), 7, cache.clone()));
        tokio::time::sleep(LOOK * 2).await;
        assert_eq!(told().await[0].change, CacheChange::Snapshot { blocks: vec![], part: 0, parts: 1 });
        cache.store(&[hash(1), hash(2)], slot);
        tokio::time::sleep(LOOK * 2).await;
        let events = told().await;
        assert_eq!(events[1].change, CacheChange::Stored { blocks: vec![hash(1), hash(2)] });
        assert_eq!((events[1].number, events[1].incarnation), (1, 7));
        // Somebody took the worker for dead.
        streams.cache_events.forget(&of).await.unwrap();
        cache.store(&[hash(1), hash(2), hash(3)], slot);
        tokio::time::sleep(TROUBLE_PAUSE * 2).await;
        let events = told().await;
        assert_eq!(events.len(), 1);
        let CacheChange::Snapshot { mut blocks, part: 0, parts: 1 } = events[0].change.clone() else {
            panic!("{events:?}");
        };
        blocks.sort();
        assert_eq!(blocks, [hash(1), hash(2), hash(3)]);
        publishing.abort();
    }
}
