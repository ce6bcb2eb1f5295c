//! CRC-64/NVME of KV in an arena, taken by the GPU: the KV does not cross the bus to be checked.

#![allow(unsafe_code)]

use super::{
    Pieces,
    arena::Arena,
    device::{Device, DeviceError, Doing, Stream},
    memory::{DeviceBuffer, HostBuffer},
    transfer::{Kernels, argument},
};
use crate::crc::{join, power};
use forebay_schemas::kv::{KvLayout, TokenRange};

/// Bytes that a block sums: as many as make what it does at its end count for little, as few as give all blocks something to do.
const STRETCH: usize = 256 << 10;

/// Blocks at most: each goes on with another stretch.
const BLOCKS_MAX: u32 = 1024;

/// Threads of a block: `SUMMERS_MAX` in `kv.cu`.
const THREADS: u32 = 256;

/// `Powers` in `kv.cu`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Powers([u64; 9]);

/// Room for the sums of a slot's KV, and then these.
#[derive(Debug)]
pub struct Sums {
    on_device: DeviceBuffer<u64>,
    host: HostBuffer<u64>,
    powers: Powers,
    /// Of what was summed last: pieces of a plane, bytes of a piece, and stretches in all.
    heads: usize,
    piece: usize,
    count: usize,
}

impl Sums {
    /// For slots of an arena that is laid out so.
    pub fn new(device: &Device, layout: &KvLayout) -> Result<Sums, DeviceError> {
        let pieces = 2 * layout.geometry.layers as usize * layout.geometry.kv_heads as usize;
        let most = pieces * layout.head_stride().div_ceil(STRETCH);
        let powers = Powers(std::array::from_fn(|step| power(128 << step)));
        Ok(Sums {
            on_device: DeviceBuffer::new(device, most)?,
            host: HostBuffer::new(device, most)?,
            powers,
            heads: layout.geometry.kv_heads as usize,
            piece: 0,
            count: 0,
        })
    }

    /// The sums of groups of so many planes, once they are there: what a [`Checksum`](crate::Checksum) says of the planes' pieces
    /// in order.
    pub fn of_groups(&mut self, planes: u32) -> Result<Vec<u64>, DeviceError> {
        let stretches = planes as usize * self.heads * self.piece.div_ceil(STRETCH);
        let (piece, count) = (self.piece, self.count);
        Ok(self.host.data()?[..count].chunks(stretches).map(|sums| join(sums, piece, STRETCH)).collect())
    }
}

impl Stream {
    /// Queues the summing of `tokens` of a slot, of all planes.
    ///
    /// # Panics
    /// If the slot or its tokens are outside, there are none, their pieces are no whole vectors of 16 bytes, or `sums` is for another
    /// layout.
    pub fn sum_kv(
        &self,
        kernels: &Kernels,
        (arena, slot): (&Arena, u32),
        tokens: TokenRange,
        sums: &mut Sums,
    ) -> Result<(), DeviceError> {
        let layout = arena.layout();
        assert!(
            slot < layout.slots && tokens.count > 0 && tokens.end() <= layout.positions,
            "slot {slot} {tokens:?} of {layout:?}"
        );
        let (of, pieces) = Pieces::new(layout, slot, tokens, 0..2 * layout.geometry.layers)
            .expect("pieces of whole vectors");
        let stretch = STRETCH as u32;
        let count = pieces * of.piece.div_ceil(stretch);
        assert!(
            count as usize <= sums.on_device.len(),
            "{count} sums, and room for {}",
            sums.on_device.len()
        );
        (sums.piece, sums.count) = (of.piece as usize, count as usize);
        let (from, into) = (arena.address(), sums.on_device.address());
        let arguments = [
            argument(&from),
            argument(&of),
            argument(&count),
            argument(&stretch),
            argument(&sums.powers),
            argument(&into),
        ];
        // SAFETY: these are the kernel's parameters; the pieces lie in the arena, and there is room for the sums.
        unsafe { self.launch(&kernels.kv_sum, count.min(BLOCKS_MAX), THREADS, arguments) }
            .doing("summing KV")?;
        self.copy_out(&sums.on_device, count as usize, &mut sums.host)
    }
}
