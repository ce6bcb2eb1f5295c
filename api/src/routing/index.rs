//! Which workers have which blocks: what all workers have told of their prefix caches, turned around.
//!
//! A block costs about 40 bytes for its first worker and 18 for each further one. A lookup goes along the prompt's blocks
//! and stops where no worker goes on, so it costs as much as the longest run that anybody has.

use forebay_schemas::{
    cache::BlockHash,
    cache_event::{CacheChange, CacheEvent},
    ids::WorkerId,
};
use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasherDefault, Hasher},
};

/// Blocks of all workers together that are known at most; those that come later are not, until others go. About 300 MB.
const HELD_MAX: usize = 8 << 20;

/// A worker within the index.
type Id = u16;

/// See the [module](self).
#[derive(Default)]
pub struct Index {
    blocks: HashMap<u128, Holders, BuildHasherDefault<Digest>>,
    workers: BTreeMap<WorkerId, Holder>,
    /// By their ids; none: the id is free.
    names: Vec<Option<WorkerId>>,
    held: usize,
}

/// What is known of a worker.
struct Holder {
    id: Id,
    incarnation: u64,
    /// Number of the event that must come next; none: something was missed, and the worker counts as having nothing.
    next: Option<u64>,
    held: usize,
    /// Blocks that it was told to have, some of them twice or gone since: for the end.
    told: Vec<u128>,
}

/// Who has a block.
enum Holders {
    One(Id),
    /// Sorted.
    Many(Vec<Id>),
}

/// Hashes of blocks are digests: any half of one is as good as a hash of it.
#[derive(Default)]
pub struct Digest(u64);

impl Hasher for Digest {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only digests are hashed")
    }

    fn write_u128(&mut self, digest: u128) {
        self.0 = digest as u64;
    }
}

fn key(hash: BlockHash) -> u128 {
    u128::from_be_bytes(*hash.as_bytes())
}

impl Holders {
    fn as_slice(&self) -> &[Id] {
        match self {
            Holders::One(id) => std::slice::from_ref(id),
            Holders::Many(ids) => ids,
        }
    }

    /// Whether it is new.
    fn add(&mut self, id: Id) -> bool {
        match self {
            Holders::One(first) if *first == id => false,
            Holders::One(first) => {
                let mut ids = vec![*first, id];
                ids.sort_unstable();
                *self = Holders::Many(ids);
                true
            }
            Holders::Many(ids) => match ids.binary_search(&id) {
                Ok(_) => false,
                Err(at) => {
                    ids.insert(at, id);
                    true
                }
            },
        }
    }
}

impl Index {
    /// Takes an event in. False: something is missing before it, or has been, so that the worker counts as having
    /// nothing: read again what is kept of it.
    pub fn apply(&mut self, event: &CacheEvent) -> bool {
        let begins = event.number == 0 || matches!(event.change, CacheChange::Snapshot { part: 0, .. });
        let known = self.workers.get(&event.worker).map(|holder| (holder.incarnation, holder.next));
        match known {
            // Of an earlier life, or read before.
            Some((incarnation, _)) if event.incarnation < incarnation => return true,
            Some((incarnation, Some(next))) if event.incarnation == incarnation && event.number < next => {
                return true;
            }
            Some((incarnation, Some(next))) if event.incarnation == incarnation && event.number == next => {}
            _ if begins => {}
            _ => {
                self.lose(&event.worker);
                return false;
            }
        }
        if begins {
            self.remove(&event.worker);
        }
        let Some(id) = self.id_of(&event.worker, event.incarnation) else { return true };
        match &event.change {
            CacheChange::Stored { blocks } | CacheChange::Snapshot { blocks, .. } => {
                blocks.iter().for_each(|block| self.store(&event.worker, id, key(*block)));
            }
            CacheChange::Removed { blocks } => {
                blocks.iter().for_each(|block| self.drop_block(&event.worker, id, key(*block)));
            }
        }
        let holder = self.workers.get_mut(&event.worker).expect("it has an id");
        holder.next = Some(event.number + 1);
        true
    }

    /// Something of this worker was missed: it counts as having nothing until it tells all.
    pub fn lose(&mut self, worker: &WorkerId) {
        let incarnation = self.workers.get(worker).map(|holder| holder.incarnation);
        self.remove(worker);
        if let Some(incarnation) = incarnation
            && self.id_of(worker, incarnation).is_some()
        {
            self.workers.get_mut(worker).expect("it has an id").next = None;
        }
    }

