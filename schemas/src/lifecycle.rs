//! The life of a request as a pure state machine: a fold over its events.
//!
//! Every process that touches a request folds its log through this code, and decides on the resulting state.
//! An event that does not fit is refused, in the writer before it is appended and in every reader after.

use crate::{
    event::{
        Body, Event, FinishReason, KvReady, PrefillQueued, ReleaseCause, Released, RequestAccepted,
        RequestFailed, Usage,
    },
    ids::{RequestId, WorkerId},
    kv::KvHandle,
    sampling::Logprobs,
};
use serde::Serialize;
use std::sync::Arc;

/// Where a request is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Accepted, or given back; no worker has it.
    Queued,
    /// A decode worker has it and no KV yet.
    Claimed,
    /// A remote prefill is asked for.
    PrefillQueued,
    /// A prefill worker computes.
    Prefilling,
    /// The KV lies sealed at the prefill worker; the first token is known.
    Prefilled,
    /// The decode worker has the KV and generates.
    Decoding,
    /// Ended: whole.
    Completed,
    /// Ended: failed.
    Failed,
    /// Ended: no longer wanted.
    Cancelled,
}

impl Phase {
    /// Whether the request has ended.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Phase::Completed | Phase::Failed | Phase::Cancelled)
    }
}

/// A request, as its events so far tell it.
#[derive(Clone, Debug, PartialEq)]
pub struct Lifecycle {
    /// Which request.
    pub request: RequestId,
    /// What was asked.
    pub accepted: Arc<RequestAccepted>,
    /// When it was accepted, in microseconds since the Unix epoch, by the gateway's clock.
    pub accepted_us: u64,
    /// Where it is.
    pub phase: Phase,
    /// The current attempt; 0 before the first claim.
    pub attempt: u32,
    /// The decode worker of the current attempt.
    pub worker: Option<WorkerId>,
    /// Where the decode task's last delivery is acknowledged.
    pub ack_subject: Option<String>,
    /// The prefill worker of the current attempt: the one that claimed last.
    pub prefiller: Option<WorkerId>,
    /// Where the prefill task's last delivery is acknowledged.
    pub prefill_ack_subject: Option<String>,
    /// How often a prefill was claimed in the current attempt.
    pub prefills: u32,
    /// Attempts in a row, the current one included, that have brought no token and were not given back for a drain.
    pub fruitless: u32,
    /// All tokens generated so far, over all attempts.
    pub tokens: Vec<u32>,
    /// All text released so far.
    pub text: String,
    /// How probable the tokens of the text are, if that was asked for.
    pub logprobs: Vec<Logprobs>,
    /// Sealed KV that the current attempt can read, contiguous: of its prefill, from [`Lifecycle::kv_from`] on, or left by
    /// the attempt before, from position 0 on.
    pub kv: Vec<KvHandle>,
    /// What the current attempt asked of a prefill worker, if it did.
    pub asked: Option<Arc<PrefillQueued>>,
    /// Tokens of the prompt whose KV was found in a prefix cache when the first token was computed.
    pub cached_tokens: u32,
    /// The KV was left by the attempt before, and nobody has said yet what became of it.
    pub handed_over: bool,
    /// How it ended, if it completed.
    pub finish: Option<FinishReason>,
    /// Why it failed, if it did.
    pub failure: Option<RequestFailed>,
}

/// An event that can't follow what came before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Illegal {
    /// The first event is not `RequestAccepted`.
    #[error("a log begins with RequestAccepted, not {0}")]
    First(&'static str),
    /// The event does not belong to this request.
    #[error("event of request {found} in the log of {expected}")]
    OtherRequest {
        /// Whose log it is.
        expected: RequestId,
        /// Whose event it is.
        found: RequestId,
    },
    /// The request has ended.
    #[error("{event} after the request has {phase:?}")]
    AfterEnd {
        /// The late event.
        event: &'static str,
        /// How the request ended.
        phase: Phase,
    },
    /// Of an attempt that is not the current one (or, for `Claimed`, not the next).
    #[error("{event} of attempt {found}, expected {expected}")]
    Attempt {
        /// The event.
        event: &'static str,
        /// Its attempt.
        found: u32,
        /// The only one that fits.
        expected: u32,
    },
    /// Not from this phase.
    #[error("{event} while {phase:?}")]
    Phase {
        /// The event.
        event: &'static str,
        /// Where the request is.
        phase: Phase,
    },
    /// From a worker that does not run the prefill (any more), or of KV in another slot than what is there.
    #[error("{event} of {worker} is not of the prefill that runs")]
    OtherPrefill {
        /// The event.
        event: &'static str,
        /// Whose prefill it is of.
        worker: WorkerId,
    },
    /// KV of positions that the sequence does not have yet.
    #[error("{event} has KV of {found} positions, of at most {most}")]
    TooMuchKv {
        /// The event.
        event: &'static str,
        /// Positions that it has KV of.
        found: u32,
        /// Positions that can have KV.
        most: u32,
    },
    /// Tokens or KV that do not join what is there.
    #[error("{event} starts at {found}, expected {expected}")]
    Gap {
        /// The event.
        event: &'static str,
        /// Index that it starts at.
        found: u32,
        /// Index that joins.
        expected: u32,
    },
}

