use super::*;

fn worker(name: &str) -> WorkerId {
    WorkerId::new(name).unwrap()
}

fn blocks(range: std::ops::Range<u128>) -> Vec<BlockHash> {
    range.map(|index| BlockHash::from_bytes((index * 0x9e37_79b9_7f4a_7c15).to_be_bytes())).collect()
}

fn event(name: &str, number: u64, change: CacheChange) -> CacheEvent {
    CacheEvent { worker: worker(name), incarnation: 5, number, change }
}

fn stored(name: &str, number: u64, range: std::ops::Range<u128>) -> CacheEvent {
    event(name, number, CacheChange::Stored { blocks: blocks(range) })
}

fn removed(name: &str, number: u64, range: std::ops::Range<u128>) -> CacheEvent {
    event(name, number, CacheChange::Removed { blocks: blocks(range) })
}

fn snapshot(name: &str, number: u64, (part, parts): (u32, u32), range: std::ops::Range<u128>) -> CacheEvent {
    event(name, number, CacheChange::Snapshot { blocks: blocks(range), part, parts })
}

fn overlap(index: &Index, range: std::ops::Range<u128>) -> Vec<(String, u32)> {
    let found = index.overlap(&blocks(range));
    let mut found: Vec<_> = found.into_iter().map(|(name, blocks)| (name.to_string(), blocks)).collect();
    found.sort();
    found
}

fn named(expected: &[(&str, u32)]) -> Vec<(String, u32)> {
    expected.iter().map(|(name, blocks)| ((*name).to_owned(), *blocks)).collect()
}

#[test]
fn only_the_first_blocks_without_a_hole_count() {
    let mut index = Index::default();
    for event in [stored("a", 0, 0..10), stored("b", 0, 0..4), stored("b", 1, 5..10), stored("c", 0, 1..10)] {
        assert!(index.apply(&event));
    }
    assert_eq!(overlap(&index, 0..10), named(&[("a", 10), ("b", 4)]));
    assert_eq!(overlap(&index, 0..3), named(&[("a", 3), ("b", 3)]));
    assert_eq!(overlap(&index, 0..20), named(&[("a", 10), ("b", 4)]));
    assert_eq!(overlap(&index, 20..30), named(&[]));
    assert_eq!(overlap(&index, 0..0), named(&[]));
    assert!(index.apply(&removed("a", 1, 2..3)));
    assert_eq!(overlap(&index, 0..10), named(&[("a", 2), ("b", 4)]));
    assert_eq!(index.held(), 9 + 9 + 9);
}

#[test]
fn after_a_gap_a_worker_has_nothing_until_it_tells_all() {
    let mut index = Index::default();
    assert!(index.apply(&snapshot("a", 0, (0, 1), 0..5)));
    assert!(index.apply(&stored("b", 0, 0..5)));
    assert!(!index.apply(&stored("a", 2, 5..10)), "1 is missing");
    assert_eq!(overlap(&index, 0..10), named(&[("b", 5)]));
    assert!(!index.apply(&stored("a", 3, 5..10)));
    assert!(!index.apply(&snapshot("a", 4, (1, 2), 0..5)), "not its first part");
    assert_eq!(index.workers().map(|(_, held)| held).collect::<Vec<_>>(), [None, Some(5)]);
    assert!(index.apply(&snapshot("a", 7, (0, 2), 0..2)));
    assert!(index.apply(&snapshot("a", 8, (1, 2), 2..6)));
    assert!(index.apply(&stored("a", 9, 6..7)));
    assert_eq!(overlap(&index, 0..10), named(&[("a", 7), ("b", 5)]));
}

#[test]
fn what_was_read_before_and_earlier_lives_change_nothing() {
    let mut index = Index::default();
    index.apply(&stored("a", 0, 0..5));
    index.apply(&removed("a", 1, 0..5));
    assert!(index.apply(&stored("a", 0, 0..5)));
    let old = CacheEvent { incarnation: 4, ..stored("a", 2, 0..5) };
    assert!(index.apply(&old));
    assert_eq!(index.held(), 0);
    let new = CacheEvent { incarnation: 6, ..snapshot("a", 0, (0, 1), 0..3) };
    assert!(index.apply(&new));
    assert!(index.apply(&stored("a", 2, 3..5)), "the earlier life is over");
    assert_eq!(overlap(&index, 0..5), named(&[("a", 3)]));
}

#[test]
fn a_snapshot_replaces_all_and_a_worker_that_goes_leaves_nothing() {
    let mut index = Index::default();
    for round in 0..50 {
        index.apply(&snapshot("a", round * 3, (0, 1), 0..100));
        index.apply(&stored("a", round * 3 + 1, 100..200));
        index.apply(&removed("a", round * 3 + 2, 0..150));
    }
    index.apply(&stored("b", 0, 150..160));
    assert_eq!(index.held(), 60);
    index.remove(&worker("a"));
    assert_eq!((index.held(), index.blocks.len()), (10, 10));
    // Its id serves the next one.
    index.apply(&stored("c", 0, 0..1));
    assert_eq!(index.names.len(), 2);
    assert_eq!(overlap(&index, 0..1), named(&[("c", 1)]));
}

#[test]
fn what_is_kept_of_a_busy_worker_stays_bounded() {
    let mut index = Index::default();
    for round in 0..100 {
        let first = round * 100;
        index.apply(&stored("a", round as u64 * 2, first..first + 100));
        index.apply(&removed("a", round as u64 * 2 + 1, first..first + 100));
    }
    assert_eq!((index.held(), index.blocks.len()), (0, 0));
    assert!(index.workers[&worker("a")].told.len() <= 1124);
}
