//! Which worker a request should go to, if any in particular: a pure decision, so that gateways that know the same decide
//! the same.
//!
//! A worker costs what it would have to prefill until the answer begins, its other prompts and this one's rest, and what it
//! holds and runs already. The cheapest one gets the request, if anybody has a part of the prompt's KV. If nobody has, the
//! shared queue serves as well: there, whoever has room takes what comes.

use forebay_schemas::ids::WorkerId;
use serde::Serialize;

/// How much each part of the cost counts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Weights {
    /// For each block that must be prefilled.
    pub prefill: f64,
    /// For each block whose KV the worker's running sequences hold.
    pub kv_load: f64,
    /// For each sequence that it runs.
    pub active: f64,
}

impl Default for Weights {
    /// To prefill a block takes longer than a step with some more KV or one more sequence, but those are in every step.
    fn default() -> Weights {
        Weights { prefill: 1.0, kv_load: 0.1, active: 2.0 }
    }
}

/// A worker that could take the request now, as far as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate<'a> {
    /// Who.
    pub worker: &'a WorkerId,
    /// How many of the prompt's first blocks it has.
    pub hit_blocks: u32,
    /// Blocks of other prompts that it has taken and not prefilled yet.
    pub queued_blocks: u32,
    /// Blocks that its running sequences hold.
    pub kv_blocks: u32,
    /// Sequences that it runs.
    pub active: u32,
    /// How many more it could run.
    pub free_slots: u32,
    /// What this gateway has just given it, and its lease does not show yet.
    pub just_routed: Given,
}

/// What a worker was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// Requests.
    pub requests: u32,
    /// Blocks of their prompts that it has to prefill.
    pub prefill_blocks: u32,
}

/// What a candidate would cost, and of what.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Choice<'a> {
    /// Who.
    pub worker: &'a WorkerId,
    /// Blocks of the prompt that it has.
    pub hit_blocks: u32,
    /// Blocks of the prompt that it would prefill.
    pub prefill_blocks: u32,
    /// Blocks of other prompts that it would prefill before.
    pub queued_blocks: u32,
    /// Blocks that its running sequences hold.
    pub kv_blocks: u32,
    /// Sequences that it runs, with those that were just given to it.
    pub active: u32,
    /// How many more it could run. With none it can't be chosen.
    pub free_slots: u32,
    /// The weighted sum. The lowest is best.
    pub cost: f64,
}

/// Why a request goes where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// This worker is the cheapest, and has a part of the prompt's KV.
    Cheapest,
    /// Nobody who has room has a part of it.
    NoOverlap,
    /// Somebody has a part of it, but this worker, without it, is cheaper.
    OthersCheaper,
    /// Nobody has room.
    NoRoom,
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision<'a> {
    /// To this worker's own queue; none: to the one that all share.
    pub worker: Option<&'a WorkerId>,
    /// Why.
    pub why: Why,
    /// Blocks of the prompt that need not be prefilled.
    pub hit_blocks: u32,
    /// All candidates, the best first.
    pub choices: Vec<Choice<'a>>,
}

/// Decides for a prompt of so many blocks, the last one perhaps not whole.
pub fn decide<'a>(prompt_blocks: u32, candidates: &[Candidate<'a>], weights: Weights) -> Decision<'a> {
    let mut choices: Vec<Choice<'a>> =
        candidates.iter().map(|candidate| weigh(prompt_blocks, candidate, weights)).collect();
    choices.sort_unstable_by(|a, b| {
        (a.free_slots == 0)
            .cmp(&(b.free_slots == 0))
            .then(a.cost.total_cmp(&b.cost))
            .then(b.hit_blocks.cmp(&a.hit_blocks))
            .then(a.worker.cmp(b.worker))
    });
    let able = || choices.iter().filter(|choice| choice.free_slots > 0);
    let (worker, why, hit_blocks) = match able().next() {
        None => (None, Why::NoRoom, 0),
        Some(best) if best.hit_blocks > 0 => (Some(best.worker), Why::Cheapest, best.hit_blocks),
        Some(best) if able().any(|choice| choice.hit_blocks > 0) => {
            (Some(best.worker), Why::OthersCheaper, 0)
        }
        Some(_) => (None, Why::NoOverlap, 0),
    };
    Decision { worker, why, hit_blocks, choices }
}

