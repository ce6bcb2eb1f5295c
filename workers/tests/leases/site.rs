//! An owner with something in its region, and readers of it, over any transport.

use forebay_kernels::Region;
use forebay_schemas::{
    card::WorkerLease,
    ids::{ModelKey, WorkerId},
    kv::{KvDtype, KvGeometry, KvHandle, KvLayout, LayoutHash, TokenRange},
    task::Role,
};
use forebay_workers::kv::{
    Choice, KvOptions, KvPeers, Leases, ReadError, Sealed, Transport, nixl, read_kv, shm, sums,
    tcp::{TcpListen, TcpOptions, TcpOwner, Tls},
};
use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tempfile::TempDir;

pub(crate) const LEASE: Duration = Duration::from_secs(10);

/// Three groups of planes, so that there is a middle of a read.
pub(crate) const LAYOUT: KvLayout = KvLayout {
    geometry: KvGeometry { layers: 20, kv_heads: 2, head_dim: 8, dtype: KvDtype::F32 },
    slots: 2,
    positions: 16,
};

pub(crate) const HASH: LayoutHash = LayoutHash(7);

pub(crate) const TOKENS: TokenRange = TokenRange { start: 0, count: 12 };

pub(crate) const SLOT: u32 = 1;

/// Which transport is tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Shm,
    Tcp,
    Nixl,
}

impl Way {
    pub(crate) const ALL: [Way; 3] = [Way::Shm, Way::Tcp, Way::Nixl];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Shm => "shm",
            Way::Tcp => "tcp",
            Way::Nixl => "nixl",
        }
    }

    pub(crate) fn options(self) -> KvOptions {
        let choice = match self {
            Way::Shm => Choice::Shm,
            Way::Tcp => Choice::Tcp,
            Way::Nixl => Choice::Nixl,
        };
        KvOptions { choice, listen: None, tcp: TcpOptions { streams: 3, tls: None }, nixl: library() }
    }
}

/// NIXL, if this build and this machine have it: in the folder that FOREBAY_NIXL names, or where the loader looks.
pub(crate) fn library() -> Option<nixl::Library> {
    let folder = std::env::var_os("FOREBAY_NIXL").map(PathBuf::from);
    nixl::Library::load(folder.as_deref()).ok()
}

/// Says so on the descriptor itself: the harness keeps what a test prints to itself if it passes.
pub(crate) fn skipped(name: &str) {
    let line = format!("SKIPPED nixl::{name}: this build or this machine has no NIXL\n");
    rustix::io::write(rustix::stdio::stderr(), line.as_bytes()).unwrap();
}

/// A worker with something in its region.
pub(crate) struct Owner {
    pub(crate) region: Arc<Region>,
    pub(crate) leases: Leases,
    pub(crate) lease: WorkerLease,
    layout: KvLayout,
    shm: Option<shm::ShmOwner>,
    tcp: Option<TcpOwner>,
    nixl: Option<nixl::NixlOwner>,
    folder: PathBuf,
}

impl Owner {
    pub(crate) fn start(folder: &TempDir) -> Owner {
        Owner::like(folder.path().to_owned(), LAYOUT, 1, ([127, 0, 0, 1], 0).into())
    }

    pub(crate) fn like(folder: PathBuf, layout: KvLayout, incarnation: u64, address: SocketAddr) -> Owner {
        let region = Arc::new(Region::create("test", layout.region_bytes()).unwrap());
        let block: Vec<u8> = (0..1 << 16).map(|at| (at * 7 % 251) as u8).collect();
        for (number, offset) in (0..layout.region_bytes()).step_by(block.len()).enumerate() {
            let bytes = block.len().min(layout.region_bytes() - offset);
            region.write(offset, &block[..bytes]);
            region.write(offset, &(number as u16).to_le_bytes());
        }
        let leases = Leases::create(layout.slots).unwrap();
        let lease = WorkerLease {
            incarnation,
            layout_hash: HASH,
            slots: layout.slots,
            host: shm::host_id(),
            kv_leases: 1,
            ..WorkerLease::of(WorkerId::new("prefill-test").unwrap(), Role::Prefill, ModelKey::of("m"))
        };
        let mut owner = Owner { region, leases, lease, layout, shm: None, tcp: None, nixl: None, folder };
        owner.listen(address);
        owner
    }

    /// Begins to serve, in the stead of what it served before.
    pub(crate) fn listen(&mut self, address: SocketAddr) {
        self.listen_with(address, None);
    }

