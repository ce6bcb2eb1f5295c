//! Which tokens run next: pure decisions over the sequences of one engine.
//!
//! Continuous batching: between any two steps sequences join and leave. A step is chunks of prompts, those that have
//! waited longest first, then one token of every sequence that decodes. While some decode, a step has a budget of tokens,
//! so that prompts don't take their pace; the fewer they are, the more of it is the prompts'.

use crate::{engine::Draw, logits::LogitsProcessors};
use forebay_schemas::{format::FormatError, sampling::Sampling};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

/// What is to be run for one request, on one slot.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// The slot it holds.
    pub slot: u32,
    /// Prompt and, after a failover, what was generated before. What is beyond `filled` is run.
    pub tokens: Vec<u32>,
    /// Positions of the slot that hold KV already.
    pub filled: u32,
    /// How tokens are drawn.
    pub sampling: Arc<Sampling>,
    /// Index within the output of the next token.
    pub next_index: u32,
    /// How many more tokens are drawn; 1 for a prefill that another worker continues.
    pub remaining: u32,
    /// Tokens that end the sequence; none if it goes on past them.
    pub eos: Arc<[u32]>,
    /// What changes logits before tokens are drawn.
    pub processors: LogitsProcessors,
}

impl Sequence {
    /// How the next token is drawn.
    pub fn draw(&self) -> Draw<'_> {
        self.processors.draw(&self.sampling, self.next_index)
    }

    /// Tokens that still have to be run before the next can be drawn.
    fn behind(&self) -> u32 {
        self.tokens.len() as u32 - self.filled
    }

    /// Tokens of the next chunk, of at most `most`. A prefill's reader copies chunk after chunk: the last one of several is
    /// halved, so that less is left to copy when it is done.
    fn next_chunk(&self, most: u32) -> u32 {
        let behind = self.behind();
        let ends_a_prefill = self.remaining == 1 && self.filled > 0 && behind <= most;
        if ends_a_prefill && behind > most / 2 { behind.div_ceil(2) } else { behind.min(most) }
    }

    /// More than one: their logits but the last are of no use, and they run as a chunk.
    fn is_prefilling(&self) -> bool {
        self.behind() > 1 || self.filled == 0
    }
}

/// A chunk of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Whose.
    pub slot: u32,
    /// First position.
    pub start: u32,
    /// How many tokens.
    pub count: u32,
    /// Whether it ends the prompt, so that a token is drawn.
    pub last: bool,
}

/// How many tokens are run at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Of prompts, while nothing decodes.
    pub chunk_tokens: u32,
    /// Of prompts and of sequences that decode together, while some do.
    pub step_tokens: u32,
}

/// One step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Run these chunks first, of one prompt each.
    pub chunks: Vec<Chunk>,
    /// Then decode one token for each of these slots, in order.
    pub rows: Vec<u32>,
}

/// All sequences of one engine.
#[derive(Debug)]
pub struct Scheduler {
    budget: Budget,
    sequences: BTreeMap<u32, Sequence>,
    /// Slots whose prompts are not done, oldest first.
    prompts: VecDeque<u32>,
    /// All slots with a sequence, oldest first.
    arrivals: Vec<u32>,
    /// For every slot, where a scratch write does no harm.
    parked: Vec<u32>,
}

impl Scheduler {
    /// A scheduler for that many slots.
    pub fn new(slots: u32, budget: Budget) -> Scheduler {
        Scheduler {
            budget,
            sequences: BTreeMap::new(),
            prompts: VecDeque::new(),
            arrivals: Vec::new(),
            parked: vec![0; slots as usize],
        }
    }

    /// Another budget, from the next step on.
    pub fn set_budget(&mut self, budget: Budget) {
        self.budget = budget;
    }

    /// Whether there is nothing to run.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Tokens whose KV all sequences hold.
    pub fn tokens(&self) -> u32 {
        self.sequences.values().map(|sequence| sequence.filled).sum()
    }

    /// Tokens of prompts that are still to be run.
    pub fn prompt_tokens(&self) -> u32 {
        self.prompts.iter().map(|slot| self.sequences[slot].behind()).sum()
    }

    /// A sequence joins.
    pub fn add(&mut self, sequence: Sequence) {
        let slot = sequence.slot;
        self.parked[slot as usize] = sequence.filled;
        if sequence.is_prefilling() {
            self.prompts.push_back(slot);
        }
        self.arrivals.retain(|other| *other != slot);
        self.arrivals.push(slot);
        self.sequences.insert(slot, sequence);
    }

    /// A sequence leaves. Its slot's KV stays as it is; `park` says where a scratch write may go from now on.
    pub fn remove(&mut self, slot: u32) -> Option<Sequence> {
        self.prompts.retain(|waiting| *waiting != slot);
        self.arrivals.retain(|other| *other != slot);
        self.sequences.remove(&slot)
    }

    /// Of the sequences that hold KV and can give it back, and the one in `slot`, the one that came last.
    pub fn latest(&self, slot: u32, can_give: impl Fn(u32) -> bool) -> u32 {
        let holds = |of: &&u32| **of == slot || (self.sequences[*of].filled > 0 && can_give(**of));
        self.arrivals.iter().rfind(holds).copied().unwrap_or(slot)
    }

