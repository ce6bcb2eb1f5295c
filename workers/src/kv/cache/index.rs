//! Which block lies where, who uses it, and which one goes when room is needed. Pure bookkeeping: the bytes are the
//! caller's.

use forebay_schemas::cache::BlockHash;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::Range,
};

/// Changes that wait for whoever publishes them. More are forgotten, and it is said that they were.
const CHANGES_MAX: usize = 4096;

/// What became of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It can be found from now on.
    Stored(BlockHash),
    /// It can't be found any more.
    Removed(BlockHash),
}

/// Changes since they were asked for last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Drained {
    /// All of them, in order.
    Changes(Vec<Change>),
    /// There were too many to keep: take a snapshot.
    Lost,
}

/// A block that is in use, so that it stays where it is until it is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) hash: BlockHash,
    pub(super) place: u32,
    /// Checksum of its bytes as they were stored.
    pub(super) sum: u64,
}

struct Block {
    place: u32,
    sum: u64,
    users: u32,
    /// When it was given back last; meaningful while nobody uses it.
    tick: u64,
}

pub(super) struct Index {
    blocks: HashMap<BlockHash, Block>,
    /// Blocks that nobody uses, the least recently used first.
    idle: BTreeMap<u64, BlockHash>,
    /// Places that hold nothing, and the first of those that never held anything.
    free: Vec<u32>,
    fresh: u32,
    /// Places up to this one have their memory, or will have it soon.
    committed: u32,
    /// Somebody is at it.
    committing: bool,
    total: u32,
    tick: u64,
    /// Blocks that are being stored.
    arriving: HashSet<BlockHash>,
    changes: Vec<Change>,
    lost: bool,
}

impl Index {
    /// That many places, all empty.
    pub(super) fn new(total: u32) -> Index {
        Index {
            blocks: HashMap::new(),
            idle: BTreeMap::new(),
            free: Vec::new(),
            fresh: 0,
            committed: 0,
            committing: false,
            total,
            tick: 0,
            arriving: HashSet::new(),
            changes: Vec::new(),
            lost: false,
        }
    }

    /// The blocks of a sequence that are here, from its first one on without a gap. They are in use until they are
    /// given back.
    pub(super) fn take_run(&mut self, hashes: &[BlockHash]) -> Vec<Used> {
        let mut run = Vec::new();
        for hash in hashes {
            let Some(used) = self.take(*hash) else { break };
            run.push(used);
        }
        run
    }

    /// One block, if it is here.
    pub(super) fn take(&mut self, hash: BlockHash) -> Option<Used> {
        let block = self.blocks.get_mut(&hash)?;
        if block.users == 0 {
            self.idle.remove(&block.tick);
        }
        block.users += 1;
        Some(Used { hash, place: block.place, sum: block.sum })
    }

    /// Gives blocks of one sequence back. The last one is the first to go: without those before it, it is of no use.
    pub(super) fn give_back(&mut self, run: &[Used]) {
        for used in run.iter().rev() {
            let Some(block) = self.blocks.get_mut(&used.hash) else { continue };
            block.users -= 1;
            if block.users == 0 {
                self.tick += 1;
                block.tick = self.tick;
                self.idle.insert(self.tick, used.hash);
            }
        }
    }

    /// Blocks are about to be stored, one after another.
    pub(super) fn expect(&mut self, hashes: &[BlockHash]) {
        self.arriving.extend(hashes);
    }

    /// No more of them will come from where they were expected.
    pub(super) fn expect_no_more(&mut self, hashes: &[BlockHash]) {
        for hash in hashes {
            self.arriving.remove(hash);
        }
    }

    /// Whether somebody is about to store a block.
    pub(super) fn is_expected(&self, hash: BlockHash) -> bool {
        self.arriving.contains(&hash)
    }

    /// A place for one more block. If there is none, the block that was not used for the longest time goes; if all are
    /// in use, there is no place.
    pub(super) fn place(&mut self) -> Option<u32> {
        if let Some(place) = self.free.pop() {
            return Some(place);
        }
        if self.fresh < self.total {
            self.fresh += 1;
            return Some(self.fresh - 1);
        }
        let (_, hash) = self.idle.pop_first()?;
        let block = self.blocks.remove(&hash).expect("an idle block is here");
        self.note(Change::Removed(hash));
        Some(block.place)
    }