fn weigh<'a>(prompt_blocks: u32, candidate: &Candidate<'a>, weights: Weights) -> Choice<'a> {
    let hit_blocks = candidate.hit_blocks.min(prompt_blocks);
    let prefill_blocks = prompt_blocks - hit_blocks;
    let queued_blocks = candidate.queued_blocks + candidate.just_routed.prefill_blocks;
    let active = candidate.active + candidate.just_routed.requests;
    let cost = weights.prefill * (f64::from(prefill_blocks) + f64::from(queued_blocks))
        + weights.kv_load * f64::from(candidate.kv_blocks)
        + weights.active * f64::from(active);
    Choice {
        worker: candidate.worker,
        hit_blocks,
        prefill_blocks,
        queued_blocks,
        kv_blocks: candidate.kv_blocks,
        active,
        free_slots: candidate.free_slots.saturating_sub(candidate.just_routed.requests),
        cost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Name, blocks hit, KV blocks, running, free, just routed (of 10 blocks each).
    type Row = (&'static str, u32, u32, u32, u32, u32);

    fn names() -> BTreeMap<&'static str, WorkerId> {
        ["a", "b"].map(|name| (name, WorkerId::new(name).unwrap())).into()
    }

    fn candidates<'a>(names: &'a BTreeMap<&str, WorkerId>, rows: &[Row]) -> Vec<Candidate<'a>> {
        rows.iter()
            .map(|&(name, hit_blocks, kv_blocks, active, free_slots, just_routed)| Candidate {
                worker: &names[name],
                hit_blocks,
                queued_blocks: 0,
                kv_blocks,
                active,
                free_slots,
                just_routed: Given { requests: just_routed, prefill_blocks: 10 * just_routed },
            })
            .collect()
    }

    #[test]
    fn requests_go_where_they_should() {
        let names = names();
        let table: &[(&str, &[Row], Option<&str>, Why)] = &[
            ("nobody is there", &[], None, Why::NoRoom),
            ("nobody has room", &[("a", 9, 0, 4, 0, 0), ("b", 0, 0, 4, 0, 0)], None, Why::NoRoom),
            ("nobody has a part", &[("a", 0, 50, 1, 3, 0), ("b", 0, 0, 0, 4, 0)], None, Why::NoOverlap),
            ("one has a part", &[("a", 0, 0, 0, 4, 0), ("b", 50, 0, 0, 4, 0)], Some("b"), Why::Cheapest),
            ("the longer part", &[("a", 40, 0, 0, 4, 0), ("b", 60, 0, 0, 4, 0)], Some("b"), Why::Cheapest),
            (
                "a busier one has more",
                &[("a", 80, 100, 2, 2, 0), ("b", 60, 0, 0, 4, 0)],
                Some("a"),
                Why::Cheapest,
            ),
            (
                "a swamped one has little",
                &[("a", 4, 300, 3, 1, 0), ("b", 0, 0, 0, 4, 0)],
                Some("b"),
                Why::OthersCheaper,
            ),
            (
                "the one that has it is full",
                &[("a", 90, 0, 4, 0, 0), ("b", 0, 0, 0, 4, 0)],
                None,
                Why::NoOverlap,
            ),
            (
                "full by what was just routed",
                &[("a", 90, 0, 2, 2, 2), ("b", 1, 0, 0, 4, 0)],
                Some("b"),
                Why::Cheapest,
            ),
            (
                "busy by what was just routed",
                &[("a", 50, 0, 0, 4, 2), ("b", 50, 0, 0, 4, 0)],
                Some("b"),
                Why::Cheapest,
            ),
            ("all alike", &[("b", 50, 7, 1, 3, 0), ("a", 50, 7, 1, 3, 0)], Some("a"), Why::Cheapest),
            (
                "more than the prompt",
                &[("a", 500, 0, 0, 4, 0), ("b", 100, 0, 1, 4, 0)],
                Some("a"),
                Why::Cheapest,
            ),
        ];
        for (what, rows, worker, why) in table {
            let mut all = candidates(&names, rows);
            let decision = decide(100, &all, Weights::default());
            assert_eq!(decision.worker.map(WorkerId::as_str), *worker, "{what}: {decision:?}");
            assert_eq!(decision.why, *why, "{what}");
            all.reverse();
            assert_eq!(decide(100, &all, Weights::default()), decision, "{what}: whatever the order");
        }
    }

    #[test]
    fn prompts_that_wait_count() {
        let names = names();
        let mut all = candidates(&names, &[("a", 60, 0, 1, 3, 0), ("b", 0, 0, 1, 3, 0)]);
        assert_eq!(decide(100, &all, Weights::default()).worker, Some(all[0].worker));
        all[0].queued_blocks = 70;
        let decision = decide(100, &all, Weights::default());
        assert_eq!((decision.worker, decision.why), (Some(all[1].worker), Why::OthersCheaper));
        assert_eq!(decision.choices[1].queued_blocks, 70);
    }

    #[test]
    fn weights_weigh() {
        let names = names();
        let all = candidates(&names, &[("a", 60, 400, 3, 1, 0), ("b", 10, 0, 0, 4, 0)]);
        let only = |prefill, kv_load, active| {
            decide(100, &all, Weights { prefill, kv_load, active }).worker.unwrap().to_string()
        };
        assert_eq!(only(1.0, 0.0, 0.0), "a");
        assert_eq!(only(1.0, 1.0, 0.0), "b");
        assert_eq!(only(1.0, 0.0, 30.0), "b");
        let choice = &decide(100, &all, Weights { prefill: 2.0, kv_load: 0.5, active: 3.0 }).choices[1];
        assert_eq!(choice.cost, 2.0 * 40.0 + 0.5 * 400.0 + 3.0 * 3.0);
        assert_eq!((choice.prefill_blocks, choice.active, choice.free_slots), (40, 3, 1));
    }
}
