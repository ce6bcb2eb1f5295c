//! Which slots of the region are free.

use forebay_schemas::kv::TokenRange;
use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

/// The free slots. A decode step runs over all slots up to the highest in use, so the lowest is given first.
#[derive(Debug, Clone)]
pub struct SlotPool {
    free: Arc<Mutex<BTreeSet<u32>>>,
    total: u32,
}

/// A slot in use; free again when dropped.
#[derive(Debug)]
pub struct Slot {
    index: u32,
    mirrored: AtomicU32,
    free: Arc<Mutex<BTreeSet<u32>>>,
}

impl SlotPool {
    /// All of them free.
    pub fn new(slots: u32) -> SlotPool {
        SlotPool { free: Arc::new(Mutex::new((0..slots).collect())), total: slots }
    }

    /// The lowest free slot.
    pub fn take(&self) -> Option<Slot> {
        let index = self.free.lock().expect("no panics while held").pop_first()?;
        Some(Slot { index, mirrored: AtomicU32::new(0), free: self.free.clone() })
    }

    /// How many are free.
    pub fn free(&self) -> u32 {
        self.free.lock().expect("no panics while held").len() as u32
    }

    /// How many there are.
    pub fn total(&self) -> u32 {
        self.total
    }
}

impl Slot {
    /// Its number.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Positions from the first on whose KV is both in the region and where the engine computes, if these are two.
    pub fn mirrored(&self) -> u32 {
        self.mirrored.load(Ordering::Acquire)
    }

    /// Notes that the region's positions from one on are written, or may be half written if that fails.
    pub fn spoil(&self, from: u32) {
        self.mirrored.fetch_min(from, Ordering::AcqRel);
    }

    /// Notes that these positions are in both places.
    pub fn mirror(&self, tokens: TokenRange) {
        if tokens.start <= self.mirrored() {
            self.mirrored.fetch_max(tokens.end(), Ordering::AcqRel);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.free.lock().expect("no panics while held").insert(self.index);
    }
}
