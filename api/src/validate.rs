//! What a request asks for, checked against the model's card: everything wrong with it is said by name, and
//! nothing that would change the answer is silently ignored. Pure: the seed for a client that gave none is an
//! argument.

mod conversation;
mod format;
mod narrowing;
mod unsupported;

use crate::error::{ApiError, ErrorCode};
use forebay_schemas::{
    card::ModelCard,
    event::RequestAccepted,
    openai::ChatRequest,
    sampling::{OutputFormat, Sampling},
};
use std::time::Duration;

pub(crate) use conversation::{Turn, conversation};

/// Stop strings that a request may have, as at OpenAI.
const STOPS_MAX: usize = 4;

/// Bytes of a `cache_salt`.
const SALT_BYTES_MAX: usize = 256;

/// Tokens that may be told of in one answer, alternatives included: the log keeps them all, and so do gateways and workers meanwhile.
const LOGPROBS_MAX: u64 = 200_000;

/// What a request asks for, apart from its prompt.
#[derive(Debug, PartialEq)]
pub(crate) struct Params {
    sampling: Sampling,
    /// As the client gave it.
    max_tokens: Option<u32>,
    stop: Vec<String>,
    ignore_eos: bool,
    cache_salt: Option<String>,
    format: Option<OutputFormat>,
}

/// Checks all fields of a request but the conversation.
pub(crate) fn params(request: &ChatRequest, card: &ModelCard, drawn_seed: u64) -> Result<Params, ApiError> {
    unsupported::refuse(request)?;
    let temperature = request.temperature.unwrap_or(card.defaults.temperature);
    within("temperature", temperature, (0.0..=2.0).contains(&temperature), "from 0 to 2")?;
    let top_p = request.top_p.unwrap_or(card.defaults.top_p);
    within("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and up to 1")?;
    let top_k = match request.top_k {
        None => card.defaults.top_k,
        Some(-1) => 0,
        Some(k) => u32::try_from(k).map_err(|_| {
            invalid("top_k", format!("top_k is {k}; give 0 or -1 for all tokens, or how many to keep"))
        })?,
    };
    let min_p = request.min_p.unwrap_or(0.0);
    within("min_p", min_p, (0.0..=1.0).contains(&min_p), "from 0 to 1")?;
    let (name, max_tokens) = match request.max_completion_tokens {
        Some(most) => ("max_completion_tokens", Some(most)),
        None => ("max_tokens", request.max_tokens),
    };
    if max_tokens == Some(0) {
        return Err(invalid(name, format!("{name} is 0; ask for at least one token")));
    }
    Ok(Params {
        // A negative seed keeps its bits.
        sampling: Sampling {
            temperature,
            top_p,
            top_k,
            seed: request.seed.map_or(drawn_seed, |seed| seed as u64),
            min_p,
            repetition_penalty: narrowing::repetition_penalty(request, card)?,
            frequency_penalty: narrowing::penalty("frequency_penalty", request.frequency_penalty)?,
            presence_penalty: narrowing::penalty("presence_penalty", request.presence_penalty)?,
            logit_bias: narrowing::logit_bias(request, card)?,
            logprobs: narrowing::logprobs(request)?,
        },
        max_tokens,
        stop: stop(request)?,
        ignore_eos: request.ignore_eos.unwrap_or(false),
        cache_salt: cache_salt(request)?,
        format: format::format(request)?,
    })
}

impl Params {
    /// Whether the answer can be held to the format that is asked for. Takes a moment.
    pub(crate) async fn check_format(&self) -> Result<(), ApiError> {
        match self.format.clone() {
            Some(format) => format::check(format).await,
            None => Ok(()),
        }
    }

    /// The request, once its prompt is known to fit.
    pub(crate) fn accept(
        self,
        card: &ModelCard,
        prompt: Vec<u32>,
        timeout: Duration,
    ) -> Result<RequestAccepted, ApiError> {
        let context = card.context_tokens as usize;
        let room = context.saturating_sub(prompt.len());
        let wanted = self.max_tokens.map_or(1, |most| most as usize);
        if room < wanted {
            let asked = match self.max_tokens {
                Some(most) => format!(
                    "{} tokens ({} of messages, {most} of completion)",
                    prompt.len() + wanted,
                    prompt.len()
                ),
                None => format!("{} tokens of messages, which leaves no room for an answer", prompt.len()),
            };
            return Err(ApiError::of(
                ErrorCode::ContextLengthExceeded,
                "messages",
                format!(
                    "the context of {} is {context} tokens, and this request asks for {asked}; shorten it",
                    card.name
                ),
            ));
        }
        let max_tokens = self.max_tokens.unwrap_or(room as u32);
        let told = self.sampling.logprobs.map_or(0, |top| u64::from(max_tokens) * u64::from(top + 1));
        if told > LOGPROBS_MAX {
            let message = format!(
                "logprobs of up to {max_tokens} tokens would tell of {told}, alternatives included, and may of {LOGPROBS_MAX}: \
                 give a lower max_tokens, or a lower top_logprobs"
            );
            return Err(invalid("top_logprobs", message));
        }
        Ok(RequestAccepted {
            model: card.name.clone(),
            endpoint: "chat.completions".into(),
            prompt,
            sampling: self.sampling,
            max_tokens,
            stop: self.stop,
            ignore_eos: self.ignore_eos,
            timeout_ms: timeout.as_millis() as u64,
            detached: false,
            stored: false,
            fingerprint: None,
            cache_salt: self.cache_salt,
            format: self.format,
            echo: None,
        })
    }
}

fn stop(request: &ChatRequest) -> Result<Vec<String>, ApiError> {
    let stop = request.stop.as_ref().map_or(&[][..], |stop| stop.as_slice());
    if stop.len() > STOPS_MAX {
        return Err(invalid("stop", format!("{} stop strings; give at most {STOPS_MAX}", stop.len())));
    }
    if stop.iter().any(String::is_empty) {
        return Err(invalid("stop", "a stop string is empty; leave it out"));
    }
    Ok(stop.to_vec())
}

fn cache_salt(request: &ChatRequest) -> Result<Option<String>, ApiError> {
    let length = request.cache_salt.as_ref().map(String::len);
    if length.is_some_and(|bytes| bytes == 0 || bytes > SALT_BYTES_MAX) {
        return Err(invalid(
            "cache_salt",
            format!("cache_salt has 1 to {SALT_BYTES_MAX} bytes; or leave it out"),
        ));
    }
    Ok(request.cache_salt.clone())
}

fn within(param: &str, value: f32, holds: bool, range: &str) -> Result<(), ApiError> {
    if holds { Ok(()) } else { Err(invalid(param, format!("{param} is {value}; it must be {range}"))) }
}

fn invalid(param: &str, message: impl Into<String>) -> ApiError {
    ApiError::of(ErrorCode::InvalidValue, param, message)
}

#[cfg(test)]
mod tests;
