//! GPUs: their memory, copies to and from it, and our kernels, whose sources are in `kernels/cuda/`.
//!
//! Work is queued on [`Stream`]s; buffers wait for it before they go. Nothing here is linked: the driver is looked for at
//! run time.

mod arena;
mod backing;
mod compile;
mod device;
mod memory;
mod transfer;

pub use arena::{Arena, GrowError};
pub use compile::{CompileError, Compiler, SOURCES, Source, preload};
pub use device::{Device, DeviceError, DeviceFacts, Mark, NoDevice, Stream};
pub use memory::{DeviceBuffer, HostBuffer, PinnedRegion, Plain};
pub use transfer::{Direction, HostSlot, Kernels, LoadError};

use crate::sampler::{nucleus_part, random};
use forebay_schemas::{
    kv::{KvLayout, TokenRange},
    sampling::Sampling,
};

/// What a row's token is where its logits were not finite.
pub const NOT_FINITE: u32 = u32::MAX;

/// How `sample` draws the token of one row: `Draw` in `sampler.cu`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct RowDraw {
    temperature: f32,
    top_k: u32,
    top_p: u64,
    random: u64,
}

impl RowDraw {
    /// For the token with number `index` of an output.
    pub fn new(sampling: &Sampling, index: u32) -> RowDraw {
        let Sampling { temperature, top_p, top_k, seed } = *sampling;
        RowDraw { temperature, top_k, top_p: nucleus_part(top_p), random: random(seed, index) }
    }
}

/// Which pieces `kv_copy` moves on one of its sides, with a block for each: `Pieces` in `kv.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Pieces {
    first: u64,
    plane_stride: u64,
    head_stride: u64,
    heads: u32,
    piece: u32,
}

/// Bytes that are moved at once.
const VECTOR: u64 = 16;

impl Pieces {
    /// The pieces of [`KvLayout::pieces`], and how many they are. None if they do not fall into vectors of 16 bytes, or one
    /// has 4 GiB.
    pub fn new(
        layout: &KvLayout,
        slot: u32,
        tokens: TokenRange,
        planes: std::ops::Range<u32>,
    ) -> Option<(Pieces, u32)> {
        let head_bytes = layout.geometry.head_bytes() as u64;
        let start = layout.slot_offset(planes.start as usize, slot as usize) as u64;
        let of = Pieces {
            first: start + u64::from(tokens.start) * head_bytes,
            plane_stride: layout.plane_stride() as u64,
            head_stride: layout.head_stride() as u64,
            heads: layout.geometry.kv_heads,
            piece: u32::try_from(u64::from(tokens.count) * head_bytes).ok()?,
        };
        let fits = [of.first, of.plane_stride, of.head_stride, of.piece.into()]
            .iter()
            .all(|bytes| bytes % VECTOR == 0);
        fits.then(|| (of, (planes.end - planes.start) * layout.geometry.kv_heads))
    }
}
