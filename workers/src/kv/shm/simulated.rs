//! The sockets of a simulation: a table. What comes over them is the same: descriptors, which are mapped.

use crate::kv::lease::Leases;
use forebay_kernels::Region;
use forebay_streams::environment::{Condition, Process};
use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

/// What peers get of an owner.
struct Owner {
    process: Option<Process>,
    greeting: Vec<u8>,
    region: Arc<Region>,
    leases: Leases,
}

/// Of all simulations in this process: their folders differ.
static OWNERS: Mutex<BTreeMap<PathBuf, Owner>> = Mutex::new(BTreeMap::new());

pub(super) fn listen(path: &Path, greeting: Vec<u8>, region: Arc<Region>, leases: Leases) {
    let owner = Owner { process: Process::current(), greeting, region, leases };
    OWNERS.lock().expect("no panics while held").insert(path.to_owned(), owner);
}

pub(super) fn close(path: &Path) {
    OWNERS.lock().expect("no panics while held").remove(path);
}

pub(super) fn meet(path: &str) -> Result<(Vec<u8>, OwnedFd, OwnedFd), String> {
    let owners = OWNERS.lock().expect("no panics while held");
    let owner = owners.get(Path::new(path)).ok_or("there is no such socket")?;
    match owner.process.as_ref().map_or(Condition::Runs, Process::condition) {
        Condition::Runs => {}
        Condition::Stands => return Err("no greeting in time".into()),
        Condition::Dead => return Err("nobody listens there".into()),
    }
    let copy = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map_err(|error| error.to_string());
    Ok((owner.greeting.clone(), copy(owner.region.fd())?, copy(owner.leases.fd())?))
}
