//! A prefill that another worker does: asked for, followed in the log, and its KV read chunk by chunk while it goes on.

use super::{
    RequestError,
    attempt::{Attempt, Start},
    handover::Leave,
    release,
};
use crate::{
    engine::EngineError,
    kv::{KvRead, ReadError, Sealed, Slot, Transport},
    output::OutputText,
    worker::Worker,
};
use forebay_schemas::{
    event::{Body, KvTransferred, PrefillQueued},
    kv::{KvHandle, TokenRange},
    task::PrefillTask,
};
use forebay_streams::{
    environment::{self, off_thread},
    follow::Follow,
    tasks::enqueue,
    writer::LogWriter,
};
use futures::{FutureExt, future::BoxFuture};
use std::{collections::VecDeque, mem, sync::Arc, time::Duration};
use tokio::time::Instant;

/// Pause before a log that could not be read is read again.
const READ_PAUSE: Duration = Duration::from_millis(500);

/// How waiting for a remote prefill ended.
enum Waited {
    /// It is done, and its KV is in the slot.
    Done(KvTransferred),
    /// It has drawn the last token of the answer: nobody needs its KV.
    Finished,
    /// It will not be of use.
    Lost(String),
    /// The worker's grace is over.
    Leave(Leave),
}

impl Attempt<'_> {
    /// Has the rest of a sequence, of which `cached` positions are filled already, run by a prefill worker.
    pub(super) async fn prefill_remotely(
        &self,
        writer: &mut LogWriter,
        output: &mut OutputText,
        cached: u32,
        reason: String,
    ) -> Result<Start, RequestError> {
        let worker = self.worker;
        let tokens = writer.state().sequence().len() as u32;
        // Subscribed before the task is queued, on the same connection: nothing that follows can be missed.
        let follow = Follow::watch(worker.streams.log.clone(), self.log.clone(), writer.seq()).await?;
        // Held until the prefill is over: the prefill worker needs what comes before to compute the rest.
        let (_sealed, kv) = self.seal_cached(cached).await.unzip();
        let layout_hash = Some(worker.model.layout_hash);
        let queued = PrefillQueued { tokens, reason, cached_tokens: cached, layout_hash, kv };
        writer.append(Body::PrefillQueued(queued)).await?;
        let task = PrefillTask {
            request: self.log.request,
            gateway: self.log.gateway.clone(),
            model: worker.model.key.clone(),
            attempt: writer.state().attempt,
        };
        let mut reading =
            Reading::new(worker, self.slot, TokenRange { start: cached, count: tokens - cached });
        if let Err(error) = enqueue(&*worker.streams.tasks, &task).await {
            return self.lost(writer, output, error.to_string(), cached, cached).await;
        }
        // Decode steps meanwhile write one position of this slot: not one that is being filled.
        if !worker.runner.park(self.slot.index(), tokens).await {
            let reason = EngineError::KvFull { slot: self.slot.index() }.to_string();
            return self.lost(writer, output, reason, cached, cached).await;
        }
        match self.await_prefill(writer, output, follow, &mut reading).await? {
            Waited::Done(transferred) => {
                writer.append(Body::KvTransferred(transferred)).await?;
                Ok(Start::Filled { filled: tokens, cached })
            }
            Waited::Finished => {
                drop(reading);
                release(worker, writer.state());
                Ok(Start::Finished(output.finish().expect("it was just said")))
            }
            Waited::Lost(reason) => {
                let filled = reading.stop().await;
                self.lost(writer, output, reason, filled, cached).await
            }
            Waited::Leave(why) => Ok(Start::Leave(why)),
        }
    }

    /// Lets the prefill worker read what is filled here.
    async fn seal_cached(&self, cached: u32) -> Option<(Sealed, KvHandle)> {
        if cached == 0 {
            return None;
        }
        let sealed = self.worker.leases.seal(self.slot.index(), self.worker.config.kv_lease);
        let handle =
            self.worker.seal(self.slot, &sealed, TokenRange { start: 0, count: cached }).await.ok()?;
        Some((sealed, handle))
    }

    /// Follows the log, and reads what is sealed, until the prefill is done and read, or will not be.
    async fn await_prefill(
        &self,
        writer: &mut LogWriter,
        output: &mut OutputText,
        mut follow: Follow,
        reading: &mut Reading,
    ) -> Result<Waited, RequestError> {
        let patience = self.worker.config.prefill_patience;
        let attempt = writer.state().attempt;
        let mut give_up = Instant::now() + patience;
        let mut completed = None;
        let deserted = self.worker.no_prefill_worker_left();
        tokio::pin!(deserted);
        loop {
            if let Some(at) = completed
                && reading.is_idle()
            {
                return Ok(reading.transferred(at));
            }
            let news = tokio::select! {
                biased;
                outcome = reading.next() => match outcome {
                    Ok(()) => continue,
                    Err(error) => return Ok(Waited::Lost(error.to_string())),
                },
                // A prefill under way is worth waiting for: the sequence can then leave with its KV.
                () = self.worker.grace_over.cancelled() => return Ok(Waited::Leave(Leave::TimeIsUp)),
                news = tokio::time::timeout_at(give_up, follow.next()) => news,
                () = &mut deserted, if completed.is_none() => {
                    return Ok(Waited::Lost("no prefill worker is left".into()));
                }
            };
            let recorded = match news {
                Ok(Ok(recorded)) => recorded,
                Ok(Err(error)) => {
                    tracing::debug!(log = %self.log, %error, "the log can't be read now; trying again");
                    tokio::time::sleep(READ_PAUSE).await;
                    continue;
                }
                Err(_) => return Ok(Waited::Lost(format!("nothing of the prefill for {patience:?}"))),
            };
            give_up = Instant::now() + patience;
            writer.observe(recorded.seq, &recorded.event)?;
            if writer.state().attempt != attempt {
                return Err(RequestError::ClaimedElsewhere(writer.state().attempt));
            }
            match recorded.event.body {
                // Another prefill worker begins anew.
                Body::PrefillClaimed(_) => reading.begin_anew().await,
                Body::KvReady(ready) => reading.add(ready.handle),
                Body::PrefillCompleted(_) => {
                    self.take_tokens(writer.state(), output);
                    if output.finish().is_some() {
                        return Ok(Waited::Finished);
                    }
                    completed = Some(Instant::now());
                }
                Body::KvLost(lost) => return Ok(Waited::Lost(lost.reason)),
                body if body.is_terminal() => return Err(RequestError::ClaimedElsewhere(attempt)),
                _ => {}
            }
        }
    }
}

