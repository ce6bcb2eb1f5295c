//! Leaving a sequence to another worker while this one is told to stop: the engine lets go of it, its KV is sealed
//! under a lease, and the log says where; whoever claims the request next reads it from there.

use super::{
    RequestError,
    attempt::{Attempt, Outcome},
};
use crate::{output::OutputText, runner::Output, worker::Worker};
use forebay_schemas::{
    card::WorkerLease,
    event::{Body, ReleaseCause, Released, TokensGenerated},
    kv::TokenRange,
    task::Role,
};
use forebay_streams::{registry::Workers, writer::LogWriter};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::mpsc;

/// How often a sequence that is to leave looks for a place.
const SUCCESSOR_POLL: Duration = Duration::from_millis(20);

/// Why a sequence is to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    /// There is somebody who can go on with it now.
    Successor,
    /// The grace is over.
    TimeIsUp,
}

/// Free slots of other workers, as far as they are known and not spoken for.
#[derive(Default)]
pub(crate) struct Places {
    /// The registry as it was when they were counted.
    seen: Option<Workers>,
    taken: u32,
}

impl Places {
    /// Speaks for one of the free slots, if there is one. News from the registry count anew.
    fn take(&mut self, workers: &Workers, of: &Worker) -> bool {
        if !self.seen.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, workers)) {
            *self = Places { seen: Some(workers.clone()), taken: 0 };
        }
        let free: u32 =
            workers.values().filter(|lease| succeeds(lease, of)).map(|lease| lease.free_slots).sum();
        let found = self.taken < free;
        self.taken += u32::from(found);
        found
    }
}

/// Whether a worker can go on where `of` stops, with its KV.
fn succeeds(lease: &WorkerLease, of: &Worker) -> bool {
    lease.role == Role::Decode
        && !lease.draining
        && lease.worker != of.id
        && lease.model == of.model.key
        && lease.layout_hash == of.model.layout_hash
}

impl Worker {
    /// Resolves once a sequence should leave this worker.
    pub(crate) async fn leave_now(&self) -> Leave {
        // Or this worker itself might be given what it gives away.
        self.pulls_over().await;
        let successor = async {
            loop {
                let now = self.workers.borrow().clone();
                if self.places.lock().expect("no panics while held").take(&now, self) {
                    return;
                }
                // Not woken by news: that happens in random order, and a simulation would not repeat itself.
                tokio::time::sleep(SUCCESSOR_POLL).await;
            }
        };
        tokio::select! {
            biased;
            () = self.grace_over.cancelled() => Leave::TimeIsUp,
            () = successor => Leave::Successor,
        }
    }
}

/// See [`Places`].
pub(crate) type SharedPlaces = Mutex<Places>;

impl Attempt<'_> {
    /// Takes the sequence from the engine and leaves it to whoever claims the request next. Without a successor at
    /// hand, nobody would read its KV before it is gone: it is left out.
    pub(super) async fn hand_over(
        &self,
        writer: &mut LogWriter,
        output: &mut OutputText,
        mut outputs: mpsc::Receiver<Output>,
        why: Leave,
        cached: u32,
    ) -> Result<Outcome, RequestError> {
        let worker = self.worker;
        // When this returns, the engine writes no more to the slot, and all that it drew is in the channel.
        let sequence = worker.runner.remove(self.slot.index()).await;
        let first_index = output.tokens().len() as u32;
        while let Ok(item) = outputs.try_recv() {
            match item {
                Output::Token(sampled) => output.draw(sampled),
                Output::Failed(error) => return Err(error.into()),
                Output::Filled(_) => {}
            }
        }
        let tokens = output.tokens()[first_index as usize..].to_vec();
        if !tokens.is_empty() {
            let text = output.release();
            writer
                .append(Body::TokensGenerated(TokensGenerated {
                    first_index,
                    tokens,
                    text,
                    cached_tokens: if first_index == 0 { cached } else { 0 },
                    logprobs: worker.logprobs(output),
                }))
                .await?;
        }
        if let Some(reason) = output.finish() {
            return self.complete(writer, reason).await;
        }
        // A sequence that has left the engine by itself has ended.
        let filled =
            sequence.map_or(0, |sequence| sequence.filled).min(writer.state().sequence().len() as u32 - 1);
        let (kv, sealed) = match why {
            Leave::Successor if filled > 0 => {
                worker.runner.park(self.slot.index(), filled).await;
                let sealed = worker.leases.seal(self.slot.index(), worker.config.kv_lease);
                let tokens = TokenRange { start: 0, count: filled };
                worker.seal(self.slot, &sealed, tokens).await.ok().map(|handle| (handle, sealed)).unzip()
            }
            _ => (None, None),
        };
        let reason = match why {
            Leave::Successor => "the worker stops; another one can go on",
            Leave::TimeIsUp => "the worker stops, and its grace is over",
        };
        let released = Released {
            worker: worker.id.clone(),
            cause: ReleaseCause::Drained,
            reason: reason.to_owned(),
            kv,
            cached_tokens: if output.tokens().is_empty() { cached } else { 0 },
        };
        writer.append(Body::Released(released)).await?;
        Ok(Outcome::Left(sealed))
    }
}
