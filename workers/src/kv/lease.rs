//! Leases on sealed slots: one word of shared memory for each slot, on which owner and readers agree.
//!
//! A word holds the slot's generation and state. A reader claims by changing *sealed* to *claimed* at the
//! generation that its handle names, and releases by changing *claimed* to *released*. The owner reuses a slot
//! once it is released, or once the lease and, if it was claimed, the longest read are over; it raises the
//! generation first, so that a reader that comes or finishes late can tell.

use forebay_kernels::{RegionError, Words};
use forebay_streams::environment;
use std::{
    os::fd::BorrowedFd,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::time::Instant;

/// The longest that a read may take after its lease has ended.
pub(super) const LONGEST_READ: Duration = Duration::from_secs(5);

/// How often an owner that waits looks at a word, at first ...
const POLL: Duration = Duration::from_millis(1);

/// ... and at last: it looks less often the longer it has waited.
const POLL_MAX: Duration = Duration::from_millis(16);

/// What a slot's word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// The owner is filling it, or nothing is in it.
    Open(u64),
    /// Readable.
    Sealed(u64),
    /// Being read.
    Claimed(u64),
    /// Read, and no longer needed.
    Released(u64),
}

impl Word {
    /// As 64 bits: the state in the lowest two, the generation above.
    pub fn pack(self) -> u64 {
        match self {
            Word::Open(generation) => generation << 2,
            Word::Sealed(generation) => generation << 2 | 1,
            Word::Claimed(generation) => generation << 2 | 2,
            Word::Released(generation) => generation << 2 | 3,
        }
    }

    /// From 64 bits.
    pub fn unpack(bits: u64) -> Word {
        let generation = bits >> 2;
        match bits & 3 {
            0 => Word::Open(generation),
            1 => Word::Sealed(generation),
            2 => Word::Claimed(generation),
            _ => Word::Released(generation),
        }
    }

    /// The slot's generation.
    pub fn generation(self) -> u64 {
        let (Word::Open(generation)
        | Word::Sealed(generation)
        | Word::Claimed(generation)
        | Word::Released(generation)) = self;
        generation
    }
}

/// Claims a slot at a generation. An error is what the word says instead.
pub(super) fn claim(words: &Words, slot: u32, generation: u64) -> Result<(), Word> {
    let (sealed, claimed) = (Word::Sealed(generation).pack(), Word::Claimed(generation).pack());
    match words.swap_if(slot as usize, sealed, claimed) {
        Ok(()) => Ok(()),
        // Claimed by a reader that was given up for dead: what it had, this one may read too.
        Err(found) if found == claimed => Ok(()),
        Err(found) => Err(Word::unpack(found)),
    }
}

/// Gives a slot back that was claimed at a generation.
pub(super) fn release(words: &Words, slot: u32, generation: u64) {
    let (claimed, released) = (Word::Claimed(generation).pack(), Word::Released(generation).pack());
    // Whatever else it is by now, it is no longer this reader's.
    let _ = words.swap_if(slot as usize, claimed, released);
}

/// What a reader shows that goes through the owner.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shown {
    pub(super) slot: u32,
    pub(super) generation: u64,
    pub(super) capability: u64,
}

/// Why an owner serves no read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Denied {
    /// The slot is at this generation, or was released at it.
    Over(u64),
    /// The lease and the longest read are over, and nobody has needed the slot since.
    Lapsed,
    /// The capability is not the lease's.
    Capability,
}

/// A slot's lease as the owner gave it.
#[derive(Clone, Copy, Debug)]
struct Right {
    generation: u64,
    capability: u64,
    until: Instant,
}

/// The owner's side: the words of its slots, and what was promised for each.
#[derive(Debug, Clone)]
pub struct Leases {
    words: Arc<Words>,
    rights: Arc<Mutex<Vec<Option<Right>>>>,
}

impl Leases {
    /// Words for that many slots, all open.
    pub fn create(slots: u32) -> Result<Leases, RegionError> {
        let words = Words::create("forebay-leases", slots as usize)?;
        Ok(Leases { words: Arc::new(words), rights: Arc::new(Mutex::new(vec![None; slots as usize])) })
    }