    /// A sequence has lost its KV: it is run from its beginning, before prompts that came later.
    pub fn preempt(&mut self, slot: u32) {
        let Some(sequence) = self.sequences.get_mut(&slot) else { return };
        sequence.filled = 0;
        self.parked[slot as usize] = 0;
        if !self.prompts.contains(&slot) {
            let age = |slot: &u32| self.arrivals.iter().position(|other| other == slot);
            let place = self.prompts.iter().position(|other| age(other) > age(&slot));
            self.prompts.insert(place.unwrap_or(self.prompts.len()), slot);
        }
    }

    /// Where a sequence's next token goes, if it decodes: its prompt is done.
    pub fn decodes(&self, slot: u32) -> Option<u32> {
        let sequence = self.sequences.get(&slot).filter(|_| !self.prompts.contains(&slot))?;
        Some(sequence.filled)
    }

    /// A slot that runs nothing here holds, or is about to be filled with, that many positions.
    pub fn park(&mut self, slot: u32, positions: u32) {
        self.parked[slot as usize] = positions;
    }

    /// Where scratch writes go, for every slot.
    pub fn parked(&self) -> &[u32] {
        &self.parked
    }

    /// The sequence in a slot.
    pub fn sequence(&self, slot: u32) -> Option<&Sequence> {
        self.sequences.get(&slot)
    }

    /// What to run next. Sequences whose reader is behind (`can_take` false) are left out, so that a stuck
    /// reader holds up nobody else.
    pub fn plan(&self, can_take: impl Fn(u32) -> bool) -> Step {
        // The last token of a prompt is a chunk like those before it.
        let decoding = self.sequences.values().filter(|sequence| !self.prompts.contains(&sequence.slot));
        let rows: Vec<u32> = decoding.map(|sequence| sequence.slot).filter(|slot| can_take(*slot)).collect();
        let Budget { chunk_tokens, step_tokens } = self.budget;
        // However many decode, a prompt gets on.
        let mut left = match rows.len() as u32 {
            0 => chunk_tokens.max(1),
            rows => step_tokens.saturating_sub(rows).clamp(1, chunk_tokens.max(1)),
        };
        let mut chunks = Vec::new();
        for slot in self.prompts.iter().copied().filter(|slot| can_take(*slot)) {
            let sequence = &self.sequences[&slot];
            let count = sequence.next_chunk(left);
            chunks.push(Chunk { slot, start: sequence.filled, count, last: count == sequence.behind() });
            left -= count;
            if left == 0 {
                break;
            }
        }
        Step { chunks, rows }
    }

    /// Notes that a chunk was run.
    pub fn filled(&mut self, chunk: &Chunk) {
        if let Some(sequence) = self.sequences.get_mut(&chunk.slot) {
            sequence.filled += chunk.count;
            self.parked[chunk.slot as usize] = sequence.filled;
        }
        if chunk.last {
            self.prompts.retain(|waiting| *waiting != chunk.slot);
        }
    }

    /// Notes that a sequence's one waiting token was run.
    pub fn stepped(&mut self, slot: u32) {
        if let Some(sequence) = self.sequences.get_mut(&slot) {
            sequence.filled += 1;
            self.parked[slot as usize] = sequence.filled;
        }
    }

