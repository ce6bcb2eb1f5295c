//! Sealed KV, when somebody dies, is late or meddles: a read gives the sealed bytes or an error, and nothing stays held.

use forebay_kernels::Region;
use forebay_schemas::{
    card::WorkerLease,
    ids::{ModelKey, WorkerId},
    kv::{KvDtype, KvGeometry, KvHandle, KvLayout, LayoutHash, TokenRange},
    task::Role,
};
use forebay_workers::kv::{KvPeers, Leases, ReadError, Sealed, Transport, Word, read_kv, shm, sums};
use std::{
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tempfile::TempDir;

const LEASE: Duration = Duration::from_secs(10);

/// Three groups of planes, so that there is a middle of a read.
const LAYOUT: KvLayout = KvLayout {
    geometry: KvGeometry { layers: 20, kv_heads: 2, head_dim: 8, dtype: KvDtype::F32 },
    slots: 2,
    positions: 16,
};

const HASH: LayoutHash = LayoutHash(7);

const TOKENS: TokenRange = TokenRange { start: 0, count: 12 };

const SLOT: u32 = 1;

/// A worker with something in its region.
struct Owner {
    region: Arc<Region>,
    leases: Leases,
    socket: shm::ShmOwner,
}

impl Owner {
    fn start(folder: &Path) -> Owner {
        let region = Arc::new(Region::create("test", LAYOUT.region_bytes()).unwrap());
        let bytes: Vec<u8> = (0..LAYOUT.region_bytes()).map(|at| (at * 7 % 251) as u8).collect();
        region.write(0, &bytes);
        let leases = Leases::create(LAYOUT.slots).unwrap();
        let kv = (region.clone(), LAYOUT, HASH);
        let socket = shm::ShmOwner::listen(folder, &agent(), 1, kv, leases.clone()).unwrap();
        Owner { region, leases, socket }
    }

    fn seal(&self, lease: Duration) -> (Sealed, KvHandle) {
        let sealed = self.leases.seal(SLOT, lease);
        let handle = KvHandle {
            agent: agent(),
            incarnation: 1,
            layout: LAYOUT,
            layout_hash: HASH,
            slot: SLOT,
            generation: sealed.generation(),
            tokens: TOKENS,
            checksums: sums(&self.region, &LAYOUT, SLOT, TOKENS),
            lease_remaining_ms: sealed.remaining().as_millis() as u32,
            capability: sealed.capability(),
        };
        (sealed, handle)
    }
}

fn agent() -> WorkerId {
    WorkerId::new("prefill-test").unwrap()
}

fn registered(socket: &Path) -> WorkerLease {
    WorkerLease {
        worker: agent(),
        incarnation: 1,
        role: Role::Prefill,
        model: ModelKey::of("m"),
        layout_hash: HASH,
        slots: LAYOUT.slots,
        free_slots: 0,
        host: shm::host_id(),
        kv_socket: socket.display().to_string(),
        kv_tcp: None,
        active_tokens: 0,
        draining: false,
        kv_leases: 1,
        own_queue: false,
    }
}

/// A reader's own region, and its way to the owner.
struct Reader {
    region: Region,
    peers: KvPeers,
}

impl Reader {
    fn new() -> Reader {
        let region = Region::create("reader", LAYOUT.region_bytes()).unwrap();
        Reader { region, peers: KvPeers::new(HASH) }
    }

    fn way(&self, handle: &KvHandle, socket: &Path) -> Arc<dyn Transport> {
        self.peers.transport(handle, Some(&registered(socket))).unwrap()
    }

    fn read(&self, way: &dyn Transport, handle: &KvHandle) -> Result<(), ReadError> {
        read_kv(way, std::slice::from_ref(handle), &self.region, &LAYOUT, 0).map(drop)
    }

    /// Whether what lies in slot 0 is what the handle says.
    fn has(&self, handle: &KvHandle) -> bool {
        sums(&self.region, &LAYOUT, 0, TOKENS) == handle.checksums
    }
}

/// A transport on which something happens in the middle of a read.
struct Interrupted<'a, F> {
    way: &'a dyn Transport,
    happens: F,
    groups: AtomicUsize,
}

