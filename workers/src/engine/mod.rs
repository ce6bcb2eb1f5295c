//! The engine: what turns tokens into the next token, over KV that lies in shared memory.
//!
//! [`Engine`] is all that the worker loop knows of a model. A *slot* is one row of the KV region and holds one
//! sequence; `prefill` fills positions of one slot, `decode` adds one position to each of many. Scheduling,
//! block reuse and KV movement are the caller's: the engine reads and writes the positions it is told to.
//!
//! Read next: [`sim`], the smallest engine; then [`onnx`], the one that serves, and what it is made of:
//! [`checkpoint`] → [`quantize`] → [`graph`] → `binding`; then [`cuda`], the same on a GPU.

pub mod bench;
mod binding;
pub mod calibrate;
pub mod checkpoint;
pub mod cuda;
mod fused;
pub mod graph;
mod kv_type;
pub mod library;
pub mod onnx;
pub mod quantize;
pub mod random_checkpoint;
pub mod sim;

pub use kv_type::KvType;

use forebay_kernels::{
    Adjustments, Normalizer, NotFinite, Penalties, Region, adjust,
    cuda::{Arena, SharedSlot},
    most_probable, sample,
};
use forebay_schemas::{
    format::FormatError,
    kv::{KvLayout, LayoutHash, TokenRange},
    sampling::Sampling,
};
use onnx::OpenError;
use std::{ops::Range, sync::Arc, time::Duration};

/// A model that runs over slots of a KV region.
///
/// # Panics
/// Calls panic on what only a bug of the caller can bring about: a slot outside the layout, rows that are not
/// sorted, no tokens. What a request can bring about is an [`EngineError`].
pub trait Engine: Send {
    /// Facts about the model and its KV.
    fn card(&self) -> &EngineCard;

    /// The KV region, laid out by the card's layout. Other threads and processes may read sealed positions and
    /// write positions that the engine was not told about; nothing else orders access to it.
    fn kv(&self) -> &Arc<Region>;

    /// What copies KV between the region and the memory that the engine computes on, if these are two.
    fn mover(&self) -> Option<Arc<dyn KvMover>> {
        None
    }

    /// What takes its time and must happen on the thread that runs the engine, before its first step.
    fn warm_up(&mut self) -> Result<(), OpenError> {
        Ok(())
    }

    /// Has memory for the first `positions` of a slot, or says [`EngineError::KvFull`]. Steps do so by themselves.
    fn reserve(&mut self, _slot: u32, _positions: u32) -> Result<(), EngineError> {
        Ok(())
    }

    /// The KV of a slot is no longer needed.
    fn release(&mut self, _slot: u32) {}

    /// Whether a [`KvMover`] copies from or to a slot at this moment: its memory can't be released.
    fn is_copied(&self, _slot: u32) -> bool {
        false
    }

    /// Runs `tokens` of one slot at positions `start..`, as one call (the caller chunks). Positions below
    /// `start` must hold the KV of the tokens before. With `draw`, also samples the token that follows.
    fn prefill(
        &mut self,
        slot: u32,
        start: u32,
        tokens: &[u32],
        draw: Option<Draw<'_>>,
    ) -> Result<Option<Sampled>, EngineError>;

