//! The text of every token of a model, as bytes, and the grammars that outputs can be held to.

use crate::engine::{RawLogprobs, Sampled};
use forebay_schemas::{
    format::{FormatError, Formats},
    sampling::{Logprobs, OutputFormat, TokenLogprob},
};
use llguidance::{
    Matcher,
    toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie},
};
use std::{
    fmt,
    sync::{Arc, OnceLock},
};
use tokenizers::{AddedToken, Tokenizer};

/// Said instead of logarithms that are no numbers, or lower than this, as OpenAI does.
const LOGPROB_MIN: f32 = -9999.0;

/// Bytes of a token that a grammar can draw.
const TEXT_BYTES_MAX: usize = 1000;

/// See the [module](self). All of it is made when first needed.
pub struct Vocabulary {
    tokenizer: Arc<Tokenizer>,
    eos: Arc<[u32]>,
    size: u32,
    texts: OnceLock<Vec<Vec<u8>>>,
    formats: OnceLock<Result<Formats, FormatError>>,
}

impl Vocabulary {
    /// Of a model whose token ids are below `size`, and whose outputs these tokens end.
    pub fn new(tokenizer: Arc<Tokenizer>, eos: Arc<[u32]>, size: u32) -> Vocabulary {
        Vocabulary { tokenizer, eos, size, texts: OnceLock::new(), formats: OnceLock::new() }
    }

    /// A token's text: empty for those that are no text.
    pub fn text(&self, token: u32) -> &[u8] {
        self.texts().get(token as usize).map_or(&[], Vec::as_slice)
    }

    /// What is told of drawn tokens, with their texts.
    pub fn logprobs(&self, sampled: &Sampled) -> Option<Logprobs> {
        let RawLogprobs { drawn, top } = sampled.logprobs.as_ref()?;
        let of = |token: u32, logprob: f32| {
            let logprob = if logprob > LOGPROB_MIN { logprob } else { LOGPROB_MIN };
            TokenLogprob { token, bytes: self.text(token).to_vec(), logprob }
        };
        let top = top.iter().map(|(token, logprob)| of(*token, *logprob)).collect();
        Some(Logprobs { drawn: of(sampled.token, *drawn), top })
    }

    /// The grammar of a format, with these tokens generated so far. Compiles it, which takes its time; the first one of a model takes
    /// longer.
    pub fn grammar(&self, format: &OutputFormat, output: &[u32]) -> Result<Grammar, FormatError> {
        let formats = self.formats.get_or_init(|| self.formats()).as_ref().map_err(Clone::clone)?;
        let mut grammar = Grammar { matcher: formats.compile(format)?, allowed: SimpleVob::new() };
        grammar.matcher.consume_tokens(output).map_err(FormatError::new)?;
        grammar.look()?;
        Ok(grammar)
    }

    fn texts(&self) -> &[Vec<u8>] {
        self.texts.get_or_init(|| (0..self.size).map(|token| text(&self.tokenizer, token)).collect())
    }

    fn formats(&self) -> Result<Formats, FormatError> {
        let mut texts = self.texts().to_vec();
        let special = |(token, added): (u32, AddedToken)| added.special.then_some(token);
        let special = self.tokenizer.get_added_tokens_decoder().into_iter().filter_map(special);
        let eos: Vec<u32> = self.eos.iter().copied().filter(|token| *token < self.size).collect();
        let Some(first) = eos.first() else {
            return Err(FormatError::new("the model has no token that ends an output"));
        };
        for token in special.chain(eos.iter().copied()) {
            // Is none of the text that a grammar knows.
            if let Some(text) = texts.get_mut(token as usize)
                && text.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER)
            {
                text.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
        }
        texts.iter_mut().filter(|text| text.len() > TEXT_BYTES_MAX).for_each(Vec::clear);
        let trie = TokTrie::from(&TokRxInfo::new(self.size, *first), &texts).with_eos_tokens(&eos);
        Formats::new(&(Arc::new(ApproximateTokEnv::new(trie)) as TokEnv))
    }
}

/// One output's grammar, at the place that the output has reached.
#[derive(Clone)]
pub struct Grammar {
    matcher: Matcher,
    allowed: SimpleVob,
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").field("allowed", &self.allowed.num_set()).finish_non_exhaustive()
    }
}

impl Grammar {
    /// A bit for each token that may come next; the lowest of the first word is token 0.
    pub fn allowed(&self) -> &[u32] {
        self.allowed.as_slice()
    }

    /// One more token was generated, which is not one that ends the output.
    pub fn push(&mut self, token: u32) -> Result<(), FormatError> {
        self.matcher.consume_token(token).map_err(FormatError::new)?;
        self.look()
    }

    fn look(&mut self) -> Result<(), FormatError> {
        self.allowed = self.matcher.compute_mask_or_eos().map_err(FormatError::new)?;
        Ok(())
    }
}

/// A token's text. Tokens of byte-level tokenizers are bytes in disguise (Radford et al., "GPT-2", 2019); others are what they
/// decode to.
fn text(tokenizer: &Tokenizer, token: u32) -> Vec<u8> {
    let Some(name) = tokenizer.id_to_token(token) else { return Vec::new() };
    let is_added = || tokenizer.get_added_vocabulary().simple_id_to_token(token).is_some();
    let byte_level = || name.chars().map(byte).collect::<Option<Vec<u8>>>();
    match tokenizer.get_decoder() {
        _ if is_added() => name.into_bytes(),
        Some(tokenizers::DecoderWrapper::ByteLevel(_)) => {
            byte_level().unwrap_or_else(|| name.clone().into_bytes())
        }
        _ => tokenizer.decode(&[token], false).unwrap_or_default().into_bytes(),
    }
}

/// The byte that a character of a byte-level token stands for: those that can be printed for themselves, the others, in their
/// order, for characters from U+0100 on.
fn byte(character: char) -> Option<u8> {
    let is_printed = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    match u32::from(character) {
        code @ 0..=255 => Some(code as u8).filter(|byte| is_printed(*byte)),
        code => (0..=255).filter(|byte| !is_printed(*byte)).nth(code as usize - 256),
    }
}