    /// Places whose memory is to be committed, so that so many have it that never held anything. Not few at a time.
    /// None too while they are being committed: who does that asks for more.
    pub(super) fn commit(&mut self, ahead: u32) -> Option<Range<u32>> {
        if self.committing { None } else { self.commit_more(ahead) }
    }

    /// The same, for who has committed what it was told before.
    pub(super) fn commit_more(&mut self, ahead: u32) -> Option<Range<u32>> {
        let more = self.uncommitted(ahead);
        self.committing = more.is_some();
        more
    }

    fn uncommitted(&mut self, ahead: u32) -> Option<Range<u32>> {
        let until = (self.fresh + ahead).min(self.total);
        let begin = self.committed.max(self.fresh);
        if until <= begin || (until < self.total && until - begin < ahead / 8) {
            return None;
        }
        self.committed = until;
        Some(begin..until)
    }

    /// A block that was written to its place is here from now on, and in use. If another one of that name came first,
    /// that one is meant, and the place is free again.
    pub(super) fn insert(&mut self, hash: BlockHash, place: u32, sum: u64) -> Used {
        if let Some(used) = self.take(hash) {
            self.free.push(place);
            return used;
        }
        self.blocks.insert(hash, Block { place, sum, users: 1, tick: 0 });
        self.note(Change::Stored(hash));
        Used { hash, place, sum }
    }

    /// Gives blocks back of which one has other bytes than were stored. That one goes, unless somebody else uses it too: who
    /// will notice by himself.
    pub(super) fn give_back_damaged(&mut self, run: &[Used], damaged: usize) {
        let hash = run[damaged].hash;
        if self.blocks.get(&hash).is_none_or(|block| block.users > 1) {
            return self.give_back(run);
        }
        let block = self.blocks.remove(&hash).expect("it was just seen");
        self.free.push(block.place);
        self.note(Change::Removed(hash));
        self.give_back(&run[damaged + 1..]);
        self.give_back(&run[..damaged]);
    }

    fn note(&mut self, change: Change) {
        if self.changes.len() >= CHANGES_MAX {
            self.changes.clear();
            self.lost = true;
        }
        if !self.lost {
            self.changes.push(change);
        }
    }

    /// See [`Drained`].
    pub(super) fn drain(&mut self) -> Drained {
        if self.lost { Drained::Lost } else { Drained::Changes(std::mem::take(&mut self.changes)) }
    }

    /// All blocks that are here. What changed before counts as told.
    pub(super) fn snapshot(&mut self) -> Vec<BlockHash> {
        self.changes.clear();
        self.lost = false;
        let mut hashes: Vec<BlockHash> = self.blocks.keys().copied().collect();
        hashes.sort_unstable();
        hashes
    }

    /// How many blocks are here.
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hash(number: u8) -> BlockHash {
        BlockHash::from_bytes([number; 16])
    }

    fn hashes(numbers: std::ops::Range<u8>) -> Vec<BlockHash> {
        numbers.map(hash).collect()
    }

    /// Stores blocks that belong together, as the cache does.
    fn store(index: &mut Index, hashes: &[BlockHash]) -> usize {
        let mut run = index.take_run(hashes);
        for hash in &hashes[run.len()..] {
            let Some(place) = index.place() else { break };
            run.push(index.insert(*hash, place, 0));
        }
        index.give_back(&run);
        run.len()
    }

    fn here(index: &mut Index, hashes: &[BlockHash]) -> usize {
        let run = index.take_run(hashes);
        index.give_back(&run);
        run.len()
    }

    #[test]
    fn memory_is_committed_ahead_of_blocks() {
        let mut index = Index::new(40);
        assert_eq!(index.commit(16), Some(0..16));
        assert_eq!(index.commit_more(16), None);
        store(&mut index, &hashes(0..1));
        assert_eq!(index.commit(16), None);
        store(&mut index, &hashes(1..2));
        assert_eq!(index.commit(16), Some(16..18));
        // More at once than there was memory for: that has it by now. But one commits at a time.
        store(&mut index, &hashes(10..32));
        assert_eq!(index.commit(16), None);
        assert_eq!(index.commit_more(16), Some(24..40));
        assert_eq!(index.commit_more(16), None);
        assert_eq!(index.commit(16), None);
    }

