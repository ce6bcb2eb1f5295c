//! An engine that fails on some requests, always or the first few times: what no worker can do must end all the same.

use super::chance::{between, chance};
use forebay_kernels::Region;
use forebay_workers::engine::{Draw, Engine, EngineCard, EngineError, Row, Sampled, sim::SimEngine};
use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, Mutex},
    time::Duration,
};

/// Seeds of poisoned requests: an engine knows a request by nothing else.
const SEEDS: Range<u64> = 1_000_000..2_000_000;

/// The first seed of requests that are not poisoned and have one of their own.
const SOUND: u64 = SEEDS.end;

/// What the engine says.
const WORDS: &str = "it is poisoned";

/// How a poison works.
#[derive(Clone, Debug)]
pub(super) struct Poison {
    /// At decode steps, which then fail for all that take part; else when the prompt is prefilled.
    decode: bool,
    /// How often it does.
    strikes: u32,
    /// How often it has, by seed, at all workers together.
    struck: Arc<Mutex<BTreeMap<u64, u32>>>,
}

impl Poison {
    pub(super) fn draw() -> Poison {
        let strikes = if chance(500) { u32::MAX } else { between(1..=6) as u32 };
        Poison { decode: chance(400), strikes, struck: Arc::default() }
    }

    /// Whether the engine failed because of it.
    pub(super) fn explains(&self, seed: u64, message: &str) -> bool {
        message.contains(WORDS) && (self.decode || SEEDS.contains(&seed))
    }

    fn strike(&self, draw: &Draw<'_>) -> Result<(), EngineError> {
        let seed = draw.sampling.seed;
        if !SEEDS.contains(&seed) {
            return Ok(());
        }
        let mut struck = self.struck.lock().expect("no panics while held");
        let struck = struck.entry(seed).or_default();
        if *struck >= self.strikes {
            return Ok(());
        }
        *struck += 1;
        Err(EngineError::Runtime(WORDS.to_owned()))
    }
}

/// The seed of a request that has one of its own.
pub(super) fn seed(number: u64, poisoned: bool) -> u64 {
    if poisoned { SEEDS.start + number } else { SOUND + number }
}

/// See the [module](self).
pub(super) struct Poisoned {
    pub(super) engine: SimEngine,
    pub(super) poison: Option<Poison>,
}

impl Engine for Poisoned {
    fn card(&self) -> &EngineCard {
        self.engine.card()
    }

    fn kv(&self) -> &Arc<Region> {
        self.engine.kv()
    }

    fn prefill(
        &mut self,
        slot: u32,
        start: u32,
        tokens: &[u32],
        draw: Option<Draw<'_>>,
    ) -> Result<Option<Sampled>, EngineError> {
        if let (Some(poison), Some(draw)) = (&self.poison, &draw)
            && !poison.decode
        {
            poison.strike(draw)?;
        }
        self.engine.prefill(slot, start, tokens, draw)
    }

    fn decode(
        &mut self,
        rows: &[Row<'_>],
        parked: &[u32],
        out: &mut Vec<Sampled>,
    ) -> Result<(), EngineError> {
        if let Some(poison) = self.poison.as_ref().filter(|poison| poison.decode) {
            rows.iter().try_for_each(|row| poison.strike(&row.draw))?;
        }
        self.engine.decode(rows, parked, out)
    }

    fn simulated_step(&self, prompt_tokens: u32, rows: u32) -> Duration {
        self.engine.simulated_step(prompt_tokens, rows)
    }
}
