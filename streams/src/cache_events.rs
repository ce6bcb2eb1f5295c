//! What workers say of their prefix caches, kept for as long as it takes a router to read it: of each worker its last
//! snapshot and what changed since.
//!
//! Routers read the stream in its order, so nothing of what is there is missed; what they hear live is only a sign that
//! there is more to read. What has gone from the stream unread shows in the events' numbers.

use crate::{StreamError, own_queues::Owner};
use async_trait::async_trait;
use forebay_schemas::cache_event::CacheEvent;
use futures::{StreamExt, stream::BoxStream};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

/// Pause between a sign and the reading, so that events are read together.
const GATHER: Duration = Duration::from_millis(5);

/// Signs that wait to be taken together.
const SIGNS_MAX: usize = 4096;

/// Silence after which one reads without a sign. Signs may be lost.
const PROBE: Duration = Duration::from_secs(2);

/// An event that is kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    /// Its place among all events.
    pub seq: u64,
    /// Whose it is.
    pub of: Owner,
    /// The event; none if this build can't read it.
    pub event: Option<CacheEvent>,
}

/// Why an event was not kept.
#[derive(Debug, thiserror::Error)]
pub enum TellError {
    /// What was told before is not there any more, or something else is. A snapshot puts it right.
    #[error("the events of worker {0} are not those that it told")]
    Overtaken(forebay_schemas::ids::WorkerId),
    /// No answer: the event may be kept.
    #[error(transparent)]
    Unavailable(#[from] StreamError),
}

/// Events of prefix caches.
#[async_trait]
pub trait CacheEvents: Send + Sync + 'static {
    /// Keeps an event if that worker's last one is at `after`, and returns where it is. The first part of a snapshot
    /// replaces all that is kept of the worker, whatever that is.
    async fn tell(&self, of: &Owner, event: &CacheEvent, after: u64) -> Result<u64, TellError>;

    /// Events after a place, oldest first: of one worker or of all. Some of them, if there are many; none only if there
    /// are none.
    async fn told(&self, of: Option<&Owner>, after: u64) -> Result<Vec<Told>, StreamError>;

    /// The place of the last event that was ever kept.
    async fn last_told(&self) -> Result<u64, StreamError>;

    /// A sign for each event that is kept from now on. Some may be missing.
    async fn signs(&self) -> Result<BoxStream<'static, ()>, StreamError>;

    /// Drops all events of a worker.
    async fn forget(&self, of: &Owner) -> Result<(), StreamError>;
}

/// What a follower hears.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard {
    /// Events in their order, at least one.
    Events(Vec<Told>),
    /// The stream has begun anew: nothing that was heard counts.
    Anew,
}

/// Reads all events, from those that are kept on.
pub struct CacheFollow {
    backend: Arc<dyn CacheEvents>,
    signs: BoxStream<'static, Vec<()>>,
    seen: u64,
}

impl CacheFollow {
    /// Begins with what is kept.
    pub async fn start(backend: Arc<dyn CacheEvents>) -> Result<CacheFollow, StreamError> {
        let signs = backend.signs().await?.ready_chunks(SIGNS_MAX).boxed();
        Ok(CacheFollow { backend, signs, seen: 0 })
    }

    /// What comes next, however long it takes. After an error it may be asked again, and nothing is missed.
    pub async fn next(&mut self) -> Result<Heard, StreamError> {
        loop {
            let events = self.backend.told(None, self.seen).await?;
            if let Some(last) = events.last() {
                self.seen = last.seq;
                return Ok(Heard::Events(events));
            }
            // Asked whenever nothing more is found, not only in silence: workers go on telling.
            if self.backend.last_told().await? < self.seen {
                self.seen = 0;
                return Ok(Heard::Anew);
            }
            let probe = Instant::now() + PROBE;
            match tokio::time::timeout_at(probe, self.signs.next()).await {
                Ok(Some(_)) => tokio::time::sleep(GATHER).await,
                Ok(None) => {
                    // The subscription is gone; the stream is read at the pace of the probe until there is another one.
                    tokio::time::sleep_until(probe).await;
                    self.signs = self.backend.signs().await?.ready_chunks(SIGNS_MAX).boxed();
                }
                Err(_) => {}
            }
        }
    }
}

/// All that is kept of one worker.
pub async fn all_told(backend: &dyn CacheEvents, of: &Owner) -> Result<Vec<Told>, StreamError> {
    let mut all: Vec<Told> = Vec::new();
    loop {
        let more = backend.told(Some(of), all.last().map_or(0, |last| last.seq)).await?;
        if more.is_empty() {
            return Ok(all);
        }
        all.extend(more);
    }
}