type Read = KvRead<Arc<dyn Transport>>;

/// What a read of one chunk brings back: the read, to go on with, and how it went.
type Job = BoxFuture<'static, Result<Read, ReadError>>;

/// Reads handles as they come, one after another, into a slot.
struct Reading {
    worker: Arc<Worker>,
    slot: Arc<Slot>,
    waiting: VecDeque<KvHandle>,
    state: State,
    /// Positions whose KV is wanted.
    wanted: TokenRange,
    /// Positions that the slot is filled up to.
    filled: u32,
}

enum State {
    Idle(Option<Read>),
    Busy(u32, Job),
}

impl Reading {
    fn new(worker: &Arc<Worker>, slot: &Arc<Slot>, wanted: TokenRange) -> Reading {
        let (worker, slot) = (worker.clone(), slot.clone());
        let (waiting, state) = (VecDeque::new(), State::Idle(None));
        Reading { worker, slot, waiting, state, wanted, filled: wanted.start }
    }

    fn add(&mut self, handle: KvHandle) {
        self.waiting.push_back(handle);
        if self.worker.config.overlap {
            self.begin();
        }
    }

    /// Begins with the next handle, if one waits and nothing is being read.
    fn begin(&mut self) {
        let State::Idle(read) = &mut self.state else { return };
        let Some(handle) = self.waiting.pop_front() else { return };
        let (read, worker, slot) = (read.take(), self.worker.clone(), self.slot.clone());
        let end = handle.tokens.end();
        // The copy can't be interrupted: it holds the slot until it is done, whatever becomes of the request.
        let job = off_thread(move || {
            let mut read = match read {
                Some(read) => read,
                None => KvRead::begin(worker.transport(&handle)?, &handle)?,
            };
            worker.read_into(&slot, &mut read, &handle)?;
            Ok(read)
        });
        self.state = State::Busy(end, job.boxed());
    }

    /// Waits for the end of the read that is under way, and goes on with the next. For ever, if there is none.
    async fn next(&mut self) -> Result<(), ReadError> {
        let State::Busy(end, job) = &mut self.state else { return std::future::pending().await };
        let outcome = job.await;
        let end = *end;
        self.state = State::Idle(None);
        let read = outcome?;
        self.filled = end;
        self.state = State::Idle(Some(read));
        self.begin();
        Ok(())
    }

    /// Whether all that was added is read.
    fn is_idle(&mut self) -> bool {
        self.begin();
        matches!(self.state, State::Idle(_))
    }

    /// Gives the lease back, on a thread that may block: the owner may be far away, or frozen.
    fn give_back(read: Read) {
        match tokio::runtime::Handle::try_current() {
            Ok(_) => drop(environment::spawn(off_thread(move || drop(read)))),
            Err(_) => drop(read),
        }
    }

    /// Forgets what was read and what waits: it is another prefill's from here on.
    async fn begin_anew(&mut self) {
        self.stop().await;
        self.filled = self.wanted.start;
    }

    /// Ends it, and returns up to where the slot is filled.
    async fn stop(&mut self) -> u32 {
        self.waiting.clear();
        let read = match mem::replace(&mut self.state, State::Idle(None)) {
            State::Idle(read) => read,
            State::Busy(end, job) => job.await.inspect(|_| self.filled = end).ok(),
        };
        read.into_iter().for_each(Reading::give_back);
        self.filled
    }

    /// What the log says of a read that is over, if it brought all that was wanted. The lease is given back.
    fn transferred(&mut self, completed: Instant) -> Waited {
        let read = match mem::replace(&mut self.state, State::Idle(None)) {
            State::Idle(Some(read)) if self.filled == self.wanted.end() => read,
            _ => {
                let reason = format!("the handles end at {}, not at {}", self.filled, self.wanted.end());
                return Waited::Lost(reason);
            }
        };
        let report = read.report();
        let transferred = KvTransferred {
            bytes: report.bytes,
            tokens: report.tokens,
            read_us: report.micros,
            after_us: completed.elapsed().as_micros() as u64,
            transport: read.transport().to_owned(),
        };
        Reading::give_back(read);
        Waited::Done(transferred)
    }
}

impl Drop for Reading {
    /// Where the request is no longer wanted. A read that is under way gives back by itself, where it runs.
    fn drop(&mut self) {
        if let State::Idle(Some(read)) = mem::replace(&mut self.state, State::Idle(None)) {
            Reading::give_back(read);
        }
    }
}
