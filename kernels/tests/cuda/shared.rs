//! An arena's memory, mapped a second time as another process would: its bytes, its identity, and who may have it.

use super::stand_in;
use forebay_kernels::{
    Region,
    cuda::{
        Arena, DeviceError, Direction, HostSlot, Kernels, PinBudget, PinnedRegion, ShareError, SharedArena,
        SharedGranule, SharedSlot, Stream,
    },
};
use forebay_schemas::kv::{KvDtype, KvGeometry, KvLayout, TokenRange};
use std::{os::fd::OwnedFd, sync::Arc};

/// On the stand-in, a head of a slot has sixteen granules; on a GPU, slots share theirs.
const LAYOUT: KvLayout = KvLayout {
    geometry: KvGeometry { layers: 2, kv_heads: 2, head_dim: 32, dtype: KvDtype::F16 },
    slots: 3,
    positions: 1024,
};

struct Bench {
    stream: Stream,
    kernels: Kernels,
}

impl Bench {
    fn new() -> Bench {
        let device = stand_in::device();
        Bench { stream: device.stream().unwrap(), kernels: stand_in::kernels(&device) }
    }

    fn arena(&self) -> Arena {
        Arena::new(self.stream.device(), LAYOUT, 64 << 20).unwrap()
    }

    fn region(&self, salt: usize) -> PinnedRegion {
        let region = Region::create("kv", LAYOUT.region_bytes()).unwrap();
        let bytes: Vec<u8> = (0..region.len()).map(|at| (at * 31 + at / 255 + salt) as u8).collect();
        region.write(0, &bytes);
        PinnedRegion::new(self.stream.device(), Arc::new(region), PinBudget::new(usize::MAX))
    }

    /// Moves all of a slot between an arena and the same slot of a region, and waits.
    fn with_region(
        &self,
        direction: Direction,
        arena: &Arena,
        slot: u32,
        region: &PinnedRegion,
        tokens: TokenRange,
    ) {
        let host = HostSlot { region, layout: &LAYOUT, slot };
        let planes = 0..2 * LAYOUT.geometry.layers;
        self.stream.move_kv(&self.kernels, direction, (arena, slot), host, tokens, planes).unwrap();
        self.stream.synchronize().unwrap();
    }

    /// Reads a shared slot into one of an arena and from there to a region, and says whether it holds what `expected` does.
    fn reads(&self, shared: &SharedSlot, expected: &PinnedRegion, tokens: TokenRange) -> bool {
        let (arena, found) = (self.arena(), self.region(77));
        let slot = shared.slot();
        arena.grow(slot, tokens.end()).unwrap();
        let planes = 0..2 * LAYOUT.geometry.layers;
        self.stream
            .move_kv(&self.kernels, Direction::In, (&arena, slot), shared, tokens, planes.clone())
            .unwrap();
        self.with_region(Direction::Out, &arena, slot, &found, tokens);
        LAYOUT.pieces(slot, tokens, planes).all(|(at, bytes)| {
            let (mut one, mut other) = (vec![0; bytes], vec![1; bytes]);
            expected.region().read(at, &mut one);
            found.region().read(at, &mut other);
            one == other
        })
    }
}

/// Where granules are small enough for a slot to have its own.
fn on_stand_in() -> Option<Bench> {
    if stand_in::is_real(&stand_in::device()) {
        eprintln!("SKIPPED: on this GPU slots of the test's layout share their granules");
        return None;
    }
    Some(Bench::new())
}

fn mapping(arena: &Arena, most: usize) -> Arc<SharedArena> {
    let device = arena.device();
    let of = (device.uuid(), arena.shared_granule().unwrap());
    Arc::new(SharedArena::new(device, of, LAYOUT, most).unwrap())
}

/// Has the first positions of a slot mapped, and says how many descriptors that took.
fn map(
    shared: &Arc<SharedArena>,
    arena: &Arena,
    slot: u32,
    positions: u32,
) -> Result<(SharedSlot, usize), ShareError> {
    let mut fetched = 0;
    let granules = arena.shared(slot, positions).unwrap();
    let fetch = |granules: &[SharedGranule]| {
        fetched += granules.len();
        let descriptor = |granule: &SharedGranule| Ok(arena.export(*granule)?.expect("it is there"));
        granules
            .iter()
            .map(descriptor)
            .collect::<Result<Vec<OwnedFd>, DeviceError>>()
            .map_err(ShareError::from)
    };
    let slot = shared.slot((slot, positions), &granules, 5, fetch)?;
    Ok((slot, fetched))
}

#[test]
fn what_the_owner_wrote_is_read_and_what_is_mapped_stays() {
    let bench = Bench::new();
    let (arena, source) = (bench.arena(), bench.region(0));
    let tokens = TokenRange { start: 3, count: 900 };
    assert!(arena.shared(1, 1).is_none(), "nothing is there yet");
    arena.grow(1, tokens.end()).unwrap();
    bench.with_region(Direction::In, &arena, 1, &source, tokens);
    let shared = mapping(&arena, 1000);
    let (slot, first) = map(&shared, &arena, 1, tokens.end()).unwrap();
    assert!(first > 0 && bench.reads(&slot, &source, tokens));
    assert!(bench.reads(&slot, &source, TokenRange { start: 17, count: 5 }));
    let (again, second) = map(&shared, &arena, 1, tokens.end()).unwrap();
    assert_eq!(second, 0, "it is mapped already");
    drop(again);
    // What is written later is seen too: it is the same memory.
    let later = bench.region(5);
    bench.with_region(Direction::In, &arena, 1, &later, tokens);
    assert!(bench.reads(&slot, &later, tokens));
    // And when the owner is gone.
    drop(arena);
    assert!(bench.reads(&slot, &later, tokens));
}

