//! The `shm` transport: workers on one host map each other's region, passed as a memfd over a Unix socket.
//!
//! The owner listens on a socket and hands every peer that connects a greeting and two descriptors: its region,
//! which the peer maps read-only, and its lease words. From then on reads need nothing of the owner: its bytes
//! stay readable even after it died, for as long as a peer has them mapped. Where the owner computes on a GPU, peers
//! that compute on one, too, may ask for its memory (`shm/gpu.rs`).

mod gpu;
mod simulated;

use super::{
    greeting::{GREETING_MAX, GpuOffer, Greeting},
    lease::{Leases, Word, claim, release},
    read::{ReadError, Transport, lease_over},
};
use forebay_kernels::{
    Checksum, Region, Words, copy_summed,
    cuda::{Arena, Device, SharedSlot},
};
use forebay_schemas::{
    card::WorkerLease,
    ids::WorkerId,
    kv::{KvHandle, KvLayout, LayoutHash},
};
use forebay_streams::environment::is_simulated;
use gpu::{GpuOwner, GpuPeer};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use std::{
    collections::BTreeMap,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// How long a peer waits for the owner's greeting.
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);

/// How long after an attempt to connect anew, for questions about an owner's GPU, the next one may be made.
const ANEW_AFTER: Duration = Duration::from_secs(5);

/// Regions of peers kept mapped; the one that was not read for the longest time goes first.
const PEERS_MAX: usize = 256;

/// Identifies the host and its boot: workers with equal ids share memory.
pub fn host_id() -> String {
    if is_simulated() {
        return "simulated".to_owned();
    }
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    format!("{}/{}", read("/proc/sys/kernel/hostname"), read("/proc/sys/kernel/random/boot_id"))
}

/// The owner's side: greets peers until dropped.
#[derive(Debug)]
pub struct ShmOwner {
    path: PathBuf,
    over: Arc<AtomicBool>,
    gpu: Option<GpuOwner>,
}

impl ShmOwner {
    /// Listens on a socket of its own in `folder`. `arena` is where the KV is computed, if that is on a GPU.
    pub fn listen(
        folder: &Path,
        worker: &WorkerId,
        incarnation: u64,
        kv: (Arc<Region>, KvLayout, LayoutHash),
        leases: Leases,
        arena: Option<&Arc<Arena>>,
    ) -> std::io::Result<ShmOwner> {
        let path = folder.join(format!("{worker}.sock"));
        let (region, layout, layout_hash) = kv;
        let (gpu, offer) = arena.and_then(|arena| GpuOwner::new(arena, leases.clone())).unzip();
        let greeting = Greeting { worker: worker.clone(), incarnation, layout, layout_hash, gpu: offer };
        let greeting = serde_json::to_vec(&greeting).expect("plain data always encodes");
        let owner = ShmOwner { path, over: Arc::default(), gpu };
        if is_simulated() {
            simulated::listen(&owner.path, greeting, region, leases);
            return Ok(owner);
        }
        std::fs::create_dir_all(folder)?;
        let listener = UnixListener::bind(&owner.path)?;
        let (over, gpu) = (owner.over.clone(), owner.gpu.clone());
        std::thread::Builder::new().name("kv-shm".into()).spawn(move || {
            for peer in listener.incoming().flatten() {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(error) = greet(&peer, &greeting, &region, &leases) {
                    tracing::debug!(%error, "a peer left before it was greeted");
                } else if let Some(Err(error)) = gpu.as_ref().map(|gpu| gpu.serve(peer)) {
                    tracing::debug!(%error, "a peer is not answered");
                }
            }
        })?;
        Ok(owner)
    }

