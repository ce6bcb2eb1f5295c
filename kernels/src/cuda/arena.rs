//! KV of all slots in a GPU's memory: addresses for all of it, memory where sequences are.

#![allow(unsafe_code)]

use super::{
    backing::{Backing, Change, Full},
    device::{Device, DeviceError, Doing},
};
use cudarc::driver::sys;
use forebay_schemas::kv::KvLayout;
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

/// Why a slot could not grow.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// All memory is in use. Nothing was changed.
    #[error("the KV cache is full: {mib} MiB are in use")]
    Full {
        /// How much there is.
        mib: usize,
    },
    /// A call of the driver failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A call of the driver has failed half way, so that what has memory is not known.
    #[error("the memory of the KV cache is in disorder: this worker must be started again")]
    Broken,
}

/// Addresses for the KV of all slots, laid out as a region is.
///
/// What has no memory of its own lies, all of it, over one and the same granule: decode steps write a scratch position of
/// slots that nobody uses, and what is read there counts for nothing.
#[derive(Debug)]
pub struct Arena {
    device: Device,
    base: sys::CUdeviceptr,
    pub(super) granule: usize,
    /// Whether its memory can be given to other processes.
    pub(super) exports: bool,
    layout: KvLayout,
    memory: Mutex<Memory>,
}

#[derive(Debug)]
pub(super) struct Memory {
    pub(super) backing: Backing,
    /// What each granule lies over.
    pub(super) handles: Vec<Handle>,
    scratch: Handle,
    /// A call of the driver failed half way.
    broken: bool,
}

/// Memory of one granule.
pub(super) type Handle = Arc<Granule>;

#[derive(Debug)]
pub(super) struct Granule {
    pub(super) memory: sys::CUmemGenericAllocationHandle,
    /// Unlike that of any other memory of this process, before or after.
    pub(super) id: u64,
}

impl Drop for Granule {
    fn drop(&mut self) {
        // SAFETY: it was made, and is no longer mapped by the one who held it.
        let _ = unsafe { sys::cuMemRelease(self.memory).result() };
    }
}

impl Arena {
    /// Reserves addresses; at most `bytes` of memory will be behind them, until [`Arena::limit`] says otherwise.
    pub fn new(device: &Device, layout: KvLayout, bytes: usize) -> Result<Arena, DeviceError> {
        device.bind()?;
        let granule = granularity(device)?;
        // A driver that says it can may still be kept from it, by a sandbox perhaps.
        let (scratch, exports) = match make(device, granule, device.exports) {
            Err(_) if device.exports => (make(device, granule, false)?, false),
            scratch => (scratch?, device.exports),
        };
        let backing = Backing::new(layout, granule, bytes / granule);
        let granules = backing.granules();
        let mut base = 0;
        // SAFETY: the pointer is valid; the range is the driver's choice.
        unsafe { sys::cuMemAddressReserve(&mut base, granules * granule, 0, 0, 0).result() }
            .doing("reserving addresses")?;
        let mut arena = Arena {
            device: device.clone(),
            base,
            granule,
            exports,
            layout,
            memory: Mutex::new(Memory { backing, handles: Vec::new(), scratch, broken: false }),
        };
        let memory = arena.memory.get_mut().unwrap_or_else(PoisonError::into_inner);
        // On an error the arena is dropped, which unmaps what is mapped.
        for at in 0..granules {
            // SAFETY: the granule is reserved, and nothing is mapped there.
            unsafe { map(base, at, granule, memory.scratch.memory)? };
            memory.handles.push(memory.scratch.clone());
        }
        arena.allow(0..granules)?;
        Ok(arena)
    }

