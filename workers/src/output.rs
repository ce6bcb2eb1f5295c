//! From tokens to the text that a client may see. A pure function of the tokens so far, the request's stop
//! strings and the tokenizer: whoever continues a request derives the same text from the logged tokens.

use crate::engine::Sampled;
use forebay_schemas::{
    event::{FinishReason, RequestAccepted},
    lifecycle::Lifecycle,
};
use std::sync::Arc;
use tokenizers::Tokenizer;

/// One request's output, token by token.
pub struct OutputText {
    tokenizer: Arc<Tokenizer>,
    accepted: Arc<RequestAccepted>,
    eos: Arc<[u32]>,
    tokens: Vec<u32>,
    /// Tokens before this are decoded and their text is final.
    decoded: usize,
    /// Where the window that is decoded together begins: some tokenizers' text depends on the token before.
    window: usize,
    /// All text decoded so far, cut before a stop string.
    text: String,
    /// Bytes of it that were released.
    released: usize,
    told: Vec<Sampled>,
    finish: Option<FinishReason>,
}

impl OutputText {
    /// The output of a request as its log tells it: empty, or what earlier attempts generated.
    pub fn resume(tokenizer: Arc<Tokenizer>, eos: Arc<[u32]>, state: &Lifecycle) -> OutputText {
        let mut output = OutputText {
            tokenizer,
            accepted: state.accepted.clone(),
            eos,
            tokens: Vec::new(),
            decoded: 0,
            window: 0,
            text: String::new(),
            released: 0,
            told: Vec::new(),
            finish: None,
        };
        for token in &state.tokens {
            output.push(*token);
        }
        output.released = state.text.len();
        output
    }

    /// Adds a drawn token, and keeps what is told of it, unless it ends the answer.
    pub fn draw(&mut self, sampled: Sampled) {
        let goes_on = self.finish.is_none();
        self.push(sampled.token);
        if goes_on && !self.ends(sampled.token) && sampled.logprobs.is_some() {
            self.told.push(sampled);
        }
    }

    /// Of the tokens since the last call, those of which something is told.
    pub fn release_told(&mut self) -> Vec<Sampled> {
        std::mem::take(&mut self.told)
    }

    fn ends(&self, token: u32) -> bool {
        self.eos.contains(&token) && !self.accepted.ignore_eos
    }

    /// Adds a token. Once the output has finished, further tokens are ignored.
    pub fn push(&mut self, token: u32) {
        if self.finish.is_some() {
            return;
        }
        self.tokens.push(token);
        let ends = self.ends(token);
        if ends {
            self.finish = Some(FinishReason::Stop);
        } else if self.tokens.len() >= self.accepted.max_tokens as usize {
            self.finish = Some(FinishReason::Length);
        }
        // The token that ends the answer is no part of its text, whether or not the tokenizer calls it special.
        self.decode(self.tokens.len() - usize::from(ends));
        self.cut_at_stop();
    }

    /// How the output ended, if it has.
    pub fn finish(&self) -> Option<FinishReason> {
        self.finish
    }

    /// Tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The text that has become certain since the last call: held back are half characters, and what may be
    /// the beginning of a stop string.
    pub fn release(&mut self) -> String {
        let certain = match self.finish {
            Some(_) => self.text.len(),
            None => self.text.len() - self.stop_prefix_len(),
        };
        let text = self.text.get(self.released..certain).unwrap_or_default().to_owned();
        self.released = self.released.max(certain);
        text
    }

    /// Decodes the tokens from the window up to `end`, twice: with and without the new ones. The difference is
    /// their text. (The window technique of vLLM and text-generation-inference.)
    fn decode(&mut self, end: usize) {
        let decode = |tokens: &[u32]| self.tokenizer.decode(tokens, true).unwrap_or_default();
        let before = decode(&self.tokens[self.window..self.decoded]);
        let with = decode(&self.tokens[self.window..end]);
        let unfinished = with.ends_with('\u{fffd}') && self.finish.is_none();
        if with.len() > before.len() && !unfinished {
            self.text.push_str(with.get(before.len()..).unwrap_or_default());
            self.window = self.decoded;
            self.decoded = end;
        }
    }

    fn cut_at_stop(&mut self) {
        // A stop string can begin in text that was held back, never in text that was released.
        let searched = self.text.get(self.released..).unwrap_or_default();
        let found = self.accepted.stop.iter().filter_map(|stop| searched.find(stop.as_str())).min();
        if let Some(at) = found {
            self.text.truncate(self.released + at);
            self.finish = Some(FinishReason::Stop);
        }
    }

    /// Bytes at the end of the text that a stop string may begin with.
    fn stop_prefix_len(&self) -> usize {
        let longest = |stop: &String| {
            let candidates = stop.char_indices().map(|(at, _)| at).skip(1);
            candidates.filter(|len| self.text.ends_with(&stop[..*len])).max().unwrap_or(0)
        };
        self.accepted.stop.iter().map(longest).max().unwrap_or(0)
    }
}