impl Lifecycle {
    /// The state after the first event.
    pub fn begin(event: &Event) -> Result<Lifecycle, Illegal> {
        let Body::RequestAccepted(accepted) = &event.body else {
            return Err(Illegal::First(event.body.name()));
        };
        Ok(Lifecycle {
            request: event.request,
            accepted: Arc::new(accepted.clone()),
            accepted_us: event.time_us,
            phase: Phase::Queued,
            attempt: 0,
            worker: None,
            ack_subject: None,
            prefiller: None,
            prefill_ack_subject: None,
            prefills: 0,
            fruitless: 0,
            tokens: Vec::new(),
            text: String::new(),
            logprobs: Vec::new(),
            kv: Vec::new(),
            asked: None,
            cached_tokens: 0,
            handed_over: false,
            finish: None,
            failure: None,
        })
    }

    /// Applies one more event. On an error the state is as it was.
    pub fn apply(&mut self, event: &Event) -> Result<(), Illegal> {
        self.check(event)?;
        match &event.body {
            Body::RequestAccepted(_) => unreachable!("refused by check"),
            Body::Claimed(claimed) => {
                self.attempt = event.attempt;
                self.worker = Some(claimed.worker.clone());
                self.ack_subject = Some(claimed.ack_subject.clone());
                self.prefiller = None;
                self.prefill_ack_subject = None;
                self.prefills = 0;
                self.fruitless += 1;
                self.asked = None;
                self.handed_over &= self.phase == Phase::Queued;
                if !self.handed_over {
                    self.kv.clear();
                }
                self.phase = Phase::Claimed;
            }
            Body::PrefillQueued(queued) => {
                self.asked = Some(Arc::new(queued.clone()));
                self.phase = Phase::PrefillQueued;
            }
            Body::PrefillClaimed(claimed) => {
                self.prefiller = Some(claimed.worker.clone());
                self.prefill_ack_subject = Some(claimed.ack_subject.clone());
                self.prefills += 1;
                self.handed_over = false;
                self.kv.clear();
                self.phase = Phase::Prefilling;
            }
            Body::KvReady(ready) => self.kv.push(ready.handle.clone()),
            Body::PrefillCompleted(prefill) => {
                self.count_cached(prefill.cached_tokens);
                self.tokens.push(prefill.token);
                self.text.push_str(&prefill.text);
                self.logprobs.extend(prefill.logprobs.clone());
                self.fruitless = 0;
                self.phase = Phase::Prefilled;
            }
            Body::KvTransferred(_) => {
                self.handed_over = false;
                self.phase = Phase::Decoding;
            }
            Body::KvLost(_) => {
                self.handed_over = false;
                self.phase = Phase::Claimed;
            }
            Body::TokensGenerated(generated) => {
                self.count_cached(generated.cached_tokens);
                self.tokens.extend_from_slice(&generated.tokens);
                self.text.push_str(&generated.text);
                self.logprobs.extend_from_slice(&generated.logprobs);
                self.fruitless = 0;
                self.phase = Phase::Decoding;
            }
            Body::Released(released) => {
                self.count_cached(released.cached_tokens);
                self.fruitless -= u32::from(released.cause == ReleaseCause::Drained && self.fruitless > 0);
                self.worker = None;
                self.ack_subject = None;
                self.prefiller = None;
                self.prefill_ack_subject = None;
                self.handed_over = released.kv.is_some();
                self.kv = released.kv.iter().cloned().collect();
                self.phase = Phase::Queued;
            }
            Body::RequestCompleted(completed) => {
                self.finish = Some(completed.reason);
                self.phase = Phase::Completed;
            }
            Body::RequestFailed(failed) => {
                self.failure = Some(failed.clone());
                self.phase = Phase::Failed;
            }
            Body::RequestCancelled(_) => self.phase = Phase::Cancelled,
        }
        Ok(())
    }

