//! Which parts of an arena need memory: pure decisions.

use forebay_schemas::kv::KvLayout;
use std::collections::BTreeMap;

/// Positions that are backed at once, at least: asking for one more position is then mostly a comparison.
const STEP: u32 = 256;

/// What must be done before positions may be used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// Granules that lose their memory: nobody uses them.
    pub(super) taken: Vec<usize>,
    /// Granules that get memory: that which was taken, and new for the rest.
    pub(super) backed: Vec<usize>,
}

/// A slot that is to grow.
#[derive(Debug)]
pub(super) struct Plan {
    slot: u32,
    positions: u32,
    new: Vec<usize>,
    pub(super) change: Change,
}

/// More memory is needed than there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

/// Which granules of an arena have memory of their own, and which slots use them. A granule keeps its memory when it is no
/// longer used, until another needs it.
#[derive(Debug)]
pub(super) struct Backing {
    layout: KvLayout,
    granule: usize,
    most: usize,
    /// How many slots use each granule that has memory.
    users: BTreeMap<usize, u32>,
    /// Positions of each slot that are backed.
    positions: Vec<u32>,
}

impl Backing {
    /// Of granules of so many bytes, at most `most` have memory.
    pub(super) fn new(layout: KvLayout, granule: usize, most: usize) -> Backing {
        let positions = vec![0; layout.slots as usize];
        Backing { layout, granule, most, users: BTreeMap::new(), positions }
    }

    /// Granules in the whole arena.
    pub(super) fn granules(&self) -> usize {
        self.layout.region_bytes().div_ceil(self.granule)
    }

    /// Granules that have memory of their own.
    pub(super) fn backed(&self) -> usize {
        self.users.len()
    }

    /// At most `most` granules have memory from now on; those that have it keep it.
    pub(super) fn limit(&mut self, most: usize) {
        self.most = most;
    }

    /// Whether the first `positions` of a slot are backed.
    pub(super) fn is_backed(&self, slot: u32, positions: u32) -> bool {
        positions <= self.positions[slot as usize]
    }

    /// Granules that a whole slot touches, of those slots the one that touches most.
    pub(super) fn granules_of_a_slot(&self) -> usize {
        let slots = 0..self.layout.slots;
        slots.map(|slot| self.touched(slot, self.layout.positions).len()).max().unwrap_or(0)
    }

    /// What must be done before the first `positions` of a slot may be used, if anything.
    pub(super) fn plan(&self, slot: u32, positions: u32) -> Result<Option<Plan>, Full> {
        let before = self.positions[slot as usize];
        if positions <= before {
            return Ok(None);
        }
        let used = self.used();
        // In steps, if there is memory for a whole one.
        let whole = positions.next_multiple_of(STEP).min(self.layout.positions);
        let (positions, new) = [whole, positions]
            .into_iter()
            .map(|positions| (positions, self.new_granules(slot, before, positions)))
            .find(|(_, new)| {
                used + new.iter().filter(|granule| !self.is_used(**granule)).count() <= self.most
            })
            .ok_or(Full)?;
        let backed: Vec<usize> =
            new.iter().copied().filter(|granule| !self.users.contains_key(granule)).collect();
        let surplus = (self.users.len() + backed.len()).saturating_sub(self.most);
        let unused =
            self.users.iter().filter(|(granule, users)| **users == 0 && new.binary_search(granule).is_err());
        let taken = unused.map(|(granule, _)| *granule).take(surplus).collect();
        Ok(Some(Plan { slot, positions, new, change: Change { taken, backed } }))
    }

    /// What was planned is done.
    pub(super) fn done(&mut self, plan: Plan) {
        for granule in &plan.change.taken {
            self.users.remove(granule);
        }
        for granule in plan.new {
            *self.users.entry(granule).or_default() += 1;
        }
        self.positions[plan.slot as usize] = plan.positions;
    }

    /// A slot is no longer used.
    pub(super) fn release(&mut self, slot: u32) {
        let positions = std::mem::take(&mut self.positions[slot as usize]);
        for granule in self.new_granules(slot, 0, positions) {
            *self.users.get_mut(&granule).expect("what a slot uses has memory") -= 1;
        }
    }

    fn used(&self) -> usize {
        self.users.values().filter(|users| **users > 0).count()
    }

    fn is_used(&self, granule: usize) -> bool {
        self.users.get(&granule).is_some_and(|users| *users > 0)
    }

    /// Granules that the first `positions` of a slot touch, without those that the first `before` do. In order.
    fn new_granules(&self, slot: u32, before: u32, positions: u32) -> Vec<usize> {
        let old = self.touched(slot, before);
        let mut old = old.iter().peekable();
        let mut new = self.touched(slot, positions);
        new.retain(|granule| old.next_if_eq(&granule).is_none());
        new
    }