#[test]
fn memory_that_moved_is_not_what_it_was() {
    let Some(bench) = on_stand_in() else { return };
    let device = stand_in::device();
    let source = bench.region(0);
    let all = TokenRange { start: 0, count: LAYOUT.positions };
    let arena = Arena::new(&device, LAYOUT, LAYOUT.region_bytes() / 3).unwrap();
    arena.grow(0, all.count).unwrap();
    bench.with_region(Direction::In, &arena, 0, &source, all);
    let shared = mapping(&arena, 1000);
    let (slot, _) = map(&shared, &arena, 0, all.count).unwrap();
    let before = arena.shared(0, all.count).unwrap();
    // Another slot takes the memory.
    arena.release(0);
    arena.grow(2, all.count).unwrap();
    assert!(arena.shared(0, 1).is_none());
    for granule in &before {
        assert!(arena.export(*granule).unwrap().is_none(), "{granule:?}");
    }
    assert!(arena.export(SharedGranule { at: u32::MAX, memory: 1 }).unwrap().is_none());
    // A third takes it, and the first gets it back in another order. Who still reads what was there is in the way.
    arena.release(2);
    arena.grow(1, all.count).unwrap();
    arena.release(1);
    arena.grow(0, all.count).unwrap();
    bench.with_region(Direction::In, &arena, 0, &source, all);
    assert!(
        before.iter().any(|granule| arena.shared(0, all.count).unwrap().iter().all(|now| now != granule))
    );
    let error = map(&shared, &arena, 0, all.count).unwrap_err();
    assert!(matches!(error, ShareError::InUse(_)), "{error}");
    drop(slot);
    let (slot, fetched) = map(&shared, &arena, 0, all.count).unwrap();
    assert!(fetched > 0 && bench.reads(&slot, &source, all));
}

#[test]
fn what_is_mapped_is_bounded_and_the_oldest_goes_first() {
    let Some(bench) = on_stand_in() else { return };
    let arena = bench.arena();
    let one = 200;
    (0..3).for_each(|slot| arena.grow(slot, one).unwrap());
    let of_slot = |slot| arena.shared(slot, one).unwrap().len();
    let shared = mapping(&arena, of_slot(0) + of_slot(1));
    let (first, _) = map(&shared, &arena, 0, one).unwrap();
    drop(map(&shared, &arena, 1, one).unwrap());
    drop(map(&shared, &arena, 2, one).unwrap());
    assert_eq!(shared.mapped_granules(), of_slot(0) + of_slot(1));
    assert_eq!(map(&shared, &arena, 0, one).unwrap().1, 0, "it was in use, and stayed");
    let (second, fetched) = map(&shared, &arena, 1, one).unwrap();
    assert_eq!(fetched, of_slot(1), "it was not, and made room");
    let error = map(&shared, &arena, 2, one).unwrap_err();
    assert!(matches!(error, ShareError::Full { .. }), "{error}");
    drop((first, second));
    map(&shared, &arena, 2, one).unwrap();
}

#[test]
fn granules_that_are_not_the_slots_are_refused() {
    let bench = Bench::new();
    let arena = bench.arena();
    arena.grow(0, 100).unwrap();
    let granules = arena.shared(0, 100).unwrap();
    let shared = mapping(&arena, 1000);
    let none = |_: &[SharedGranule]| Ok(Vec::new());
    let mut forged = granules.clone();
    forged[0].at += 1_000_000;
    for granules in [&forged[..], &granules[1..], &[]] {
        let error = shared.slot((0, 100), granules, 5, none).unwrap_err();
        assert!(matches!(error, ShareError::Astray), "{error}");
    }
    // Fewer descriptors than were asked for.
    let error = shared.slot((0, 100), &granules, 5, none).unwrap_err();
    assert!(matches!(error, ShareError::Astray), "{error}");
    // What is no memory of a GPU.
    let file = |granules: &[SharedGranule]| {
        Ok(granules.iter().map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect())
    };
    let error = shared.slot((0, 100), &granules, 5, file).unwrap_err();
    assert!(matches!(error, ShareError::Device(_)), "{error}");
    assert_eq!(shared.mapped_granules(), 0);
}

#[test]
fn only_a_gpu_that_is_reached_is_asked() {
    let bench = Bench::new();
    let (device, arena) = (stand_in::device(), bench.arena());
    let granule = arena.shared_granule().unwrap();
    assert!(device.reaches(&device.uuid()).unwrap());
    let error = SharedArena::new(&device, ([7; 16], granule), LAYOUT, 1).unwrap_err();
    assert!(matches!(error, ShareError::Unreachable), "{error}");
    let error = SharedArena::new(&device, (device.uuid(), granule + 1), LAYOUT, 1).unwrap_err();
    assert!(matches!(error, ShareError::Layout { .. }), "{error}");
    if let Ok(other) = forebay_kernels::cuda::Device::open(1) {
        assert_ne!(other.uuid(), device.uuid());
        assert!(stand_in::is_real(&device) || device.reaches(&other.uuid()).unwrap());
    }
}
