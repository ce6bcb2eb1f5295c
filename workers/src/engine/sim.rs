//! An engine without a model: a labelled tool for load and chaos tests, never the default.
//!
//! Its KV is real: position p of a slot holds a 64-bit hash of all tokens up to p as its K, and the complement
//! as its V. The next token is a function of the hash *read from memory* at the last position, the seed and the
//! index. So tokens depend on the prompt and nothing else, and KV that was lost, torn or taken from the wrong
//! place shows up as an error or as other tokens.

use super::{Draw, Engine, EngineCard, EngineError, Row, Sampled};
use forebay_kernels::{Region, RegionError};
use forebay_schemas::{
    ids::fnv1a,
    kv::{KvDtype, KvGeometry, KvLayout, LayoutHash, TokenRange},
};
use forebay_streams::environment;
use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

/// Shape and speed of a [`SimEngine`].
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// Sequences held at once.
    pub slots: u32,
    /// Positions of each.
    pub positions: u32,
    /// Token ids are below this.
    pub vocab: u32,
    /// Tokens are drawn from this range, which must hold no end-of-sequence token: a simulated output ends by
    /// its length.
    pub drawn: Range<u32>,
    /// How long steps take.
    pub pace: SimPace,
}

/// How long simulated steps take, in microseconds. All zero: as fast as possible.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SimPace {
    /// Each prefill call.
    pub prefill_us: f64,
    /// Each token of a prefill call.
    pub prefill_token_us: f64,
    /// Each decode step.
    pub decode_us: f64,
    /// Each row of a decode step.
    pub decode_row_us: f64,
}

/// See the [module](self).
#[derive(Debug)]
pub struct SimEngine {
    card: EngineCard,
    kv: Arc<Region>,
    drawn: Range<u32>,
    pace: SimPace,
    /// How much longer than asked the last step took, taken off the next.
    overslept: Duration,
}

/// In virtual time one step in that many is a stall ...
const STALL_EVERY: u64 = 64;

/// ... of that many steps.
const STALL_STEPS: f64 = 40.0;

const GEOMETRY: KvGeometry = KvGeometry { layers: 1, kv_heads: 1, head_dim: 2, dtype: KvDtype::F32 };

/// What position −1 would hold.
const EMPTY: u64 = 0x243f_6a88_85a3_08d3;

impl SimEngine {
    /// An engine with empty KV.
    ///
    /// # Panics
    /// If no token can be drawn, or one outside the vocabulary.
    pub fn new(options: SimOptions) -> Result<SimEngine, RegionError> {
        let SimOptions { slots, positions, vocab, drawn, pace } = options;
        assert!(drawn.start < drawn.end && drawn.end <= vocab, "tokens {drawn:?} of a vocabulary of {vocab}");
        let layout = KvLayout { geometry: GEOMETRY, slots, positions };
        let card = EngineCard {
            vocab,
            context_limit: positions.saturating_sub(1),
            eos: Vec::new(),
            layout,
            layout_hash: LayoutHash(fnv1a(b"forebay simulated kv 1")),
            weights: "simulated".to_owned(),
        };
        let kv = Arc::new(Region::create("forebay-kv-sim", layout.region_bytes())?);
        Ok(SimEngine { card, kv, drawn, pace, overslept: Duration::ZERO })
    }

    /// Offsets of the K and the V of a position.
    fn at(&self, slot: u32, position: u32) -> [usize; 2] {
        let mut pieces = self.card.layout.pieces(slot, TokenRange { start: position, count: 1 }, 0..2);
        [(); 2].map(|()| pieces.next().expect("one head in each of two planes").0)
    }

    /// The hash of the tokens before `position`.
    fn before(&self, slot: u32, position: u32) -> Result<u64, EngineError> {
        let Some(position) = position.checked_sub(1) else { return Ok(EMPTY) };
        let [key, value] = self.at(slot, position).map(|offset| {
            let mut bytes = [0; 8];
            self.kv.read(offset, &mut bytes);
            u64::from_le_bytes(bytes)
        });
        if key == !value { Ok(key) } else { Err(EngineError::DamagedKv { slot, position }) }
    }

    fn write(&self, slot: u32, position: u32, hash: u64) {
        let [key, value] = self.at(slot, position);
        self.kv.write(key, &hash.to_le_bytes());
        self.kv.write(value, &(!hash).to_le_bytes());
    }

    fn draw(&self, hash: u64, draw: Draw<'_>) -> Sampled {
        let mixed = mix(mix(hash, draw.sampling.seed), u64::from(draw.index));
        Sampled::new(self.drawn.start + (mixed % u64::from(self.drawn.end - self.drawn.start)) as u32)
    }

    /// Waits until `us` after `start`, less what earlier waits overran. Sleeps where the system can be trusted
    /// to wake in time, and spins only over what is too short for that.
    fn wait(&mut self, start: Instant, us: f64) {
        if us <= 0.0 || environment::is_simulated() {
            return;
        }
        let asked = Duration::from_secs_f64(us * 1e-6);
        let end = start + asked.saturating_sub(self.overslept);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match left {
                Duration::ZERO => break,
                left if left > Duration::from_micros(100) => {
                    std::thread::sleep(left - Duration::from_micros(60));
                }
                _ if asked > Duration::from_micros(100) => std::thread::sleep(left),
                _ => std::hint::spin_loop(),
            }
        }
        self.overslept =
            (self.overslept + start.elapsed()).saturating_sub(asked).min(Duration::from_millis(10));
    }
}

