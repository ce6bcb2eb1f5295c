//! The prefix cache: KV of blocks of tokens that were run before, to be copied instead of computed.
//!
//! Blocks lie beside the slots, in a region of their own: attention wants the positions of a sequence side by side, so a
//! block that several sequences share can't lie in any of their slots. A block is named by all tokens up to its end
//! ([`BlockHash`]), has a checksum of its bytes, and is checked against it each time that it is copied into a slot.

mod index;

pub use index::{Change, Drained};

use forebay_kernels::{Checksum, Region, RegionError, copy_summed};
use forebay_schemas::{
    cache::{BLOCK_TOKENS, BlockHash},
    kv::{KvLayout, TokenRange},
};
use forebay_streams::environment::{is_simulated, pause};
use index::{Index, Used};
use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

/// How long one block that is being stored is waited for ...
const ARRIVAL_MAX: Duration = Duration::from_secs(1);

/// ... and how often it is looked for.
const ARRIVAL_POLL: Duration = Duration::from_millis(1);

/// Bytes that are committed at once.
const COMMIT_STEP: usize = 256 << 10;

/// More blocks are of no use: what is known of them would take more than they do.
const BLOCKS_MAX: u64 = 1 << 20;

/// The blocks of one worker.
#[derive(Clone)]
pub struct BlockCache(Arc<Shared>);

struct Shared {
    pool: Region,
    /// Each block is a slot of this.
    layout: KvLayout,
    index: Mutex<Index>,
    /// For how many more blocks there should be memory at any time.
    ahead: u32,
}

/// A slot whose positions a block is copied to or from.
#[derive(Clone, Copy)]
pub struct SlotOf<'a> {
    /// The region that it is in.
    pub region: &'a Region,
    /// The region's layout; of the cache's geometry.
    pub layout: &'a KvLayout,
    /// Its number.
    pub slot: u32,
}

impl BlockCache {
    /// An empty cache for slots of a layout. It takes at most so many bytes, as it fills: there is always room for one more
    /// sequence, though no more than a quarter of the whole, that need not wait for the kernel to find memory. With less than
    /// a block's bytes it never holds anything.
    pub fn new(slots: &KvLayout, bytes_max: u64) -> Result<BlockCache, RegionError> {
        let geometry = slots.geometry;
        let block_bytes = geometry.bytes_per_token() as u64 * u64::from(BLOCK_TOKENS);
        let blocks = (bytes_max / block_bytes).min(BLOCKS_MAX) as u32;
        let layout = KvLayout { geometry, slots: blocks, positions: BLOCK_TOKENS };
        let pool = Region::create("forebay-kv-cache", layout.region_bytes())?;
        let ahead = (slots.positions / BLOCK_TOKENS).min(blocks / 4);
        let index = Mutex::new(Index::new(blocks));
        let cache = BlockCache(Arc::new(Shared { pool, layout, index, ahead }));
        cache.commit_ahead();
        Ok(cache)
    }

    /// Copies what there is of a sequence's first blocks into the beginning of a slot, and returns how many tokens that
    /// are. Blocks for as long as the copy takes.
    pub fn load(&self, hashes: &[BlockHash], into: SlotOf<'_>) -> u32 {
        let mut run = self.index().take_run(hashes);
        let mut whole = 0;
        while whole < hashes.len() {
            if whole == run.len() {
                let Some(used) = self.take_arriving(hashes[whole]) else { break };
                run.push(used);
            }
            pause();
            let used = run[whole];
            if self.copy_out(used, whole as u32, into) != used.sum {
                tracing::error!(block = %used.hash, "a cached block is damaged; it is computed again");
                self.index().give_back_damaged(&run, whole);
                return whole as u32 * BLOCK_TOKENS;
            }
            whole += 1;
        }
        self.index().give_back(&run);
        whole as u32 * BLOCK_TOKENS
    }

    /// A block that was not here, once it is, if somebody is about to store it: who asks again right after an answer
    /// should not compute what is being copied.
    fn take_arriving(&self, hash: BlockHash) -> Option<Used> {
        let begun = Instant::now();
        loop {
            let mut index = self.index();
            if let Some(used) = index.take(hash) {
                return Some(used);
            }
            // In a simulation nobody would go on storing meanwhile.
            if !index.is_expected(hash) || is_simulated() || begun.elapsed() > ARRIVAL_MAX {
                return None;
            }
            drop(index);
            std::thread::sleep(ARRIVAL_POLL);
        }
    }

