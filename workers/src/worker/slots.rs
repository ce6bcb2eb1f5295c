//! Slots and their KV: what fits, what is sealed for others, and when a slot is free again.

use super::Worker;
use crate::{
    engine::{EngineError, KvMover, PeerSlot},
    kv::{KvRead, ReadError, Sealed, Slot, Transport, sum_of, sums},
};
use forebay_schemas::{
    kv::{KvHandle, TokenRange},
    lifecycle::Lifecycle,
};
use forebay_streams::environment::off_thread;
use std::{sync::Arc, time::Duration};

/// How often a slot is looked at that a copy still holds.
const SLOT_POLL: Duration = Duration::from_millis(1);

impl Worker {
    /// Waits until nobody but the caller uses a slot: its KV may still be being kept, or read, although the request is
    /// over.
    pub(crate) async fn unused(&self, slot: &Arc<Slot>) {
        while Arc::strong_count(slot) > 1 {
            tokio::time::sleep(SLOT_POLL).await;
        }
    }

    /// The way to the worker that holds a handle's bytes. Blocks, for a moment, the first time.
    pub(crate) fn transport(&self, handle: &KvHandle) -> Result<Arc<dyn Transport>, ReadError> {
        let lease = self.workers.borrow().get(&handle.agent).cloned();
        self.peers.transport(handle, lease.as_deref())
    }

    /// Seals a range of a slot's positions, which nobody writes any more, under a lease.
    pub(crate) async fn seal(
        self: &Arc<Self>,
        slot: &Arc<Slot>,
        lease: &Sealed,
        tokens: TokenRange,
    ) -> Result<KvHandle, EngineError> {
        let layout = self.runner.card().layout;
        let (worker, held) = (self.clone(), slot.clone());
        let seal = move || {
            worker.save(&held, tokens)?;
            Ok::<_, EngineError>(sums(worker.runner.kv(), &layout, held.index(), tokens))
        };
        Ok(self.handle(slot, lease, tokens, off_thread(seal).await?))
    }

    /// Has the region hold these positions of a slot, which the engine has filled. Blocks for as long as a copy takes.
    pub(crate) fn save(&self, slot: &Slot, tokens: TokenRange) -> Result<(), EngineError> {
        self.mirror(slot, tokens, |mover, missing| mover.save(slot.index(), missing))
    }

    /// Has the engine know these positions of a slot, which were written to the region. Blocks for as long as a copy takes.
    pub(crate) fn load(&self, slot: &Slot, tokens: TokenRange) -> Result<(), EngineError> {
        self.mirror(slot, tokens, |mover, missing| mover.load(slot.index(), missing))
    }

    /// Has the engine know what a handle names, of a read that was begun: from the owner's GPU or straight from its region where the
    /// engine reaches these, otherwise by way of its own region. Blocks for as long as the copy takes.
    pub(crate) fn read_into(
        &self,
        slot: &Slot,
        read: &mut KvRead<Arc<dyn Transport>>,
        handle: &KvHandle,
    ) -> Result<(), ReadError> {
        let (layout, tokens) = (&self.runner.card().layout, handle.tokens);
        slot.spoil(tokens.start);
        if let (Some(mover), Some(from)) = (self.runner.mover(), read.mapped_gpu(handle)) {
            let copy = || mover.load_from_gpu(&from, slot.index(), tokens);
            let Err(error) = read.piece_on_gpu(handle, layout, copy) else {
                mover.fill(slot.index(), tokens.end());
                return Ok(());
            };
            // The owner may have given that memory to another sequence, and the region has the KV all the same.
            tracing::debug!(agent = %handle.agent, %error, "KV is read again, from the owner's region");
        }
        let (Some(mover), Some(region)) = (self.runner.mover(), read.mapped(handle)) else {
            read.piece(handle, self.runner.kv(), layout, slot.index())?;
            return Ok(self.load(slot, tokens)?);
        };
        let from = PeerSlot { region: &region, layout: &handle.layout, slot: handle.slot };
        read.piece_by(handle, layout, |_, group| {
            let planes = KvHandle::group_planes(&layout.geometry, group);
            let mut sum = 0;
            let mut add = || sum = sum_of(&region, &handle.layout, handle.slot, tokens, group);
            mover.load_from(from, slot.index(), tokens, planes, &mut add)?;
            Ok(sum)
        })?;
        // Not before all sums were compared: others may save what is filled.
        mover.fill(slot.index(), tokens.end());
        Ok(())
    }

    fn mirror(
        &self,
        slot: &Slot,
        tokens: TokenRange,
        copy: impl FnOnce(&dyn KvMover, TokenRange) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let Some(mover) = self.runner.mover() else { return Ok(()) };
        let start = tokens.start.max(slot.mirrored());
        if start < tokens.end() {
            let missing = TokenRange { start, count: tokens.end() - start };
            copy(&**mover, missing)?;
            slot.mirror(missing);
        }
        Ok(())
    }

    /// Whether a sequence fits into a slot. Another worker of the model may have longer ones, and the gateway goes by its
    /// card.
    pub(crate) fn check_context(&self, slot: &Slot, state: &Lifecycle) -> Result<(), EngineError> {
        let (tokens, limit) = (state.sequence().len() as u32, self.runner.card().context_limit);
        if tokens < limit {
            return Ok(());
        }
        Err(EngineError::ContextFull { slot: slot.index(), start: 0, tokens, limit })
    }

    /// What an event says of sealed KV in one of this worker's slots.
    pub(super) fn handle(
        &self,
        slot: &Slot,
        lease: &Sealed,
        tokens: TokenRange,
        checksums: Vec<u64>,
    ) -> KvHandle {
        KvHandle {
            agent: self.id.clone(),
            incarnation: self.incarnation,
            layout: self.runner.card().layout,
            layout_hash: self.model.layout_hash,
            slot: slot.index(),
            generation: lease.generation(),
            tokens,
            checksums,
            lease_remaining_ms: lease.remaining().as_millis() as u32,
            capability: lease.capability(),
        }
    }
}
