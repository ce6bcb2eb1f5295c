//! What arrives: the bytes that were sealed, or an error.

use crate::site::{Interrupted, LAYOUT, LEASE, Owner, Reader, SLOT, Way, folder};
use forebay_schemas::kv::{KvDtype, KvGeometry, KvLayout, TokenRange};
use forebay_workers::kv::{ReadError, Word};
use std::sync::Mutex;

pub(crate) async fn a_slot_that_is_used_again_under_a_reader_is_noticed(way: Way) {
    let folder = folder();
    let (owner, reader) = (Owner::start(&folder), Reader::new(way));
    let (sealed, handle) = owner.seal(LEASE);
    let transport = reader.way(&handle, &owner.lease);
    let sealed = Mutex::new(Some(sealed));
    let reuse = || {
        drop(sealed.lock().unwrap().take());
        owner.region.write(LAYOUT.slot_offset(39, SLOT as usize), &[0xee; 64]);
    };
    let read = reader.read(&Interrupted::new(&*transport, reuse), &handle);
    assert!(matches!(read, Err(ReadError::LeaseOver { .. })), "{read:?}");
    // The same, with bytes that happen to be right: the lease is over all the same.
    let (again, handle) = owner.seal(LEASE);
    let again = Mutex::new(Some(again));
    let read = reader.read(&Interrupted::new(&*transport, || drop(again.lock().unwrap().take())), &handle);
    assert!(matches!(read, Err(ReadError::LeaseOver { .. })), "{read:?}");
    // The late reader's release is not one of the new lease.
    let (newer, _) = owner.seal(LEASE);
    transport.release(&handle);
    assert_eq!(owner.leases.word(SLOT), Word::Sealed(newer.generation()));
}

pub(crate) async fn a_flipped_bit_is_noticed(way: Way) {
    let folder = folder();
    let (owner, reader) = (Owner::start(&folder), Reader::new(way));
    let (_sealed, handle) = owner.seal(LEASE);
    let at = LAYOUT.slot_offset(20, SLOT as usize);
    let mut byte = [0];
    owner.region.read(at, &mut byte);
    owner.region.write(at, &[byte[0] ^ 1]);
    let read = reader.find_and_read(&handle, &owner.lease);
    assert!(matches!(read, Err(ReadError::Corrupt { group: 1, .. })), "{read:?}");
    assert_eq!(owner.leases.held(), 0, "a read that failed gives the lease back too");
}

/// Of these, a group is read over several connections, and a piece spans frames or pages in part.
pub(crate) async fn large_pieces_arrive_whole(way: Way) {
    let geometry = KvGeometry { layers: 9, kv_heads: 3, head_dim: 64, dtype: KvDtype::F32 };
    let layout = KvLayout { geometry, slots: 2, positions: 2048 };
    let folder = folder();
    let owner = Owner::like(folder.path().to_owned(), layout, 1, ([127, 0, 0, 1], 0).into());
    let reader = Reader::like(layout, &way.options());
    for tokens in [TokenRange { start: 3, count: 2000 }, TokenRange { start: 2047, count: 1 }] {
        let (_sealed, handle) = owner.seal_tokens(SLOT, tokens, LEASE);
        reader.find_and_read(&handle, &owner.lease).unwrap();
        assert!(reader.has(&handle));
    }
    // Into a region of another shape, as long as a token's KV is the same.
    let reader = Reader::like(KvLayout { slots: 1, positions: 1500, ..layout }, &way.options());
    let (_sealed, handle) = owner.seal_tokens(SLOT, TokenRange { start: 1, count: 1400 }, LEASE);
    reader.find_and_read(&handle, &owner.lease).unwrap();
    assert!(reader.has(&handle));
}

pub(crate) async fn many_read_at_once(way: Way) {
    const READS: u32 = 64;
    let layout = KvLayout { slots: READS, positions: 300, ..LAYOUT };
    let folder = folder();
    let owner = Owner::like(folder.path().to_owned(), layout, 1, ([127, 0, 0, 1], 0).into());
    let reader = Reader::like(layout, &way.options());
    let sealed: Vec<_> = (0..READS)
        .map(|slot| owner.seal_tokens(slot, TokenRange { start: slot, count: 300 - 2 * slot }, LEASE))
        .collect();
    assert_eq!(owner.leases.held(), READS);
    std::thread::scope(|scope| {
        for (_, handle) in &sealed {
            scope.spawn(|| {
                let transport = reader.way(handle, &owner.lease);
                reader.read_into(handle.slot, &*transport, handle).unwrap();
            });
        }
    });
    for (_, handle) in &sealed {
        assert!(reader.has_in(handle.slot, handle));
    }
    assert_eq!(owner.leases.held(), 0);
}
