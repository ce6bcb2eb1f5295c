//! KV between an arena and a region, both ways, by copy engines and by the kernel.

use super::stand_in;
use forebay_kernels::{
    Region,
    cuda::{Arena, Direction, HostSlot, PinBudget, PinnedRegion},
};
use forebay_schemas::kv::{KvDtype, KvGeometry, KvLayout, TokenRange};
use proptest::prelude::*;
use std::sync::Arc;

/// A region whose bytes tell where they are.
fn region(layout: &KvLayout, salt: usize) -> Arc<Region> {
    let region = Region::create("kv", layout.region_bytes()).unwrap();
    let bytes: Vec<u8> = (0..layout.region_bytes()).map(|at| (at * 31 + at / 255 + salt) as u8).collect();
    region.write(0, &bytes);
    Arc::new(region)
}

fn bytes_of(region: &Region) -> Vec<u8> {
    let mut bytes = vec![0; region.len()];
    region.read(0, &mut bytes);
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn what_goes_in_comes_out_and_nothing_else_is_written(
        (layers, kv_heads, slots, pages) in (1u32..4, 1u32..4, 1u32..3, 1u32..40),
        (slot, other, start, count) in (0u32..3, 0u32..3, 0u32..20_000, 1u32..20_000),
        (first_plane, planes) in (0u32..8, 1u32..8),
        (f16, pinned) in any::<(bool, bool)>(),
    ) {
        // A slot has whole pages in each plane.
        let dtype = if f16 { KvDtype::F16 } else { KvDtype::F32 };
        let geometry = KvGeometry { layers, kv_heads, head_dim: 8, dtype };
        let layout = KvLayout { geometry, slots: slots + 1, positions: pages * 256 };
        let of_arena = KvLayout { geometry, slots, positions: pages * 256 + 16 };
        let (slot, other, start) = (slot % slots, other % (slots + 1), start % layout.positions);
        let tokens = TokenRange { start, count: count.min(layout.positions - start) };
        let planes = first_plane % (layers * 2)..(first_plane % (layers * 2) + planes).min(layers * 2);

        let device = stand_in::device();
        let (stream, kernels) = (device.stream().unwrap(), stand_in::kernels(&device));
        let arena = Arena::new(&device, of_arena, of_arena.region_bytes() + (4 << 20)).unwrap();
        arena.grow(slot, tokens.end()).unwrap();
        let budget = if pinned { usize::MAX } else { 0 };
        let (source, target) = (region(&layout, 0), region(&layout, 7));
        let (expected, mut wanted) = (bytes_of(&source), bytes_of(&target));
        let [source, target] = [source, target].map(|region| PinnedRegion::new(&device, region, PinBudget::new(budget)));
        let host = |region, slot| HostSlot { region, layout: &layout, slot };
        let detours = stand_in::counts().map(|counts| counts[3]);
        stream.move_kv(&kernels, Direction::In, (&arena, slot), host(&source, other), tokens, planes.clone()).unwrap();
        stream
            .move_kv(&kernels, Direction::Out, (&arena, slot), host(&target, (other + 1) % (slots + 1)), tokens, planes.clone())
            .unwrap();
        stream.synchronize().unwrap();
        let from = layout.pieces(other, tokens, planes.clone());
        for ((from, bytes), (into, _)) in from.zip(layout.pieces((other + 1) % (slots + 1), tokens, planes)) {
            wanted[into..into + bytes].copy_from_slice(&expected[from..from + bytes]);
        }
        prop_assert!(bytes_of(target.region()) == wanted, "the target holds what was moved, and the rest as before");
        prop_assert!(bytes_of(source.region()) == expected);
        prop_assert_eq!(source.pinned_bytes() > 0, pinned);
        if let (true, Some(before), Some(after)) = (pinned, detours, stand_in::counts()) {
            prop_assert_eq!(after[3], before, "no copy of pinned memory takes a detour");
        }
    }
}
