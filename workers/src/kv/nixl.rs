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
pub use agent::end_process;
use forebay_kernels::{Checksum, Region, checksum};
use forebay_schemas::{
    ids::WorkerId,
    kv::{KvHandle, KvLayout},
};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// The longest that one group of planes may take.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Owners that are known to the agent; the one that was not read for the longest time is forgotten first.
const PEERS_MAX: usize = 256;

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
#[cfg_attr(not(feature = "nixl"), expect(dead_code, reason = "only NIXL looks into it"))]
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
    /// By worker and life of it.
    known: Mutex<Known>,
}

type Known = BTreeMap<(WorkerId, u64), (Arc<Met>, Instant)>;

/// An owner that the agent knows.
#[derive(Debug)]
struct Met {
    name: String,
    /// Where its region begins, for its agent.
    remote: u64,
    /// A read failed: it has to be met again.
    is_broken: AtomicBool,
    one_at_a_time: Mutex<()>,
}

impl NixlPeers {
    /// None known yet. The agent begins with the first.
    pub(super) fn new(library: &Library) -> NixlPeers {
        NixlPeers { library: library.clone(), agent: OnceLock::new(), known: Mutex::default() }
    }

    /// The owner of a handle's bytes, met over `tcp`.
    pub(super) fn peer(&self, handle: &KvHandle, tcp: Arc<TcpPeer>) -> Result<Arc<dyn Transport>, ReadError> {
        let agent = self.agent.get_or_init(|| Agent::start(&self.library).map(Arc::new)).clone();
        let agent = agent.map_err(|error| unreachable(handle, error.to_string()))?;
        let known = met_before(&mut self.known(), handle);
        let met = match known {
            Some(met) => met,
            None => self.meet(&agent, &tcp.introduction(handle)?, handle)?,
        };
        Ok(Arc::new(NixlPeer { agent, tcp, met, layout: handle.layout }))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("no panics while held")
    }

    fn meet(&self, agent: &Agent, said: &[u8], handle: &KvHandle) -> Result<Arc<Met>, ReadError> {
        let Some((at, metadata)) = said.split_first_chunk::<8>() else {
            return Err(unreachable(handle, "it introduces no agent".into()));
        };
        let key = (handle.agent.clone(), handle.incarnation);
        let mut known = self.known();
        // Another read may have met it meanwhile.
        if let Some(met) = met_before(&mut known, handle) {
            return Ok(met);
        }
        // What is forgotten ends for everybody who reads from it: so only what nobody reads from.
        match known.get(&key) {
            Some(broken) if !is_idle(broken) => {
                return Err(unreachable(handle, "a read failed, and others have not ended yet".into()));
            }
            Some(_) => forget(&mut known, agent, &key),
            None => {}
        }
        if known.len() >= PEERS_MAX {
            let idle = known.iter().filter(|(_, known)| is_idle(known));
            let oldest = idle.min_by_key(|(_, (_, used))| *used).map(|(key, _)| key.clone());
            let oldest =
                oldest.ok_or_else(|| unreachable(handle, "too many workers are read from".into()))?;
            forget(&mut known, agent, &oldest);
        }
        let name = agent.meet(metadata).map_err(|error| unreachable(handle, error.to_string()))?;
        let (remote, one_at_a_time) = (u64::from_le_bytes(*at), Mutex::default());
        let met = Arc::new(Met { name, remote, is_broken: AtomicBool::new(false), one_at_a_time });
        known.insert(key, (met.clone(), Instant::now()));
        Ok(met)
    }
}

fn met_before(known: &mut Known, handle: &KvHandle) -> Option<Arc<Met>> {
    let (met, used) = known.get_mut(&(handle.agent.clone(), handle.incarnation))?;
    *used = Instant::now();
    (!met.is_broken.load(Ordering::Relaxed)).then(|| met.clone())
}

fn is_idle((met, _): &(Arc<Met>, Instant)) -> bool {
    Arc::strong_count(met) == 1
}

fn forget(known: &mut Known, agent: &Agent, key: &(WorkerId, u64)) {
    if let Some((met, _)) = known.remove(key) {
        agent.forget(&met.name);
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
    met: Arc<Met>,
    layout: KvLayout,
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
                remote: self.met.remote + from as u64,
                bytes,
            })
            .collect();
        {
            let _one = self.met.one_at_a_time.lock().expect("no panics while held");
            for spans in spans.chunks(SPANS_MAX) {
                self.agent.read(&self.met.name, spans).map_err(|error| {
                    self.met.is_broken.store(true, Ordering::Relaxed);
                    failed(error)
                })?;
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