impl SimPace {
    fn step_us(&self, prompt_tokens: u32, rows: u32) -> f64 {
        let step = |fixed: f64, each: f64, count: u32| {
            if count == 0 { 0.0 } else { fixed + each * f64::from(count) }
        };
        step(self.prefill_us, self.prefill_token_us, prompt_tokens)
            + step(self.decode_us, self.decode_row_us, rows)
    }
}

impl Engine for SimEngine {
    fn card(&self) -> &EngineCard {
        &self.card
    }

    fn kv(&self) -> &Arc<Region> {
        &self.kv
    }

    fn prefill(
        &mut self,
        slot: u32,
        start: u32,
        tokens: &[u32],
        draw: Option<Draw<'_>>,
    ) -> Result<Option<Sampled>, EngineError> {
        let begun = Instant::now();
        self.card.check(slot, start, tokens)?;
        let mut hash = self.before(slot, start)?;
        for (position, token) in (start..).zip(tokens) {
            hash = mix(hash, u64::from(*token));
            self.write(slot, position, hash);
        }
        self.wait(begun, self.pace.step_us(tokens.len() as u32, 0));
        Ok(draw.map(|draw| self.draw(hash, draw)))
    }

    fn decode(
        &mut self,
        rows: &[Row<'_>],
        parked: &[u32],
        out: &mut Vec<Sampled>,
    ) -> Result<(), EngineError> {
        let begun = Instant::now();
        out.clear();
        self.card.check_rows(rows, parked)?;
        // A real engine reads and writes all through the step. The last moment is when a write does most harm.
        self.wait(begun, self.pace.step_us(0, rows.len() as u32));
        let mut next = rows.iter().peekable();
        for slot in 0..rows.last().map_or(0, |row| row.slot + 1) {
            let Some(row) = next.next_if(|row| row.slot == slot) else {
                // A real engine would write something here too: what it may harm must be harmed in tests.
                self.write(slot, parked[slot as usize], mix(EMPTY, u64::MAX));
                continue;
            };
            let hash = mix(self.before(slot, row.position)?, u64::from(row.token));
            self.write(slot, row.position, hash);
            out.push(self.draw(hash, row.draw));
        }
        Ok(())
    }

    /// From half to one and a half times the pace, and now and then much more.
    fn simulated_step(&self, prompt_tokens: u32, rows: u32) -> Duration {
        let us = self.pace.step_us(prompt_tokens, rows);
        if us == 0.0 {
            return Duration::ZERO;
        }
        let drawn = environment::random();
        let factor = 0.5 + (drawn >> 32) as f64 / f64::from(u32::MAX);
        let stall = if drawn.is_multiple_of(STALL_EVERY) { STALL_STEPS } else { 1.0 };
        Duration::from_secs_f64(us * factor * stall * 1e-6)
    }
}

/// SplitMix64's finalizer over both: <https://prng.di.unimi.it/splitmix64.c>.
fn mix(hash: u64, word: u64) -> u64 {
    let mut z = (hash.rotate_left(17) ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::sampling::Sampling;

    fn paced(pace: SimPace) -> SimEngine {
        SimEngine::new(SimOptions { slots: 4, positions: 128, vocab: 300, drawn: 100..200, pace }).unwrap()
    }

    fn engine() -> SimEngine {
        paced(SimPace::default())
    }

    #[test]
    fn damaged_kv_is_refused() {
        let mut engine = engine();
        let draw = Draw::greedy(0);
        engine.prefill(1, 0, &[1, 2, 3], None).unwrap();
        let [key, _] = engine.at(1, 2);
        engine.kv().write(key, &[0xee]);
        let error = engine.prefill(1, 3, &[4], Some(draw)).unwrap_err();
        assert!(matches!(error, EngineError::DamagedKv { slot: 1, position: 2 }), "{error}");
        assert!(engine.prefill(2, 5, &[4], Some(draw)).is_err(), "KV never written");
    }

    #[test]
    fn tokens_stay_in_range_and_depend_on_seed_index_and_prompt() {
        let mut engine = engine();
        let mut seen = std::collections::HashSet::new();
        for seed in 0..3 {
            let sampling = Sampling { seed, ..Sampling::GREEDY };
            for index in 0..3 {
                for prompt in [[1, 2], [2, 1]] {
                    let draw = Draw::new(&sampling, index);
                    let token = engine.prefill(0, 0, &prompt, Some(draw)).unwrap().unwrap().token;
                    assert!((100..200).contains(&token));
                    seen.insert(token);
                }
            }
        }
        assert!(seen.len() > 12, "{seen:?}");
    }

    #[test]
    fn steps_take_the_time_asked_on_average() {
        let mut engine = paced(SimPace { prefill_us: 300.0, prefill_token_us: 100.0, ..SimPace::default() });
        let start = Instant::now();
        for _ in 0..50 {
            engine.prefill(0, 0, &[1, 2], None).unwrap();
        }
        let mean = start.elapsed().as_secs_f64() / 50.0;
        assert!((0.45e-3..1.5e-3).contains(&mean), "{mean}");
    }
}
