//! Blocks of the prefix cache: which tokens they hold, by a name that every process derives alike.

use crate::kv::LayoutHash;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use sha2::{Digest, Sha256};
use std::fmt;

/// Tokens of a block. Only whole blocks are cached.
pub const BLOCK_TOKENS: u32 = 16;

/// Names a block by all tokens from the beginning of the sequence to the block's end, by what its KV means, and by the
/// request's salt: 128 bits of a chain of SHA-256, so that nobody can make two that are equal. Shown as 32 hexadecimal
/// digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash([u8; 16]);

impl BlockHash {
    /// What the chain begins with. The layout hash stands for model, weights and precision too.
    fn root(layout_hash: LayoutHash, cache_salt: Option<&str>) -> BlockHash {
        let digest = Sha256::new_with_prefix(b"forebay block 1")
            .chain_update(layout_hash.0.to_le_bytes())
            .chain_update([u8::from(cache_salt.is_some())])
            .chain_update(cache_salt.unwrap_or_default());
        BlockHash::of(digest)
    }

    /// The hash of the block that follows this one.
    fn next(self, tokens: &[u32]) -> BlockHash {
        let mut digest = Sha256::new_with_prefix(self.0);
        tokens.iter().for_each(|token| digest.update(token.to_le_bytes()));
        BlockHash::of(digest)
    }

    fn of(digest: Sha256) -> BlockHash {
        let digest: [u8; 32] = digest.finalize().into();
        BlockHash(digest[..16].try_into().expect("a digest has 32 bytes"))
    }

    /// From its bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> BlockHash {
        BlockHash(bytes)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

/// The hashes of all whole blocks of a sequence, in order.
pub fn block_hashes(layout_hash: LayoutHash, cache_salt: Option<&str>, tokens: &[u32]) -> Vec<BlockHash> {
    let mut hash = BlockHash::root(layout_hash, cache_salt);
    let blocks = tokens.chunks_exact(BLOCK_TOKENS as usize);
    blocks
        .map(|tokens| {
            hash = hash.next(tokens);
            hash
        })
        .collect()
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for BlockHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => serializer.collect_str(self),
            false => serializer.serialize_bytes(&self.0),
        }
    }
}

impl<'de> Deserialize<'de> for BlockHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<BlockHash, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            let bits = u128::from_str_radix(&text, 16).map_err(D::Error::custom)?;
            return Ok(BlockHash(bits.to_be_bytes()));
        }
        let bytes = bytes::Bytes::deserialize(deserializer)?;
        let bytes = <[u8; 16]>::try_from(&bytes[..]).map_err(D::Error::custom)?;
        Ok(BlockHash(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: LayoutHash = LayoutHash(7);

    fn tokens(count: u32) -> Vec<u32> {
        (0..count).collect()
    }

    #[test]
    fn only_whole_blocks_have_a_hash() {
        assert_eq!(block_hashes(LAYOUT, None, &tokens(15)), []);
        assert_eq!(block_hashes(LAYOUT, None, &tokens(47)).len(), 2);
    }

    #[test]
    fn a_hash_tells_all_that_came_before() {
        let hashes = block_hashes(LAYOUT, None, &tokens(48));
        assert_eq!(block_hashes(LAYOUT, None, &tokens(32)), hashes[..2]);
        let mut other = tokens(48);
        other[0] = 99;
        let changed = block_hashes(LAYOUT, None, &other);
        assert!(hashes.iter().zip(&changed).all(|(a, b)| a != b));
        other[0] = 0;
        other[47] = 99;
        let changed = block_hashes(LAYOUT, None, &other);
        assert_eq!((&changed[..2], changed[2] == hashes[2]), (&hashes[..2], false));
    }

    #[test]
    fn layouts_and_salts_share_nothing() {
        let of = |layout, salt| block_hashes(LayoutHash(layout), salt, &tokens(16))[0];
        let all = [of(7, None), of(8, None), of(7, Some("")), of(7, Some("a")), of(7, Some("b"))];
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }

    #[test]
    fn a_hash_reads_back_from_text_and_bytes() {
        let hash = block_hashes(LAYOUT, None, &tokens(16))[0];
        let text = serde_json::to_string(&hash).unwrap();
        assert_eq!(text, format!("\"{hash}\""));
        assert_eq!(serde_json::from_str::<BlockHash>(&text).unwrap(), hash);
        let bytes = rmp_serde::to_vec_named(&hash).unwrap();
        assert_eq!(bytes.len(), 18);
        assert_eq!(rmp_serde::from_slice::<BlockHash>(&bytes).unwrap(), hash);
    }
}
