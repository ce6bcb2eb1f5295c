//! How long sealed KV can be read, and by whom it is given back.

use crate::site::{LEASE, Owner, Reader, SLOT, Way, folder};
use forebay_workers::kv::{ReadError, Word};
use std::time::Duration;

pub(crate) async fn what_was_sealed_is_read_once_and_given_back(way: Way) {
    let folder = folder();
    let (owner, reader) = (Owner::start(&folder), Reader::new(way));
    let (sealed, handle) = owner.seal(LEASE);
    assert_eq!(owner.leases.held(), 1);
    let transport = reader.way(&handle, &owner.lease);
    assert_eq!(transport.name(), way.name());
    reader.read(&*transport, &handle).unwrap();
    assert!(reader.has(&handle));
    assert_eq!(owner.leases.held(), 0);
    assert!(sealed.over().await, "it was released, and its time did not run out");
    // Once more is too late.
    assert!(matches!(reader.read(&*transport, &handle), Err(ReadError::LeaseOver { .. })));
    drop(sealed);
    assert_eq!(owner.leases.word(SLOT), Word::Open(handle.generation + 1));
}

pub(crate) async fn a_second_release_gives_back_nothing_of_anybody_else(way: Way) {
    let folder = folder();
    let (owner, reader) = (Owner::start(&folder), Reader::new(way));
    let (sealed, handle) = owner.seal(LEASE);
    let transport = reader.way(&handle, &owner.lease);
    reader.read(&*transport, &handle).unwrap();
    transport.release(&handle);
    assert_eq!(owner.leases.word(SLOT), Word::Released(handle.generation));
    drop(sealed);
    let (newer, next) = owner.seal(LEASE);
    transport.release(&handle);
    assert_eq!(owner.leases.word(SLOT), Word::Sealed(newer.generation()));
    transport.claim(&next).unwrap();
    transport.release(&handle);
    assert_eq!(owner.leases.word(SLOT), Word::Claimed(newer.generation()));
}

pub(crate) async fn a_lease_lasts_as_long_as_it_says(way: Way) {
    let folder = folder();
    let (owner, reader) = (Owner::start(&folder), Reader::new(way));
    let (mut sealed, handle) = owner.seal(LEASE);
    assert_eq!(handle.lease_remaining_ms, LEASE.as_millis() as u32);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(sealed.remaining(), Duration::from_secs(6));
    sealed.renew(LEASE);
    assert_eq!(sealed.remaining(), LEASE);
    // Beyond what the first promise was.
    tokio::time::sleep(Duration::from_secs(9)).await;
    let transport = reader.way(&handle, &owner.lease);
    transport.claim(&handle).unwrap();
    transport.release(&handle);
    let begun = tokio::time::Instant::now();
    assert!(sealed.over().await);
    let (sealed, _) = owner.seal(LEASE);
    assert!(!sealed.over().await);
    assert!(begun.elapsed() >= LEASE);
}

pub(crate) async fn a_lease_that_is_over_is_not_read(way: Way) {
    let folder = folder();
    let (owner, reader) = (Owner::start(&folder), Reader::new(way));
    let (sealed, handle) = owner.seal(LEASE);
    assert!(!sealed.over().await);
    let read = reader.find_and_read(&handle, &owner.lease);
    assert!(matches!(read, Err(ReadError::LeaseOver { .. })), "{read:?}");
    assert!(!reader.has(&handle));
    assert_eq!(owner.leases.word(SLOT), Word::Open(handle.generation + 1));
}

pub(crate) async fn a_handle_of_an_older_generation_claims_nothing(way: Way) {
    let folder = folder();
    let (owner, reader) = (Owner::start(&folder), Reader::new(way));
    let (older, handle) = owner.seal(LEASE);
    drop(older);
    let (newer, _) = owner.seal(LEASE);
    let read = reader.find_and_read(&handle, &owner.lease);
    let Err(ReadError::LeaseOver { expected, found, slot, .. }) = read else { panic!("{read:?}") };
    assert_eq!((expected, found, slot), (handle.generation, newer.generation(), SLOT));
    assert_eq!(owner.leases.word(SLOT), Word::Sealed(newer.generation()));
}

pub(crate) async fn a_reader_that_dies_holds_nothing_for_ever_and_another_may_read(way: Way) {
    let folder = folder();
    let (owner, dead, other) = (Owner::start(&folder), Reader::new(way), Reader::new(way));
    let (sealed, handle) = owner.seal(LEASE);
    dead.way(&handle, &owner.lease).claim(&handle).unwrap();
    let begun = tokio::time::Instant::now();
    assert_eq!(owner.leases.held(), 1);
    // The worker that took over from the dead one has the same handle.
    let transport = other.way(&handle, &owner.lease);
    transport.claim(&handle).unwrap();
    assert!(!sealed.over().await, "nobody released it");
    let waited = begun.elapsed();
    assert!(waited >= LEASE && waited < LEASE + Duration::from_secs(6), "{waited:?}");
    drop(sealed);
    assert_eq!(owner.leases.held(), 0);
    assert!(matches!(other.read(&*transport, &handle), Err(ReadError::LeaseOver { .. })));
    assert_eq!(owner.leases.word(SLOT), Word::Open(handle.generation + 1));
}
