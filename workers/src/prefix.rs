//! What a worker knows of prefixes: into a slot before a prompt is run, and out of it once it was.

use crate::{
    kv::{Slot, SlotOf},
    worker::Worker,
};
use forebay_schemas::{
    cache::{BLOCK_TOKENS, BlockHash, block_hashes},
    kv::TokenRange,
    lifecycle::Lifecycle,
};
use forebay_streams::environment::{self, off_thread};
use std::{sync::Arc, time::Instant};

impl Worker {
    /// Fills the beginning of a slot with what the prefix cache has of a request's sequence, and returns how many
    /// positions are filled. At least one token is left to run: what follows is drawn from its logits.
    pub(crate) async fn load_prefix(self: &Arc<Self>, slot: &Arc<Slot>, state: &Lifecycle) -> u32 {
        let tokens = state.sequence();
        let hashes = self.hashes(state, &tokens[..tokens.len() - 1]);
        if hashes.is_empty() || self.cache.is_off() {
            return 0;
        }
        // Decode steps meanwhile write one position of this slot: not one that is being filled.
        if !self.runner.park(slot.index(), tokens.len() as u32).await {
            return 0;
        }
        let index = slot.index();
        let (worker, slot) = (self.clone(), slot.clone());
        let load = move || {
            let begun = Instant::now();
            slot.spoil(0);
            let tokens = worker.cache.load(&hashes, worker.slot_of(&slot));
            if let Err(error) = worker.load(&slot, TokenRange { start: 0, count: tokens }) {
                tracing::warn!(%error, "what the prefix cache has is computed again");
                return 0;
            }
            tracing::debug!(slot = slot.index(), tokens, took = ?begun.elapsed(), "loaded from the prefix cache");
            tokens
        };
        let tokens = off_thread(load).await;
        if tokens == 0 {
            // A prompt that waits for its turn holds no memory.
            self.runner.free(index).await;
        }
        tokens
    }

    /// Keeps the blocks of a slot that holds the KV of these tokens of a request.
    pub(crate) fn store_prefix(
        self: &Arc<Self>,
        slot: &Arc<Slot>,
        state: &Lifecycle,
        tokens: &[u32],
    ) -> impl Future<Output = ()> + Send + use<> {
        let hashes = self.hashes(state, tokens);
        let (worker, slot) = (self.clone(), slot.clone());
        off_thread(move || {
            let begun = Instant::now();
            if let Err(error) =
                worker.save(&slot, TokenRange { start: 0, count: hashes.len() as u32 * BLOCK_TOKENS })
            {
                return tracing::warn!(%error, "not stored in the prefix cache");
            }
            worker.cache.store(&hashes, worker.slot_of(&slot));
            tracing::debug!(slot = slot.index(), blocks = hashes.len(), took = ?begun.elapsed(), "stored in the prefix cache");
        })
    }

    /// The same beside what goes on. The slot is in use until it is done.
    pub(crate) fn store_prefix_soon(self: &Arc<Self>, slot: &Arc<Slot>, state: &Lifecycle, tokens: &[u32]) {
        if tokens.len() >= BLOCK_TOKENS as usize && !self.cache.is_off() {
            environment::spawn(self.store_prefix(slot, state, tokens));
        }
    }

    fn hashes(&self, state: &Lifecycle, tokens: &[u32]) -> Vec<BlockHash> {
        let fits = tokens.len().min(self.runner.card().context_limit as usize);
        block_hashes(self.model.layout_hash, state.accepted.cache_salt.as_deref(), &tokens[..fits])
    }

    fn slot_of<'a>(&'a self, slot: &Slot) -> SlotOf<'a> {
        SlotOf { region: self.runner.kv(), layout: &self.runner.card().layout, slot: slot.index() }
    }
}
