//! What a worker says of its prefix cache: which blocks it has now and has no longer. Routers build their index from it.

use crate::{cache::BlockHash, ids::WorkerId};
use serde::{Deserialize, Serialize};

/// Blocks of one event. Their hashes take 256 KiB: well within what a NATS server takes in one message.
pub const EVENT_BLOCKS_MAX: usize = 16_384;

/// One change of a worker's prefix cache. As MessagePack, fields by name: fields may be added, and a new kind of change is
/// an error to older readers, for whom that worker has nothing then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheEvent {
    /// Whose cache.
    pub worker: WorkerId,
    /// Which life of it; a later one is larger.
    pub incarnation: u64,
    /// Counts the events of this life from 0, so that a missing one shows.
    pub number: u64,
    /// What changed.
    pub change: CacheChange,
}

/// What changed in a prefix cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheChange {
    /// Blocks that can be read from it from now on.
    Stored {
        /// Which.
        #[serde(with = "packed")]
        blocks: Vec<BlockHash>,
    },
    /// Blocks that it has no longer.
    Removed {
        /// Which.
        #[serde(with = "packed")]
        blocks: Vec<BlockHash>,
    },
    /// All that it has: nothing said before counts any more. In several parts, one event each, if there is much.
    Snapshot {
        /// The blocks of this part.
        #[serde(with = "packed")]
        blocks: Vec<BlockHash>,
        /// Which part, from 0.
        part: u32,
        /// How many there are.
        parts: u32,
    },
}

impl CacheEvent {
    /// As MessagePack.
    pub fn encode(&self) -> Vec<u8> {
        rmp_serde::to_vec_named(self).expect("plain data always encodes into memory")
    }

    /// From MessagePack.
    pub fn decode(bytes: &[u8]) -> Result<CacheEvent, rmp_serde::decode::Error> {
        rmp_serde::from_slice(bytes)
    }
}

impl CacheChange {
    /// A snapshot in as many parts as it needs, at least one.
    pub fn snapshot(blocks: &[BlockHash]) -> Vec<CacheChange> {
        let parts = blocks.len().div_ceil(EVENT_BLOCKS_MAX).max(1) as u32;
        let mut rest = blocks.chunks(EVENT_BLOCKS_MAX);
        (0..parts)
            .map(|part| CacheChange::Snapshot {
                blocks: rest.next().unwrap_or_default().to_vec(),
                part,
                parts,
            })
            .collect()
    }
}

/// Hashes as one run of bytes; in text, as a list.
mod packed {
    use super::BlockHash;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(blocks: &[BlockHash], serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return blocks.serialize(serializer);
        }
        let bytes: Vec<u8> = blocks.iter().flat_map(|block| *block.as_bytes()).collect();
        serializer.serialize_bytes(&bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<BlockHash>, D::Error> {
        if deserializer.is_human_readable() {
            return Vec::deserialize(deserializer);
        }
        let bytes = bytes::Bytes::deserialize(deserializer)?;
        let (blocks, rest) = bytes.as_chunks::<16>();
        match rest {
            [] => Ok(blocks.iter().copied().map(BlockHash::from_bytes).collect()),
            _ => Err(D::Error::invalid_length(bytes.len(), &"a multiple of 16 bytes")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(index: usize) -> BlockHash {
        BlockHash::from_bytes((index as u128).to_be_bytes())
    }

    #[test]
    fn a_large_snapshot_comes_in_parts_that_fit_a_message() {
        let blocks: Vec<BlockHash> = (0..EVENT_BLOCKS_MAX * 2 + 1).map(block).collect();
        let changes = CacheChange::snapshot(&blocks);
        let mut read = Vec::new();
        for (number, change) in changes.into_iter().enumerate() {
            let worker = WorkerId::new("decode-1").unwrap();
            let event = CacheEvent { worker, incarnation: u64::MAX, number: u64::MAX, change };
            let bytes = event.encode();
            assert!(bytes.len() < 300_000);
            let again = CacheEvent::decode(&bytes).unwrap();
            assert_eq!(again, event);
            let CacheChange::Snapshot { blocks, part, parts: 3 } = again.change else { panic!("{number}") };
            assert_eq!(part as usize, number);
            read.extend(blocks);
        }
        assert_eq!(read, blocks);
        assert_eq!(CacheChange::snapshot(&[]).len(), 1);
    }

    #[test]
    fn half_a_hash_is_refused() {
        let change = CacheChange::Stored { blocks: vec![block(1)] };
        let mut bytes = rmp_serde::to_vec_named(&change).unwrap();
        let length = bytes.len() - 17;
        assert_eq!(bytes[length], 16);
        bytes[length] = 15;
        bytes.pop();
        assert!(rmp_serde::from_slice::<CacheChange>(&bytes).is_err());
    }
}
