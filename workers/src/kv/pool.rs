//! Which slots of the region are free.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
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
        Some(Slot { index, free: self.free.clone() })
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
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.free.lock().expect("no panics while held").insert(self.index);
    }
}
