//! Memory of a GPU: it is given back, it ends, and an arena has it where sequences are.

use super::{buffer, contents, stand_in};
use forebay_kernels::cuda::{Arena, Device, DeviceBuffer, GrowError, NoDevice};
use forebay_schemas::kv::{KvDtype, KvGeometry, KvLayout};

const GEOMETRY: KvGeometry = KvGeometry { layers: 2, kv_heads: 2, head_dim: 64, dtype: KvDtype::F16 };

#[test]
fn a_gpu_that_is_not_there_is_told() {
    let device = stand_in::device();
    let error = Device::open(1000).unwrap_err();
    assert!(matches!(error, NoDevice::NoSuchGpu { asked: 1000, .. }), "{error}");
    assert!(device.facts().capability >= 80 && device.free_bytes().unwrap() <= device.facts().bytes);
}

#[test]
fn streams_are_ordered_by_marks() {
    let device = stand_in::device();
    let (first, second) = (device.stream().unwrap(), device.stream().unwrap());
    let numbers: Vec<u32> = (0..1000).collect();
    let filled = buffer(&first, &numbers);
    second.after(&first.mark().unwrap()).unwrap();
    assert_eq!(contents(&second, &filled), numbers);
}

#[test]
fn too_much_memory_is_refused() {
    let device = stand_in::device();
    let error = DeviceBuffer::<u8>::new(&device, device.facts().bytes + 1).unwrap_err();
    assert!(error.is_out_of_memory() && error.to_string().contains("out of memory"), "{error}");
}

#[test]
fn an_arena_has_memory_where_sequences_are_and_gives_it_back() {
    let device = stand_in::device();
    let layout = KvLayout { geometry: GEOMETRY, slots: 4, positions: 8192 };
    let granule = 2 << 20;
    let arena = Arena::new(&device, layout, 8 * granule).unwrap();
    assert_eq!(arena.backed_bytes(), 0);
    arena.grow(0, 1).unwrap();
    let one = arena.backed_bytes();
    assert!(one > 0 && one <= 8 * granule);
    arena.grow(0, 1).unwrap();
    assert_eq!(arena.backed_bytes(), one);
    // As much as there is: then it is full, and another slot's memory makes room.
    let mut slots = 1;
    let full = loop {
        match arena.grow(slots, layout.positions) {
            Ok(()) => slots += 1,
            Err(error) => break error,
        }
    };
    assert!(
        matches!(full, GrowError::Full { .. }) && full.to_string().contains("KV cache is full"),
        "{full}"
    );
    assert!(slots < layout.slots);
    (0..slots).for_each(|slot| arena.release(slot));
    arena.grow(3, 1).unwrap();
}
