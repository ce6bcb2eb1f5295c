//! KV between a GPU's arena and other memory: a region of the host's, or another process's arena; and kernels put to work.

#![allow(unsafe_code)]

use super::{
    Pieces,
    arena::Arena,
    compile::{CompileError, Compiler, SOURCES, Source},
    device::{Device, DeviceError, Doing, Stream},
    memory::PinnedRegion,
    shared::SharedSlot,
};
use cudarc::{
    driver::{
        CudaFunction, CudaModule, result,
        sys::{self, CUmemorytype::*},
    },
    nvrtc::Ptx,
};
use forebay_schemas::kv::{KvLayout, TokenRange};
use std::{ffi::c_void, ops::Range, path::Path, sync::Arc};

/// Why kernels could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// They could not be compiled.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// The driver refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// The kernels, loaded on a GPU.
#[derive(Clone, Debug)]
pub struct Kernels {
    kv_copy: CudaFunction,
    pub(super) kv_sum: CudaFunction,
    pub(super) adjust: CudaFunction,
    pub(super) sample: CudaFunction,
    pub(super) probabilities: CudaFunction,
}

/// A piece shorter than this is moved by a kernel: copy engines take their time for each.
const KERNEL_BELOW: usize = 32 << 10;

/// Threads of a block that moves a piece.
const MOVERS: u32 = 256;

/// Where KV goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the arena.
    Out,
    /// Into the arena.
    In,
}

/// A slot of a region that a GPU copies to and from. Its bytes in each plane are whole pages, pinned when they are first used.
#[derive(Clone, Copy, Debug)]
pub struct HostSlot<'a> {
    /// The region.
    pub region: &'a PinnedRegion,
    /// How it is laid out.
    pub layout: &'a KvLayout,
    /// Which slot.
    pub slot: u32,
}

