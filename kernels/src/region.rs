//! A region of memory that other processes can map: a sealed-size memfd, committed page by page as it is
//! touched.

#![allow(unsafe_code)]

use rustix::{
    fs::{MemfdFlags, SealFlags},
    mm::{Advice, MapFlags, ProtFlags},
};
use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
};

/// Why a region could not be made or mapped.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The kernel refused.
    #[error("shared memory of {bytes} bytes: {call} failed: {source}")]
    System {
        /// Which call.
        call: &'static str,
        /// Size asked for.
        bytes: usize,
        /// What the kernel said.
        source: rustix::io::Errno,
    },
    /// A peer's descriptor is no region of the size it was said to be.
    #[error("the shared region has {found} bytes, its owner announced {announced}")]
    Size {
        /// Size of the file received.
        found: u64,
        /// Size that was announced.
        announced: usize,
    },
    /// A peer's descriptor could shrink under the reader.
    #[error("the shared region is not sealed against shrinking")]
    Unsealed,
}

/// A mapped memfd. The owner maps it writable; a peer that was passed the descriptor maps it as it needs.
///
/// The bytes are shared with other processes, so this type hands out raw pointers and bounds-checked copies,
/// never Rust references into the mapping.
#[derive(Debug)]
pub struct Region {
    base: NonNull<u8>,
    bytes: usize,
    writable: bool,
    fd: OwnedFd,
}

// SAFETY: the mapping belongs to the region for its whole life and is not tied to a thread; all access goes
// through raw pointers whose users answer for synchronization.
unsafe impl Send for Region {}
// SAFETY: as above; `&Region` gives no Rust reference into the bytes.
unsafe impl Sync for Region {}

impl Region {
    /// Makes a region of `bytes` zeroes. Nothing is committed before it is touched, so a region may be larger
    /// than the machine's free memory.
    pub fn create(name: &str, bytes: usize) -> Result<Region, RegionError> {
        let fail = |call| move |source| RegionError::System { call, bytes, source };
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(fail("memfd_create"))?;
        rustix::fs::ftruncate(&fd, bytes as u64).map_err(fail("ftruncate"))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(fail("fcntl(F_ADD_SEALS)"))?;
        Region::map(fd, bytes, true)
    }

    /// Maps a region that another process made. The descriptor must be of the announced size and sealed, so
    /// that no later truncation can turn a read into a SIGBUS.
    pub fn open(fd: OwnedFd, bytes: usize, writable: bool) -> Result<Region, RegionError> {
        let fail = |call| move |source| RegionError::System { call, bytes, source };
        let found = rustix::fs::fstat(&fd).map_err(fail("fstat"))?.st_size as u64;
        if found != bytes as u64 {
            return Err(RegionError::Size { found, announced: bytes });
        }
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(fail("fcntl(F_GET_SEALS)"))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(RegionError::Unsealed);
        }
        Region::map(fd, bytes, writable)
    }

    fn map(fd: OwnedFd, bytes: usize, writable: bool) -> Result<Region, RegionError> {
        let access = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a fresh mapping at an address of the kernel's choice disturbs nothing; the descriptor is
        // open and holds `bytes` bytes.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes.max(1),
                access,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &fd,
                0,
            )
        }
        .map_err(|source| RegionError::System { call: "mmap", bytes, source })?;
        let base = NonNull::new(base.cast()).expect("mmap without MAP_FIXED never returns null");
        Ok(Region { base, bytes, writable, fd })
    }

    /// Start of the mapping. Page-aligned.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes in the region.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether the region has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Whether it may be written to.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The descriptor to pass to peers.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Commits the memory of a range before it is touched: copying into it later does not wait for pages to be found and
    /// cleared. What was written there stays. Blocks meanwhile, and returns whether it was done: kernels before Linux 5.14
    /// can't, and there may be too little memory.
    pub fn commit(&self, offset: usize, bytes: usize) -> bool {
        let page = rustix::param::page_size();
        let before = offset % page;
        let start = self.at(offset, bytes, true).wrapping_sub(before);
        // SAFETY: the mapping begins at a page, so the range lies in it; its bytes are left as they are.
        unsafe { rustix::mm::madvise(start.cast(), bytes + before, Advice::LinuxPopulateWrite) }.is_ok()
    }

    /// Pointer to `bytes` bytes at `offset`.
    ///
    /// # Panics
    /// If they do not lie within the region, or `write` is asked of a read-only mapping: only a bug can.
    pub fn at(&self, offset: usize, bytes: usize, write: bool) -> *mut u8 {
        let end = offset.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= self.bytes),
            "{offset}+{bytes} is outside a region of {}",
            self.bytes
        );
        assert!(self.writable || !write, "write to a region mapped read-only");
        // SAFETY: the offset was just checked to lie within the mapping.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// Copies bytes out. The other side may be writing: the result is then torn, which callers detect by
    /// generation and checksum.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len(), false);
        // SAFETY: `from` is valid for the length, and `into` is a distinct Rust allocation.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }

    /// Copies bytes in. The caller owns the range by the rules of the KV arena.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let into = self.at(offset, from.len(), true);
        // SAFETY: `into` is valid for the length, and `from` is a distinct Rust allocation.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) };
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length, and nothing refers into it any more.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes.max(1)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_sees_what_the_owner_writes() {
        let owner = Region::create("test", 3 * 4096).unwrap();
        let fd = owner.fd().try_clone_to_owned().unwrap();
        let peer = Region::open(fd, 3 * 4096, false).unwrap();
        owner.write(4090, b"across a page");
        let mut seen = [0; 13];
        peer.read(4090, &mut seen);
        assert_eq!(&seen, b"across a page");
    }

    #[test]
    fn a_descriptor_of_another_size_is_refused() {
        let owner = Region::create("test", 4096).unwrap();
        let fd = owner.fd().try_clone_to_owned().unwrap();
        assert!(matches!(
            Region::open(fd, 8192, false),
            Err(RegionError::Size { found: 4096, announced: 8192 })
        ));
    }

    #[test]
    fn committing_leaves_bytes_as_they_are() {
        let region = Region::create("test", 5 * 4096).unwrap();
        region.write(4000, &[7; 200]);
        assert!(region.commit(4100, 9000));
        let mut found = [1; 300];
        region.read(3950, &mut found);
        assert!((0..300).all(|i| found[i] == if (50..250).contains(&i) { 7 } else { 0 }));
    }

    #[test]
    #[should_panic(expected = "outside a region")]
    fn reads_past_the_end_are_bugs() {
        Region::create("test", 10).unwrap().read(8, &mut [0; 3]);
    }
}
