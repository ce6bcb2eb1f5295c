//! Which tokens run next: pure decisions over the sequences of one engine.
//!
//! Continuous batching: between any two steps sequences join and leave. A step is at most one chunk of one
//! prompt (the one that has waited longest), then one token of every sequence that decodes.

use forebay_schemas::sampling::Sampling;
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
}

impl Sequence {
    /// Tokens that still have to be run before the next can be drawn.
    fn behind(&self) -> u32 {
        self.tokens.len() as u32 - self.filled
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

/// One step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Run this chunk first, if any.
    pub chunk: Option<Chunk>,
    /// Then decode one token for each of these slots, in order.
    pub rows: Vec<u32>,
}

/// All sequences of one engine.
#[derive(Debug)]
pub struct Scheduler {
    chunk_tokens: u32,
    sequences: BTreeMap<u32, Sequence>,
    /// Slots whose prompts are not done, oldest first.
    prompts: VecDeque<u32>,
    /// For every slot, where a scratch write does no harm.
    parked: Vec<u32>,
}

impl Scheduler {
    /// A scheduler for that many slots, which cuts prompts into chunks of at most `chunk_tokens`.
    pub fn new(slots: u32, chunk_tokens: u32) -> Scheduler {
        Scheduler {
            chunk_tokens: chunk_tokens.max(1),
            sequences: BTreeMap::new(),
            prompts: VecDeque::new(),
            parked: vec![0; slots as usize],
        }
    }

    /// Whether there is nothing to run.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Tokens whose KV all sequences hold.
    pub fn tokens(&self) -> u32 {
        self.sequences.values().map(|sequence| sequence.filled).sum()
    }

    /// A sequence joins.
    pub fn add(&mut self, sequence: Sequence) {
        let slot = sequence.slot;
        self.parked[slot as usize] = sequence.filled;
        if sequence.is_prefilling() {
            self.prompts.push_back(slot);
        }
        self.sequences.insert(slot, sequence);
    }

    /// A sequence leaves. Its slot's KV stays as it is; `park` says where a scratch write may go from now on.
    pub fn remove(&mut self, slot: u32) -> Option<Sequence> {
        self.prompts.retain(|waiting| *waiting != slot);
        self.sequences.remove(&slot)
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
        let chunk = self.prompts.iter().copied().find(|slot| can_take(*slot)).map(|slot| {
            let sequence = &self.sequences[&slot];
            let count = sequence.behind().min(self.chunk_tokens);
            Chunk { slot, start: sequence.filled, count, last: count == sequence.behind() }
        });
        let decoding = self.sequences.values().filter(|sequence| !sequence.is_prefilling());
        let rows = decoding.map(|sequence| sequence.slot).filter(|slot| can_take(*slot)).collect();
        Step { chunk, rows }
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

    /// Notes a drawn token. Returns whether the sequence goes on; one that does not has left.
    pub fn drawn(&mut self, slot: u32, token: u32) -> bool {
        let Some(sequence) = self.sequences.get_mut(&slot) else { return false };
        sequence.tokens.push(token);
        sequence.next_index += 1;
        sequence.remaining = sequence.remaining.saturating_sub(1);
        let goes_on = sequence.remaining > 0 && !sequence.eos.contains(&token);
        if !goes_on {
            self.remove(slot);
        }
        goes_on
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
        }
    }

    #[test]
    fn prompts_run_in_chunks_between_decode_steps() {
        let mut scheduler = Scheduler::new(4, 8);
        scheduler.add(sequence(2, 5, 4, 3));
        scheduler.add(sequence(0, 20, 0, 3));
        let step = scheduler.plan(|_| true);
        assert_eq!(
            step,
            Step { chunk: Some(Chunk { slot: 0, start: 0, count: 8, last: false }), rows: vec![2] }
        );
        scheduler.filled(step.chunk.as_ref().unwrap());
        scheduler.stepped(2);
        assert!(scheduler.drawn(2, 7));
        assert_eq!(scheduler.parked(), [8, 0, 5, 0]);
        for (start, count, last) in [(8, 8, false), (16, 4, true)] {
            let chunk = scheduler.plan(|_| true).chunk.unwrap();
            assert_eq!(chunk, Chunk { slot: 0, start, count, last });
            scheduler.filled(&chunk);
        }
        assert!(scheduler.drawn(0, 1));
        assert_eq!(scheduler.plan(|_| true), Step { chunk: None, rows: vec![0, 2] });
    }

    #[test]
    fn a_whole_prompt_of_one_token_is_a_chunk() {
        let mut scheduler = Scheduler::new(1, 8);
        scheduler.add(sequence(0, 1, 0, 1));
        assert_eq!(scheduler.plan(|_| true).chunk, Some(Chunk { slot: 0, start: 0, count: 1, last: true }));
    }

    #[test]
    fn sequences_end_by_count_and_by_token() {
        let mut scheduler = Scheduler::new(2, 8);
        scheduler.add(sequence(0, 3, 2, 1));
        scheduler.add(sequence(1, 3, 2, 9));
        assert!(!scheduler.drawn(0, 5));
        assert!(scheduler.drawn(1, 5));
        assert!(!scheduler.drawn(1, 99));
        assert!(scheduler.is_idle());
    }

    #[test]
    fn a_stuck_reader_holds_up_nobody_else() {
        let mut scheduler = Scheduler::new(3, 8);
        scheduler.add(sequence(0, 3, 2, 9));
        scheduler.add(sequence(1, 30, 0, 9));
        scheduler.add(sequence(2, 30, 0, 9));
        let step = scheduler.plan(|slot| slot == 2);
        assert!(step.rows.is_empty());
        assert_eq!(step.chunk.unwrap().slot, 2);
    }
}