    /// Forgets a worker.
    pub fn remove(&mut self, worker: &WorkerId) {
        let Some(holder) = self.workers.remove(worker) else { return };
        self.names[usize::from(holder.id)] = None;
        for block in holder.told {
            self.held -= usize::from(take_out(&mut self.blocks, holder.id, block));
        }
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        *self = Index::default();
    }

    /// Workers that are known, and how many blocks each has. None: it counts as having nothing, for something of it was
    /// missed.
    pub fn workers(&self) -> impl Iterator<Item = (&WorkerId, Option<usize>)> {
        self.workers.iter().map(|(name, holder)| (name, holder.next.map(|_| holder.held)))
    }

    /// How many blocks all workers have together.
    pub fn held(&self) -> usize {
        self.held
    }

    /// How many of a prompt's first blocks each worker has, of those that have any, in no order.
    pub fn overlap(&self, prompt: &[BlockHash]) -> Vec<(&WorkerId, u32)> {
        let mut found = Vec::new();
        let mut note = |id: Id, blocks: usize| {
            found.extend(self.names[usize::from(id)].as_ref().map(|name| (name, blocks as u32)));
        };
        let holders = |hash: &BlockHash| self.blocks.get(&key(*hash)).map_or(&[][..], Holders::as_slice);
        let mut going = prompt.first().map(holders).unwrap_or_default().to_vec();
        for (blocks, hash) in prompt.iter().enumerate().skip(1) {
            if going.is_empty() {
                break;
            }
            let next = holders(hash);
            // Most of the time the same workers go on.
            if next == going {
                continue;
            }
            going.retain(|id| {
                let goes_on = next.binary_search(id).is_ok();
                if !goes_on {
                    note(*id, blocks);
                }
                goes_on
            });
        }
        going.iter().for_each(|id| note(*id, prompt.len()));
        found
    }

    fn id_of(&mut self, worker: &WorkerId, incarnation: u64) -> Option<Id> {
        if let Some(holder) = self.workers.get(worker) {
            return Some(holder.id);
        }
        let free = self.names.iter().position(Option::is_none).unwrap_or(self.names.len());
        let id = Id::try_from(free).ok()?;
        if free == self.names.len() {
            self.names.push(None);
        }
        self.names[free] = Some(worker.clone());
        let holder = Holder { id, incarnation, next: Some(0), held: 0, told: Vec::new() };
        self.workers.insert(worker.clone(), holder);
        Some(id)
    }

    fn store(&mut self, worker: &WorkerId, id: Id, block: u128) {
        if self.held >= HELD_MAX {
            return;
        }
        let mut new = false;
        self.blocks.entry(block).and_modify(|holders| new = holders.add(id)).or_insert_with(|| {
            new = true;
            Holders::One(id)
        });
        if !new {
            return;
        }
        self.held += 1;
        let holder = self.workers.get_mut(worker).expect("it has an id");
        holder.held += 1;
        holder.told.push(block);
        // What has gone in the meantime, or came twice, is left out once it is as much as the rest.
        if holder.told.len() > 2 * holder.held + 1024 {
            holder.told.sort_unstable();
            holder.told.dedup();
            let blocks = &self.blocks;
            holder.told.retain(|block| {
                blocks.get(block).is_some_and(|holders| holders.as_slice().binary_search(&id).is_ok())
            });
        }
    }

    fn drop_block(&mut self, worker: &WorkerId, id: Id, block: u128) {
        if take_out(&mut self.blocks, id, block) {
            self.held -= 1;
            self.workers.get_mut(worker).expect("it has an id").held -= 1;
        }
    }
}

/// Takes a worker from a block's holders. Whether it was one.
fn take_out(blocks: &mut HashMap<u128, Holders, BuildHasherDefault<Digest>>, id: Id, block: u128) -> bool {
    let Some(holders) = blocks.get_mut(&block) else { return false };
    match holders {
        Holders::One(only) if *only == id => {
            blocks.remove(&block);
            true
        }
        Holders::One(_) => false,
        Holders::Many(ids) => {
            let Ok(at) = ids.binary_search(&id) else { return false };
            ids.remove(at);
            if let [last] = ids[..] {
                *holders = Holders::One(last);
            }
            true
        }
    }
}

#[cfg(test)]
mod tests;
