//! Handles that say what is not so. A handle comes from an event, and an event from anybody who may write to the log.

use crate::site::{HASH, LAYOUT, LEASE, Owner, Reader, Way, folder};
use forebay_schemas::kv::{KvDtype, KvGeometry, KvHandle, KvLayout, LayoutHash, TokenRange};
use forebay_workers::kv::{KvPeers, ReadError};

pub(crate) async fn a_handle_beyond_the_region_is_refused(way: Way) {
    let folder = folder();
    let (owner, reader) = (Owner::start(&folder), Reader::new(way));
    let (_sealed, handle) = owner.seal(LEASE);
    // Once before anybody is met, and once afterwards.
    for met in [false, true] {
        if met {
            let transport = reader.way(&handle, &owner.lease);
            assert_eq!(transport.generation(&handle).unwrap(), handle.generation);
        }
        for forged in beyond(&handle) {
            let read = reader.find_and_read(&forged, &owner.lease);
            let told = matches!(
                read,
                Err(ReadError::BadHandle(_) | ReadError::Refused { .. } | ReadError::Unreachable { .. })
            );
            assert!(told, "{read:?} of {forged:?}");
        }
    }
    // A transport that was found with a good handle is handed the bad ones itself.
    let transport = reader.way(&handle, &owner.lease);
    for forged in beyond(&handle) {
        let _ = transport.claim(&forged);
        let read = transport.read(&forged, 2, &reader.region, &LAYOUT, 0);
        assert!(read.is_err() || forged.layout != LAYOUT || forged.checksums.len() != 3, "{forged:?}");
        transport.release(&forged);
    }
    let (_sealed, handle) = owner.seal(LEASE);
    reader.read(&*transport, &handle).unwrap();
    assert!(reader.has(&handle));
}

fn beyond(handle: &KvHandle) -> Vec<KvHandle> {
    let forged = |change: &dyn Fn(&mut KvHandle)| {
        let mut forged = handle.clone();
        change(&mut forged);
        forged
    };
    let wide = KvLayout { slots: 1000, positions: 16, ..LAYOUT };
    let long = KvLayout { positions: 1 << 20, ..LAYOUT };
    vec![
        forged(&|handle| handle.slot = LAYOUT.slots),
        forged(&|handle| handle.slot = u32::MAX),
        forged(&|handle| handle.tokens = TokenRange { start: 8, count: 9 }),
        forged(&|handle| handle.tokens = TokenRange { start: u32::MAX, count: 2 }),
        forged(&|handle| (handle.layout, handle.slot) = (wide, 900)),
        forged(&|handle| (handle.layout, handle.tokens.start) = (long, 1 << 19)),
        forged(&|handle| handle.checksums.push(1)),
        forged(&|handle| handle.checksums.truncate(2)),
    ]
}

pub(crate) async fn a_handle_of_another_layout_is_refused(way: Way) {
    let folder = folder();
    let (owner, reader) = (Owner::start(&folder), Reader::new(way));
    let (_sealed, handle) = owner.seal(LEASE);
    let other = KvHandle { layout_hash: LayoutHash(8), ..handle.clone() };
    let read = reader.find_and_read(&other, &owner.lease);
    assert!(matches!(read, Err(ReadError::Layout { .. })), "{read:?}");
    // Reader and handle agree, but the owner knows better.
    let astray = KvPeers::new(LayoutHash(8), &way.options());
    let read = astray.transport(&other, Some(&owner.lease)).and_then(|way| reader.read(&*way, &other));
    assert!(matches!(read, Err(ReadError::Unreachable { .. })), "{read:?}");
    let geometry = KvGeometry { dtype: KvDtype::F16, head_dim: 16, ..LAYOUT.geometry };
    let same_size = KvHandle { layout: KvLayout { geometry, ..LAYOUT }, ..handle.clone() };
    let read = reader.find_and_read(&same_size, &owner.lease);
    assert!(matches!(read, Err(ReadError::BadHandle(_) | ReadError::Unreachable { .. })), "{read:?}");
    assert_eq!(owner.leases.held(), 1);
    assert_eq!(handle.layout_hash, HASH);
    reader.find_and_read(&handle, &owner.lease).unwrap();
}

pub(crate) async fn a_capability_counts_where_the_owner_serves(way: Way) {
    let folder = folder();
    let (owner, reader) = (Owner::start(&folder), Reader::new(way));
    let (_sealed, handle) = owner.seal(LEASE);
    let guessed = KvHandle { capability: !handle.capability, ..handle.clone() };
    let read = reader.find_and_read(&guessed, &owner.lease);
    if way == Way::Shm {
        // Whoever was passed the descriptors has the right.
        return read.unwrap();
    }
    assert!(matches!(read, Err(ReadError::Refused { .. })), "{read:?}");
    assert!(!reader.has(&handle));
    let transport = reader.way(&handle, &owner.lease);
    transport.claim(&handle).unwrap();
    let read = transport.read(&guessed, 0, &reader.region, &LAYOUT, 0);
    assert!(matches!(read, Err(ReadError::Refused { .. })), "{read:?}");
    transport.release(&guessed);
    assert_eq!(owner.leases.held(), 1, "what was not claimed with it is not given back with it");
    reader.read(&*transport, &handle).unwrap();
}
