//! The promises of ARCHITECTURE.md that can be read off a log, each under its name. They are checked here from the events
//! alone, beside the state machine that all processes share: a fault in that must not hide itself.

use crate::Answer;
use forebay_schemas::{
    event::Body,
    lifecycle::{Lifecycle, Phase},
};
use forebay_streams::log::Recorded;
use std::fmt;

/// A promise that was not kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Which, by its number in ARCHITECTURE.md.
    pub invariant: &'static str,
    /// What was found instead.
    pub detail: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broken: {} ({})", self.invariant, self.detail)
    }
}

const LEGAL: &str = "a log folds through the lifecycle";
const ONE_END: &str = "1: a request reaches exactly one terminal event";
const ALL_TOKENS: &str = "2: no token twice, none missing";
const SAME_TEXT: &str = "2: the client reads what the log says";
/// Tokens are not what they must be, or of no question that was asked.
pub const SAME_TOKENS: &str = "4: the tokens are those of an undisturbed run";
/// A stored answer whose connection broke is read to its end at another gateway.
pub const GOES_ON: &str = "2: a broken stream goes on at any gateway";
const ONE_AUTHOR: &str = "3: after a newer claim, an older attempt appends nothing";
const ONE_PREFILL: &str = "3: after a newer claim, an older prefill appends nothing";

/// A request that was acknowledged to its client has no end, or, with several, too many.
pub const ENDS: &str = ONE_END;
/// Something follows the end of a log.
pub const NOTHING_AFTER: &str = "1: nothing follows the end of a request";
/// Slots are held that no request needs.
pub const ALL_FREE: &str = "5: no slot and no lease stays held";
/// Tasks are left that no request needs.
pub const QUEUES_EMPTY: &str = "5: no task stays in a queue";
/// A process ends though nothing was done to it, or panics.
pub const ALIVE: &str = "no process ends but by what is done to it";
/// Something waits for longer than it may.
pub const BOUNDED: &str = "7: every wait has a bound";

/// A promise that was not kept, found elsewhere than in a log.
pub fn broken(invariant: &'static str, detail: impl Into<String>) -> Broken {
    Broken { invariant, detail: detail.into() }
}

/// Checks the log of a request that has ended.
pub fn of_log(events: &[Recorded]) -> Result<Lifecycle, Broken> {
    let state = Lifecycle::fold(events.iter().map(|recorded| &recorded.event))
        .map_err(|illegal| broken(LEGAL, illegal.to_string()))?
        .ok_or_else(|| broken(LEGAL, "it is empty"))?;
    one_end(events)?;
    all_tokens(events, &state)?;
    one_author(events)?;
    one_prefill(events)?;
    Ok(state)
}

/// Checks an answer against the log of its request, which has ended.
pub fn of_answer(state: &Lifecycle, answer: &Answer) -> Result<(), Broken> {
    let whole = answer.finish.is_some();
    let same = if whole { state.text == answer.text } else { state.text.starts_with(&answer.text) };
    if !same {
        return Err(broken(SAME_TEXT, format!("read {:?}, logged {:?}", answer.text, state.text)));
    }
    if whole != (state.phase == Phase::Completed) || answer.finish != state.finish {
        return Err(broken(SAME_TEXT, format!("read {:?}, logged {:?}", answer.finish, state.finish)));
    }
    let usage = state.usage().into();
    match answer.usage {
        Some(read) if read != usage => Err(broken(SAME_TEXT, format!("read {read:?}, logged {usage:?}"))),
        _ => Ok(()),
    }
}

/// Checks what a client read whose connection broke off, or that closed it: the beginning of what the log says.
pub fn of_part(state: &Lifecycle, answer: &Answer) -> Result<(), Broken> {
    if state.text.starts_with(&answer.text) {
        return Ok(());
    }
    Err(broken(SAME_TEXT, format!("read {:?}, logged {:?}", answer.text, state.text)))
}

/// Checks a log's tokens against those of a run that nothing happened to, which may go on for longer.
pub fn of_tokens(state: &Lifecycle, undisturbed: &[u32]) -> Result<(), Broken> {
    if undisturbed.starts_with(&state.tokens) {
        return Ok(());
    }
    let differs = state.tokens.iter().zip(undisturbed).position(|(found, expected)| found != expected);
    let differs = differs.unwrap_or(undisturbed.len());
    let detail = format!("token {differs} of {} is {:?}", state.tokens.len(), state.tokens.get(differs));
    Err(broken(SAME_TOKENS, format!("{detail}, expected {:?}", undisturbed.get(differs))))
}

fn one_end(events: &[Recorded]) -> Result<(), Broken> {
    let ends = events.iter().filter(|recorded| recorded.event.body.is_terminal()).count();
    let last = events.last().is_some_and(|recorded| recorded.event.body.is_terminal());
    if ends == 1 && last { Ok(()) } else { Err(broken(ONE_END, format!("{ends} of them, last: {last}"))) }
}

