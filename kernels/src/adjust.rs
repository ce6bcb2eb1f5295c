//! What is done to logits before a token is drawn, and what is told of them after: penalties, bias and masks; probabilities.
//!
//! Each is the reference of a kernel in `kernels/cuda/adjust.cu`, which gives the same bits.

use crate::{exp, sampler::mass};
use forebay_schemas::sampling::Sampling;
use std::collections::BTreeMap;

/// A token whose logit changes: because it was seen before, or because the request says so.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct TokenAdjustment {
    /// Its id.
    pub token: u32,
    /// How often the output has it.
    pub count: u32,
    /// 1 if the prompt or the output has it, 0 if not.
    pub seen: u32,
    /// Added at last.
    pub bias: f32,
}

/// How much what was seen counts. Those that change nothing: 1, 0 and 0.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Penalties {
    /// Positive logits of tokens that were seen are divided by this, negative ones multiplied (Keskar et al., "CTRL", 2019).
    pub repetition: f32,
    /// Subtracted once for each time that the output has a token, as OpenAI's `frequency_penalty`.
    pub frequency: f32,
    /// Subtracted if the output has a token, as OpenAI's `presence_penalty`.
    pub presence: f32,
}

impl Penalties {
    /// None.
    pub const NONE: Penalties = Penalties { repetition: 1.0, frequency: 0.0, presence: 0.0 };
}

/// What penalties and bias change of one sequence's logits, kept up with its tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Adjustments {
    penalties: Penalties,
    /// Sorted by token.
    tokens: Vec<TokenAdjustment>,
}

impl Adjustments {
    /// Of a sequence with a prompt and what was generated so far; none if nothing ever changes.
    pub fn new(sampling: &Sampling, prompt: &[u32], output: &[u32]) -> Option<Adjustments> {
        let penalties = Penalties {
            repetition: sampling.repetition_penalty,
            frequency: sampling.frequency_penalty,
            presence: sampling.presence_penalty,
        };
        if penalties == Penalties::NONE && sampling.logit_bias.is_empty() {
            return None;
        }
        let mut tokens = BTreeMap::new();
        let blank = |token: u32| TokenAdjustment { token, count: 0, seen: 0, bias: 0.0 };
        for (token, bias) in &sampling.logit_bias {
            tokens.insert(*token, TokenAdjustment { bias: *bias, ..blank(*token) });
        }
        if penalties.repetition != Penalties::NONE.repetition {
            prompt.iter().for_each(|token| tokens.entry(*token).or_insert(blank(*token)).seen = 1);
        }
        if penalties != Penalties::NONE {
            for token in output {
                let of = tokens.entry(*token).or_insert(blank(*token));
                (of.seen, of.count) = (1, of.count + 1);
            }
        }
        Some(Adjustments { penalties, tokens: tokens.into_values().collect() })
    }

    /// One more token was generated.
    pub fn push(&mut self, token: u32) {
        if self.penalties == Penalties::NONE {
            return;
        }
        let at = self.tokens.binary_search_by_key(&token, |of| of.token).unwrap_or_else(|at| {
            self.tokens.insert(at, TokenAdjustment { token, count: 0, seen: 0, bias: 0.0 });
            at
        });
        self.tokens[at].seen = 1;
        self.tokens[at].count += 1;
    }

    /// How much what was seen counts.
    pub fn penalties(&self) -> Penalties {
        self.penalties
    }

    /// The tokens whose logits change, each named once.
    pub fn tokens(&self) -> &[TokenAdjustment] {
        &self.tokens
    }
}

