//! Reading a peer's KV: the protocol, above every transport.

use forebay_kernels::Region;
use forebay_schemas::{
    ids::WorkerId,
    kv::{KvHandle, KvLayout, LayoutHash},
};
use forebay_streams::environment::pause;
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
    /// sum of the bytes as stored.
    fn read(
        &self,
        handle: &KvHandle,
        group: usize,
        into: &Region,
        layout: &KvLayout,
        slot: u32,
    ) -> Result<u64, ReadError>;

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

/// Reads what the handles name into a slot: all of it, checked, or nothing that may be used. The handles are of
/// one slot of one owner. Blocks for as long as the copy takes.
pub fn read_kv(
    transport: &dyn Transport,
    handles: &[KvHandle],
    into: &Region,
    layout: &KvLayout,
    slot: u32,
) -> Result<ReadReport, ReadError> {
    let begun = Instant::now();
    let Some(first) = handles.first() else { return Ok(ReadReport::default()) };
    handles.iter().try_for_each(|handle| check_handle(handle, layout))?;
    transport.claim(first)?;
    pause();
    let outcome = copy_checked(transport, handles, into, layout, slot);
    pause();
    transport.release(first);
    outcome?;
    Ok(ReadReport {
        bytes: handles.iter().map(|handle| handle.bytes() as u64).sum(),
        tokens: handles.iter().map(|handle| handle.tokens.count).sum(),
        micros: begun.elapsed().as_micros() as u64,
    })
}

fn copy_checked(
    transport: &dyn Transport,
    handles: &[KvHandle],
    into: &Region,
    layout: &KvLayout,
    slot: u32,
) -> Result<(), ReadError> {
    for handle in handles {
        for (group, expected) in handle.checksums.iter().enumerate() {
            let sum = transport.read(handle, group, into, layout, slot)?;
            pause();
            if sum != *expected {
                // Reused while it was read, or damaged: say which.
                check_generation(transport, handle)?;
                return Err(ReadError::Corrupt { agent: handle.agent.clone(), slot: handle.slot, group });
            }
        }
        check_generation(transport, handle)?;
        pause();
    }
    Ok(())
}

fn check_generation(transport: &dyn Transport, handle: &KvHandle) -> Result<(), ReadError> {
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