    /// Whether the event can follow.
    pub fn check(&self, event: &Event) -> Result<(), Illegal> {
        let name = event.body.name();
        if event.request != self.request {
            return Err(Illegal::OtherRequest { expected: self.request, found: event.request });
        }
        if self.phase.is_terminal() {
            return Err(Illegal::AfterEnd { event: name, phase: self.phase.clone() });
        }
        let claims = matches!(event.body, Body::Claimed(_));
        let expected = self.attempt + u32::from(claims);
        if event.attempt != expected {
            return Err(Illegal::Attempt { event: name, found: event.attempt, expected });
        }
        let fits = match &event.body {
            Body::RequestAccepted(_) => false,
            Body::Claimed(_) | Body::RequestFailed(_) | Body::RequestCancelled(_) => true,
            Body::PrefillQueued(_) => self.phase == Phase::Claimed,
            Body::PrefillClaimed(_) => matches!(self.phase, Phase::PrefillQueued | Phase::Prefilling),
            Body::KvReady(_) | Body::PrefillCompleted(_) => self.phase == Phase::Prefilling,
            Body::KvTransferred(_) => self.phase == Phase::Prefilled || self.has_inherited(),
            Body::KvLost(_) => {
                matches!(self.phase, Phase::PrefillQueued | Phase::Prefilling | Phase::Prefilled)
                    || self.has_inherited()
            }
            Body::Released(_) => self.phase != Phase::Queued,
            Body::TokensGenerated(_) => matches!(self.phase, Phase::Claimed | Phase::Decoding),
            Body::RequestCompleted(_) => {
                matches!(self.phase, Phase::Claimed | Phase::Prefilled | Phase::Decoding)
            }
        };
        if !fits {
            return Err(Illegal::Phase { event: name, phase: self.phase.clone() });
        }
        // Prefills have no attempts of their own: an overtaken one shows in who reports it.
        let other_prefill = match &event.body {
            Body::KvReady(KvReady { handle }) => {
                Some(&handle.agent).filter(|_| !self.joins_the_prefill(handle))
            }
            Body::PrefillCompleted(done) => {
                Some(&done.worker).filter(|worker| self.prefiller.as_ref() != Some(worker))
            }
            _ => None,
        };
        if let Some(worker) = other_prefill {
            return Err(Illegal::OtherPrefill { event: name, worker: worker.clone() });
        }
        if let Body::Released(Released { kv: Some(handle), .. }) = &event.body {
            // The last token was drawn and not run: the next worker runs it.
            let most = (self.accepted.prompt.len() + self.tokens.len()).saturating_sub(1) as u32;
            let found = handle.tokens.end();
            if found > most {
                return Err(Illegal::TooMuchKv { event: name, found, most });
            }
        }
        let joins = match &event.body {
            Body::KvReady(ready) => {
                Some((ready.handle.tokens.start, self.kv.last().map_or(self.kv_from(), |kv| kv.tokens.end())))
            }
            Body::Released(Released { kv: Some(handle), .. }) => Some((handle.tokens.start, 0)),
            Body::PrefillCompleted(prefill) => Some((prefill.first_index, self.tokens.len() as u32)),
            Body::TokensGenerated(generated) => Some((generated.first_index, self.tokens.len() as u32)),
            _ => None,
        };
        match joins {
            Some((found, expected)) if found != expected => {
                Err(Illegal::Gap { event: name, found, expected })
            }
            _ => Ok(()),
        }
    }

    /// Position from which a remote prefill's KV is wanted: what is before lies in the decode worker's slot already.
    pub fn kv_from(&self) -> u32 {
        self.asked.as_ref().map_or(0, |asked| asked.cached_tokens)
    }

    /// Whether there is KV of the attempt before that nobody has decided about.
    fn has_inherited(&self) -> bool {
        self.phase == Phase::Claimed && self.handed_over
    }

    /// What counts is what the first token cost; what a later attempt finds is of its own making.
    fn count_cached(&mut self, cached_tokens: u32) {
        if self.tokens.is_empty() {
            self.cached_tokens = cached_tokens.min(self.accepted.prompt.len() as u32);
        }
    }

    fn joins_the_prefill(&self, handle: &KvHandle) -> bool {
        let lease = |kv: &KvHandle| (kv.incarnation, kv.slot, kv.generation);
        self.prefiller.as_ref() == Some(&handle.agent)
            && self.kv.last().is_none_or(|kv| lease(kv) == lease(handle))
    }

    /// The state after all of the events.
    pub fn fold<'a>(events: impl IntoIterator<Item = &'a Event>) -> Result<Option<Lifecycle>, Illegal> {
        let mut events = events.into_iter();
        let Some(first) = events.next() else { return Ok(None) };
        let mut state = Lifecycle::begin(first)?;
        events.try_for_each(|event| state.apply(event))?;
        Ok(Some(state))
    }

    /// Prompt and generated tokens so far: what a worker must have KV of before it can draw the next, but for the last.
    pub fn sequence(&self) -> Vec<u32> {
        [&self.accepted.prompt[..], &self.tokens[..]].concat()
    }

    /// Tokens counted so far.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.accepted.prompt.len() as u32,
            completion_tokens: self.tokens.len() as u32,
            cached_tokens: self.cached_tokens,
        }
    }

    /// When the request must have ended, in microseconds since the Unix epoch.
    pub fn deadline_us(&self) -> u64 {
        self.accepted_us.saturating_add(self.accepted.timeout_ms.saturating_mul(1000))
    }
}