    /// Runs one token for each row and samples the next, into `out` (cleared first) in the order of `rows`.
    /// Rows are sorted by slot, at most one for each.
    ///
    /// Decode runs over the first slots up to the highest of `rows`, so slots below it that are not in `rows`
    /// get a scratch write of one position: `parked[slot]`, which must be a position where that does no harm: 0
    /// for a free slot, the number of positions filled for one that waits or is being prefilled, and a position
    /// beyond the range being copied for one that is being loaded. Entries of slots in `rows` are ignored.
    fn decode(&mut self, rows: &[Row<'_>], parked: &[u32], out: &mut Vec<Sampled>)
    -> Result<(), EngineError>;

    /// In a simulation: the virtual time that a step of that many prompt tokens and decoded rows takes. An engine that
    /// computes takes real time.
    fn simulated_step(&self, _prompt_tokens: u32, _rows: u32) -> Duration {
        Duration::ZERO
    }

    /// Logits of row number `row` of the last step (0 for a prefill), one for each token of the vocabulary. None, before
    /// any step too, from an engine that draws by other means. A draw overwrites those of its row, unless it is greedy and
    /// from logits as they are: whoever wants to see them draws so.
    fn row_logits(&mut self, _row: usize) -> Option<&[f32]> {
        None
    }
}

/// Copies KV between a region and an engine's own memory, from any thread.
pub trait KvMover: Send + Sync {
    /// Brings positions of a slot that the engine has filled into the region. Blocks until they are there. Says
    /// [`EngineError::KvGone`] if they are not, or no longer, filled.
    fn save(&self, slot: u32, tokens: TokenRange) -> Result<(), EngineError>;

    /// Brings positions of a slot of the region to where the engine computes, which has memory for them. Blocks until they are
    /// there.
    fn load(&self, slot: u32, tokens: TokenRange) -> Result<(), EngineError>;

    /// The same of a group of planes from a slot of another worker's region that is mapped here. Does `beside` while the copy goes
    /// on. The slot counts as filled when [`KvMover::fill`] says so.
    fn load_from(
        &self,
        from: PeerSlot<'_>,
        slot: u32,
        tokens: TokenRange,
        planes: Range<u32>,
        beside: &mut dyn FnMut(),
    ) -> Result<(), EngineError>;

    /// The same of all planes, from another process's memory of a GPU. Returns the sums of what has arrived, as a
    /// [`KvHandle`] has them: whoever has compared them says so by [`KvMover::fill`].
    ///
    /// [`KvHandle`]: forebay_schemas::kv::KvHandle
    fn load_from_gpu(
        &self,
        from: &SharedSlot,
        slot: u32,
        tokens: TokenRange,
    ) -> Result<Vec<u64>, EngineError>;

    /// So many positions of a slot hold KV that is what it should be.
    fn fill(&self, slot: u32, filled: u32);

    /// The memory that the engine computes on.
    fn arena(&self) -> &Arc<Arena>;
}

/// A slot of another worker's region, mapped here.
#[derive(Clone, Copy, Debug)]
pub struct PeerSlot<'a> {
    /// The region.
    pub region: &'a Arc<Region>,
    /// How it is laid out; of the engine's geometry.
    pub layout: &'a KvLayout,
    /// Which slot.
    pub slot: u32,
}

/// One sequence's part in a decode step.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// Slot that holds the sequence.
    pub slot: u32,
    /// Positions already filled, which is the position where `token` goes.
    pub position: u32,
    /// The token to run: usually the one drawn last.
    pub token: u32,
    /// How to draw the next.
    pub draw: Draw<'a>,
}

/// How to draw one token.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    /// The request's sampling parameters.
    pub sampling: &'a Sampling,
    /// Index within the output of the token to be drawn: the counter of the generator.
    pub index: u32,
    /// Penalties and bias, for the tokens so far.
    pub adjustments: Option<&'a Adjustments>,
    /// A bit for each token that may be drawn, the lowest of the first word for token 0; none: all may.
    pub allowed: Option<&'a [u32]>,
}

static GREEDY: Sampling = Sampling::GREEDY;

impl<'a> Draw<'a> {
    /// The most probable token.
    pub const fn greedy(index: u32) -> Draw<'static> {
        Draw::new(&GREEDY, index)
    }

    /// From logits as they are.
    pub const fn new(sampling: &'a Sampling, index: u32) -> Draw<'a> {
        Draw { sampling, index, adjustments: None, allowed: None }
    }
}

/// A drawn token.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// How probable it was, if that was asked for and the engine has logits.
    pub logprobs: Option<RawLogprobs>,
}

impl Sampled {
    /// A drawn token with nothing said of its probability.
    pub fn new(token: u32) -> Sampled {
        Sampled { token, logprobs: None }
    }
}

/// Natural logarithms of probabilities, by the logits as the model gave them.
#[derive(Clone, Debug, PartialEq)]
pub struct RawLogprobs {
    /// Of the token that was drawn.
    pub drawn: f32,
    /// Of the most probable ones, most probable first.
    pub top: Vec<(u32, f32)>,
}

impl RawLogprobs {
    /// From logits: of the drawn token's, and of the most probable ones.
    fn of(normalizer: &Normalizer, drawn: f32, top: impl IntoIterator<Item = (u32, f32)>) -> RawLogprobs {
        let of = |logit| normalizer.logprob(logit) as f32;
        RawLogprobs {
            drawn: of(drawn),
            top: top.into_iter().map(|(token, logit)| (token, of(logit))).collect(),
        }
    }
}

