//! What changes the model's choice before it is made, and what is told of it after.

use super::{invalid, within};
use crate::error::ApiError;
use forebay_schemas::{card::ModelCard, openai::ChatRequest};

/// The most probable tokens that are told at one place, as at OpenAI.
const TOP_LOGPROBS_MAX: u32 = 20;

/// Tokens with a bias that a request may have.
const BIASES_MAX: usize = 1024;

/// A penalty of OpenAI's.
pub(super) fn penalty(name: &str, asked: Option<f32>) -> Result<f32, ApiError> {
    let penalty = asked.unwrap_or(0.0);
    within(name, penalty, (-2.0..=2.0).contains(&penalty), "from -2 to 2")?;
    Ok(penalty)
}

pub(super) fn repetition_penalty(request: &ChatRequest, card: &ModelCard) -> Result<f32, ApiError> {
    let penalty = request.repetition_penalty.unwrap_or(card.defaults.repetition_penalty);
    // Less would make logits infinite.
    within("repetition_penalty", penalty, (0.01..=2.0).contains(&penalty), "from 0.01 to 2")?;
    Ok(penalty)
}

/// Sorted by token.
pub(super) fn logit_bias(request: &ChatRequest, card: &ModelCard) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(asked) = &request.logit_bias else { return Ok(Vec::new()) };
    if asked.len() > BIASES_MAX {
        let message = format!("logit_bias has {} tokens; give at most {BIASES_MAX}", asked.len());
        return Err(invalid("logit_bias", message));
    }
    let mut biases = Vec::with_capacity(asked.len());
    for (token, bias) in asked {
        let Some(id) = token.parse::<u32>().ok().filter(|id| *id < card.vocab_size) else {
            let ids = format!("{} has token ids from 0 to {}", card.name, card.vocab_size - 1);
            return Err(invalid("logit_bias", format!("logit_bias names the token {token:?}; {ids}")));
        };
        let Some(bias) = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias)) else {
            let message = format!("logit_bias of token {token} is {bias}; it must be from -100 to 100");
            return Err(invalid("logit_bias", message));
        };
        biases.push((id, bias as f32));
    }
    biases.sort_unstable_by_key(|(id, _)| *id);
    // "7" and "07" are one token.
    biases.dedup_by_key(|(id, _)| *id);
    Ok(biases)
}

pub(super) fn logprobs(request: &ChatRequest) -> Result<Option<u32>, ApiError> {
    let top = request.top_logprobs.unwrap_or(0);
    if top > TOP_LOGPROBS_MAX {
        let message = format!("top_logprobs is {top}; it must be from 0 to {TOP_LOGPROBS_MAX}");
        return Err(invalid("top_logprobs", message));
    }
    match request.logprobs {
        Some(true) => Ok(Some(top)),
        _ if top > 0 => {
            Err(invalid("top_logprobs", "top_logprobs is only told with logprobs; set that to true"))
        }
        _ => Ok(None),
    }
}
