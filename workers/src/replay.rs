//! Running a logged request again: its prompt goes through an engine here, and at every index what that engine would
//! draw is compared with the token in the log.
//!
//! The logged tokens are fed in, whatever is drawn (teacher forcing), so that one difference does not hide those after
//! it. Chunks and steps are a worker's; batches are not: what ran beside the request is not in its log.

use crate::{
    engine::{Draw, Engine, EngineError, Row, Sampled, draw},
    logits::LogitsProcessors,
    output::OutputText,
};
use forebay_kernels::NotFinite;
use forebay_schemas::{event::FinishReason, lifecycle::Lifecycle, sampling::Sampling};
use std::sync::Arc;
use tokenizers::Tokenizer;

/// The slot that the request runs in.
const SLOT: u32 = 0;

/// What an engine would draw, beside what the log says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// Tokens compared: all that the log has.
    pub tokens: u32,
    /// How many of them differ.
    pub differing: u32,
    /// The first that differs.
    pub first: Option<Divergence>,
}

/// One token that differs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergence {
    /// Its index within the output.
    pub index: u32,
    /// The token in the log.
    pub logged: u32,
    /// The token that is drawn here, after the same tokens.
    pub drawn: u32,
    /// Their logits here, if the engine has any.
    pub logits: Option<Logits>,
}

/// Logits of two tokens at one index.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Logits {
    /// Of the token in the log.
    pub logged: f32,
    /// Of the token that is drawn here.
    pub drawn: f32,
}

impl Logits {
    /// By how much the token that is drawn here is ahead.
    pub fn margin(&self) -> f32 {
        self.drawn - self.logged
    }
}

/// Runs a request again in the engine's first slot, and compares every logged token. The prompt is run in chunks of at
/// most `chunk_tokens`; `processors` are those of the request before its first token.
pub fn compare(
    engine: &mut dyn Engine,
    state: &Lifecycle,
    mut processors: LogitsProcessors,
    chunk_tokens: u32,
) -> Result<Comparison, EngineError> {
    let (prompt, logged) = (&state.accepted.prompt, &state.tokens);
    let mut comparison = Comparison::default();
    let Some(first) = logged.first() else { return Ok(comparison) };
    let sampling = &Sampling { logprobs: None, ..state.accepted.sampling.clone() };
    let chunks = prompt.chunks(chunk_tokens.max(1) as usize);
    let (last, mut start) = (chunks.len().saturating_sub(1), 0);
    let asked = asked(engine, sampling);
    for (number, chunk) in chunks.enumerate() {
        let draw = (number == last).then_some(Draw::new(&asked, 0));
        let sampled = engine.prefill(SLOT, start, chunk, draw)?;
        start += chunk.len() as u32;
        if let Some(sampled) = sampled {
            let token = drawn(engine, processors.draw(sampling, 0), &sampled, start - 1)?;
            comparison.add(0, *first, token, engine.row_logits(0));
        }
    }
    let mut out = Vec::with_capacity(1);
    for (index, pair) in (1..).zip(logged.windows(2)) {
        let position = start + index - 1;
        let draw = Draw::new(&asked, index);
        processors.push(pair[0]).map_err(|error| EngineError::OutOfFormat { slot: SLOT, error })?;
        engine.decode(&[Row { slot: SLOT, position, token: pair[0], draw }], &[0], &mut out)?;
        let token = drawn(engine, processors.draw(sampling, index), &out[0], position)?;
        comparison.add(index, pair[1], token, engine.row_logits(0));
    }
    Ok(comparison)
}

/// How the engine is asked to draw: greedily if it has logits, so that they are left as they are and the draw itself can
/// be done here, with a copy of them.
fn asked(engine: &mut dyn Engine, sampling: &Sampling) -> Sampling {
    if engine.row_logits(0).is_some() { Sampling::GREEDY } else { sampling.clone() }
}

/// The token that a worker would have drawn.
fn drawn(
    engine: &mut dyn Engine,
    as_asked: Draw<'_>,
    sampled: &Sampled,
    position: u32,
) -> Result<u32, EngineError> {
    let Some(logits) = engine.row_logits(0) else { return Ok(sampled.token) };
    let drawn = draw(&mut logits.to_vec(), as_asked);
    Ok(drawn.map_err(|NotFinite| EngineError::NotFinite { slot: SLOT, position })?.token)
}

impl Comparison {
    fn add(&mut self, index: u32, logged: u32, drawn: u32, logits: Option<&[f32]>) {
        self.tokens += 1;
        if logged == drawn {
            return;
        }
        self.differing += 1;
        let of = |token: u32| logits.and_then(|logits| logits.get(token as usize)).copied();
        let logits = of(logged).zip(of(drawn)).map(|(logged, drawn)| Logits { logged, drawn });
        self.first.get_or_insert(Divergence { index, logged, drawn, logits });
    }
}

/// The text of the logged tokens, and how they end the output: what a worker would have said, from the tokens alone.
pub fn output(
    tokenizer: Arc<Tokenizer>,
    eos: Arc<[u32]>,
    state: &Lifecycle,
) -> (String, Option<FinishReason>) {
    let unanswered = Lifecycle { tokens: Vec::new(), text: String::new(), ..state.clone() };
    let mut output = OutputText::resume(tokenizer, eos, &unanswered);
    let mut text = String::new();
    for token in &state.tokens {
        output.push(*token);
        text += &output.release();
    }
    (text, output.finish())
}
