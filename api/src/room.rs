//! Whether the decode queue has room: asked again and again beside the requests, so that a full queue costs a client
//! one short answer and nobody else anything.

use crate::{
    Shared,
    error::{ApiError, ErrorCode},
};
use forebay_schemas::task::Role;
use std::{
    sync::{
        Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// Time between two questions, hence how old an answer may be.
const PROBE: Duration = Duration::from_secs(1);

/// What is known of the decode queue.
#[derive(Default)]
pub(crate) struct Room {
    full: AtomicBool,
}

impl Room {
    /// Refuses a request that the queue would not take.
    pub(crate) fn check(&self) -> Result<(), ApiError> {
        if !self.full.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(ApiError::new(ErrorCode::QueueFull, "the decode queue is full; try again later"))
    }

    /// The queue has just refused a task.
    pub(crate) fn is_full(&self) {
        self.full.store(true, Ordering::Relaxed);
    }
}

/// Asks again and again, for as long as the gateway lives.
pub(crate) async fn probe(gateway: Weak<Shared>) {
    let mut interval = tokio::time::interval(PROBE);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let Some(gateway) = gateway.upgrade() else { return };
        match gateway.streams.tasks.room(Role::Decode).await {
            Ok(room) => gateway.room.full.store(room == 0, Ordering::Relaxed),
            // What was known last stands: a backend that is away says so itself where it is needed.
            Err(error) => tracing::debug!(%error, "nobody knows whether the queue has room"),
        }
    }
}