    /// Keeps the first blocks of a slot that holds the KV of these and that nobody writes to meanwhile. Those that are
    /// here already are not copied. Blocks for as long as the copy takes.
    pub fn store(&self, hashes: &[BlockHash], from: SlotOf<'_>) {
        let mut run = self.index().take_run(hashes);
        let missing = &hashes[run.len()..];
        self.index().expect(missing);
        for hash in missing {
            // A later block may be here although the one before was not.
            let known = self.index().take(*hash);
            let used = match known {
                Some(used) => used,
                None => {
                    let Some(place) = self.index().place() else { break };
                    pause();
                    let sum = self.copy_in(place, run.len() as u32, from);
                    self.index().insert(*hash, place, sum)
                }
            };
            run.push(used);
        }
        let mut index = self.index();
        index.expect_no_more(missing);
        index.give_back(&run);
        drop(index);
        self.commit_ahead();
    }

    /// Commits memory for the blocks to come, beside what goes on.
    fn commit_ahead(&self) {
        if is_simulated() {
            return;
        }
        let Some(blocks) = self.index().commit(self.0.ahead) else { return };
        let cache = self.clone();
        let commit = move || {
            cache.commit(blocks);
            // One such thread at a time: more blocks may have come meanwhile.
            while let Some(blocks) = cache.index().commit_more(cache.0.ahead) {
                cache.commit(blocks);
            }
        };
        // Without a thread for it, memory comes as it is touched.
        let _ = thread::Builder::new().name("kv-commit".to_owned()).spawn(commit);
    }

    fn commit(&self, blocks: Range<u32>) {
        let Shared { pool, layout, .. } = &*self.0;
        let bytes = blocks.len() * layout.slot_stride();
        let planes = 0..layout.geometry.layers as usize * 2;
        let starts = planes.map(|plane| layout.slot_offset(plane, blocks.start as usize));
        // In steps: the kernel holds a lock of the whole process during each.
        let mut steps = starts.flat_map(|start| {
            (0..bytes).step_by(COMMIT_STEP).map(move |at| (start + at, COMMIT_STEP.min(bytes - at)))
        });
        if !steps.all(|(start, bytes)| pool.commit(start, bytes)) {
            tracing::debug!("memory of the prefix cache is not committed ahead of need");
        }
    }

    /// Changes since this was asked last, for the router's index.
    pub fn drain(&self) -> Drained {
        self.index().drain()
    }

    /// All blocks that are here now. Changes that are not drained yet are part of it, and forgotten.
    pub fn snapshot(&self) -> Vec<BlockHash> {
        self.index().snapshot()
    }

    /// How many blocks are here.
    pub fn blocks(&self) -> usize {
        self.index().len()
    }

    /// Whether it can hold anything.
    pub fn is_off(&self) -> bool {
        self.0.layout.slots == 0
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.0.index.lock().expect("no panics while held")
    }

    fn copy_out(&self, used: Used, number: u32, into: SlotOf<'_>) -> u64 {
        let block = SlotOf { region: &self.0.pool, layout: &self.0.layout, slot: used.place };
        copy((block, 0), (into, number * BLOCK_TOKENS))
    }

    fn copy_in(&self, place: u32, number: u32, from: SlotOf<'_>) -> u64 {
        let block = SlotOf { region: &self.0.pool, layout: &self.0.layout, slot: place };
        copy((from, number * BLOCK_TOKENS), (block, 0))
    }
}