    /// How it is laid out.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// The GPU that it is of.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.base
    }

    /// Bytes that have memory of their own.
    pub fn backed_bytes(&self) -> usize {
        self.memory().backing.backed() * self.granule
    }

    /// At most so much memory will be behind the addresses.
    pub fn limit(&self, bytes: usize) {
        self.memory().backing.limit(bytes / self.granule);
    }

    /// Bytes that a slot with so many positions takes at most, if slots have no more.
    pub fn bytes_of(&self, positions: u32) -> usize {
        let layout = KvLayout { positions, ..self.layout };
        Backing::new(layout, self.granule, 0).granules_of_a_slot() * self.granule
    }

    /// Backs the first `positions` of a slot. No work that uses the arena may be under way but on slots in use.
    pub fn grow(&self, slot: u32, positions: u32) -> Result<(), GrowError> {
        let mut memory = self.memory();
        if memory.broken {
            return Err(GrowError::Broken);
        }
        let full = |Full| GrowError::Full { mib: (memory.backing.backed() * self.granule) >> 20 };
        let Some(plan) = memory.backing.plan(slot, positions).map_err(full)? else { return Ok(()) };
        self.device.bind()?;
        // First what may fail for want of memory: nothing is changed then.
        let new = plan.change.backed.len() - plan.change.taken.len();
        let made = (0..new)
            .map(|_| make(&self.device, self.granule, self.exports))
            .collect::<Result<Vec<_>, _>>()?;
        let outcome = self.apply(&mut memory, made, &plan.change);
        // What was half done can't be told from what was done: nothing grows any more.
        memory.broken = outcome.is_err();
        outcome?;
        memory.backing.done(plan);
        Ok(())
    }

    /// Lays granules over other memory: those that are taken over scratch, those that are backed over what these had, and over what
    /// was made.
    fn apply(&self, memory: &mut Memory, mut free: Vec<Handle>, change: &Change) -> Result<(), DeviceError> {
        for at in &change.taken {
            let scratch = memory.scratch.clone();
            free.push(self.put(memory, *at, scratch)?);
        }
        for at in &change.backed {
            let handle = free.pop().expect("as many were made and taken");
            self.put(memory, *at, handle)?;
        }
        let mut changed: Vec<usize> = change.taken.iter().chain(&change.backed).copied().collect();
        changed.sort_unstable();
        // A call for each run of neighbours.
        for run in changed.chunk_by(|one, next| one + 1 == *next) {
            self.allow(run[0]..run[0] + run.len())?;
        }
        Ok(())
    }

    /// A slot is no longer used.
    pub fn release(&self, slot: u32) {
        self.memory().backing.release(slot);
    }

    /// Lays a granule over other memory, which must then be allowed, and returns what it lay over.
    fn put(&self, memory: &mut Memory, at: usize, handle: Handle) -> Result<Handle, DeviceError> {
        let address = self.base + (at * self.granule) as u64;
        // SAFETY: the granule is mapped, and the caller says that nothing uses it.
        unsafe { sys::cuMemUnmap(address, self.granule).result() }.doing("unmapping memory")?;
        // SAFETY: nothing is mapped there any more.
        unsafe { map(self.base, at, self.granule, handle.memory)? };
        Ok(std::mem::replace(&mut memory.handles[at], handle))
    }

    /// Lets the GPU read and write granules.
    fn allow(&self, granules: std::ops::Range<usize>) -> Result<(), DeviceError> {
        let access = Access::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        allow(&self.device, self.base, granules, self.granule, access)
    }

    pub(super) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let _ = self.device.synchronize();
        let memory = self.memory.get_mut().unwrap_or_else(PoisonError::into_inner);
        let bytes = memory.backing.granules() * self.granule;
        // SAFETY: all of them are mapped, and nothing is under way.
        unsafe { unmap_all(self.base, 0..memory.handles.len(), self.granule) };
        // SAFETY: nothing is mapped there any more.
        let _ = unsafe { sys::cuMemAddressFree(self.base, bytes).result() };
    }
}

/// What a GPU may do with memory.
pub(super) type Access = sys::CUmemAccess_flags;

/// Lets a GPU have access to granules, which are mapped.
pub(super) fn allow(
    device: &Device,
    base: u64,
    granules: std::ops::Range<usize>,
    granule: usize,
    flags: Access,
) -> Result<(), DeviceError> {
    let access = sys::CUmemAccessDesc { location: device.location(), flags };
    let start = base + (granules.start * granule) as u64;
    // SAFETY: the description is valid, and the driver refuses what is not mapped.
    unsafe { sys::cuMemSetAccess(start, granules.len() * granule, &access, 1).result() }
        .doing("allowing access to memory")
}

type Kind = sys::CUmemAllocationHandleType;

/// As what memory is exported.
pub(super) const DESCRIPTOR: Kind = Kind::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// What granules are: memory of a GPU that other processes can be given, or not.
fn properties(device: &Device, exports: bool) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: if exports { DESCRIPTOR } else { Kind::CU_MEM_HANDLE_TYPE_NONE },
        location: device.location(),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

pub(super) fn granularity(device: &Device) -> Result<usize, DeviceError> {
    let mut granule = 0;
    let minimum = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    // SAFETY: pointers are valid for the call.
    unsafe {
        sys::cuMemGetAllocationGranularity(&mut granule, &properties(device, device.exports), minimum)
            .result()
    }
    .doing("asking for the size of granules")?;
    Ok(granule)
}

fn make(device: &Device, granule: usize, exports: bool) -> Result<Handle, DeviceError> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut memory = 0;
    // SAFETY: pointers are valid for the call; what it makes is kept, and released once.
    unsafe { sys::cuMemCreate(&mut memory, granule, &properties(device, exports), 0).result() }
        .doing("allocating KV")?;
    Ok(Arc::new(Granule { memory, id: NEXT.fetch_add(1, Ordering::Relaxed) }))
}

/// # Safety
/// The granule is reserved, nothing is mapped there, and the memory is of one granule.
pub(super) unsafe fn map(
    base: u64,
    at: usize,
    granule: usize,
    memory: sys::CUmemGenericAllocationHandle,
) -> Result<(), DeviceError> {
    let address = base + (at * granule) as u64;
    // SAFETY: as the caller says.
    unsafe { sys::cuMemMap(address, granule, 0, memory, 0).result() }.doing("mapping memory")
}

/// Unmaps granules. In one call: there may be tens of thousands, and the process ends meanwhile. If that fails, one by one: memory that
/// stays mapped is missing for whoever comes next.
///
/// # Safety
/// They are mapped, and nothing that uses them is under way.
pub(super) unsafe fn unmap_all(base: u64, granules: std::ops::Range<usize>, granule: usize) {
    let unmap = |granules: std::ops::Range<usize>| {
        let start = base + (granules.start * granule) as u64;
        // SAFETY: as the caller says.
        unsafe { sys::cuMemUnmap(start, granules.len() * granule).result() }
    };
    if unmap(granules.clone()).is_err() {
        granules.for_each(|at| _ = unmap(at..at + 1));
    }
}
