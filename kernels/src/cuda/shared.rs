//! Memory of an arena in other processes: granules given away as descriptors, and those of others mapped here.
//!
//! Who holds a granule's memory: the arena, which has it until it ends; each descriptor, until it is closed; each import, until it
//! is released; and each mapping elsewhere. The GPU has it back when the last of these is gone, and until then it counts as used
//! for whoever asks the driver. So a descriptor is closed as soon as it was sent or imported, an import is released as soon as it is
//! mapped, and mappings go with their [`SharedArena`], which readers drop once the owner is gone. What the arena counts as backed
//! has nothing to do with it: it gives granules to other slots as ever, and a reader finds out by their identity.

#![allow(unsafe_code)]

use super::{
    arena::{Access, Arena, DESCRIPTOR, allow, granularity, map, unmap_all},
    backing::Backing,
    device::{Device, DeviceError, DeviceUuid, Doing},
};
use cudarc::driver::sys;
use forebay_schemas::kv::KvLayout;
use std::{
    collections::BTreeMap,
    ffi::c_void,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A granule of an arena, and which memory it lies over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedGranule {
    /// Its number within the arena.
    pub at: u32,
    /// Which memory: of one process, no two are alike.
    pub memory: u64,
}

/// Why another process's memory is not mapped here.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// It is of another GPU, and this one can't reach that.
    #[error("the memory is of a GPU that this one does not reach")]
    Unreachable,
    /// Its granules can't be granules here, or KV is not laid out in vectors.
    #[error("KV of {head_bytes} bytes a head in granules of {granule} bytes can't be mapped")]
    Layout {
        /// Bytes of one head of one position.
        head_bytes: usize,
        /// Bytes of the owner's granules.
        granule: usize,
    },
    /// As many are mapped as may be, and all are being read.
    #[error("{most} granules are mapped and in use, and no more may be")]
    Full {
        /// How many may be mapped.
        most: usize,
    },
    /// The owner has put other memory there, while somebody still reads what was there before.
    #[error("granule {0} is still being read as it was")]
    InUse(u32),
    /// They are not the granules that a slot has by its layout.
    #[error("the granules are not those of the slot")]
    Astray,
    /// A call of the driver failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl Arena {
    /// Bytes of a granule, if other processes can be given them.
    pub fn shared_granule(&self) -> Option<usize> {
        self.exports.then_some(self.granule)
    }

    /// The granules that the first `positions` of a slot lie in. None if these are not backed.
    pub fn shared(&self, slot: u32, positions: u32) -> Option<Vec<SharedGranule>> {
        let memory = self.memory();
        let granule = |at: usize| SharedGranule { at: at as u32, memory: memory.handles[at].id };
        let backed = memory.backing.is_backed(slot, positions);
        backed.then(|| memory.backing.touched(slot, positions).into_iter().map(granule).collect())
    }

    /// A descriptor of a granule's memory. None if the granule lies over other memory by now, or is none.
    pub fn export(&self, granule: SharedGranule) -> Result<Option<OwnedFd>, DeviceError> {
        let handle = self.memory().handles.get(granule.at as usize).cloned();
        let Some(handle) = handle.filter(|handle| handle.id == granule.memory) else { return Ok(None) };
        self.device().bind()?;
        let mut descriptor = -1i32;
        // SAFETY: for this kind of handle the driver writes an int, which is valid for the call; the handle is held meanwhile.
        unsafe {
            let into = std::ptr::from_mut(&mut descriptor).cast::<c_void>();
            sys::cuMemExportToShareableHandle(into, handle.memory, DESCRIPTOR, 0).result()
        }
        .doing("exporting memory")?;
        // SAFETY: the driver has just opened it for its caller.
        Ok(Some(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }
}

/// Another process's arena, as much of it as was mapped here: at addresses laid out as there.
#[derive(Debug)]
pub struct SharedArena {
    device: Device,
    base: sys::CUdeviceptr,
    granule: usize,
    backing: Backing,
    layout: KvLayout,
    /// How many granules may be mapped.
    most: usize,
    mapped: Mutex<Mapped>,
}

#[derive(Debug, Default)]
struct Mapped {
    granules: BTreeMap<u32, MappedGranule>,
    /// Counts slots that were mapped.
    time: u64,
}

#[derive(Debug)]
struct MappedGranule {
    memory: u64,
    /// How many read it.
    users: u32,
    /// When it was wanted last.
    used: u64,
}

/// The first positions of a slot of another process's arena: mapped here for as long as this lives.
#[derive(Debug)]
pub struct SharedSlot {
    arena: Arc<SharedArena>,
    slot: u32,
    positions: u32,
    granules: Vec<u32>,
}

impl SharedArena {
    /// Reserves addresses for an arena of a GPU, of which at most `most` granules will be mapped. What was not used for the longest
    /// time makes room.
    pub fn new(
        device: &Device,
        (of, granule): (DeviceUuid, usize),
        layout: KvLayout,
        most: usize,
    ) -> Result<SharedArena, ShareError> {
        device.bind()?;
        if !device.reaches(&of)? {
            return Err(ShareError::Unreachable);
        }
        let head_bytes = layout.geometry.head_bytes();
        let fits = granule > 0 && granule % granularity(device)? == 0;
        if !fits || !head_bytes.is_multiple_of(16) || u32::try_from(layout.head_stride()).is_err() {
            return Err(ShareError::Layout { head_bytes, granule });
        }
        let backing = Backing::new(layout, granule, 0);
        let mut base = 0;
        // SAFETY: the pointer is valid; the range is the driver's choice.
        unsafe { sys::cuMemAddressReserve(&mut base, backing.granules() * granule, 0, 0, 0).result() }
            .doing("reserving addresses")?;
        Ok(SharedArena {
            device: device.clone(),
            base,
            granule,
            backing,
            layout,
            most,
            mapped: Mutex::default(),
        })
    }

    /// How many granules the first `positions` of a slot lie in.
    pub fn granules(&self, slot: u32, positions: u32) -> usize {
        self.backing.touched(slot, positions).len()
    }

    /// Has the first `positions` of a slot mapped, which lie in these granules by what the owner says. `fetch` gets descriptors of
    /// those that are not mapped yet, up to `batch` at once, in order.
    ///
    /// # Panics
    /// If the slot or its positions are outside.
    pub fn slot<E: From<ShareError>>(
        self: &Arc<Self>,
        (slot, positions): (u32, u32),
        granules: &[SharedGranule],
        batch: usize,
        mut fetch: impl FnMut(&[SharedGranule]) -> Result<Vec<OwnedFd>, E>,
    ) -> Result<SharedSlot, E> {
        assert!(slot < self.layout.slots && positions <= self.layout.positions, "slot {slot}, {positions}");
        let expected = self.backing.touched(slot, positions);
        if !granules.iter().map(|granule| granule.at as usize).eq(expected) {
            return Err(ShareError::Astray.into());
        }
        // Held while it is mapped: who else wants granules of this owner would wait for its answers too.
        let mut mapped = self.mapped();
        let missing = self.make_room(&mut mapped, granules)?;
        for missing in missing.chunks(batch) {
            for (granule, descriptor) in missing.iter().zip(fetch(missing)?) {
                self.map(&mut mapped, *granule, &descriptor).map_err(ShareError::from)?;
            }
        }
        let numbers = || granules.iter().map(|granule| granule.at);
        let all_there = numbers().all(|at| mapped.granules.contains_key(&at));
        if !all_there {
            return Err(ShareError::Astray.into());
        }
        for at in numbers() {
            mapped.granules.entry(at).and_modify(|granule| granule.users += 1);
        }
        Ok(SharedSlot { arena: self.clone(), slot, positions, granules: numbers().collect() })
    }

    /// Unmaps what is in the way, and returns what must be mapped.
    fn make_room(
        &self,
        mapped: &mut Mapped,
        granules: &[SharedGranule],
    ) -> Result<Vec<SharedGranule>, ShareError> {
        mapped.time += 1;
        let mut missing = Vec::new();
        for granule in granules {
            match mapped.granules.get_mut(&granule.at) {
                Some(known) if known.memory == granule.memory => {
                    known.used = mapped.time;
                    continue;
                }
                Some(known) if known.users > 0 => return Err(ShareError::InUse(granule.at)),
                Some(_) => self.unmap(mapped, granule.at)?,
                None => {}
            }
            missing.push(*granule);
        }
        let surplus = (mapped.granules.len() + missing.len()).saturating_sub(self.most);
        let unused =
            mapped.granules.iter().filter(|(_, granule)| granule.users == 0 && granule.used < mapped.time);
        let mut unused: Vec<(u64, u32)> = unused.map(|(at, granule)| (granule.used, *at)).collect();
        if unused.len() < surplus {
            return Err(ShareError::Full { most: self.most });
        }
        unused.sort_unstable();
        unused[..surplus].iter().try_for_each(|(_, at)| self.unmap(mapped, *at))?;
        Ok(missing)
    }

    fn map(
        &self,
        mapped: &mut Mapped,
        granule: SharedGranule,
        descriptor: &OwnedFd,
    ) -> Result<(), DeviceError> {
        self.device.bind()?;
        let (at, mut memory) = (granule.at as usize, 0);
        // SAFETY: the pointer is valid, and for this kind of handle the driver takes the descriptor itself in its stead.
        unsafe {
            let descriptor = std::ptr::without_provenance_mut::<c_void>(descriptor.as_raw_fd() as usize);
            sys::cuMemImportFromShareableHandle(&mut memory, descriptor, DESCRIPTOR).result()
        }
        .doing("importing memory")?;
        // SAFETY: the granule is reserved and nothing is mapped there; the driver refuses memory of another size.
        let outcome = unsafe { map(self.base, at, self.granule, memory) };
        // SAFETY: it was imported; the mapping holds it from here on.
        let _ = unsafe { sys::cuMemRelease(memory).result() };
        outcome?;
        // What is the owner's is only read.
        let access = Access::CU_MEM_ACCESS_FLAGS_PROT_READ;
        let allowed = allow(&self.device, self.base, at..at + 1, self.granule, access);
        if allowed.is_err() {
            let address = self.base + (at * self.granule) as u64;
            // SAFETY: it was mapped above, and nobody knows of it yet.
            let _ = unsafe { sys::cuMemUnmap(address, self.granule).result() };
        }
        allowed?;
        let used = mapped.time;
        mapped.granules.insert(granule.at, MappedGranule { memory: granule.memory, users: 0, used });
        Ok(())
    }

    fn unmap(&self, mapped: &mut Mapped, at: u32) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: it is mapped, and nobody reads it.
        unsafe { sys::cuMemUnmap(self.base + at as u64 * self.granule as u64, self.granule).result() }
            .doing("unmapping memory")?;
        mapped.granules.remove(&at);
        Ok(())
    }

    /// How many granules are mapped.
    pub fn mapped_granules(&self) -> usize {
        self.mapped().granules.len()
    }

    fn mapped(&self) -> MutexGuard<'_, Mapped> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SharedArena {
    fn drop(&mut self) {
        let _ = self.device.bind();
        let mapped = std::mem::take(self.mapped.get_mut().unwrap_or_else(PoisonError::into_inner));
        let mapped: Vec<usize> = mapped.granules.keys().map(|at| *at as usize).collect();
        for run in mapped.chunk_by(|one, next| one + 1 == *next) {
            // SAFETY: they are mapped, and slots of them are gone, whose holders have waited for what they had queued.
            unsafe { unmap_all(self.base, run[0]..run[0] + run.len(), self.granule) };
        }
        // SAFETY: nothing is mapped there any more.
        let _ = unsafe { sys::cuMemAddressFree(self.base, self.backing.granules() * self.granule).result() };
    }
}

impl SharedSlot {
    /// How the arena is laid out.
    pub fn layout(&self) -> &KvLayout {
        &self.arena.layout
    }

    /// Which slot.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// How many of its positions are mapped.
    pub fn positions(&self) -> u32 {
        self.positions
    }

    /// Where the arena begins.
    pub(super) fn address(&self) -> u64 {
        self.arena.base
    }
}

impl Drop for SharedSlot {
    fn drop(&mut self) {
        let mut mapped = self.arena.mapped();
        for at in &self.granules {
            mapped.granules.entry(*at).and_modify(|granule| granule.users -= 1);
        }
    }
}