/// Applies penalties and bias to the logits of some tokens, each named once; then −∞ to all whose bit in `allowed` is not set
/// (the lowest bit of the first word is token 0; none: all are allowed). Tokens outside the vocabulary are passed over.
pub fn adjust(logits: &mut [f32], penalties: Penalties, tokens: &[TokenAdjustment], allowed: Option<&[u32]>) {
    let Penalties { repetition, frequency, presence } = penalties;
    for TokenAdjustment { token, count, seen, bias } in tokens.iter().copied() {
        let Some(logit) = logits.get_mut(token as usize) else { continue };
        if seen != 0 {
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
        }
        if count > 0 {
            *logit = *logit - frequency * count as f32 - presence;
        }
        *logit += bias;
    }
    let Some(allowed) = allowed else { return };
    for (token, logit) in logits.iter_mut().enumerate() {
        if allowed.get(token / 32).is_none_or(|word| word >> (token % 32) & 1 == 0) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// What the probabilities of a row follow from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Normalizer {
    /// Sum of the weights e^(logit − largest), in parts of 2^40.
    mass: u64,
    /// Bits of the largest logit.
    largest: u32,
    /// 0: the row's logits are not finite.
    finite: u32,
}

impl Normalizer {
    /// That of a row.
    pub fn of(logits: &[f32]) -> Normalizer {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !largest.is_finite() || logits.iter().any(|logit| logit.is_nan()) {
            return Normalizer { mass: 0, largest: largest.to_bits(), finite: 0 };
        }
        let mass = logits.iter().map(|logit| mass(exp(*logit - largest))).sum();
        Normalizer { mass, largest: largest.to_bits(), finite: 1 }
    }

    /// The natural logarithm of the probability of a token with that logit; NaN where logits are not finite.
    pub fn logprob(&self, logit: f32) -> f64 {
        if self.finite == 0 {
            return f64::NAN;
        }
        const WHOLE: f64 = (1u64 << 40) as f64;
        f64::from(logit) - f64::from(f32::from_bits(self.largest)) - (self.mass as f64 / WHOLE).ln()
    }
}

/// The `count` most probable tokens with their logits, most probable first, and of equals the lowest id.
pub fn most_probable(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    // Zeros are equal, whatever their sign.
    let order = |a: &(u32, f32), b: &(u32, f32)| (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0));
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    if count < all.len() {
        all.select_nth_unstable_by(count, order);
        all.truncate(count);
    }
    all.sort_by(order);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn penalties_are_those_of_the_papers_and_of_openai() {
        let mut logits = [2.0, -2.0, 1.0, 0.5];
        let seen = |token, count, seen, bias| TokenAdjustment { token, count, seen, bias };
        let tokens = [seen(0, 0, 1, 0.0), seen(1, 3, 1, 0.0), seen(2, 0, 0, 4.0), seen(99, 1, 1, 1.0)];
        adjust(&mut logits, Penalties { repetition: 2.0, frequency: 0.25, presence: 1.0 }, &tokens, None);
        assert_eq!(logits, [1.0, -5.75, 5.0, 0.5]);
        adjust(&mut logits, Penalties::NONE, &[], Some(&[0b0101]));
        assert_eq!(logits, [1.0, f32::NEG_INFINITY, 5.0, f32::NEG_INFINITY]);
    }

    #[test]
    fn what_was_generated_counts_and_what_was_asked_is_seen() {
        let sampling = Sampling {
            repetition_penalty: 2.0,
            frequency_penalty: 1.0,
            logit_bias: vec![(3, 0.5), (9, -1.0)],
            ..Sampling::GREEDY
        };
        let mut adjustments = Adjustments::new(&sampling, &[5, 3, 5], &[7]).unwrap();
        adjustments.push(7);
        adjustments.push(3);
        let seen = |token, count, seen, bias| TokenAdjustment { token, count, seen, bias };
        let expected = [seen(3, 1, 1, 0.5), seen(5, 0, 1, 0.0), seen(7, 2, 1, 0.0), seen(9, 0, 0, -1.0)];
        assert_eq!(adjustments.tokens(), expected);

        // A prompt counts for nothing at OpenAI.
        let openai = Sampling { presence_penalty: 0.5, ..Sampling::GREEDY };
        let adjustments = Adjustments::new(&openai, &[5, 3, 5], &[7]).unwrap();
        assert_eq!(adjustments.tokens(), [seen(7, 1, 1, 0.0)]);
        // Without penalties nothing is counted.
        let bias = Sampling { logit_bias: vec![(3, 0.5)], ..Sampling::GREEDY };
        assert_eq!(Adjustments::new(&bias, &[5], &[7]).unwrap().tokens(), [seen(3, 0, 0, 0.5)]);
        assert_eq!(Adjustments::new(&Sampling::GREEDY, &[5], &[7]), None);
    }

    #[test]
    fn probabilities_add_up_to_one() {
        let logits: Vec<f32> = (0..1000).map(|i| (i * 37 % 101) as f32 / 10.0 - 3.0).collect();
        let normalizer = Normalizer::of(&logits);
        let sum: f64 = logits.iter().map(|logit| normalizer.logprob(*logit).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        let exact = |logit: f32| {
            f64::from(logit) - logits.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln()
        };
        assert!((normalizer.logprob(1.5) - exact(1.5)).abs() < 1e-6);
        assert!(Normalizer::of(&[1.0, f32::NAN]).logprob(1.0).is_nan());
    }

    #[test]
    fn the_first_of_equals_is_more_probable() {
        assert_eq!(most_probable(&[1.0, 3.0, 3.0, -1.0], 3), [(1, 3.0), (2, 3.0), (0, 1.0)]);
    }
}
