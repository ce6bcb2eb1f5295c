//! Events of prefix caches in memory.

use super::{Memory, received};
use crate::{
    StreamError,
    cache_events::{CacheEvents, TellError, Told},
    own_queues::Owner,
};
use async_trait::async_trait;
use forebay_schemas::cache_event::{CacheChange, CacheEvent};
use futures::stream::BoxStream;

/// Events read at once.
const READ_BATCH: usize = 64;

/// What is kept.
#[derive(Default)]
pub(super) struct CacheLog {
    last: u64,
    /// Oldest first.
    events: Vec<Told>,
}

#[async_trait]
impl CacheEvents for Memory {
    async fn tell(&self, of: &Owner, event: &CacheEvent, after: u64) -> Result<u64, TellError> {
        let seq = {
            let log = &mut self.state().cache;
            match event.change {
                CacheChange::Snapshot { part: 0, .. } => log.events.retain(|told| told.of != *of),
                _ => {
                    let last = log.events.iter().rev().find(|told| told.of == *of);
                    if last.map_or(0, |last| last.seq) != after {
                        return Err(TellError::Overtaken(of.worker.clone()));
                    }
                }
            }
            log.last += 1;
            log.events.push(Told { seq: log.last, of: of.clone(), event: Some(event.clone()) });
            log.last
        };
        // Without a listener nobody needs a sign.
        let _ = self.cache_signs.send(());
        Ok(seq)
    }

    async fn told(&self, of: Option<&Owner>, after: u64) -> Result<Vec<Told>, StreamError> {
        let state = self.state();
        let wanted = |told: &&Told| told.seq > after && of.is_none_or(|of| told.of == *of);
        Ok(state.cache.events.iter().filter(wanted).take(READ_BATCH).cloned().collect())
    }

    async fn last_told(&self) -> Result<u64, StreamError> {
        Ok(self.state().cache.last)
    }

    async fn signs(&self) -> Result<BoxStream<'static, ()>, StreamError> {
        Ok(received(self.cache_signs.subscribe()))
    }

    async fn forget(&self, of: &Owner) -> Result<(), StreamError> {
        self.state().cache.events.retain(|told| told.of != *of);
        Ok(())
    }
}
