//! KV between workers: sealed under a lease by the one that computed it, read one-sidedly by the one that
//! needs it.
//!
//! The protocol, above every transport: claim the lease → read → look at the generation again → check the sums
//! → release. Whatever fails, the reader computes the KV itself; nothing is ever served with a warning.

mod cache;
mod greeting;
mod lease;
pub mod nixl;
mod peers;
mod pool;
mod publish;
mod read;
pub mod shm;
pub mod tcp;

pub use cache::{BlockCache, Change, Drained, SlotOf};
pub use lease::{Leases, Sealed, Word};
pub use peers::{Choice, KvOptions, KvPeers};
pub use pool::{Slot, SlotPool};
pub(crate) use publish::publish;
pub use read::{FROM_GPU, KvRead, ReadError, ReadReport, Transport, read_kv};

use forebay_kernels::{Checksum, Region, checksum};
use forebay_schemas::kv::{KvHandle, KvLayout, TokenRange};

/// The sums of a range of tokens of a slot, one for each group of planes, as a [`KvHandle`] carries them.
pub fn sums(region: &Region, layout: &KvLayout, slot: u32, tokens: TokenRange) -> Vec<u64> {
    (0..KvHandle::groups(&layout.geometry)).map(|group| sum_of(region, layout, slot, tokens, group)).collect()
}

/// The sum of one group of planes.
pub(crate) fn sum_of(region: &Region, layout: &KvLayout, slot: u32, tokens: TokenRange, group: usize) -> u64 {
    let mut sum = Checksum::default();
    for (offset, bytes) in layout.pieces(slot, tokens, KvHandle::group_planes(&layout.geometry, group)) {
        checksum(region, offset, bytes, &mut sum);
    }
    sum.value()
}