/// Draws a token from logits on the CPU. They are overwritten if that is not greedily, from logits as they are.
pub(crate) fn draw(logits: &mut [f32], draw: Draw<'_>) -> Result<Sampled, NotFinite> {
    let Draw { sampling, index, adjustments, allowed } = draw;
    let told = sampling.logprobs.map(|top| (logits.to_vec(), top));
    if adjustments.is_some() || allowed.is_some() {
        let penalties = adjustments.map_or(Penalties::NONE, Adjustments::penalties);
        adjust(logits, penalties, adjustments.map_or(&[], Adjustments::tokens), allowed);
    }
    let token = sample(logits, sampling, index)?;
    let logprobs = told.map(|(logits, top)| {
        let top = most_probable(&logits, top as usize);
        RawLogprobs::of(&Normalizer::of(&logits), logits[token as usize], top)
    });
    Ok(Sampled { token, logprobs })
}

/// What a caller needs to know of an engine's model.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineCard {
    /// Token ids are below this.
    pub vocab: u32,
    /// Most tokens that a sequence can have, prompt and output together: the model's limit, or one less than
    /// the positions of a slot (the last one takes the scratch write of a parked row).
    pub context_limit: u32,
    /// Tokens that end an output.
    pub eos: Vec<u32>,
    /// Shape of the KV region.
    pub layout: KvLayout,
    /// Meaning of the bytes in it.
    pub layout_hash: LayoutHash,
    /// What computes, for people: `Qwen3ForCausalLM, 28 layers, int4 in blocks of 32`.
    pub weights: String,
}

/// Why an engine could not do a step. Only [`EngineError::KvFull`] goes away by trying the same again on the same engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The sequence would outgrow its slot.
    #[error("slot {slot}: {tokens} tokens at position {start} exceed the context of {limit}")]
    ContextFull {
        /// Which slot.
        slot: u32,
        /// First position to be written.
        start: u32,
        /// How many tokens were to be run.
        tokens: u32,
        /// The card's limit.
        limit: u32,
    },
    /// The request holds a token that the model does not have.
    #[error("slot {slot}: token {token} is outside the vocabulary of {vocab}")]
    UnknownToken {
        /// Which slot.
        slot: u32,
        /// The token.
        token: u32,
        /// The card's vocabulary.
        vocab: u32,
    },
    /// The model computed a logit that is no number.
    #[error("slot {slot}: the logits at position {position} are not finite")]
    NotFinite {
        /// Which slot.
        slot: u32,
        /// Position of the token whose logits they are.
        position: u32,
    },
    /// There is no memory for more KV. It may come when another sequence ends.
    #[error("slot {slot}: there is no memory for more KV")]
    KvFull {
        /// Which slot.
        slot: u32,
    },
    /// KV that was to be copied is no longer there: its memory was given to another sequence.
    #[error("slot {slot}: the KV has made room for another sequence")]
    KvGone {
        /// Which slot.
        slot: u32,
    },
    /// KV that was read is not what an engine of this kind writes. Only [`sim::SimEngine`] can tell.
    #[error("slot {slot}: the KV at position {position} is damaged or was never written")]
    DamagedKv {
        /// Which slot.
        slot: u32,
        /// Which position.
        position: u32,
    },
    /// A token was drawn that the output's format does not have.
    #[error("slot {slot}: a token that is not of the output's format: {error}")]
    OutOfFormat {
        /// Which slot.
        slot: u32,
        /// What happened.
        error: FormatError,
    },
    /// The runtime failed within a step.
    #[error("ONNX Runtime failed: {0}")]
    Runtime(String),
}

/// Checks of a step's arguments that every engine makes.
impl EngineCard {
    fn check(&self, slot: u32, start: u32, tokens: &[u32]) -> Result<(), EngineError> {
        assert!(slot < self.layout.slots, "slot {slot} of {}", self.layout.slots);
        assert!(!tokens.is_empty(), "a step of slot {slot} has no tokens");
        let limit = self.context_limit;
        if u64::from(start) + tokens.len() as u64 > u64::from(limit) {
            return Err(EngineError::ContextFull { slot, start, tokens: tokens.len() as u32, limit });
        }
        match tokens.iter().find(|token| **token >= self.vocab) {
            Some(&token) => Err(EngineError::UnknownToken { slot, token, vocab: self.vocab }),
            None => Ok(()),
        }
    }

    fn check_rows(&self, rows: &[Row<'_>], parked: &[u32]) -> Result<(), EngineError> {
        assert!(rows.windows(2).all(|pair| pair[0].slot < pair[1].slot), "rows are not sorted by slot");
        let below = rows.last().map_or(0, |row| row.slot as usize);
        assert!(parked.len() >= below, "{} parked positions for {below} slots", parked.len());
        assert!(parked.iter().all(|at| *at < self.layout.positions), "a row is parked outside its slot");
        rows.iter().try_for_each(|row| self.check(row.slot, row.position, &[row.token]))
    }
}
