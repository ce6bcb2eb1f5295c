//! Where the keys and values of a sequence lie, and how an event refers to them.
//!
//! A worker keeps all of its KV cache in one shared-memory region, head-major:
//! `[layer][k|v][slot][kv_head][position][head_dim]`. A [`KvHandle`] names a range of positions of one slot
//! of one region of one incarnation of one worker; it never holds an address.

use crate::ids::WorkerId;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Element type of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// 4 bytes an element.
    F32,
    /// IEEE half, 2 bytes.
    F16,
    /// bfloat16, 2 bytes.
    Bf16,
    /// fp8 with 4 bits of exponent and 3 of mantissa (E4M3), 1 byte.
    F8,
    /// 1 byte, with static scales.
    Int8,
}

impl KvDtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::F16 | KvDtype::Bf16 => 2,
            KvDtype::F8 | KvDtype::Int8 => 1,
        }
    }
}

/// What two workers must agree on before one may read the other's KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KvGeometry {
    /// Transformer layers.
    pub layers: u32,
    /// KV heads a layer (fewer than query heads under grouped-query attention).
    pub kv_heads: u32,
    /// Elements of one head.
    pub head_dim: u32,
    /// Element type.
    pub dtype: KvDtype,
}

impl KvGeometry {
    /// Bytes that one head of one position takes: the unit of contiguity within a piece.
    pub fn head_bytes(&self) -> usize {
        self.head_dim as usize * self.dtype.bytes()
    }

    /// Bytes of KV that one token adds, over all layers, keys and values.
    pub fn bytes_per_token(&self) -> usize {
        self.layers as usize * 2 * self.kv_heads as usize * self.head_bytes()
    }
}

/// One region: a geometry, and how many sequences of which length it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KvLayout {
    /// What readers must agree on.
    pub geometry: KvGeometry,
    /// Sequences that the region holds at once.
    pub slots: u32,
    /// Token positions of each slot.
    pub positions: u32,
}

impl KvLayout {
    /// Bytes of one (layer, k or v, slot, head): all positions of one head, contiguous.
    pub fn head_stride(&self) -> usize {
        self.positions as usize * self.geometry.head_bytes()
    }

    /// Bytes of one (layer, k or v, slot).
    pub fn slot_stride(&self) -> usize {
        self.geometry.kv_heads as usize * self.head_stride()
    }

    /// Bytes of one (layer, k or v): what ONNX Runtime sees as one past tensor of all slots.
    pub fn plane_stride(&self) -> usize {
        self.slots as usize * self.slot_stride()
    }

    /// Bytes of the whole region.
    pub fn region_bytes(&self) -> usize {
        self.geometry.layers as usize * 2 * self.plane_stride()
    }

    /// Offset of the first position of a slot in one plane; `plane` is `2 * layer + (0 for k, 1 for v)`.
    pub fn slot_offset(&self, plane: usize, slot: usize) -> usize {
        plane * self.plane_stride() + slot * self.slot_stride()
    }

    /// The contiguous runs of bytes that hold `tokens` of `slot`, one for each head of each plane in order:
    /// `(offset in the region, bytes)`. Two regions of one geometry give runs of the same lengths.
    pub fn pieces(
        &self,
        slot: u32,
        tokens: TokenRange,
        planes: std::ops::Range<u32>,
    ) -> impl Iterator<Item = (usize, usize)> + use<> {
        let layout = *self;
        let head_bytes = layout.geometry.head_bytes();
        let (start, bytes) = (tokens.start as usize * head_bytes, tokens.count as usize * head_bytes);
        planes.flat_map(move |plane| {
            let base = layout.slot_offset(plane as usize, slot as usize) + start;
            (0..layout.geometry.kv_heads as usize)
                .map(move |head| (base + head * layout.head_stride(), bytes))
        })
    }
}

/// A range of token positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TokenRange {
    /// First position.
    pub start: u32,
    /// How many.
    pub count: u32,
}

impl TokenRange {
    /// The position after the last.
    pub fn end(&self) -> u32 {
        self.start.saturating_add(self.count)
    }
}

/// Identifies everything that decides the meaning of KV bytes: weights, architecture, position encoding and
/// element type. KV is only ever read between equal hashes. Shown as 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayoutHash(pub u64);

impl fmt::Display for LayoutHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for LayoutHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A reference to sealed KV: who holds it, where in its region, for how long, and how to tell that the bytes
/// read are the bytes sealed. Carried by `KvReady`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvHandle {
    /// The worker that holds the bytes.
    pub agent: WorkerId,
    /// Which life of that worker: a restarted worker has another, and none of the old KV.
    pub incarnation: u64,
    /// Shape of the owner's region, from which the strided pieces follow.
    pub layout: KvLayout,
    /// Meaning of the bytes; a reader with another hash must not read.
    pub layout_hash: LayoutHash,
    /// Slot of the owner's region.
    pub slot: u32,
    /// Generation of that slot when it was sealed; another generation means the bytes are gone.
    pub generation: u64,
    /// Which tokens of the sequence.
    pub tokens: TokenRange,
    /// CRC-64/NVME of each group of planes, in order; see [`KvHandle::group_planes`].
    pub checksums: Vec<u64>,
    /// How long the owner keeps the slot from the time of the event, in milliseconds: a duration, because
    /// clocks of two machines differ.
    pub lease_remaining_ms: u32,
    /// Proof of the right to read, checked by the owner where a transport goes through it.
    pub capability: u64,
}

impl KvHandle {
    /// Planes (one k or v tensor of one layer each) that one checksum covers: eight layers' worth.
    pub const PLANES_PER_CHECKSUM: u32 = 16;

    /// The planes that checksum number `group` covers.
    pub fn group_planes(geometry: &KvGeometry, group: usize) -> std::ops::Range<u32> {
        let start = group as u32 * Self::PLANES_PER_CHECKSUM;
        start..(start + Self::PLANES_PER_CHECKSUM).min(geometry.layers * 2)
    }

    /// How many checksums a handle of this geometry has.
    pub fn groups(geometry: &KvGeometry) -> usize {
        (geometry.layers * 2).div_ceil(Self::PLANES_PER_CHECKSUM) as usize
    }

    /// Bytes that the handle refers to.
    pub fn bytes(&self) -> usize {
        self.layout.geometry.bytes_per_token() * self.tokens.count as usize
    }
}
