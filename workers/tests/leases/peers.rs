//! Owners that go and come back, and which way leads to them.

use crate::site::{LAYOUT, LEASE, Owner, Reader, Way, folder};
use forebay_schemas::card::WorkerLease;
use forebay_workers::kv::{Choice, KvOptions, ReadError};

pub(crate) async fn an_owner_that_lives_again_is_another(way: Way) {
    let folder = folder();
    let reader = Reader::new(way);
    let owner = Owner::start(&folder);
    let address = owner.address();
    let (sealed, old) = owner.seal(LEASE);
    let transport = reader.way(&old, &owner.lease);
    reader.read(&*transport, &old).unwrap();
    drop((sealed, owner));
    // Under the same name, and at the same address.
    let owner = Owner::like(folder.path().to_owned(), LAYOUT, 2, address);
    let (_sealed, new) = owner.seal(LEASE);
    assert_eq!((new.slot, new.generation), (old.slot, old.generation));
    for read in [reader.read(&*transport, &old), reader.find_and_read(&old, &owner.lease)] {
        assert!(matches!(read, Err(ReadError::Unreachable { .. } | ReadError::LeaseOver { .. })), "{read:?}");
    }
    assert_eq!(owner.leases.held(), 1);
    reader.find_and_read(&new, &owner.lease).unwrap();
    assert!(reader.has(&new));
    assert_eq!(owner.leases.held(), 0);
}

pub(crate) async fn an_owner_that_comes_back_is_met_again(way: Way) {
    let folder = folder();
    let reader = Reader::new(way);
    let mut owner = Owner::start(&folder);
    let (sealed, handle) = owner.seal(LEASE);
    let transport = reader.way(&handle, &owner.lease);
    reader.read(&*transport, &handle).unwrap();
    drop(sealed);
    // The same life of it: only its connections are lost.
    owner.listen(owner.address());
    let (_sealed, handle) = owner.seal(LEASE);
    reader.read(&*transport, &handle).unwrap();
    assert!(reader.has(&handle));
}

#[tokio::test(start_paused = true)]
async fn the_nearest_way_is_found_by_itself() {
    let folder = folder();
    let owner = Owner::start(&folder);
    let auto = KvOptions { choice: Choice::Auto, ..KvOptions::default() };
    let over = |lease: &WorkerLease| {
        let reader = Reader::like(LAYOUT, &auto);
        let (_sealed, handle) = owner.seal(LEASE);
        let transport = reader.peers.transport(&handle, Some(lease))?;
        reader.read(&*transport, &handle)?;
        Ok::<_, ReadError>(transport.name())
    };
    assert_eq!(over(&owner.lease).unwrap(), "shm");
    let elsewhere = WorkerLease { host: "another/boot".into(), ..owner.lease.clone() };
    assert_eq!(over(&elsewhere).unwrap(), "tcp");
    // On this host, but not in the same folder: in another container, perhaps.
    let apart = WorkerLease { kv_socket: "/nowhere".into(), ..owner.lease.clone() };
    assert_eq!(over(&apart).unwrap(), "tcp");
    let mute = WorkerLease { kv_tcp: None, ..apart };
    let Err(ReadError::Unreachable { transport, cause, .. }) = over(&mute) else { panic!("it was reached") };
    assert_eq!(transport, "shm", "{cause}");
}
