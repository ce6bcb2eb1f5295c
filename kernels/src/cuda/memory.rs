//! Memory of a GPU, and of the host where the GPU reaches it.

#![allow(unsafe_code)]

use super::device::{Device, DeviceError, Doing, Mark, Stream};
use crate::Region;
use cudarc::driver::{result, sys};
use std::{
    collections::BTreeMap,
    ffi::c_void,
    marker::PhantomData,
    ops::Range,
    ptr::NonNull,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Elements that are only bytes: any are valid, and none is a pointer.
///
/// # Safety
/// All bit patterns are values, there is no padding, and nothing is dropped.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for i64 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}

/// Elements in a GPU's memory, at an address that does not change.
#[derive(Debug)]
pub struct DeviceBuffer<T: Plain> {
    address: sys::CUdeviceptr,
    len: usize,
    device: Device,
    elements: PhantomData<T>,
}

impl<T: Plain> DeviceBuffer<T> {
    /// Room for `len` elements, of which nothing is known.
    pub fn new(device: &Device, len: usize) -> Result<DeviceBuffer<T>, DeviceError> {
        device.bind()?;
        let bytes = (len * size_of::<T>()).max(1);
        // SAFETY: what it returns is kept, and freed once.
        let address = unsafe { result::malloc_sync(bytes) }.doing("allocating memory of the GPU")?;
        Ok(DeviceBuffer { address, len, device: device.clone(), elements: PhantomData })
    }

    /// Where it is.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<T: Plain> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        // What was queued may still use it.
        let _ = self.device.synchronize();
        // SAFETY: it was allocated, and nothing is under way. An error is that of earlier work, and is told there.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Elements in memory of the host that copies reach without a detour. Whoever asks for the elements waits until no copy uses them.
#[derive(Debug)]
pub struct HostBuffer<T: Plain> {
    data: NonNull<T>,
    len: usize,
    used: Option<Mark>,
    device: Device,
}

// SAFETY: the memory is owned, and tied to no thread.
unsafe impl<T: Plain> Send for HostBuffer<T> {}

impl<T: Plain> HostBuffer<T> {
    /// Room for `len` elements, all zero.
    pub fn new(device: &Device, len: usize) -> Result<HostBuffer<T>, DeviceError> {
        device.bind()?;
        let bytes = (len * size_of::<T>()).max(1);
        // Not write-combined: the processor reads it too.
        // SAFETY: what it returns is kept, and freed once.
        let data = unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE) }
            .doing("allocating memory of the host")?;
        // SAFETY: there are so many bytes.
        unsafe { std::ptr::write_bytes(data.cast::<u8>(), 0, bytes) };
        let data = NonNull::new(data.cast()).expect("a successful call sets its result");
        Ok(HostBuffer { data, len, used: None, device: device.clone() })
    }

    /// The elements, once no copy uses them.
    pub fn data(&mut self) -> Result<&mut [T], DeviceError> {
        if let Some(used) = self.used.take() {
            used.wait()?;
        }
        // SAFETY: there are so many elements, all of which were written; no copy is under way, and none begins while it is
        // borrowed.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) })
    }
}

impl<T: Plain> Drop for HostBuffer<T> {
    fn drop(&mut self) {
        let _ = self.device.synchronize();
        // SAFETY: it was allocated, and nothing is under way.
        let _ = unsafe { result::free_host(self.data.as_ptr().cast::<c_void>()) };
    }
}

impl Stream {
    /// Queues a copy of a host buffer's first elements to those of a buffer of the GPU from `at` on.
    ///
    /// # Panics
    /// If either has fewer.
    pub fn copy_in<T: Plain>(
        &self,
        from: &mut HostBuffer<T>,
        count: usize,
        into: &DeviceBuffer<T>,
        at: usize,
    ) -> Result<(), DeviceError> {
        assert!(
            count <= from.len && at + count <= into.len,
            "{count} of {} into {} at {at}",
            from.len,
            into.len
        );
        self.device.bind()?;
        self.after_use(from.used.as_ref())?;
        let into = into.address + (at * size_of::<T>()) as u64;
        // SAFETY: both ranges were checked, and both buffers wait for the copy before they go.
        unsafe {
            sys::cuMemcpyHtoDAsync_v2(into, from.data.as_ptr().cast(), count * size_of::<T>(), self.raw())
                .result()
        }
        .doing("copying to the GPU")?;
        from.used = Some(self.mark_to_spin()?);
        Ok(())
    }

