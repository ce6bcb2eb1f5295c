//! What changes a sequence's logits before its next token is drawn: penalties, bias, and the grammar of its format. All of it
//! follows from the request and the tokens so far, so whoever continues a request derives it anew.

use crate::{
    engine::Draw,
    vocabulary::{Grammar, Vocabulary},
};
use forebay_kernels::Adjustments;
use forebay_schemas::{
    event::RequestAccepted, format::FormatError, lifecycle::Lifecycle, sampling::Sampling,
};
use forebay_streams::environment::off_thread;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Of one sequence; by default nothing changes.
#[derive(Clone, Debug, Default)]
pub struct LogitsProcessors {
    adjustments: Option<Adjustments>,
    grammar: Option<Box<Grammar>>,
}

impl LogitsProcessors {
    /// Of a request of which this much was generated. Takes its time if it asks for a format: see [`Vocabulary::grammar`].
    pub fn new(
        accepted: &RequestAccepted,
        output: &[u32],
        vocabulary: &Vocabulary,
    ) -> Result<LogitsProcessors, FormatError> {
        let grammar =
            accepted.format.as_ref().map(|format| vocabulary.grammar(format, output)).transpose()?;
        Ok(LogitsProcessors {
            adjustments: Adjustments::new(&accepted.sampling, &accepted.prompt, output),
            grammar: grammar.map(Box::new),
        })
    }

    /// Of a request as its log tells it.
    pub(crate) async fn resume(
        state: &Lifecycle,
        vocabulary: &Arc<Vocabulary>,
    ) -> Result<LogitsProcessors, FormatError> {
        let accepted = &state.accepted;
        if accepted.format.is_none() {
            return LogitsProcessors::new(accepted, &state.tokens, vocabulary);
        }
        let (accepted, tokens, vocabulary) = (accepted.clone(), state.tokens.clone(), vocabulary.clone());
        // Whoever cancels meanwhile does not end what runs: so few at once that KV can still be moved.
        static TURNS: Semaphore = Semaphore::const_new(2);
        let _turn = TURNS.acquire().await.expect("never closed");
        off_thread(move || LogitsProcessors::new(&accepted, &tokens, &vocabulary)).await
    }

    /// How the token with that index is drawn.
    pub fn draw<'a>(&'a self, sampling: &'a Sampling, index: u32) -> Draw<'a> {
        Draw {
            sampling,
            index,
            adjustments: self.adjustments.as_ref(),
            allowed: self.grammar.as_ref().map(|grammar| grammar.allowed()),
        }
    }

    /// One more token was drawn, and others follow.
    pub fn push(&mut self, token: u32) -> Result<(), FormatError> {
        if let Some(adjustments) = &mut self.adjustments {
            adjustments.push(token);
        }
        self.grammar.as_mut().map_or(Ok(()), |grammar| grammar.push(token))
    }
}