    /// Granules that the first `positions` of a slot touch, in order.
    pub(super) fn touched(&self, slot: u32, positions: u32) -> Vec<usize> {
        let layout = &self.layout;
        let tokens = forebay_schemas::kv::TokenRange { start: 0, count: positions };
        let mut touched = Vec::new();
        if positions == 0 {
            return touched;
        }
        for (at, bytes) in layout.pieces(slot, tokens, 0..2 * layout.geometry.layers) {
            let first = touched.last().map_or(0, |last| last + 1).max(at / self.granule);
            touched.extend(first..(at + bytes).div_ceil(self.granule));
        }
        touched
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::kv::{KvDtype, KvGeometry};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    impl Backing {
        fn grow(&mut self, slot: u32, positions: u32) -> Result<Change, Full> {
            let Some(plan) = self.plan(slot, positions)? else { return Ok(Change::default()) };
            let change = plan.change.clone();
            self.done(plan);
            Ok(change)
        }
    }

    fn layout(slots: u32, positions: u32) -> KvLayout {
        let geometry = KvGeometry { layers: 2, kv_heads: 2, head_dim: 8, dtype: KvDtype::F16 };
        KvLayout { geometry, slots, positions }
    }

    #[test]
    fn a_slot_takes_memory_as_it_grows() {
        // A head of a slot has 16 KiB: four granules of 256 positions each, in each of eight heads.
        let mut backing = Backing::new(layout(2, 1024), 4096, 1000);
        assert_eq!(backing.granules(), 64);
        let change = backing.grow(1, 1).unwrap();
        assert_eq!((change.backed.len(), change.taken.len(), backing.backed()), (8, 0, 8));
        assert_eq!(change.backed[..3], [8, 12, 24]);
        assert_eq!(backing.grow(1, 256).unwrap(), Change::default());
        assert_eq!(backing.grow(1, 257).unwrap().backed.len(), 8);
        backing.release(1);
        assert_eq!(backing.backed(), 16);
        assert_eq!(backing.grow(1, 512).unwrap(), Change::default(), "it was kept");
    }

    #[test]
    fn what_nobody_uses_is_taken_and_then_it_is_full() {
        let mut backing = Backing::new(layout(3, 1024), 4096, 16);
        backing.grow(0, 256).unwrap();
        backing.grow(1, 256).unwrap();
        assert_eq!(backing.grow(2, 1), Err(Full));
        assert_eq!(backing.grow(0, 257), Err(Full));
        backing.release(0);
        let change = backing.grow(2, 1).unwrap();
        assert_eq!((change.backed.len(), change.taken.len(), backing.backed()), (8, 8, 16));
    }

    proptest! {
        /// Against sets of granules that are counted anew each time.
        #[test]
        fn every_position_in_use_has_memory_and_no_more_is_used_than_there_is(
            granule in prop_oneof![Just(512usize), Just(4096), Just(40_000)],
            most in 0usize..60,
            positions in 1u32..900,
            calls in prop::collection::vec((0u32..4, 0u32..1000), 1..40),
        ) {
            let layout = layout(4, positions);
            let mut backing = Backing::new(layout, granule, most);
            let (mut has, mut wanted) = (BTreeSet::new(), [0u32; 4]);
            for (slot, grow) in calls {
                if grow == 0 {
                    backing.release(slot);
                    wanted[slot as usize] = 0;
                    continue;
                }
                let to = grow.min(positions);
                match backing.grow(slot, to) {
                    Ok(change) => {
                        wanted[slot as usize] = wanted[slot as usize].max(to);
                        change.taken.iter().for_each(|granule| assert!(has.remove(granule)));
                        change.backed.iter().for_each(|granule| assert!(has.insert(*granule)));
                    }
                    Err(Full) => {
                        let mut all: BTreeSet<usize> = backing.touched(slot, to).into_iter().collect();
                        for (slot, positions) in (0..).zip(&backing.positions) {
                            all.extend(backing.touched(slot, *positions));
                        }
                        prop_assert!(all.len() > most, "{} of {most}", all.len());
                    }
                }
                prop_assert!(has.len() <= most);
                prop_assert_eq!(has.len(), backing.backed());
                for (slot, positions) in (0..).zip(wanted) {
                    let tokens = forebay_schemas::kv::TokenRange { start: 0, count: positions };
                    for (at, bytes) in layout.pieces(slot, tokens, 0..4) {
                        prop_assert!(bytes == 0 || (at / granule..(at + bytes).div_ceil(granule)).all(|g| has.contains(&g)));
                    }
                }
            }
        }
    }
}