fn all_tokens(events: &[Recorded], state: &Lifecycle) -> Result<(), Broken> {
    let mut next = 0;
    for Recorded { seq, event } in events {
        let (first, count) = match &event.body {
            Body::PrefillCompleted(prefill) => (prefill.first_index, 1),
            Body::TokensGenerated(generated) => (generated.first_index, generated.tokens.len() as u32),
            Body::RequestCompleted(completed) => {
                let counted = completed.usage.completion_tokens;
                if counted != next {
                    return Err(broken(ALL_TOKENS, format!("{counted} counted, {next} logged")));
                }
                continue;
            }
            _ => continue,
        };
        if first != next {
            return Err(broken(ALL_TOKENS, format!("{first} instead of {next} at {seq}")));
        }
        next += count;
    }
    let most = state.accepted.max_tokens;
    if next > most { Err(broken(ALL_TOKENS, format!("{next} of at most {most}"))) } else { Ok(()) }
}

fn one_author(events: &[Recorded]) -> Result<(), Broken> {
    let mut attempt = 0;
    for Recorded { seq, event } in events {
        attempt += u32::from(matches!(event.body, Body::Claimed(_)));
        if event.attempt != attempt {
            let name = event.body.name();
            return Err(broken(
                ONE_AUTHOR,
                format!("{name} of attempt {} in {attempt}, at {seq}", event.attempt),
            ));
        }
    }
    Ok(())
}

fn one_prefill(events: &[Recorded]) -> Result<(), Broken> {
    let mut owner = None;
    for Recorded { seq, event } in events {
        let author = match &event.body {
            Body::PrefillClaimed(claimed) => {
                owner = Some(&claimed.worker);
                continue;
            }
            Body::KvReady(ready) => &ready.handle.agent,
            Body::PrefillCompleted(done) => &done.worker,
            _ => continue,
        };
        if Some(author) != owner {
            let name = event.body.name();
            return Err(broken(ONE_PREFILL, format!("{name} of {author} in that of {owner:?}, at {seq}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::{
        event::{Claimed, Event, FinishReason, RequestAccepted, RequestCompleted, TokensGenerated, Usage},
        ids::{RequestId, WorkerId},
    };

    fn log(bodies: impl IntoIterator<Item = (u32, Body)>) -> Vec<Recorded> {
        let request = RequestId::new();
        let accepted = Body::RequestAccepted(RequestAccepted::greedy("m", vec![1, 2], 3));
        let bodies = [(0, accepted)].into_iter().chain(bodies);
        (1..)
            .zip(bodies)
            .map(|(seq, (attempt, body))| Recorded {
                seq,
                event: Event { request, attempt, time_us: seq, body },
            })
            .collect()
    }

    fn claimed() -> Body {
        Body::Claimed(Claimed {
            worker: WorkerId::new("w").unwrap(),
            ack_subject: "a".into(),
            delivery: 1,
            engine: None,
        })
    }

    fn tokens(first_index: u32, tokens: &[u32]) -> Body {
        Body::TokensGenerated(TokensGenerated {
            first_index,
            tokens: tokens.into(),
            text: "ab".into(),
            cached_tokens: 0,
            logprobs: Vec::new(),
        })
    }

    fn completed(completion_tokens: u32) -> Body {
        let usage = Usage { prompt_tokens: 2, completion_tokens, cached_tokens: 0 };
        Body::RequestCompleted(RequestCompleted { reason: FinishReason::Length, usage })
    }

    #[test]
    fn a_good_log_passes_and_its_answer_must_agree() {
        let state = of_log(&log([(1, claimed()), (1, tokens(0, &[7, 8, 9])), (1, completed(3))])).unwrap();
        let mut answer = Answer {
            request: state.request,
            status: 200,
            text: "ab".into(),
            finish: Some(FinishReason::Length),
            usage: Some(state.usage().into()),
            error: None,
        };
        assert_eq!(of_answer(&state, &answer), Ok(()));
        answer.text.push('b');
        assert_eq!(of_answer(&state, &answer).unwrap_err().invariant, SAME_TEXT);
        assert_eq!(of_part(&state, &answer).unwrap_err().invariant, SAME_TEXT);
        answer = Answer { text: "a".into(), ..answer };
        assert_eq!(of_part(&state, &answer), Ok(()));
        assert_eq!(of_tokens(&state, &[7, 8, 9, 10]), Ok(()));
        assert_eq!(of_tokens(&state, &[7, 8]).unwrap_err().invariant, SAME_TOKENS);
        assert_eq!(of_tokens(&state, &[7, 6, 9]).unwrap_err().invariant, SAME_TOKENS);
        answer = Answer { text: "ab".into(), finish: Some(FinishReason::Stop), ..answer };
        assert_eq!(of_answer(&state, &answer).unwrap_err().invariant, SAME_TEXT);
    }

    #[test]
    fn each_fault_is_called_by_its_name() {
        let fault = |bodies: Vec<(u32, Body)>| of_log(&log(bodies)).unwrap_err().invariant;
        assert_eq!(fault(vec![(1, claimed()), (1, tokens(0, &[7]))]), ONE_END);
        assert_eq!(fault(vec![(1, claimed()), (1, tokens(0, &[7, 8])), (1, completed(1))]), ALL_TOKENS);
        assert_eq!(fault(vec![(1, claimed()), (1, tokens(0, &[6, 7, 8, 9])), (1, completed(4))]), ALL_TOKENS);
        assert_eq!(fault(vec![(1, claimed()), (1, tokens(1, &[7])), (1, completed(1))]), LEGAL);
        assert_eq!(
            fault(vec![(1, claimed()), (2, claimed()), (1, tokens(0, &[7])), (2, completed(1))]),
            LEGAL
        );
    }
}