    pub(crate) fn listen_with(&mut self, address: SocketAddr, tls: Option<Tls>) {
        (self.shm, self.tcp) = (None, None);
        let kv = (self.region.clone(), self.layout, HASH);
        let WorkerLease { worker, incarnation, .. } = &self.lease;
        let leases = self.leases.clone();
        let shm =
            shm::ShmOwner::listen(&self.folder, worker, *incarnation, kv.clone(), leases, None).unwrap();
        let listen = TcpListen { address, advertise: None, tls };
        let tcp = TcpOwner::listen(&listen, worker, *incarnation, kv, self.leases.clone()).unwrap();
        if let Some(library) = library() {
            let nixl = self
                .nixl
                .take()
                .unwrap_or_else(|| nixl::NixlOwner::register(&library, &self.region).unwrap());
            nixl.introduce_by(&tcp);
            self.nixl = Some(nixl);
        }
        self.lease.kv_socket = shm.path().display().to_string();
        self.lease.kv_tcp = Some(tcp.advertised().to_owned());
        (self.shm, self.tcp) = (Some(shm), Some(tcp));
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.lease.kv_tcp.as_ref().unwrap().parse().unwrap()
    }

    pub(crate) fn seal(&self, lease: Duration) -> (Sealed, KvHandle) {
        self.seal_tokens(SLOT, TOKENS, lease)
    }

    pub(crate) fn seal_tokens(&self, slot: u32, tokens: TokenRange, lease: Duration) -> (Sealed, KvHandle) {
        let sealed = self.leases.seal(slot, lease);
        let handle = KvHandle {
            agent: self.lease.worker.clone(),
            incarnation: self.lease.incarnation,
            layout: self.layout,
            layout_hash: HASH,
            slot,
            generation: sealed.generation(),
            tokens,
            checksums: sums(&self.region, &self.layout, slot, tokens),
            lease_remaining_ms: sealed.remaining().as_millis() as u32,
            capability: sealed.capability(),
        };
        (sealed, handle)
    }
}

/// A reader's own region, and its ways to owners.
pub(crate) struct Reader {
    pub(crate) region: Region,
    pub(crate) peers: KvPeers,
    layout: KvLayout,
}

impl Reader {
    pub(crate) fn new(way: Way) -> Reader {
        Reader::like(LAYOUT, &way.options())
    }

    pub(crate) fn like(layout: KvLayout, options: &KvOptions) -> Reader {
        let region = Region::create("reader", layout.region_bytes()).unwrap();
        Reader { region, peers: KvPeers::new(HASH, options), layout }
    }

    pub(crate) fn way(&self, handle: &KvHandle, owner: &WorkerLease) -> Arc<dyn Transport> {
        self.peers.transport(handle, Some(owner)).unwrap()
    }

    /// Reads into slot 0.
    pub(crate) fn read(&self, way: &dyn Transport, handle: &KvHandle) -> Result<(), ReadError> {
        self.read_into(0, way, handle)
    }

    pub(crate) fn read_into(
        &self,
        slot: u32,
        way: &dyn Transport,
        handle: &KvHandle,
    ) -> Result<(), ReadError> {
        read_kv(way, std::slice::from_ref(handle), &self.region, &self.layout, slot).map(drop)
    }

    /// Finds the way and reads, as a worker does.
    pub(crate) fn find_and_read(&self, handle: &KvHandle, owner: &WorkerLease) -> Result<(), ReadError> {
        let way = self.peers.transport(handle, Some(owner))?;
        self.read(&*way, handle)
    }

    /// Whether what lies in slot 0 is what the handle says.
    pub(crate) fn has(&self, handle: &KvHandle) -> bool {
        self.has_in(0, handle)
    }

    pub(crate) fn has_in(&self, slot: u32, handle: &KvHandle) -> bool {
        sums(&self.region, &self.layout, slot, handle.tokens) == handle.checksums
    }
}

/// A transport on which something happens in the middle of a read.
pub(crate) struct Interrupted<'a, F> {
    way: &'a dyn Transport,
    happens: F,
    groups: AtomicUsize,
}

impl<'a, F: Fn() + Send + Sync> Interrupted<'a, F> {
    pub(crate) fn new(way: &'a dyn Transport, happens: F) -> Interrupted<'a, F> {
        Interrupted { way, happens, groups: AtomicUsize::new(0) }
    }
}

impl<F: Fn() + Send + Sync> Transport for Interrupted<'_, F> {
    fn name(&self) -> &'static str {
        self.way.name()
    }

    fn claim(&self, handle: &KvHandle) -> Result<(), ReadError> {
        self.way.claim(handle)
    }

    fn read(
        &self,
        handle: &KvHandle,
        group: usize,
        into: &Region,
        layout: &KvLayout,
        slot: u32,
    ) -> Result<u64, ReadError> {
        if self.groups.fetch_add(1, Ordering::Relaxed) == 1 {
            (self.happens)();
        }
        self.way.read(handle, group, into, layout, slot)
    }

    fn generation(&self, handle: &KvHandle) -> Result<u64, ReadError> {
        self.way.generation(handle)
    }

    fn release(&self, handle: &KvHandle) {
        self.way.release(handle);
    }
}

pub(crate) fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}