    /// Where peers connect.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ShmOwner {
    fn drop(&mut self) {
        if is_simulated() {
            return simulated::close(&self.path);
        }
        self.over.store(true, Ordering::Relaxed);
        self.gpu.iter().for_each(GpuOwner::close);
        // The thread waits for a peer: this is the last one.
        let _ = UnixStream::connect(&self.path);
        // Whoever finds no socket computes the KV itself.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn greet(peer: &UnixStream, greeting: &[u8], region: &Region, leases: &Leases) -> rustix::io::Result<()> {
    let descriptors = [region.fd(), leases.fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    rustix::net::sendmsg(peer, &[IoSlice::new(greeting)], &mut ancillary, SendFlags::NOSIGNAL).map(drop)
}

/// What an owner gives whoever connects, and the connection.
struct Met {
    gpu: Option<GpuOffer>,
    region: OwnedFd,
    words: OwnedFd,
    stream: Option<UnixStream>,
}

/// Connects to who must be the owner of a handle's bytes.
fn meet(path: &str, handle: &KvHandle) -> Result<Met, String> {
    let (greeting, region, words, stream) = if is_simulated() {
        let (greeting, region, words) = simulated::meet(path)?;
        (greeting, region, words, None)
    } else {
        connect(path)?
    };
    let mut greeting: Greeting =
        serde_json::from_slice(&greeting).map_err(|error| format!("greeting: {error}"))?;
    let gpu = greeting.gpu.take();
    let expected = Greeting::of(handle);
    if greeting != expected {
        return Err(format!("the owner says it is {greeting:?}, the handle says {expected:?}"));
    }
    Ok(Met { gpu, region, words, stream })
}

fn connect(path: &str) -> Result<(Vec<u8>, OwnedFd, OwnedFd, Option<UnixStream>), String> {
    let stream = UnixStream::connect(path).map_err(|error| format!("{path}: {error}"))?;
    stream.set_read_timeout(Some(GREETING_TIMEOUT)).map_err(|error| error.to_string())?;
    let mut bytes = vec![0; GREETING_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        stream.as_fd(),
        &mut [IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )
    .map_err(|error| format!("no greeting: {error}"))?;
    let mut descriptors = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect::<Vec<OwnedFd>>(),
        _ => Vec::new(),
    });
    let (Some(region), Some(words)) = (descriptors.next(), descriptors.next()) else {
        return Err("the greeting came without descriptors".into());
    };
    bytes.truncate(received.bytes);
    Ok((bytes, region, words, Some(stream)))
}

/// Peers whose regions are mapped: mapped once, at the first read.
#[derive(Debug, Default)]
pub struct ShmPeers {
    /// The GPU that this worker computes on, if it may read other GPUs' memory.
    device: Option<Device>,
    mapped: Mutex<BTreeMap<(WorkerId, u64), Mapped>>,
}

impl ShmPeers {
    /// Has KV read from other GPUs' memory into this one's, where that can be done.
    pub(super) fn read_gpus(&mut self, device: &Device) {
        self.device = Some(device.clone());
    }

    /// The peer that holds a handle's bytes.
    pub fn peer(
        &self,
        handle: &KvHandle,
        lease: Option<&WorkerLease>,
    ) -> Result<Arc<dyn Transport>, ReadError> {
        let key = (handle.agent.clone(), handle.incarnation);
        let unreachable =
            |cause: String| ReadError::Unreachable { agent: handle.agent.clone(), transport: "shm", cause };
        let known = self.mapped.lock().expect("no panics while held").get_mut(&key).map(|mapped| {
            mapped.used = Instant::now();
            mapped.peer.clone()
        });
        if let Some(peer) = known {
            if let (Some(device), Some(lease)) = (&self.device, lease) {
                peer.reach_gpu(&lease.kv_socket, handle, device);
            }
            return Ok(peer);
        }
        let lease = lease.ok_or_else(|| unreachable("it has no lease in the registry".into()))?;
        if lease.host != host_id() {
            return Err(unreachable(format!("it is on another host ({})", lease.host)));
        }
        let peer =
            Arc::new(ShmPeer::map(&lease.kv_socket, handle, self.device.as_ref()).map_err(unreachable)?);
        let mut mapped = self.mapped.lock().expect("no panics while held");
        let mut gone = None;
        if mapped.len() >= PEERS_MAX
            && let Some(oldest) =
                mapped.iter().min_by_key(|(_, mapped)| mapped.used).map(|(key, _)| key.clone())
        {
            gone = mapped.remove(&oldest);
        }
        let before = mapped.insert(key, Mapped { peer: peer.clone(), used: Instant::now() });
        // Others need not wait until what these had mapped is unmapped.
        drop(mapped);
        drop((gone, before));
        Ok(peer)
    }
}

/// A peer, and when it was asked for last.
#[derive(Debug)]
struct Mapped {
    peer: Arc<ShmPeer>,
    used: Instant,
}

/// One peer's region and lease words, mapped here.
#[derive(Debug)]
struct ShmPeer {
    region: Arc<Region>,
    words: Words,
    layout: KvLayout,
    gpu: Mutex<GpuWay>,
}

/// The way to a peer's memory of a GPU.
#[derive(Debug, Default)]
struct GpuWay {
    /// None if there is none.
    peer: Option<Arc<GpuPeer>>,
    /// When it was last looked for anew.
    anew: Option<Instant>,
}

impl ShmPeer {
    fn map(socket: &str, handle: &KvHandle, device: Option<&Device>) -> Result<ShmPeer, String> {
        let Met { gpu: offer, region, words, stream } = meet(socket, handle)?;
        let layout = handle.layout;
        let region = Region::open(region, layout.region_bytes(), false).map_err(|error| error.to_string())?;
        let words = Words::open(words, layout.slots as usize).map_err(|error| error.to_string())?;
        let peer = device.and_then(|device| gpu_peer(device, stream, offer, handle));
        let gpu = Mutex::new(GpuWay { peer, anew: None });
        Ok(ShmPeer { region: Arc::new(region), words, layout, gpu })
    }