/// Copies a block's tokens from one position to another, and returns the sum of its bytes.
fn copy(from: (SlotOf<'_>, u32), into: (SlotOf<'_>, u32)) -> u64 {
    let pieces = |(of, start): (SlotOf<'_>, u32)| {
        let planes = 0..of.layout.geometry.layers * 2;
        of.layout.pieces(of.slot, TokenRange { start, count: BLOCK_TOKENS }, planes)
    };
    let mut sum = Checksum::default();
    for ((source, bytes), (target, _)) in pieces(from).zip(pieces(into)) {
        copy_summed((from.0.region, source), (into.0.region, target), bytes, Some(&mut sum));
    }
    sum.value()
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::{
        cache::block_hashes,
        kv::{KvDtype, KvGeometry, LayoutHash},
    };

    const GEOMETRY: KvGeometry = KvGeometry { layers: 2, kv_heads: 2, head_dim: 4, dtype: KvDtype::F32 };
    const LAYOUT: KvLayout = KvLayout { geometry: GEOMETRY, slots: 2, positions: 64 };

    fn region() -> Region {
        let region = Region::create("slots", LAYOUT.region_bytes()).unwrap();
        let bytes: Vec<u8> = (0..LAYOUT.region_bytes()).map(|i| (i * 31 + i / 255) as u8).collect();
        region.write(0, &bytes);
        region
    }

    fn of(region: &Region, slot: u32) -> SlotOf<'_> {
        SlotOf { region, layout: &LAYOUT, slot }
    }

    fn bytes_of(region: &Region, slot: u32, count: u32) -> Vec<u8> {
        let mut all = Vec::new();
        for (offset, bytes) in LAYOUT.pieces(slot, TokenRange { start: 0, count }, 0..4) {
            let start = all.len();
            all.resize(start + bytes, 0);
            region.read(offset, &mut all[start..]);
        }
        all
    }

    fn cache(blocks: u64) -> BlockCache {
        BlockCache::new(&LAYOUT, blocks * GEOMETRY.bytes_per_token() as u64 * 16).unwrap()
    }

    fn hashes(tokens: u32) -> Vec<BlockHash> {
        block_hashes(LayoutHash(1), None, &(0..tokens).collect::<Vec<_>>())
    }

    #[test]
    fn what_was_stored_is_loaded_into_another_slot() {
        let (region, cache) = (region(), cache(8));
        cache.store(&hashes(48), of(&region, 0));
        let target = Region::create("other", LAYOUT.region_bytes()).unwrap();
        assert_eq!(cache.load(&hashes(64), of(&target, 1)), 48);
        assert_eq!(bytes_of(&target, 1, 48), bytes_of(&region, 0, 48));
        assert_eq!(bytes_of(&target, 1, 64)[..48], bytes_of(&region, 0, 64)[..48]);
        // What comes after them was not touched.
        let after = LAYOUT.pieces(1, TokenRange { start: 48, count: 16 }, 0..4);
        for (offset, bytes) in after {
            let mut found = vec![1; bytes];
            target.read(offset, &mut found);
            assert!(found.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn a_damaged_block_is_not_served() {
        let (region, cache) = (region(), cache(8));
        cache.store(&hashes(48), of(&region, 0));
        // The second block's first key.
        let at = cache.0.layout.pieces(1, TokenRange { start: 0, count: 1 }, 0..1).next().unwrap().0;
        let mut byte = [0];
        cache.0.pool.read(at, &mut byte);
        cache.0.pool.write(at, &[byte[0] ^ 1]);
        let target = Region::create("other", LAYOUT.region_bytes()).unwrap();
        assert_eq!(cache.load(&hashes(48), of(&target, 0)), 16);
        assert_eq!(cache.blocks(), 2);
        cache.store(&hashes(48), of(&region, 0));
        assert_eq!(cache.load(&hashes(48), of(&target, 0)), 48);
        assert_eq!(bytes_of(&target, 0, 48), bytes_of(&region, 0, 48));
    }

    #[test]
    fn blocks_that_are_being_stored_are_waited_for() {
        let (region, cache) = (region(), cache(8));
        let hashes = hashes(48);
        cache.store(&hashes[..1], of(&region, 0));
        cache.index().expect(&hashes[1..]);
        let target = Region::create("other", LAYOUT.region_bytes()).unwrap();
        std::thread::scope(|scope| {
            let loading = scope.spawn(|| cache.load(&hashes, of(&target, 0)));
            std::thread::sleep(Duration::from_millis(20));
            cache.store(&hashes, of(&region, 0));
            assert_eq!(loading.join().unwrap(), 48);
        });
        assert_eq!(bytes_of(&target, 0, 48), bytes_of(&region, 0, 48));
    }

    #[test]
    fn a_cache_without_room_holds_nothing() {
        let (region, cache) = (region(), BlockCache::new(&LAYOUT, 100).unwrap());
        assert!(cache.is_off());
        cache.store(&hashes(48), of(&region, 0));
        assert_eq!(cache.load(&hashes(48), of(&region, 1)), 0);
    }

    #[test]
    fn readers_and_writers_at_once_get_whole_blocks() {
        let cache = cache(4);
        let regions: Vec<Region> = (0..4).map(|_| region()).collect();
        std::thread::scope(|scope| {
            for (number, region) in regions.iter().enumerate() {
                let cache = &cache;
                scope.spawn(move || {
                    let tokens: Vec<u32> = (0..64).map(|token| token + number as u32 % 2 * 100).collect();
                    let hashes = block_hashes(LayoutHash(1), None, &tokens);
                    let expected = bytes_of(region, 0, 64);
                    for _ in 0..200 {
                        cache.store(&hashes, of(region, 0));
                        let target = Region::create("target", LAYOUT.region_bytes()).unwrap();
                        let found = cache.load(&hashes, of(&target, 0));
                        let whole = bytes_of(&target, 0, found);
                        assert_eq!(whole, bytes_of(region, 0, found));
                        assert_eq!(expected, bytes_of(region, 0, 64));
                    }
                });
            }
        });
        assert!(cache.blocks() <= 4);
    }
}
