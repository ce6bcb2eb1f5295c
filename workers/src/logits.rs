//! What changes a sequence's logits before its next token is drawn: penalties, bias, and the grammar of its format. All of it
//! follows from the request and the tokens so far, so whoever continues a request derives it anew.

use crate::{
    engine::Draw,
    vocabulary::{Grammar, GrammarError, Vocabulary},
};
use forebay_kernels::Adjustments;
use forebay_schemas::{lifecycle::Lifecycle, sampling::Sampling};
use forebay_streams::environment::off_thread;
use std::sync::Arc;

/// Of one sequence; by default nothing changes.
#[derive(Clone, Debug, Default)]
pub struct LogitsProcessors {
    adjustments: Option<Adjustments>,
    grammar: Option<Box<Grammar>>,
}

impl LogitsProcessors {
    /// Of a request as its log tells it.
    pub async fn resume(
        state: &Lifecycle,
        vocabulary: &Arc<Vocabulary>,
    ) -> Result<LogitsProcessors, GrammarError> {
        let accepted = &state.accepted;
        let adjustments = Adjustments::new(&accepted.sampling, &accepted.prompt, &state.tokens);
        let Some(format) = accepted.format.clone() else {
            return Ok(LogitsProcessors { adjustments, grammar: None });
        };
        let (vocabulary, tokens) = (vocabulary.clone(), state.tokens.clone());
        let grammar = off_thread(move || vocabulary.grammar(&format, &tokens)).await?;
        Ok(LogitsProcessors { adjustments, grammar: Some(Box::new(grammar)) })
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
    pub fn push(&mut self, token: u32) -> Result<(), GrammarError> {
        if let Some(adjustments) = &mut self.adjustments {
            adjustments.push(token);
        }
        self.grammar.as_mut().map_or(Ok(()), |grammar| grammar.push(token))
    }
}