    /// Queues a copy of a GPU buffer's first elements to a host buffer's first.
    ///
    /// # Panics
    /// If either has fewer.
    pub fn copy_out<T: Plain>(
        &self,
        from: &DeviceBuffer<T>,
        count: usize,
        into: &mut HostBuffer<T>,
    ) -> Result<(), DeviceError> {
        assert!(count <= from.len && count <= into.len, "{count} of {} into {}", from.len, into.len);
        self.device.bind()?;
        self.after_use(into.used.as_ref())?;
        // SAFETY: as in `copy_in`.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                into.data.as_ptr().cast(),
                from.address,
                count * size_of::<T>(),
                self.raw(),
            )
            .result()
        }
        .doing("copying from the GPU")?;
        into.used = Some(self.mark_to_spin()?);
        Ok(())
    }

    /// Queues a copy of one buffer of the GPU to another.
    ///
    /// # Panics
    /// If they differ in length.
    pub fn copy_within<T: Plain>(
        &self,
        from: &DeviceBuffer<T>,
        into: &DeviceBuffer<T>,
    ) -> Result<(), DeviceError> {
        assert_eq!(from.len, into.len, "buffers of other lengths");
        self.device.bind()?;
        // SAFETY: both have so many elements, and wait for the copy before they go.
        unsafe {
            result::memcpy_dtod_async(into.address, from.address, from.len * size_of::<T>(), self.raw())
        }
        .doing("copying within the GPU")
    }

    /// The last use is then the end of all of them.
    fn after_use(&self, used: Option<&Mark>) -> Result<(), DeviceError> {
        used.map_or(Ok(()), |used| self.after(used))
    }
}

/// A region of shared memory that a GPU copies to and from. Pinning commits memory, so each part is pinned when it is first used.
#[derive(Debug)]
pub struct PinnedRegion {
    region: Arc<Region>,
    device: Device,
    budget: PinBudget,
    pinned: Mutex<Pinned>,
}

/// How much may be pinned, in one region or several.
#[derive(Clone, Debug)]
pub struct PinBudget(Arc<AtomicUsize>);

impl PinBudget {
    /// So many bytes.
    pub fn new(bytes: usize) -> PinBudget {
        PinBudget(Arc::new(AtomicUsize::new(bytes)))
    }

    fn take(&self, bytes: usize) -> bool {
        let less = |left: usize| left.checked_sub(bytes);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    fn put_back(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct Pinned {
    /// Where parts begin, and how long they are.
    parts: BTreeMap<usize, usize>,
    bytes: usize,
}

impl PinnedRegion {
    /// Nothing is pinned yet.
    pub fn new(device: &Device, region: Arc<Region>, budget: PinBudget) -> PinnedRegion {
        PinnedRegion { region, device: device.clone(), budget, pinned: Mutex::default() }
    }

    /// The region.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Pins a part of whole pages, and commits it; the same part again costs nothing. Blocks meanwhile. Returns whether it is
    /// pinned: it is not where pages are shared with other parts, the budget is used up, or the system refuses. Copies of it then go
    /// by a detour that the driver makes.
    pub fn pin(&self, part: Range<usize>) -> Result<bool, DeviceError> {
        if [part.start, part.end].iter().any(|at| at % rustix::param::page_size() != 0) {
            return Ok(false);
        }
        let mut pinned = self.pinned();
        if pinned.parts.contains_key(&part.start) {
            return Ok(true);
        }
        if !self.budget.take(part.len()) {
            return Ok(false);
        }
        self.device.bind()?;
        let at = self.region.at(part.start, part.len(), false).cast::<c_void>();
        // Another process's region is mapped for reading.
        let read_only = if self.region.is_writable() { 0 } else { sys::CU_MEMHOSTREGISTER_READ_ONLY };
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP | read_only;
        // SAFETY: the range is mapped for as long as the region lives, and is unpinned before.
        if unsafe { sys::cuMemHostRegister_v2(at, part.len(), flags).result() }.is_err() {
            self.budget.put_back(part.len());
            return Ok(false);
        }
        pinned.parts.insert(part.start, part.len());
        pinned.bytes += part.len();
        Ok(true)
    }

    /// Bytes that are pinned.
    pub fn pinned_bytes(&self) -> usize {
        self.pinned().bytes
    }

    fn pinned(&self) -> MutexGuard<'_, Pinned> {
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for PinnedRegion {
    fn drop(&mut self) {
        let _ = self.device.synchronize();
        for (start, bytes) in &self.pinned().parts {
            let at = self.region.at(*start, *bytes, false);
            // SAFETY: it was pinned, and nothing is under way.
            let _ = unsafe { sys::cuMemHostUnregister(at.cast()).result() };
            self.budget.put_back(*bytes);
        }
    }
}
