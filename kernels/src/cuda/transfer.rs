//! KV between a GPU's arena and a region of shared memory, and kernels put to work.

#![allow(unsafe_code)]

use super::{
    Pieces,
    arena::Arena,
    compile::{CompileError, Compiler, SOURCES, Source},
    device::{Device, DeviceError, Doing, Stream},
    memory::PinnedRegion,
};
use cudarc::{
    driver::{CudaFunction, CudaModule, result, sys},
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
    /// From the GPU to the host.
    Out,
    /// From the host to the GPU.
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
            adjust: function(&adjust, "adjust")?,
            sample: function(&sampler, "sample")?,
            probabilities: function(&adjust, "probabilities")?,
        })
    }
}

impl Stream {
    /// Queues the move of `tokens` of some planes between a slot of an arena and one of a region.
    ///
    /// # Panics
    /// If the layouts differ in geometry, or a slot, its tokens or the planes are outside.
    pub fn move_kv(
        &self,
        kernels: &Kernels,
        direction: Direction,
        (arena, slot): (&Arena, u32),
        host: HostSlot<'_>,
        tokens: TokenRange,
        planes: Range<u32>,
    ) -> Result<(), DeviceError> {
        let layouts = [arena.layout(), host.layout];
        assert_eq!(layouts[0].geometry, layouts[1].geometry, "KV of another shape");
        for (layout, slot) in layouts.into_iter().zip([slot, host.slot]) {
            assert!(
                slot < layout.slots && tokens.end() <= layout.positions,
                "slot {slot} {tokens:?} of {layout:?}"
            );
        }
        assert!(
            planes.end <= 2 * host.layout.geometry.layers
                && host.layout.region_bytes() <= host.region.region().len()
        );
        if tokens.count == 0 || planes.is_empty() {
            return Ok(());
        }
        let mut pinned = self.device.one_address;
        for plane in planes.clone() {
            let start = host.layout.slot_offset(plane as usize, host.slot as usize);
            pinned &= host.region.pin(start..start + host.layout.slot_stride())?;
        }
        self.device.bind()?;
        // Of the host's memory no more is written than what is moved there.
        let on_host = host.region.region().at(0, host.region.region().len(), direction == Direction::Out);
        let ends = Ends { host: on_host, device: arena.address() };
        let short = tokens.count as usize * host.layout.geometry.head_bytes() < KERNEL_BELOW;
        let pieces = |layout, slot| Pieces::new(layout, slot, tokens, planes.clone());
        if let (true, Some((device, count)), Some((host, _))) =
            (pinned && short, pieces(layouts[0], slot), pieces(host.layout, host.slot))
        {
            // SAFETY: all pieces were checked to lie in their memory, the host's is pinned, and both wait before they go.
            return unsafe { self.move_by_kernel(kernels, direction, &ends, (device, host), count) };
        }
        for plane in planes {
            let copy = copy_2d(direction, &ends, (layouts[0], slot), (host.layout, host.slot), tokens, plane);
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
        direction: Direction,
        ends: &Ends,
        (on_device, on_host): (Pieces, Pieces),
        count: u32,
    ) -> Result<(), DeviceError> {
        // Pinned memory has one address, for the host and the GPU.
        let (device, host) = ((ends.device, on_device), (ends.host as u64, on_host));
        let ((from, out), (into, r#in)) =
            if direction == Direction::Out { (device, host) } else { (host, device) };
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

/// Where the two memories begin.
struct Ends {
    host: *mut u8,
    device: u64,
}

/// A head is a row of a 2D copy.
fn copy_2d(
    direction: Direction,
    ends: &Ends,
    (device, slot): (&KvLayout, u32),
    (host, other): (&KvLayout, u32),
    tokens: TokenRange,
    plane: u32,
) -> sys::CUDA_MEMCPY2D {
    use sys::CUmemorytype::{CU_MEMORYTYPE_DEVICE, CU_MEMORYTYPE_HOST};
    let head_bytes = host.geometry.head_bytes();
    let first = |layout: &KvLayout, slot: u32| {
        layout.slot_offset(plane as usize, slot as usize) + tokens.start as usize * head_bytes
    };
    let on_device = (
        CU_MEMORYTYPE_DEVICE,
        std::ptr::null_mut(),
        ends.device + first(device, slot) as u64,
        device.head_stride(),
    );
    let on_host = (CU_MEMORYTYPE_HOST, ends.host.wrapping_add(first(host, other)), 0, host.head_stride());
    let (from, into) = if direction == Direction::Out { (on_device, on_host) } else { (on_host, on_device) };
    sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: from.0,
        srcHost: from.1.cast(),
        srcDevice: from.2,
        srcArray: std::ptr::null_mut(),
        srcPitch: from.3,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: into.0,
        dstHost: into.1.cast(),
        dstDevice: into.2,
        dstArray: std::ptr::null_mut(),
        dstPitch: into.3,
        WidthInBytes: tokens.count as usize * head_bytes,
        Height: host.geometry.kv_heads as usize,
    }
}
