//! Atomic words in shared memory: what two processes use to agree on who may touch a slot.

#![allow(unsafe_code)]

use crate::{Region, RegionError};
use std::{
    os::fd::{BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering, fence},
};

/// An array of 64-bit words that processes share. Every operation is atomic and sequentially consistent.
#[derive(Debug)]
pub struct Words(Region);

impl Words {
    /// Makes `count` words, all zero.
    pub fn create(name: &str, count: usize) -> Result<Words, RegionError> {
        Region::create(name, count * 8).map(Words)
    }

    /// Maps words that another process made.
    pub fn open(fd: OwnedFd, count: usize) -> Result<Words, RegionError> {
        Region::open(fd, count * 8, true).map(Words)
    }

    /// The descriptor to pass to peers.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    /// How many words.
    pub fn count(&self) -> usize {
        self.0.len() / 8
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        let at = self.0.at(index * 8, 8, true).cast::<u64>();
        // SAFETY: in bounds (checked by `at`), aligned (the mapping is page-aligned and 8 divides the offset),
        // mapped writable for as long as `self` lives, and only ever accessed atomically by every process.
        unsafe { AtomicU64::from_ptr(at) }
    }

    /// The word's value. Whatever the caller has read of other shared memory before, it has read before this.
    pub fn load(&self, index: usize) -> u64 {
        fence(Ordering::SeqCst);
        self.word(index).load(Ordering::SeqCst)
    }

    /// Sets the word. Whatever the caller writes to other shared memory after, others see after this.
    pub fn store(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Sets the word to `new` if it is `current`; otherwise returns what it is. Ordered as [`Words::store`].
    pub fn swap_if(&self, index: usize, current: u64, new: u64) -> Result<(), u64> {
        let swapped = self.word(index).compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        swapped.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_agree_on_a_word() {
        let owner = Words::create("words", 4).unwrap();
        let peer = Words::open(owner.fd().try_clone_to_owned().unwrap(), 4).unwrap();
        owner.store(3, 7);
        assert_eq!(peer.swap_if(3, 6, 9), Err(7));
        assert_eq!(peer.swap_if(3, 7, 9), Ok(()));
        assert_eq!(owner.load(3), 9);
        assert_eq!(owner.load(2), 0);
    }
}
