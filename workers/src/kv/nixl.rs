//! The `nixl` transport: the bytes are read one-sidedly by NVIDIA's NIXL, over whatever the two hosts share.
//!
//! The lease stays with the owner: claim, check, generation and release go over `tcp`, where the owner also introduces
//! its agent. Before each group of planes the reader asks whether a read would be served; then it reads the bytes
//! itself, straight into its region, and sums them there.

#[cfg_attr(not(feature = "nixl"), path = "nixl/absent.rs")]
mod agent;

use super::{
    read::{ReadError, Transport},
    tcp::{TcpOwner, TcpPeer},
};
use agent::Agent;
pub use agent::Library;
use forebay_kernels::{Checksum, Region, checksum};
use forebay_schemas::kv::{KvHandle, KvLayout};
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

/// The longest that one group of planes may take.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Pieces of one transfer. More go in several.
const SPANS_MAX: usize = 4096;

/// Why NIXL can't be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NixlError {
    /// This build is without it.
    #[error("this build has no NIXL: build with `--features nixl`")]
    NotBuilt,
    /// The library is not there.
    #[error("NIXL was not found ({}: {cause}): run `scripts/setup.sh nixl`, or name the folder of libnixl_capi.so in FOREBAY_NIXL", path.display())]
    NotFound {
        /// What was looked for.
        path: PathBuf,
        /// What the loader says.
        cause: String,
    },
    /// A call failed.
    #[error("NIXL: {call}: {cause}")]
    Failed {
        /// What was done.
        call: &'static str,
        /// What NIXL says.
        cause: String,
    },
    /// A read did not end in time.
    #[error("NIXL: a read took more than {} s", READ_TIMEOUT.as_secs())]
    TimedOut,
}

/// Bytes of the owner's memory, and where they go. Addresses of the agents' mappings.
#[derive(Clone, Copy, Debug)]
struct Span {
    local: u64,
    remote: u64,
    bytes: usize,
}

/// The owner's side: its region, known to an agent. The agent serves reads by itself.
#[derive(Debug)]
pub struct NixlOwner {
    _agent: Agent,
    introduction: Vec<u8>,
}

impl NixlOwner {
    /// Makes a region readable.
    pub fn register(library: &Library, region: &Region) -> Result<NixlOwner, NixlError> {
        let agent = Agent::start(library)?;
        let at = agent.register(region)?;
        let introduction = [&at.to_le_bytes()[..], &agent.metadata()?].concat();
        Ok(NixlOwner { _agent: agent, introduction })
    }

    /// Has the agent introduced to readers that ask there.
    pub fn introduce_by(&self, tcp: &TcpOwner) {
        tcp.introduce(self.introduction.clone());
    }
}

/// Owners that are read over NIXL, by one agent.
#[derive(Debug)]
pub(super) struct NixlPeers {
    library: Library,
    agent: OnceLock<Result<Arc<Agent>, NixlError>>,
}

impl NixlPeers {
    /// None known yet. The agent begins with the first.
    pub(super) fn new(library: &Library) -> NixlPeers {
        NixlPeers { library: library.clone(), agent: OnceLock::new() }
    }

    /// The owner of a handle's bytes, met over `tcp`.
    pub(super) fn peer(&self, handle: &KvHandle, tcp: Arc<TcpPeer>) -> Result<Arc<dyn Transport>, ReadError> {
        let agent = self.agent.get_or_init(|| Agent::start(&self.library).map(Arc::new)).clone();
        let agent = agent.map_err(|error| unreachable(handle, error.to_string()))?;
        let said = tcp.introduction(handle)?;
        let Some((at, metadata)) = said.split_first_chunk::<8>() else {
            return Err(unreachable(handle, "it introduces no agent".into()));
        };
        let name = agent.meet(metadata).map_err(|error| unreachable(handle, error.to_string()))?;
        let (remote, layout) = (u64::from_le_bytes(*at), handle.layout);
        Ok(Arc::new(NixlPeer { agent, tcp, name, remote, layout, one_at_a_time: Mutex::new(()) }))
    }
}

fn unreachable(handle: &KvHandle, cause: String) -> ReadError {
    ReadError::Unreachable { agent: handle.agent.clone(), transport: "nixl", cause }
}

/// One owner.
#[derive(Debug)]
struct NixlPeer {
    agent: Arc<Agent>,
    tcp: Arc<TcpPeer>,
    name: String,
    /// Where its region begins, for its agent.
    remote: u64,
    layout: KvLayout,
    one_at_a_time: Mutex<()>,
}

impl Transport for NixlPeer {
    fn name(&self) -> &'static str {
        "nixl"
    }

    fn claim(&self, handle: &KvHandle) -> Result<(), ReadError> {
        self.tcp.claim(handle)
    }

    fn read(
        &self,
        handle: &KvHandle,
        group: usize,
        into: &Region,
        layout: &KvLayout,
        slot: u32,
    ) -> Result<u64, ReadError> {
        let within = handle.layout == self.layout
            && handle.slot < self.layout.slots
            && handle.tokens.end() <= self.layout.positions;
        if !within {
            let KvHandle { slot, tokens, layout, .. } = handle;
            return Err(ReadError::BadHandle(format!("slot {slot} positions {tokens:?} of {layout:?}")));
        }
        self.tcp.check(handle)?;
        let failed = |error: NixlError| unreachable(handle, error.to_string());
        let local = self.agent.register(into).map_err(failed)?;
        let planes = KvHandle::group_planes(&layout.geometry, group);
        let from = self.layout.pieces(handle.slot, handle.tokens, planes.clone());
        let to: Vec<_> = layout.pieces(slot, handle.tokens, planes).collect();
        let spans: Vec<Span> = from
            .zip(&to)
            .map(|((from, bytes), (to, _))| Span {
                local: local + *to as u64,
                remote: self.remote + from as u64,
                bytes,
            })
            .collect();
        {
            let _one = self.one_at_a_time.lock().expect("no panics while held");
            for spans in spans.chunks(SPANS_MAX) {
                self.agent.read(&self.name, spans).map_err(failed)?;
            }
        }
        let mut sum = Checksum::default();
        for (offset, bytes) in to {
            checksum(into, offset, bytes, &mut sum);
        }
        Ok(sum.value())
    }

    fn generation(&self, handle: &KvHandle) -> Result<u64, ReadError> {
        self.tcp.generation(handle)
    }

    fn release(&self, handle: &KvHandle) {
        self.tcp.release(handle);
    }
}
