//! Reading a peer's KV: the protocol, above every transport.

use crate::engine::EngineError;
use forebay_kernels::{Region, cuda::SharedSlot};
use forebay_schemas::{
    ids::WorkerId,
    kv::{KvHandle, KvLayout, LayoutHash},
};
use forebay_streams::environment::pause;
use std::{ops::Deref, sync::Arc};
use tokio::time::Instant;

/// Why KV could not be had. The reader then computes it itself.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The owner's bytes mean something else.
    #[error("layout {found} of worker {agent} is not this worker's {expected}")]
    Layout {
        /// Whose KV.
        agent: WorkerId,
        /// This worker's layout hash.
        expected: LayoutHash,
        /// The handle's.
        found: LayoutHash,
    },
    /// The owner can't be reached.
    #[error("worker {agent} can't be reached over {transport}: {cause}")]
    Unreachable {
        /// Whose KV.
        agent: WorkerId,
        /// Over what.
        transport: &'static str,
        /// What happened.
        cause: String,
    },
    /// The owner is another life of that worker, or has reused the slot.
    #[error(
        "the lease is over: slot {slot} of worker {agent} is at generation {found}, the handle's is {expected}"
    )]
    LeaseOver {
        /// Whose KV.
        agent: WorkerId,
        /// Which slot.
        slot: u32,
        /// The handle's generation.
        expected: u64,
        /// The slot's.
        found: u64,
    },
    /// The owner serves no such read.
    #[error("worker {agent} refuses to have slot {slot} read: {cause}")]
    Refused {
        /// Whose KV.
        agent: WorkerId,
        /// Which slot.
        slot: u32,
        /// What the owner says.
        cause: &'static str,
    },
    /// What was read is not what was sealed.
    #[error("checksum of group {group} of slot {slot} of worker {agent} does not match")]
    Corrupt {
        /// Whose KV.
        agent: WorkerId,
        /// Which slot.
        slot: u32,
        /// Which group of planes.
        group: usize,
    },
    /// It was read, and the engine could not have it.
    #[error("what was read did not reach the engine: {0}")]
    Engine(#[from] EngineError),
    /// The handle names what can't be.
    #[error("an impossible handle: {0}")]
    BadHandle(String),
}

/// A way to another worker's region. The bytes are the owner's; the reader moves them.
pub trait Transport: Send + Sync {
    /// For events and metrics, such as `shm`.
    fn name(&self) -> &'static str;

    /// Claims the lease on the handle's slot.
    fn claim(&self, handle: &KvHandle) -> Result<(), ReadError>;

    /// Copies one group of planes of the handle's tokens into a slot of this worker's region, and returns the
    /// sum of the bytes.
    fn read(
        &self,
        handle: &KvHandle,
        group: usize,
        into: &Region,
        layout: &KvLayout,
        slot: u32,
    ) -> Result<u64, ReadError>;

    /// The owner's region, if it is mapped here and has all that the handle names: an engine may copy from it straight to where it
    /// computes.
    fn mapped(&self, _handle: &KvHandle) -> Option<&Arc<Region>> {
        None
    }

    /// What the handle names in the owner's memory of a GPU, mapped for this worker's, if both ends can do that.
    fn mapped_gpu(&self, _handle: &KvHandle) -> Option<SharedSlot> {
        None
    }

    /// The slot's generation now.
    fn generation(&self, handle: &KvHandle) -> Result<u64, ReadError>;

    /// Gives the lease back.
    fn release(&self, handle: &KvHandle);
}

/// A finished read.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReadReport {
    /// Bytes read.
    pub bytes: u64,
    /// Tokens whose KV was read.
    pub tokens: u32,
    /// Time it took, in microseconds.
    pub micros: u64,
}

/// A read of one slot of one owner, piece by piece: claimed at its beginning, given back at its end, however it ends.
/// What a piece brought may be used only if [`KvRead::piece`] returned without an error.
pub struct KvRead<T: Deref<Target: Transport>> {
    transport: T,
    /// The handle that the lease was claimed with.
    claimed: KvHandle,
    report: ReadReport,
    /// Tokens that came from GPU to GPU.
    gpu_tokens: u32,
}

/// What [`KvRead::transport`] says of a read from GPU to GPU.
pub const FROM_GPU: &str = "cuda";

impl<T: Deref<Target: Transport>> KvRead<T> {
    /// Claims the lease that a handle names.
    pub fn begin(transport: T, handle: &KvHandle) -> Result<KvRead<T>, ReadError> {
        transport.claim(handle)?;
        Ok(KvRead { transport, claimed: handle.clone(), report: ReadReport::default(), gpu_tokens: 0 })
    }

    /// Copies what a handle names, of the lease that was claimed, into a slot. Blocks for as long as the copy takes.
    pub fn piece(
        &mut self,
        handle: &KvHandle,
        into: &Region,
        layout: &KvLayout,
        slot: u32,
    ) -> Result<(), ReadError> {
        self.piece_by(handle, layout, |transport, group| transport.read(handle, group, into, layout, slot))
    }

