//! Workers' own queues in memory.

use super::{Line, Memory, Queued, State};
use crate::{
    StreamError,
    own_queues::{OwnQueues, Owner},
    tasks::{Delivery, EnqueueError},
};
use async_trait::async_trait;
use bytes::Bytes;
use forebay_schemas::{ids::ModelKey, task::Role};
use std::time::Duration;

impl Line {
    fn own(owner: &Owner) -> Line {
        Line { role: Role::Decode, model: owner.model.clone(), of: Some(owner.worker.clone()) }
    }
}

impl State {
    /// Puts a task from a worker's own queue into the shared one, as one that was never delivered.
    pub(super) fn move_to_shared(&mut self, role: Role, model: &ModelKey, task: Queued) {
        let shared = self.queues.entry(Line::shared(role, model)).or_default();
        shared.pending.push_back(Queued { payload: task.payload, deliveries: 0 });
    }
}

#[async_trait]
impl OwnQueues for Memory {
    async fn open(&self, owner: &Owner) -> Result<(), StreamError> {
        self.state().open.insert(owner.clone());
        Ok(())
    }

    async fn publish_to(&self, owner: &Owner, dedup_id: &str, payload: Bytes) -> Result<(), EnqueueError> {
        self.queue(Line::own(owner), dedup_id, payload)
    }

    async fn pull_own(&self, owner: &Owner, wait: Duration) -> Result<Option<Delivery>, StreamError> {
        if !self.state().open.contains(owner) {
            return Err(StreamError::new(format!("pulling for {}", owner.worker), "its queue is not open"));
        }
        Ok(self.wait_for(&Line::own(owner), wait).await)
    }

    async fn close(&self, owner: &Owner) -> Result<u64, StreamError> {
        let mut state = self.state();
        state.open.remove(owner);
        let Some(queue) = state.queues.remove(&Line::own(owner)) else { return Ok(0) };
        let delivered = queue.delivered.into_values().map(|(task, _)| task);
        let tasks: Vec<Queued> = delivered.chain(queue.pending).collect();
        let moved = tasks.len() as u64;
        for task in tasks {
            state.move_to_shared(Role::Decode, &owner.model, task);
        }
        drop(state);
        self.work.notify_waiters();
        Ok(moved)
    }

    async fn filled(&self) -> Result<Vec<Owner>, StreamError> {
        let state = self.state();
        let filled = state.queues.iter().filter(|(_, queue)| queue.len() > 0);
        let owner = |line: &Line| Some(Owner { model: line.model.clone(), worker: line.of.clone()? });
        Ok(filled.filter_map(|(line, _)| owner(line)).collect())
    }
}