    /// Connects anew for questions about the GPU's memory if that connection has ended, but not too often. The region stays mapped.
    fn reach_gpu(&self, socket: &str, handle: &KvHandle, device: &Device) {
        {
            let mut way = self.gpu();
            let is_over = way.peer.as_ref().is_some_and(|peer| peer.is_over());
            if !is_over || way.anew.is_some_and(|anew| anew.elapsed() < ANEW_AFTER) {
                return;
            }
            way.anew = Some(Instant::now());
        }
        let met = meet(socket, handle)
            .inspect_err(|error| tracing::debug!(agent = %handle.agent, %error, "{}", NO_GPU));
        let peer = met.ok().and_then(|Met { gpu, stream, .. }| gpu_peer(device, stream, gpu, handle));
        if peer.is_some() {
            // The old one goes after the lock.
            let _old = std::mem::replace(&mut self.gpu().peer, peer);
        }
    }

    fn gpu(&self) -> MutexGuard<'_, GpuWay> {
        self.gpu.lock().expect("no panics while held")
    }
}

/// Who is asked for an owner's memory of a GPU, over a connection that brought this offer.
fn gpu_peer(
    device: &Device,
    stream: Option<UnixStream>,
    offer: Option<GpuOffer>,
    handle: &KvHandle,
) -> Option<Arc<GpuPeer>> {
    let peer = GpuPeer::new(device, stream?, &offer?, handle.layout)
        .inspect_err(|error| tracing::debug!(agent = %handle.agent, %error, "{}", NO_GPU));
    peer.ok().map(Arc::new)
}

/// What is then done instead.
const NO_GPU: &str = "KV is read from the owner's region, not from its GPU";

impl ShmPeer {
    /// A handle is what somebody else wrote: it must not lead beyond what is mapped.
    fn check(&self, handle: &KvHandle) -> Result<(), ReadError> {
        let within = handle.layout == self.layout
            && handle.slot < self.layout.slots
            && handle.tokens.end() <= self.layout.positions;
        if within {
            return Ok(());
        }
        let KvHandle { slot, tokens, layout, .. } = handle;
        Err(ReadError::BadHandle(format!("slot {slot} positions {tokens:?} of {layout:?}")))
    }
}

impl Transport for ShmPeer {
    fn name(&self) -> &'static str {
        "shm"
    }

    fn claim(&self, handle: &KvHandle) -> Result<(), ReadError> {
        self.check(handle)?;
        claim(&self.words, handle.slot, handle.generation)
            .map_err(|found| lease_over(handle, found.generation()))
    }

    fn read(
        &self,
        handle: &KvHandle,
        group: usize,
        into: &Region,
        layout: &KvLayout,
        slot: u32,
    ) -> Result<u64, ReadError> {
        self.check(handle)?;
        let planes = KvHandle::group_planes(&layout.geometry, group);
        let from = self.layout.pieces(handle.slot, handle.tokens, planes.clone());
        let mut sum = Checksum::default();
        for ((source, bytes), (target, _)) in from.zip(layout.pieces(slot, handle.tokens, planes)) {
            copy_summed((&self.region, source), (into, target), bytes, Some(&mut sum));
        }
        Ok(sum.value())
    }

    fn mapped(&self, handle: &KvHandle) -> Option<&Arc<Region>> {
        self.check(handle).is_ok().then_some(&self.region)
    }

    fn mapped_gpu(&self, handle: &KvHandle) -> Option<SharedSlot> {
        if handle.tokens.count == 0 || self.check(handle).is_err() {
            return None;
        }
        let gpu = self.gpu().peer.clone()?;
        gpu.slot(handle)
            .inspect_err(|error| tracing::debug!(agent = %handle.agent, %error, "{}", NO_GPU))
            .ok()
    }

    fn generation(&self, handle: &KvHandle) -> Result<u64, ReadError> {
        self.check(handle)?;
        Ok(Word::unpack(self.words.load(handle.slot as usize)).generation())
    }

    fn release(&self, handle: &KvHandle) {
        if self.check(handle).is_ok() {
            release(&self.words, handle.slot, handle.generation);
        }
    }
}