    /// The same by other means: `copy` copies one group of planes, and returns the sum of the bytes that the owner has.
    pub fn piece_by(
        &mut self,
        handle: &KvHandle,
        layout: &KvLayout,
        copy: impl FnMut(&T::Target, usize) -> Result<u64, ReadError>,
    ) -> Result<(), ReadError> {
        let begun = Instant::now();
        self.check_lease(handle)?;
        check_handle(handle, layout)?;
        copy_checked(&*self.transport, handle, copy)?;
        self.report.bytes += handle.bytes() as u64;
        self.report.tokens += handle.tokens.count;
        self.report.micros += begun.elapsed().as_micros() as u64;
        Ok(())
    }

    /// What was read so far.
    pub fn report(&self) -> ReadReport {
        self.report
    }

    /// The same from GPU to GPU: `copy` copies all groups of planes from what is mapped, and returns the sums of what has arrived.
    pub fn piece_on_gpu(
        &mut self,
        handle: &KvHandle,
        layout: &KvLayout,
        copy: impl FnOnce() -> Result<Vec<u64>, EngineError>,
    ) -> Result<(), ReadError> {
        let (mut copy, mut sums) = (Some(copy), Vec::new());
        self.piece_by(handle, layout, |_, group| {
            if let Some(copy) = copy.take() {
                sums = copy()?;
            }
            Ok(sums[group])
        })?;
        self.gpu_tokens += handle.tokens.count;
        Ok(())
    }

    /// Over which transport; or `cuda`, if all came from GPU to GPU.
    pub fn transport(&self) -> &'static str {
        let all = self.gpu_tokens > 0 && self.gpu_tokens == self.report.tokens;
        if all { FROM_GPU } else { self.transport.name() }
    }

    /// See [`Transport::mapped_gpu`].
    pub fn mapped_gpu(&self, handle: &KvHandle) -> Option<SharedSlot> {
        self.transport.mapped_gpu(handle)
    }

    /// See [`Transport::mapped`].
    pub fn mapped(&self, handle: &KvHandle) -> Option<Arc<Region>> {
        self.transport.mapped(handle).cloned()
    }

    fn check_lease(&self, handle: &KvHandle) -> Result<(), ReadError> {
        let lease = |handle: &KvHandle| (handle.incarnation, handle.slot, handle.generation);
        if handle.agent == self.claimed.agent && lease(handle) == lease(&self.claimed) {
            return Ok(());
        }
        Err(ReadError::BadHandle(format!(
            "slot {} of {} is not under the lease of slot {} of {}",
            handle.slot, handle.agent, self.claimed.slot, self.claimed.agent
        )))
    }
}

impl<T: Deref<Target: Transport>> Drop for KvRead<T> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            pause();
        }
        self.transport.release(&self.claimed);
    }
}

/// Reads what the handles name into a slot: all of it, checked, or nothing that may be used. The handles are of
/// one slot of one owner. Blocks for as long as the copy takes.
pub fn read_kv(
    transport: &dyn Transport,
    handles: &[KvHandle],
    into: &Region,
    layout: &KvLayout,
    slot: u32,
) -> Result<ReadReport, ReadError> {
    let Some(first) = handles.first() else { return Ok(ReadReport::default()) };
    handles.iter().try_for_each(|handle| check_handle(handle, layout))?;
    let mut read = KvRead::begin(transport, first)?;
    pause();
    handles.iter().try_for_each(|handle| read.piece(handle, into, layout, slot))?;
    Ok(read.report())
}

fn copy_checked<T: Transport + ?Sized>(
    transport: &T,
    handle: &KvHandle,
    mut copy: impl FnMut(&T, usize) -> Result<u64, ReadError>,
) -> Result<(), ReadError> {
    for (group, expected) in handle.checksums.iter().enumerate() {
        let sum = copy(transport, group)?;
        pause();
        if sum != *expected {
            // Reused while it was read, or damaged: say which.
            check_generation(transport, handle)?;
            return Err(ReadError::Corrupt { agent: handle.agent.clone(), slot: handle.slot, group });
        }
    }
    check_generation(transport, handle)?;
    pause();
    Ok(())
}

fn check_generation(transport: &(impl Transport + ?Sized), handle: &KvHandle) -> Result<(), ReadError> {
    match transport.generation(handle)? {
        found if found == handle.generation => Ok(()),
        found => Err(lease_over(handle, found)),
    }
}

pub(super) fn lease_over(handle: &KvHandle, found: u64) -> ReadError {
    ReadError::LeaseOver {
        agent: handle.agent.clone(),
        slot: handle.slot,
        expected: handle.generation,
        found,
    }
}

/// A handle comes from an event that somebody else wrote: nothing in it is taken for granted.
fn check_handle(handle: &KvHandle, layout: &KvLayout) -> Result<(), ReadError> {
    let bad = |problem: String| Err(ReadError::BadHandle(problem));
    if handle.layout.geometry != layout.geometry {
        return bad(format!("geometry {:?}, not {:?}", handle.layout.geometry, layout.geometry));
    }
    if handle.slot >= handle.layout.slots
        || handle.tokens.end() > handle.layout.positions.min(layout.positions)
    {
        return bad(format!("slot {} positions {:?} of {:?}", handle.slot, handle.tokens, handle.layout));
    }
    if handle.checksums.len() != KvHandle::groups(&layout.geometry) {
        return bad(format!(
            "{} checksums for {} groups",
            handle.checksums.len(),
            KvHandle::groups(&layout.geometry)
        ));
    }
    Ok(())
}