/// Where KV of an arena goes, or comes from.
#[derive(Clone, Copy, Debug)]
pub enum OtherSlot<'a> {
    /// Memory of the host.
    Host(HostSlot<'a>),
    /// Another process's arena, which is only read. It stays mapped until what is queued is done: whoever holds it waits.
    Shared(&'a SharedSlot),
}

impl<'a> From<HostSlot<'a>> for OtherSlot<'a> {
    fn from(slot: HostSlot<'a>) -> OtherSlot<'a> {
        OtherSlot::Host(slot)
    }
}

impl<'a> From<&'a SharedSlot> for OtherSlot<'a> {
    fn from(slot: &'a SharedSlot) -> OtherSlot<'a> {
        OtherSlot::Shared(slot)
    }
}

impl<'a> OtherSlot<'a> {
    fn place(&self) -> (&'a KvLayout, u32) {
        match self {
            OtherSlot::Host(host) => (host.layout, host.slot),
            OtherSlot::Shared(shared) => (shared.layout(), shared.slot()),
        }
    }

    /// Where the memory begins, and whether a kernel may move these planes. Of the host's they are pinned, if they can be.
    fn reach(
        &self,
        planes: Range<u32>,
        direction: Direction,
        (device, short): (&Device, bool),
    ) -> Result<(End, bool), DeviceError> {
        match self {
            // Always by the kernel, which touches nothing but pieces: between those of a copy engine's rows nothing is mapped.
            OtherSlot::Shared(shared) => {
                assert_eq!(direction, Direction::In, "another process's arena is only read");
                Ok((End { address: shared.address(), kind: CU_MEMORYTYPE_DEVICE }, true))
            }
            OtherSlot::Host(HostSlot { region, layout, slot }) => {
                assert!(layout.region_bytes() <= region.region().len());
                let mut pinned = device.one_address;
                for plane in planes {
                    let start = layout.slot_offset(plane as usize, *slot as usize);
                    pinned &= region.pin(start..start + layout.slot_stride())?;
                }
                // Of the host's memory no more is written than what is moved there.
                let at = region.region().at(0, region.region().len(), direction == Direction::Out);
                Ok((
                    End { address: at.expose_provenance() as u64, kind: CU_MEMORYTYPE_HOST },
                    pinned && short,
                ))
            }
        }
    }
}

impl Kernels {
    /// Loads the kernels for a GPU: as they were compiled before and kept in `cache`, or compiled now by the NVRTC in a folder.
    pub fn load(device: &Device, nvrtc: Option<&Path>, cache: Option<&Path>) -> Result<Kernels, LoadError> {
        let capability = device.facts().capability;
        let mut compiler = None;
        let mut code = |source: Source| {
            if let Some(code) = cache.and_then(|cache| source.cached(capability, cache)) {
                return Ok(code);
            }
            let compiler = match compiler {
                Some(compiler) => compiler,
                None => *compiler.insert(Compiler::load(nvrtc)?),
            };
            let code = compiler.compile(source, capability)?;
            cache.inspect(|cache| source.keep(capability, cache, &code));
            Ok::<_, CompileError>(code)
        };
        let [adjust, kv, sampler] = SOURCES.map(&mut code);
        Ok(Kernels::from_code(device, [adjust?, kv?, sampler?])?)
    }

    /// Loads the compiled code of all [`SOURCES`].
    pub fn from_code(device: &Device, code: [Vec<u8>; SOURCES.len()]) -> Result<Kernels, DeviceError> {
        let module = |code| device.context.load_module(Ptx::from_binary(code)).doing("loading kernels");
        let [adjust, kv, sampler] = code.map(module);
        let (adjust, kv, sampler) = (adjust?, kv?, sampler?);
        let function = |module: &Arc<CudaModule>, name| module.load_function(name).doing("finding a kernel");
        Ok(Kernels {
            kv_copy: function(&kv, "kv_copy")?,
            kv_sum: function(&kv, "kv_sum")?,
            adjust: function(&adjust, "adjust")?,
            sample: function(&sampler, "sample")?,
            probabilities: function(&adjust, "probabilities")?,
        })
    }
}

impl Stream {
    /// Queues the move of `tokens` of some planes between a slot of an arena and another.
    ///
    /// # Panics
    /// If the layouts differ in geometry, a slot, its tokens or the planes are outside, or another process's arena is to be written.
    pub fn move_kv<'a>(
        &self,
        kernels: &Kernels,
        direction: Direction,
        (arena, slot): (&Arena, u32),
        other: impl Into<OtherSlot<'a>>,
        tokens: TokenRange,
        planes: Range<u32>,
    ) -> Result<(), DeviceError> {
        let other = other.into();
        let places = [(arena.layout(), slot), other.place()];
        assert_eq!(places[0].0.geometry, places[1].0.geometry, "KV of another shape");
        for (layout, slot) in places {
            assert!(
                slot < layout.slots && tokens.end() <= layout.positions,
                "slot {slot} {tokens:?} of {layout:?}"
            );
        }
        if let OtherSlot::Shared(shared) = other {
            assert!(tokens.end() <= shared.positions(), "{tokens:?}, and {} are mapped", shared.positions());
        }
        assert!(planes.end <= 2 * arena.layout().geometry.layers, "planes {planes:?}");
        if tokens.count == 0 || planes.is_empty() {
            return Ok(());
        }
        let short = tokens.count as usize * arena.layout().geometry.head_bytes() < KERNEL_BELOW;
        let (end, by_kernel) = other.reach(planes.clone(), direction, (&self.device, short))?;
        self.device.bind()?;
        let ends = [End { address: arena.address(), kind: CU_MEMORYTYPE_DEVICE }, end];
        let [ours, others] = places.map(|(layout, slot)| Pieces::new(layout, slot, tokens, planes.clone()));
        if let (true, Some((ours, count)), Some((others, _))) = (by_kernel, ours, others) {
            let [ours, others] = [(ends[0].address, ours), (ends[1].address, others)];
            let (from, into) = if direction == Direction::Out { (ours, others) } else { (others, ours) };
            // SAFETY: all pieces were checked to lie in their memory, the host's is pinned, and all wait before they go.
            return unsafe { self.move_by_kernel(kernels, from, into, count) };
        }
        for plane in planes {
            let copy = copy_2d(direction, ends, places, tokens, plane);
            // SAFETY: as above; of memory that is not pinned the driver takes a copy.
            unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.raw()).result() }.doing("copying KV")?;
        }
        Ok(())
    }

    /// # Safety
    /// The pieces lie in the memories, which the GPU reaches, and stay until they are moved.
    unsafe fn move_by_kernel(
        &self,
        kernels: &Kernels,
        (from, out): (u64, Pieces),
        (into, r#in): (u64, Pieces),
        count: u32,
    ) -> Result<(), DeviceError> {
        let arguments = [argument(&from), argument(&out), argument(&into), argument(&r#in)];
        // SAFETY: these are the kernel's parameters; the rest is as the caller says.
        unsafe { self.launch(&kernels.kv_copy, count, MOVERS, arguments) }.doing("moving KV")
    }

    /// # Safety
    /// The arguments are the kernel's, and stay valid for this call; what it reads and writes is there until it is done.
    pub(super) unsafe fn launch<const N: usize>(
        &self,
        kernel: &CudaFunction,
        blocks: u32,
        threads: u32,
        mut arguments: [*mut c_void; N],
    ) -> Result<(), cudarc::driver::DriverError> {
        self.device.context.bind_to_thread()?;
        let (grid, block) = ((blocks, 1, 1), (threads, 1, 1));
        // SAFETY: as the caller says.
        unsafe { result::launch_kernel(kernel.cu_function(), grid, block, 0, self.raw(), &mut arguments) }
    }
}

pub(super) fn argument<T>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

/// Where a memory begins, and what kind it is. Pinned memory has one address, for the host and the GPU.
#[derive(Clone, Copy)]
struct End {
    address: u64,
    kind: sys::CUmemorytype,
}

/// A head is a row of a 2D copy.
fn copy_2d(
    direction: Direction,
    ends: [End; 2],
    places: [(&KvLayout, u32); 2],
    tokens: TokenRange,
    plane: u32,
) -> sys::CUDA_MEMCPY2D {
    let geometry = places[0].0.geometry;
    let side = |number: usize| {
        let (End { address, kind }, (layout, slot)) = (ends[number], places[number]);
        let offset = layout.slot_offset(plane as usize, slot as usize);
        let at = address + (offset + tokens.start as usize * geometry.head_bytes()) as u64;
        let on_host = kind == CU_MEMORYTYPE_HOST;
        let host = std::ptr::with_exposed_provenance_mut::<c_void>(if on_host { at as usize } else { 0 });
        (kind, host, if on_host { 0 } else { at }, layout.head_stride())
    };
    let (from, into) = if direction == Direction::Out { (side(0), side(1)) } else { (side(1), side(0)) };
    sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: from.0,
        srcHost: from.1,
        srcDevice: from.2,
        srcArray: std::ptr::null_mut(),
        srcPitch: from.3,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: into.0,
        dstHost: into.1,
        dstDevice: into.2,
        dstArray: std::ptr::null_mut(),
        dstPitch: into.3,
        WidthInBytes: tokens.count as usize * geometry.head_bytes(),
        Height: geometry.kv_heads as usize,
    }
}