    /// The descriptor to pass to peers.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.words.fd()
    }

    /// What a slot's word says.
    pub fn word(&self, slot: u32) -> Word {
        Word::unpack(self.words.load(slot as usize))
    }

    /// Slots that are sealed and not released: somebody may still read them.
    pub fn held(&self) -> u32 {
        let held = |word: u64| matches!(Word::unpack(word), Word::Sealed(_) | Word::Claimed(_));
        (0..self.words.count()).filter(|slot| held(self.words.load(*slot))).count() as u32
    }

    /// Makes a slot readable for that long, in a new generation. Chunks that are sealed later are covered by the
    /// same lease: what is readable is what events say.
    pub fn seal(&self, slot: u32, lease: Duration) -> Sealed {
        let generation = self.word(slot).generation() + 1;
        self.words.store(slot as usize, Word::Sealed(generation).pack());
        let (capability, until) = (environment::random(), Instant::now() + lease);
        self.promise(slot, Right { generation, capability, until });
        Sealed { leases: self.clone(), slot, generation, capability, until }
    }

    fn promise(&self, slot: u32, right: Right) {
        self.rights.lock().expect("no panics while held")[slot as usize] = Some(right);
    }

    /// Whether who shows this may read the slot. The slot must be one of these.
    pub(super) fn check(&self, shown: Shown) -> Result<(), Denied> {
        let found = self.word(shown.slot).generation();
        let right = self.rights.lock().expect("no panics while held")[shown.slot as usize];
        match right {
            Some(right) if right.generation == shown.generation && found == shown.generation => {
                if right.capability != shown.capability {
                    return Err(Denied::Capability);
                }
                if Instant::now() >= right.until + LONGEST_READ { Err(Denied::Lapsed) } else { Ok(()) }
            }
            _ => Err(Denied::Over(found)),
        }
    }

    /// Claims a slot for who shows this.
    pub(super) fn claim(&self, shown: Shown) -> Result<(), Denied> {
        self.check(shown)?;
        claim(&self.words, shown.slot, shown.generation).map_err(|found| Denied::Over(found.generation()))
    }

    /// Gives a slot back for who shows this.
    pub(super) fn release(&self, shown: Shown) -> Result<(), Denied> {
        self.check(shown)?;
        release(&self.words, shown.slot, shown.generation);
        Ok(())
    }

    fn open_next(&self, slot: u32, generation: u64) {
        self.words.store(slot as usize, Word::Open(generation + 1).pack());
    }
}

/// A slot under lease. Ends, and the slot's generation is raised, when dropped.
#[derive(Debug)]
pub struct Sealed {
    leases: Leases,
    slot: u32,
    generation: u64,
    capability: u64,
    until: Instant,
}

impl Sealed {
    /// The generation that handles name.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What a reader must show where the owner serves the read. (Over `shm` the descriptors are the right to read.)
    pub fn capability(&self) -> u64 {
        self.capability
    }

    /// How long the lease still lasts.
    pub fn remaining(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    /// Begins the lease's time anew.
    pub fn renew(&mut self, lease: Duration) {
        self.until = Instant::now() + lease;
        let Sealed { generation, capability, until, .. } = *self;
        self.leases.promise(self.slot, Right { generation, capability, until });
    }

    /// Waits until the slot may be reused. True if a reader released it, false if time ran out.
    pub async fn over(&self) -> bool {
        let begun = Instant::now();
        loop {
            match self.leases.word(self.slot) {
                Word::Released(_) => return true,
                Word::Claimed(_) if Instant::now() >= self.until + LONGEST_READ => return false,
                Word::Sealed(_) | Word::Open(_) if Instant::now() >= self.until => {
                    // A claim in this very moment must not be overlooked.
                    let sealed = Word::Sealed(self.generation).pack();
                    let open = Word::Open(self.generation + 1).pack();
                    if self.leases.words.swap_if(self.slot as usize, sealed, open).is_ok() {
                        return false;
                    }
                }
                _ => {}
            }
            tokio::time::sleep((begun.elapsed() / 8).clamp(POLL, POLL_MAX)).await;
        }
    }
}

impl Drop for Sealed {
    fn drop(&mut self) {
        self.leases.open_next(self.slot, self.generation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_keep_generation_and_state() {
        for word in [Word::Open(0), Word::Sealed(1), Word::Claimed(7), Word::Released(u64::MAX >> 2)] {
            assert_eq!(Word::unpack(word.pack()), word);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_owner_serves_who_has_the_right_and_for_as_long() {
        let leases = Leases::create(2).unwrap();
        let mut sealed = leases.seal(1, Duration::from_secs(10));
        let shown = Shown { slot: 1, generation: sealed.generation(), capability: sealed.capability() };
        assert_eq!(leases.check(shown), Ok(()));
        assert_eq!(leases.claim(Shown { capability: !shown.capability, ..shown }), Err(Denied::Capability));
        assert_eq!(leases.claim(Shown { generation: 0, ..shown }), Err(Denied::Over(1)));
        assert_eq!(leases.claim(Shown { slot: 0, ..shown }), Err(Denied::Over(0)));
        assert_eq!(leases.word(1), Word::Sealed(1));
        tokio::time::advance(Duration::from_secs(9)).await;
        sealed.renew(Duration::from_secs(10));
        tokio::time::advance(Duration::from_secs(14)).await;
        assert_eq!(leases.claim(shown), Ok(()));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(leases.check(shown), Err(Denied::Lapsed));
        drop(sealed);
        assert_eq!(leases.check(shown), Err(Denied::Over(2)));
    }

    #[tokio::test]
    async fn an_unclaimed_lease_ends_and_the_generation_rises() {
        let leases = Leases::create(1).unwrap();
        let sealed = leases.seal(0, Duration::from_millis(20));
        assert_eq!(leases.word(0), Word::Sealed(1));
        assert!(!sealed.over().await);
        assert_eq!(leases.word(0), Word::Open(2));
        drop(sealed);
        assert_eq!(leases.word(0), Word::Open(2));
        assert_eq!(leases.seal(0, Duration::ZERO).generation(), 3);
    }
}