    /// Notes a drawn token. Returns whether the sequence goes on; one that does not has left. Fails if the token is not of its
    /// format.
    pub fn drawn(&mut self, slot: u32, token: u32) -> Result<bool, FormatError> {
        let Some(sequence) = self.sequences.get_mut(&slot) else { return Ok(false) };
        sequence.tokens.push(token);
        sequence.next_index += 1;
        sequence.remaining = sequence.remaining.saturating_sub(1);
        let goes_on = sequence.remaining > 0 && !sequence.eos.contains(&token);
        if goes_on {
            sequence.processors.push(token)?;
        } else {
            self.remove(slot);
        }
        Ok(goes_on)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(slot: u32, tokens: u32, filled: u32, remaining: u32) -> Sequence {
        Sequence {
            slot,
            tokens: (0..tokens).collect(),
            filled,
            sampling: Arc::new(Sampling::GREEDY),
            next_index: 0,
            remaining,
            eos: Arc::new([99]),
            processors: LogitsProcessors::default(),
        }
    }

    fn scheduler(slots: u32) -> Scheduler {
        Scheduler::new(slots, Budget { chunk_tokens: 8, step_tokens: 6 })
    }

    fn chunk(slot: u32, start: u32, count: u32, last: bool) -> Chunk {
        Chunk { slot, start, count, last }
    }

    #[test]
    fn the_latest_is_preempted_and_runs_again_before_later_prompts() {
        let mut scheduler = scheduler(4);
        scheduler.add(sequence(3, 5, 4, 3));
        scheduler.add(sequence(1, 9, 8, 3));
        scheduler.add(sequence(0, 20, 0, 3));
        let latest = |scheduler: &Scheduler, slot| scheduler.latest(slot, |_| true);
        assert_eq!((latest(&scheduler, 3), latest(&scheduler, 0)), (1, 0), "who holds nothing gives nothing");
        assert_eq!(scheduler.latest(3, |slot| slot != 1), 3, "nor does one that can't");
        scheduler.preempt(1);
        assert_eq!((scheduler.decodes(1), scheduler.decodes(3), scheduler.parked()[1]), (None, Some(4), 0));
        let step = scheduler.plan(|_| true);
        assert_eq!(step, Step { chunks: vec![chunk(1, 0, 5, false)], rows: vec![3] });
        assert_eq!(latest(&scheduler, 3), 3, "a sequence that was preempted holds nothing");
    }

    #[test]
    fn prompts_run_in_chunks_between_decode_steps() {
        let mut scheduler = scheduler(4);
        scheduler.add(sequence(2, 5, 4, 3));
        scheduler.add(sequence(0, 20, 0, 3));
        let step = scheduler.plan(|_| true);
        // One token of the budget is the other sequence's.
        assert_eq!(step, Step { chunks: vec![chunk(0, 0, 5, false)], rows: vec![2] });
        scheduler.filled(&step.chunks[0]);
        scheduler.stepped(2);
        assert!(scheduler.drawn(2, 7).unwrap());
        assert_eq!(scheduler.parked(), [5, 0, 5, 0]);
        scheduler.remove(2);
        for (start, count, last) in [(5, 8, false), (13, 7, true)] {
            let step = scheduler.plan(|_| true);
            assert_eq!(step, Step { chunks: vec![chunk(0, start, count, last)], rows: vec![] });
            scheduler.filled(&step.chunks[0]);
        }
        assert!(scheduler.drawn(0, 1).unwrap());
        assert_eq!(scheduler.plan(|_| true), Step { chunks: vec![], rows: vec![0] });
    }

    #[test]
    fn the_last_token_of_a_prompt_runs_once() {
        let mut scheduler = scheduler(1);
        scheduler.add(sequence(0, 9, 0, 3));
        let step = scheduler.plan(|_| true);
        scheduler.filled(&step.chunks[0]);
        let step = scheduler.plan(|_| true);
        assert_eq!(step, Step { chunks: vec![chunk(0, 8, 1, true)], rows: vec![] });
    }

    #[test]
    fn the_end_of_a_prefill_is_halved() {
        let mut scheduler = scheduler(1);
        scheduler.add(sequence(0, 16, 0, 1));
        let mut counts = Vec::new();
        while let Some(chunk) = scheduler.plan(|_| true).chunks.first() {
            counts.push(chunk.count);
            scheduler.filled(chunk);
            if chunk.last {
                break;
            }
        }
        assert_eq!(counts, [8, 4, 4]);
    }

    #[test]
    fn short_prompts_share_a_step() {
        let mut scheduler = scheduler(4);
        scheduler.add(sequence(3, 3, 0, 1));
        scheduler.add(sequence(0, 2, 0, 1));
        scheduler.add(sequence(1, 9, 0, 1));
        let step = scheduler.plan(|_| true);
        assert_eq!(step.chunks, [chunk(3, 0, 3, true), chunk(0, 0, 2, true), chunk(1, 0, 3, false)]);
    }

    #[test]
    fn many_that_decode_do_not_starve_a_prompt() {
        let mut scheduler = Scheduler::new(9, Budget { chunk_tokens: 8, step_tokens: 6 });
        (0..8).for_each(|slot| scheduler.add(sequence(slot, 3, 2, 9)));
        scheduler.add(sequence(8, 30, 0, 1));
        let step = scheduler.plan(|_| true);
        assert_eq!((step.chunks, step.rows.len()), (vec![chunk(8, 0, 1, false)], 8));
        scheduler.set_budget(Budget { chunk_tokens: 8, step_tokens: 100 });
        assert_eq!(scheduler.plan(|_| true).chunks, [chunk(8, 0, 8, false)]);
    }

    #[test]
    fn a_whole_prompt_of_one_token_is_a_chunk() {
        let mut scheduler = scheduler(1);
        scheduler.add(sequence(0, 1, 0, 1));
        assert_eq!(scheduler.plan(|_| true).chunks, [chunk(0, 0, 1, true)]);
    }

    #[test]
    fn sequences_end_by_count_and_by_token() {
        let mut scheduler = scheduler(2);
        scheduler.add(sequence(0, 3, 2, 1));
        scheduler.add(sequence(1, 3, 2, 9));
        assert!(!scheduler.drawn(0, 5).unwrap());
        assert!(scheduler.drawn(1, 5).unwrap());
        assert!(!scheduler.drawn(1, 99).unwrap());
        assert!(scheduler.is_idle());
    }

    #[test]
    fn a_stuck_reader_holds_up_nobody_else() {
        let mut scheduler = scheduler(3);
        scheduler.add(sequence(0, 3, 2, 9));
        scheduler.add(sequence(1, 30, 0, 9));
        scheduler.add(sequence(2, 30, 0, 9));
        let step = scheduler.plan(|slot| slot == 2);
        assert!(step.rows.is_empty());
        assert_eq!(step.chunks, [chunk(2, 0, 8, false)]);
    }
}
