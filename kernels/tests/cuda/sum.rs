//! Sums of KV: the kernel against the checksum of the same bytes on the CPU.

use super::stand_in;
use forebay_kernels::{
    Checksum, Region, checksum,
    cuda::{Arena, Direction, HostSlot, PinBudget, PinnedRegion, Sums},
};
use forebay_schemas::kv::{KvDtype, KvGeometry, KvLayout, TokenRange};
use proptest::prelude::*;
use std::sync::Arc;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn kv_is_summed_as_by_the_cpu(
        // Up to pieces of several stretches. A slot has whole pages in each plane, or another test would count detours.
        (layers, kv_heads, slots, pages) in (1u32..4, 1u32..4, 1u32..3, 1u32..40),
        (slot, start, count) in (0u32..3, 0u32..10_000, 1u32..10_000),
        (planes, wide, salt) in (1u32..7, any::<bool>(), any::<u64>()),
    ) {
        let dtype = if wide { KvDtype::F32 } else { KvDtype::F16 };
        let geometry = KvGeometry { layers, kv_heads, head_dim: 8, dtype };
        let layout = KvLayout { geometry, slots, positions: pages * 256 };
        let (positions, slot, start) = (layout.positions, slot % slots, start % layout.positions);
        let tokens = TokenRange { start, count: count.min(positions - start) };
        let device = stand_in::device();
        let (stream, kernels) = (device.stream().unwrap(), stand_in::kernels(&device));
        let region = Region::create("kv", layout.region_bytes()).unwrap();
        let bytes: Vec<u8> = (1..=layout.region_bytes() as u64).map(|at| (salt.wrapping_mul(at) >> 31) as u8).collect();
        region.write(0, &bytes);
        let region = PinnedRegion::new(&device, Arc::new(region), PinBudget::new(usize::MAX));
        let arena = Arena::new(&device, layout, layout.region_bytes() + (4 << 20)).unwrap();
        arena.grow(slot, tokens.end()).unwrap();
        let host = HostSlot { region: &region, layout: &layout, slot };
        stream.move_kv(&kernels, Direction::In, (&arena, slot), host, tokens, 0..2 * layers).unwrap();
        let mut sums = Sums::new(&device, &layout).unwrap();
        // What was there before counts for nothing.
        for tokens in [TokenRange { count: 1, ..tokens }, tokens] {
            stream.sum_kv(&kernels, (&arena, slot), tokens, &mut sums).unwrap();
            let groups = (0..2 * layers).step_by(planes as usize);
            let expected: Vec<u64> = groups
                .map(|first| {
                    let mut sum = Checksum::default();
                    for (at, bytes) in layout.pieces(slot, tokens, first..(first + planes).min(2 * layers)) {
                        checksum(region.region(), at, bytes, &mut sum);
                    }
                    sum.value()
                })
                .collect();
            prop_assert_eq!(sums.of_groups(planes).unwrap(), expected);
        }
    }
}
