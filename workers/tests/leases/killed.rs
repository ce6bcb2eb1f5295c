//! Processes that are killed in the middle of a read.

use crate::site::{Interrupted, LEASE, Owner, Reader, Way, folder};
use forebay_schemas::{card::WorkerLease, kv::KvHandle};
use forebay_workers::kv::ReadError;
use std::{
    path::Path,
    process::{Child, Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

/// How long a child waits to be killed.
const LIFE: Duration = Duration::from_secs(60);

/// The child of [`an_owner_that_is_killed_under_a_reader_gives_its_bytes_or_an_error`]; a test only so that it can be
/// found.
#[test]
fn owner_process() {
    let Some(folder) = std::env::var_os("FOREBAY_TEST_OWNER") else { return };
    let folder = Path::new(&folder);
    let owner = Owner::like(folder.to_owned(), crate::site::LAYOUT, 1, ([127, 0, 0, 1], 0).into());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _within = runtime.enter();
    let (_sealed, handle) = owner.seal(LEASE);
    say(folder, &(handle, &owner.lease));
    std::thread::sleep(LIFE);
}

/// The child of [`a_reader_that_is_killed_leaves_the_kv_to_another`].
#[test]
fn reader_process() {
    let Some(folder) = std::env::var_os("FOREBAY_TEST_READER") else { return };
    let folder = Path::new(&folder);
    let name = std::env::var("FOREBAY_TEST_WAY").unwrap();
    let way = Way::ALL.into_iter().find(|way| way.name() == name).unwrap();
    let (handle, lease): (KvHandle, WorkerLease) =
        serde_json::from_slice(&std::fs::read(folder.join("handle")).unwrap()).unwrap();
    let reader = Reader::new(way);
    let transport = reader.way(&handle, &lease);
    let stuck = || {
        say(folder, &"in the middle");
        std::thread::sleep(LIFE);
    };
    reader.read(&Interrupted::new(&*transport, stuck), &handle).unwrap();
}

fn say(folder: &Path, what: &impl serde::Serialize) {
    std::fs::write(folder.join("new"), serde_json::to_vec(what).unwrap()).unwrap();
    std::fs::rename(folder.join("new"), folder.join("said")).unwrap();
}

fn heard(folder: &Path) -> Vec<u8> {
    let file = folder.join("said");
    let give_up = Instant::now() + LIFE / 2;
    while !file.exists() {
        assert!(Instant::now() < give_up, "the child does not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::fs::read(file).unwrap()
}

/// Killed and waited for when dropped.
struct Killed(Child);

impl Killed {
    fn start(test: &str, folder: &Path, variable: &str, way: Way) -> Killed {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("killed::{test}")])
            .env(variable, folder)
            .env("FOREBAY_TEST_WAY", way.name())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Killed(child.unwrap())
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) async fn an_owner_that_is_killed_under_a_reader_gives_its_bytes_or_an_error(way: Way) {
    let folder = folder();
    let owner = Killed::start("owner_process", folder.path(), "FOREBAY_TEST_OWNER", way);
    let owner = Mutex::new(Some(owner));
    let (handle, lease): (KvHandle, WorkerLease) = serde_json::from_slice(&heard(folder.path())).unwrap();
    let (reader, late) = (Reader::new(way), Reader::new(way));
    let transport = reader.way(&handle, &lease);
    let begun = Instant::now();
    let read = reader.read(&Interrupted::new(&*transport, || drop(owner.lock().unwrap().take())), &handle);
    match way {
        // Its memory is mapped here.
        Way::Shm => {
            read.unwrap();
            assert!(reader.has(&handle));
        }
        Way::Tcp | Way::Nixl => assert!(matches!(read, Err(ReadError::Unreachable { .. })), "{read:?}"),
    }
    // Who has not met it yet can't any more, and is told so.
    let read = late.find_and_read(&handle, &lease);
    assert!(matches!(read, Err(ReadError::Unreachable { .. })), "{read:?}");
    assert!(begun.elapsed() < LIFE / 2, "nobody waits for the dead");
}

pub(crate) async fn a_reader_that_is_killed_leaves_the_kv_to_another(way: Way) {
    let folder = folder();
    let (owner, other) = (Owner::start(&folder), Reader::new(way));
    let (_sealed, handle) = owner.seal(LEASE);
    std::fs::write(folder.path().join("handle"), serde_json::to_vec(&(&handle, &owner.lease)).unwrap())
        .unwrap();
    let dead = Killed::start("reader_process", folder.path(), "FOREBAY_TEST_READER", way);
    heard(folder.path());
    drop(dead);
    assert_eq!(owner.leases.held(), 1);
    other.find_and_read(&handle, &owner.lease).unwrap();
    assert!(other.has(&handle));
    assert_eq!(owner.leases.held(), 0);
}