    #[test]
    fn the_end_of_the_oldest_sequence_goes_first() {
        let mut index = Index::new(6);
        assert_eq!(store(&mut index, &hashes(0..3)), 3);
        assert_eq!(store(&mut index, &hashes(10..13)), 3);
        // The first one is used again: now the second one is older.
        assert_eq!(here(&mut index, &hashes(0..3)), 3);
        assert_eq!(store(&mut index, &hashes(20..22)), 2);
        assert_eq!(here(&mut index, &hashes(10..13)), 1);
        assert_eq!(here(&mut index, &hashes(0..3)), 3);
    }

    #[test]
    fn what_is_in_use_stays() {
        let mut index = Index::new(2);
        store(&mut index, &hashes(0..2));
        let run = index.take_run(&hashes(0..2));
        assert_eq!(store(&mut index, &hashes(5..7)), 0);
        index.give_back(&run);
        assert_eq!(store(&mut index, &hashes(5..7)), 2);
        // A sequence longer than the cache keeps its beginning.
        assert_eq!(store(&mut index, &hashes(30..40)), 2);
        assert_eq!(here(&mut index, &hashes(30..40)), 2);
    }

    #[test]
    fn changes_are_told_once_and_in_order() {
        let mut index = Index::new(1);
        store(&mut index, &hashes(1..2));
        store(&mut index, &hashes(2..3));
        let told = [Change::Stored(hash(1)), Change::Removed(hash(1)), Change::Stored(hash(2))];
        assert_eq!(index.drain(), Drained::Changes(told.into()));
        assert_eq!(index.drain(), Drained::Changes(Vec::new()));
        for round in 0..CHANGES_MAX {
            store(&mut index, &[hash((round % 3) as u8)]);
        }
        assert_eq!(index.drain(), Drained::Lost);
        assert_eq!(index.snapshot().len(), 1);
        assert_eq!(index.drain(), Drained::Changes(Vec::new()));
    }

    #[test]
    fn a_damaged_block_is_not_found_again() {
        let mut index = Index::new(2);
        store(&mut index, &hashes(0..2));
        let run = index.take_run(&hashes(0..2));
        index.give_back_damaged(&run, 1);
        assert_eq!(here(&mut index, &hashes(0..2)), 1);
        assert_eq!(store(&mut index, &hashes(0..2)), 2);
        // Whoever else uses it keeps it.
        let (one, other) = (index.take_run(&hashes(0..2)), index.take_run(&hashes(0..2)));
        index.give_back_damaged(&one, 1);
        assert_eq!(index.blocks[&hash(1)].users, 1);
        index.give_back_damaged(&other, 1);
        assert_eq!(here(&mut index, &hashes(0..2)), 1);
    }

    proptest! {
        /// Whatever happens, no place holds two blocks, and what is told adds up to what is here.
        #[test]
        fn places_are_never_shared(steps in prop::collection::vec((0u8..40, 1u8..8, any::<bool>()), 1..200)) {
            let mut index = Index::new(8);
            let mut held: Vec<Vec<Used>> = Vec::new();
            let mut told = std::collections::BTreeSet::new();
            for (first, count, hold) in steps {
                let wanted = hashes(first..first + count);
                store(&mut index, &wanted);
                if hold {
                    held.push(index.take_run(&wanted));
                } else if let Some(run) = held.pop() {
                    index.give_back(&run);
                }
                let mut places: Vec<u32> = index.blocks.values().map(|block| block.place).collect();
                places.extend(&index.free);
                let count = places.len();
                places.sort_unstable();
                places.dedup();
                prop_assert_eq!(places.len(), count);
                prop_assert_eq!(count as u32, index.fresh);
                for used in held.iter().flatten() {
                    prop_assert_eq!(index.blocks[&used.hash].place, used.place);
                }
                let Drained::Changes(changes) = index.drain() else { panic!("few changes") };
                for change in changes {
                    match change {
                        Change::Stored(hash) => prop_assert!(told.insert(hash)),
                        Change::Removed(hash) => prop_assert!(told.remove(&hash)),
                    }
                }
                prop_assert!(told.iter().all(|hash| index.blocks.contains_key(hash)));
                prop_assert_eq!(told.len(), index.len());
            }
        }
    }
}