impl<'a, F: Fn() + Send + Sync> Interrupted<'a, F> {
    fn new(way: &'a dyn Transport, happens: F) -> Interrupted<'a, F> {
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

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_was_sealed_is_read_once_and_given_back() {
    let folder = folder();
    let (owner, reader) = (Owner::start(folder.path()), Reader::new());
    let (sealed, handle) = owner.seal(LEASE);
    assert_eq!(owner.leases.held(), 1);
    let way = reader.way(&handle, owner.socket.path());
    reader.read(&*way, &handle).unwrap();
    assert!(reader.has(&handle));
    assert_eq!(owner.leases.held(), 0);
    assert!(sealed.over().await, "it was released, and its time did not run out");
    // Once more is too late, and a second release gives nothing back twice.
    assert!(matches!(reader.read(&*way, &handle), Err(ReadError::LeaseOver { .. })));
    way.release(&handle);
    drop(sealed);
    assert_eq!(owner.leases.word(SLOT), Word::Open(handle.generation + 1));
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_dies_holds_nothing_for_ever_and_another_may_read() {
    let folder = folder();
    let (owner, dead, other) = (Owner::start(folder.path()), Reader::new(), Reader::new());
    let (sealed, handle) = owner.seal(LEASE);
    dead.way(&handle, owner.socket.path()).claim(&handle).unwrap();
    let begun = tokio::time::Instant::now();
    assert_eq!(owner.leases.held(), 1);
    // The worker that took over from the dead one has the same handle.
    let way = other.way(&handle, owner.socket.path());
    way.claim(&handle).unwrap();
    assert!(!sealed.over().await, "nobody released it");
    let waited = begun.elapsed();
    assert!(waited >= LEASE && waited < LEASE + Duration::from_secs(6), "{waited:?}");
    drop(sealed);
    assert_eq!(owner.leases.held(), 0);
    assert!(matches!(other.read(&*way, &handle), Err(ReadError::LeaseOver { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_lease_lasts_as_long_as_it_says() {
    let folder = folder();
    let owner = Owner::start(folder.path());
    let (mut sealed, handle) = owner.seal(LEASE);
    assert_eq!(handle.lease_remaining_ms, LEASE.as_millis() as u32);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(sealed.remaining(), Duration::from_secs(6));
    sealed.renew(LEASE);
    assert_eq!(sealed.remaining(), LEASE);
    let begun = tokio::time::Instant::now();
    assert!(!sealed.over().await);
    assert!(begun.elapsed() >= LEASE);
}

#[tokio::test]
async fn a_slot_that_is_used_again_under_a_reader_is_noticed() {
    let folder = folder();
    let (owner, reader) = (Owner::start(folder.path()), Reader::new());
    let (sealed, handle) = owner.seal(LEASE);
    let way = reader.way(&handle, owner.socket.path());
    let sealed = std::sync::Mutex::new(Some(sealed));
    let reuse = || {
        drop(sealed.lock().unwrap().take());
        owner.region.write(LAYOUT.slot_offset(39, SLOT as usize), &[0xee; 64]);
    };
    let read = reader.read(&Interrupted::new(&*way, reuse), &handle);
    assert!(matches!(read, Err(ReadError::LeaseOver { .. })), "{read:?}");
    // The same, with bytes that happen to be right: the lease is over all the same.
    let (again, handle) = owner.seal(LEASE);
    let again = std::sync::Mutex::new(Some(again));
    let read = reader.read(&Interrupted::new(&*way, || drop(again.lock().unwrap().take())), &handle);
    assert!(matches!(read, Err(ReadError::LeaseOver { .. })), "{read:?}");
    // The late reader's release is not one of the new lease.
    let (newer, _) = owner.seal(LEASE);
    way.release(&handle);
    assert_eq!(owner.leases.word(SLOT), Word::Sealed(newer.generation()));
}

#[tokio::test]
async fn a_flipped_bit_is_noticed() {
    let folder = folder();
    let (owner, reader) = (Owner::start(folder.path()), Reader::new());
    let (_sealed, handle) = owner.seal(LEASE);
    let way = reader.way(&handle, owner.socket.path());
    let at = LAYOUT.slot_offset(20, SLOT as usize);
    let mut byte = [0];
    owner.region.read(at, &mut byte);
    owner.region.write(at, &[byte[0] ^ 1]);
    let read = reader.read(&*way, &handle);
    assert!(matches!(read, Err(ReadError::Corrupt { group: 1, .. })), "{read:?}");
    assert_eq!(owner.leases.held(), 0, "a read that failed gives the lease back too");
}

/// The child of [`an_owner_that_dies_under_a_reader_is_read_all_the_same`]; a test only so that it can be found.
#[test]
fn owner_process() {
    let Some(folder) = std::env::var_os("FOREBAY_TEST_OWNER") else { return };
    let folder = Path::new(&folder);
    let owner = Owner::start(folder);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _within = runtime.enter();
    let (_sealed, handle) = owner.seal(LEASE);
    std::fs::write(folder.join("new"), serde_json::to_vec(&handle).unwrap()).unwrap();
    std::fs::rename(folder.join("new"), folder.join("handle")).unwrap();
    std::thread::sleep(Duration::from_secs(60));
}

/// Killed and waited for when dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_owner_that_dies_under_a_reader_is_read_all_the_same() {
    let folder = folder();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "owner_process"])
        .env("FOREBAY_TEST_OWNER", folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let child = std::sync::Mutex::new(Some(Killed(child)));
    let file = folder.path().join("handle");
    let give_up = std::time::Instant::now() + Duration::from_secs(30);
    while !file.exists() {
        assert!(std::time::Instant::now() < give_up, "the owner does not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    let handle: KvHandle = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let (reader, late) = (Reader::new(), Reader::new());
    let socket = folder.path().join(format!("{}.sock", agent()));
    let way = reader.way(&handle, &socket);
    reader.read(&Interrupted::new(&*way, || drop(child.lock().unwrap().take())), &handle).unwrap();
    assert!(reader.has(&handle));
    // Who has not met it yet can't any more, and is told so.
    let way = late.peers.transport(&handle, Some(&registered(&socket)));
    assert!(matches!(way.err(), Some(ReadError::Unreachable { .. })));
}
