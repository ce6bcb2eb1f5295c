//! KV between a GPU's memory, regions of shared memory, and other processes' memory of GPUs.

use super::super::{EngineError, KvMover, PeerSlot};
use forebay_kernels::{
    Region,
    cuda::{
        Arena, DeviceError, Direction, HostSlot, Kernels, OtherSlot, PinBudget, PinnedRegion, SharedSlot,
        Stream, Sums,
    },
};
use forebay_schemas::kv::{KvHandle, TokenRange};
use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What is known of a slot by those who copy.
#[derive(Clone, Copy, Debug, Default)]
struct SlotUse {
    /// Positions that hold KV.
    filled: u32,
    /// Copies under way.
    copies: u32,
}

/// KV between the GPU's memory and the region: each way on a stream of its own, while the engine computes.
pub(super) struct CudaKv {
    pub(super) arena: Arc<Arena>,
    pub(super) region: PinnedRegion,
    /// Regions of other workers on this host, from which was read; the last one last.
    peers: Mutex<Vec<Arc<PinnedRegion>>>,
    /// What all of them may pin.
    budget: PinBudget,
    slots: Mutex<Vec<SlotUse>>,
    /// Room for sums of what was copied: as many as copies were under way at once.
    sums: Mutex<Vec<Sums>>,
    kernels: Kernels,
    out: Stream,
    r#in: Stream,
}

/// A copy under way.
struct Copying<'a> {
    kv: &'a CudaKv,
    slot: u32,
}

impl Drop for Copying<'_> {
    fn drop(&mut self) {
        self.kv.slots()[self.slot as usize].copies -= 1;
    }
}

impl CudaKv {
    /// Streams are made for it; `budget` is what all regions may pin.
    pub(super) fn new(
        arena: Arc<Arena>,
        region: PinnedRegion,
        budget: PinBudget,
        kernels: &Kernels,
    ) -> Result<CudaKv, DeviceError> {
        let slots = Mutex::new(vec![SlotUse::default(); arena.layout().slots as usize]);
        let (out, r#in) = (arena.device().stream()?, arena.device().stream()?);
        Ok(CudaKv {
            arena,
            region,
            peers: Mutex::default(),
            budget,
            slots,
            sums: Mutex::default(),
            kernels: kernels.clone(),
            out,
            r#in,
        })
    }

    /// Whether a slot is being copied.
    pub(super) fn is_copied(&self, slot: u32) -> bool {
        self.slots()[slot as usize].copies > 0
    }

    fn slots(&self) -> MutexGuard<'_, Vec<SlotUse>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody takes a slot's memory while this is held. The first `filled` positions must be there.
    fn hold(&self, slot: u32, filled: u32) -> Result<Copying<'_>, EngineError> {
        let of = &mut self.slots()[slot as usize];
        if of.filled < filled {
            return Err(EngineError::KvGone { slot });
        }
        of.copies += 1;
        Ok(Copying { kv: self, slot })
    }

    fn copy(&self, direction: Direction, slot: u32, tokens: TokenRange) -> Result<(), EngineError> {
        let stream = if direction == Direction::Out { &self.out } else { &self.r#in };
        let layout = self.arena.layout();
        let host = HostSlot { region: &self.region, layout, slot };
        self.queue(stream, direction, slot, host, tokens, 0..2 * layout.geometry.layers)?;
        // Whoever waits sleeps, and others queue their copies meanwhile.
        Ok(stream.mark()?.wait()?)
    }

    fn queue<'a>(
        &self,
        stream: &Stream,
        direction: Direction,
        slot: u32,
        other: impl Into<OtherSlot<'a>>,
        tokens: TokenRange,
        planes: Range<u32>,
    ) -> Result<(), EngineError> {
        let queued = stream.move_kv(&self.kernels, direction, (&self.arena, slot), other, tokens, planes);
        if queued.is_err() {
            // What was queued before is done before anybody uses the slot for something else.
            let _ = stream.synchronize();
        }
        Ok(queued?)
    }

    /// Another worker's region, known to the driver. Those that nobody else holds any more are of workers that are gone.
    fn peer(&self, region: &Arc<Region>) -> Arc<PinnedRegion> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.retain(|peer| Arc::strong_count(peer.region()) > 1);
        if let Some(known) = peers.iter().find(|peer| Arc::ptr_eq(peer.region(), region)) {
            return known.clone();
        }
        let peer = PinnedRegion::new(self.r#in.device(), region.clone(), self.budget.clone());
        peers.push(Arc::new(peer));
        peers[peers.len() - 1].clone()
    }
}

impl KvMover for CudaKv {
    fn save(&self, slot: u32, tokens: TokenRange) -> Result<(), EngineError> {
        let _held = self.hold(slot, tokens.end())?;
        self.copy(Direction::Out, slot, tokens)
    }

    fn load(&self, slot: u32, tokens: TokenRange) -> Result<(), EngineError> {
        let _held = self.hold(slot, 0)?;
        self.copy(Direction::In, slot, tokens)?;
        self.fill(slot, tokens.end());
        Ok(())
    }

    fn load_from(
        &self,
        from: PeerSlot<'_>,
        slot: u32,
        tokens: TokenRange,
        planes: Range<u32>,
        beside: &mut dyn FnMut(),
    ) -> Result<(), EngineError> {
        let _held = self.hold(slot, 0)?;
        let peer = self.peer(from.region);
        let host = HostSlot { region: &peer, layout: from.layout, slot: from.slot };
        self.queue(&self.r#in, Direction::In, slot, host, tokens, planes)?;
        let done = self.r#in.mark()?;
        beside();
        Ok(done.wait()?)
    }

    fn load_from_gpu(
        &self,
        from: &SharedSlot,
        slot: u32,
        tokens: TokenRange,
    ) -> Result<Vec<u64>, EngineError> {
        let _held = self.hold(slot, 0)?;
        let all = || self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let known = all().pop();
        let layout = self.arena.layout();
        let mut sums = known.map_or_else(|| Sums::new(self.arena.device(), layout), Ok)?;
        self.queue(&self.r#in, Direction::In, slot, from, tokens, 0..2 * layout.geometry.layers)?;
        let summed = self.r#in.sum_kv(&self.kernels, (&self.arena, slot), tokens, &mut sums);
        // Nothing is under way when the owner's memory is let go.
        let done = self.r#in.mark().and_then(|done| done.wait()).inspect_err(|_| _ = self.r#in.synchronize());
        summed.and(done)?;
        let of_groups = sums.of_groups(KvHandle::PLANES_PER_CHECKSUM)?;
        all().push(sums);
        Ok(of_groups)
    }

    fn fill(&self, slot: u32, filled: u32) {
        self.slots()[slot as usize].filled = filled;
    }

    fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }
}
