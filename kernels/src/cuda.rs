//! GPUs: their memory, copies to and from it, and our kernels, whose sources are in `kernels/cuda/`.
//!
//! Work is queued on [`Stream`]s; buffers wait for it before they go. Nothing here is linked: the driver is looked for at
//! run time.

mod arena;
mod backing;
mod compile;
mod device;
mod draw;
mod memory;
mod rows;
mod shared;
mod sum;
mod transfer;

pub use arena::{Arena, GrowError};
pub use compile::{CompileError, Compiler, SOURCES, Source, preload};
pub use device::{Device, DeviceError, DeviceFacts, DeviceUuid, Mark, NoDevice, Stream};
pub use memory::{DeviceBuffer, HostBuffer, PinBudget, PinnedRegion, Plain};
pub use rows::{Drawn, RowDraws, Told};
pub use shared::{ShareError, SharedArena, SharedGranule, SharedSlot};
pub use sum::Sums;
pub use transfer::{Direction, HostSlot, Kernels, LoadError, OtherSlot};

use crate::{
    adjust::Penalties,
    sampler::{nucleus_part, random},
};
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
    min_p: f32,
    // To the end of the last eight bytes.
    unused: u32,
}

impl RowDraw {
    /// For the token with number `index` of an output.
    pub fn new(sampling: &Sampling, index: u32) -> RowDraw {
        let Sampling { temperature, top_p, top_k, seed, min_p, .. } = *sampling;
        let (top_p, random) = (nucleus_part(top_p), random(seed, index));
        RowDraw { temperature, top_k, top_p, random, min_p, unused: 0 }
    }
}

/// How `adjust` changes the logits of one row: `RowAdjustment` in `adjust.cu`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct RowAdjustment {
    /// How much what was seen counts.
    pub penalties: Penalties,
    /// Where the row's tokens begin in the list of all.
    pub first: u32,
    /// How many there are.
    pub count: u32,
    /// 1 if the row has a mask.
    pub masked: u32,
}

impl RowAdjustment {
    /// Nothing changes.
    pub const NONE: RowAdjustment =
        RowAdjustment { penalties: Penalties::NONE, first: 0, count: 0, masked: 0 };
}

/// What `probabilities` tells of one row: `Told` in `adjust.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct RowTold {
    /// So many of the most probable tokens, ...
    pub top: u32,
    /// ... if this is 1; with 0 nothing at all.
    pub told: u32,
}

/// A token with its logit: `Probable` in `adjust.cu`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Probable {
    /// Its id.
    pub token: u32,
    /// Its logit.
    pub logit: f32,
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
