//! The decode worker: owns a request from claim to end.
//!
//! pull → claim → prefill, here or remotely → generate → complete → acknowledge. Everything that happens is an
//! event in the request's log before anybody acts on it; a worker that finds itself overtaken there stops.

use crate::{
    engine::EngineError,
    kv::{ReadError, Slot, Transport, read_kv},
    output::OutputText,
    runner::{EngineStopped, Output},
    scheduler::Sequence,
    worker::Worker,
};
use forebay_schemas::{
    event::{
        Body, Claimed, EngineRef, FailureCode, FinishReason, KvLost, KvTransferred, PrefillQueued,
        RequestCancelled, RequestCompleted, RequestFailed, TokensGenerated,
    },
    kv::KvHandle,
    lifecycle::{Lifecycle, Phase},
    task::{DecodeTask, PrefillTask, Role, Task},
};
use forebay_streams::{
    StreamError,
    environment::{self, now_us, off_thread},
    follow::Follow,
    log::LogRef,
    tasks::{Delivery, Verdict, enqueue},
    writer::{LogWriter, WriteError},
};
use std::{sync::Arc, time::Duration};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

/// Outputs taken from the engine at once; they become one event.
const BATCH_MAX: usize = 64;

/// Pause before a log that could not be read is read again.
const READ_PAUSE: Duration = Duration::from_millis(500);

/// How often a slot is looked at that a read still holds.
const SLOT_POLL: Duration = Duration::from_millis(1);

/// Why a request did not end here.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    /// The log can't be extended by this worker (any more).
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The log can't be read.
    #[error(transparent)]
    Read(#[from] StreamError),
    /// Another worker claimed the request.
    #[error("attempt {0} has begun elsewhere")]
    ClaimedElsewhere(u32),
    /// The engine refused or failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The engine is gone.
    #[error(transparent)]
    Stopped(#[from] EngineStopped),
}

/// One slot's loop.
pub(crate) async fn serve(worker: Arc<Worker>, stop: CancellationToken) {
    while let Some(delivery) = worker.next_task(&stop).await {
        let Ok(task) = DecodeTask::decode(&delivery.payload) else {
            tracing::error!("a decode task is not readable; dropped");
            worker.answer(&delivery, Verdict::Ack).await;
            continue;
        };
        let log = LogRef { gateway: task.gateway, request: task.request };
        let verdict = see_through(&worker, &delivery, &log).await;
        if let Some(verdict) = verdict {
            worker.answer(&delivery, verdict).await;
        }
    }
}

/// Takes a request to its end, or as far as it goes here, and says what becomes of the task. None: say nothing,
/// since the task is in other hands, and an acknowledgement from here would take it from them.
async fn see_through(worker: &Arc<Worker>, delivery: &Delivery, log: &LogRef) -> Option<Verdict> {
    let slot = Arc::new(worker.slots.take().expect("there are as many loops as slots"));
    let _alive = worker.keep_alive(delivery);
    let unwanted = worker.enter(log.request);
    let attempt = Attempt { worker, log, slot: &slot };
    let outcome = tokio::select! {
        biased;
        outcome = attempt.run(delivery) => outcome,
        cause = unwanted.raised() => cancel(worker, log, cause).await,
    };
    worker.leave(log.request, &unwanted);
    worker.runner.remove(slot.index()).await;
    worker.runner.park(slot.index(), 0).await;
    while Arc::strong_count(&slot) > 1 {
        // A read that was under way when the request was cancelled: the slot is free once it is done.
        tokio::time::sleep(SLOT_POLL).await;
    }
    match outcome {
        Ok(()) => Some(Verdict::Ack),
        Err(error) => failed(worker, delivery, log, &error).await,
    }
}

async fn cancel(worker: &Arc<Worker>, log: &LogRef, cause: String) -> Result<(), RequestError> {
    let mut writer = LogWriter::open(worker.streams.log.clone(), log.clone()).await?;
    release(worker, writer.state());
    if !writer.state().phase.is_terminal() {
        writer.append(Body::RequestCancelled(RequestCancelled { cause })).await?;
    }
    Ok(())
}

/// What becomes of a task whose request did not end well.
async fn failed(
    worker: &Arc<Worker>,
    delivery: &Delivery,
    log: &LogRef,
    error: &RequestError,
) -> Option<Verdict> {
    let mut writer = match LogWriter::open(worker.streams.log.clone(), log.clone()).await {
        Ok(writer) if writer.state().phase.is_terminal() => {
            release(worker, writer.state());
            return Some(Verdict::Ack);
        }
        Ok(writer) => writer,
        Err(WriteError::Corrupt { problem, .. }) => {
            tracing::error!(%log, problem, "a log is not readable; its task is dropped");
            return Some(Verdict::Ack);
        }
        Err(WriteError::Missing(_)) if delivery.delivery >= worker.streams.tasks.max_deliver() => {
            tracing::error!(%log, "a task without a log is dropped");
            return Some(Verdict::Ack);
        }
        Err(_) => return Some(Verdict::Nak),
    };
    // The newer attempt may be this worker's own: a task comes again to one that hung for longer than the ack
    // wait, in another of its slots. To give it back from here would take it from there.
    let overtaken = matches!(
        error,
        RequestError::Write(WriteError::Overtaken { .. }) | RequestError::ClaimedElsewhere(_)
    );
    if overtaken || writer.state().worker.as_ref().is_some_and(|owner| *owner != worker.id) {
        tracing::info!(%log, %error, "a newer attempt goes on with the request");
        return None;
    }
    let code = match error {
        RequestError::Engine(EngineError::ContextFull { .. } | EngineError::UnknownToken { .. }) => {
            FailureCode::Unservable
        }
        RequestError::Engine(_) => FailureCode::EngineFailed,
        _ if delivery.delivery >= worker.streams.tasks.max_deliver() => FailureCode::TooManyAttempts,
        _ => {
            tracing::warn!(%log, %error, "giving the request back");
            return Some(Verdict::Nak);
        }
    };
    tracing::warn!(%log, %error, "the request failed");
    let body = Body::RequestFailed(RequestFailed { code, message: error.to_string() });
    writer.append(body).await.map_or(Some(Verdict::Nak), |()| Some(Verdict::Ack))
}

/// Where a prompt is prefilled, and why.
#[derive(Debug, PartialEq, Eq)]
enum Placement {
    Local,
    Remote { reason: String },
}

/// Conditional disaggregation: a prompt goes to a prefill worker if there is one and enough to do for it.
fn place(tokens: u32, max_local_prefill_length: u32, prefill_workers: usize) -> Placement {
    if prefill_workers == 0 || tokens <= max_local_prefill_length {
        return Placement::Local;
    }
    Placement::Remote {
        reason: format!("prompt of {tokens} > max_local_prefill_length {max_local_prefill_length}"),
    }
}

/// How a remote prefill went.
enum Remote {
    /// The KV of all tokens before the last is in the slot.
    Here,
    /// It must be computed here.
    Lost,
    /// The first token was the last: there is nothing to decode.
    Finished(FinishReason),
}

/// One attempt at one request.
struct Attempt<'a> {
    worker: &'a Arc<Worker>,
    log: &'a LogRef,
    slot: &'a Arc<Slot>,
}

impl Attempt<'_> {
    async fn run(&self, delivery: &Delivery) -> Result<(), RequestError> {
        let mut writer = LogWriter::open(self.worker.streams.log.clone(), self.log.clone()).await?;
        if writer.state().phase.is_terminal() {
            return Ok(());
        }
        if now_us() > writer.state().deadline_us() {
            let timeout_ms = writer.state().accepted.timeout_ms;
            let message = format!("no worker took the request within its {timeout_ms} ms");
            let failed = RequestFailed { code: FailureCode::DeadlineExceeded, message };
            return Ok(writer.append(Body::RequestFailed(failed)).await?);
        }
        let claimed = Claimed {
            worker: self.worker.id.clone(),
            ack_subject: delivery.ack_subject.clone(),
            delivery: delivery.delivery,
            engine: Some(EngineRef {
                layout_hash: self.worker.model.layout_hash,
                weights: self.worker.model.weights.clone(),
            }),
        };
        writer.append(Body::Claimed(claimed)).await?;

        let worker = self.worker;
        let mut output = OutputText::resume(worker.tokenizer.clone(), worker.eos.clone(), writer.state());
        if let Some(reason) = output.finish() {
            // An earlier attempt generated everything and died before it could say so.
            return complete(&mut writer, reason).await;
        }
        self.check_context(writer.state())?;
        let filled = match self.prefill(&mut writer, &mut output).await? {
            Remote::Here => writer.state().sequence().len() as u32 - 1,
            Remote::Lost => 0,
            Remote::Finished(reason) => return complete(&mut writer, reason).await,
        };
        let outputs = worker.runner.add(self.sequence(writer.state(), filled)).await?;
        let reason = self.generate(&mut writer, &mut output, outputs).await?;
        complete(&mut writer, reason).await
    }

    /// Another worker of the model may have longer slots, and the gateway goes by its card.
    fn check_context(&self, state: &Lifecycle) -> Result<(), EngineError> {
        let (tokens, limit) = (state.sequence().len() as u32, self.worker.runner.card().context_limit);
        if tokens < limit {
            return Ok(());
        }
        Err(EngineError::ContextFull { slot: self.slot.index(), start: 0, tokens, limit })
    }

    fn sequence(&self, state: &Lifecycle, filled: u32) -> Sequence {
        let generated = state.tokens.len() as u32;
        let eos = if state.accepted.ignore_eos { Arc::default() } else { self.worker.eos.clone() };
        Sequence {
            slot: self.slot.index(),
            tokens: state.sequence(),
            filled,
            sampling: Arc::new(state.accepted.sampling.clone()),
            next_index: generated,
            remaining: state.accepted.max_tokens - generated,
            eos,
        }
    }

    /// Gets the KV of the prompt (and of what earlier attempts generated) from a prefill worker, if it is to.
    async fn prefill(&self, writer: &mut LogWriter, output: &mut OutputText) -> Result<Remote, RequestError> {
        let tokens = writer.state().sequence().len() as u32;
        let prefill_workers = self.prefill_workers();
        let Placement::Remote { reason } =
            place(tokens, self.worker.config.max_local_prefill_length, prefill_workers)
        else {
            return Ok(Remote::Lost);
        };
        // Subscribed before the task is queued, on the same connection: nothing that follows can be missed.
        let follow = Follow::watch(self.worker.streams.log.clone(), self.log.clone(), writer.seq()).await?;
        writer.append(Body::PrefillQueued(PrefillQueued { tokens, reason })).await?;
        let task = PrefillTask {
            request: self.log.request,
            gateway: self.log.gateway.clone(),
            model: self.worker.model.key.clone(),
            attempt: writer.state().attempt,
        };
        if let Err(error) = enqueue(&*self.worker.streams.tasks, &task).await {
            return self.lost(writer, output, error.to_string()).await;
        }
        if let Err(reason) = self.await_prefill(writer, follow).await? {
            return self.lost(writer, output, reason).await;
        }
        self.take_tokens(writer.state(), output);
        if let Some(reason) = output.finish() {
            release(self.worker, writer.state());
            return Ok(Remote::Finished(reason));
        }
        match self.read(writer.state(), tokens).await {
            Ok(transferred) => {
                writer.append(Body::KvTransferred(transferred)).await?;
                Ok(Remote::Here)
            }
            Err(error) => self.lost(writer, output, error.to_string()).await,
        }
    }

    fn prefill_workers(&self) -> usize {
        let model = &self.worker.model;
        let fits = |lease: &forebay_schemas::card::WorkerLease| {
            lease.role == Role::Prefill && lease.model == model.key && lease.layout_hash == model.layout_hash
        };
        self.worker.workers.borrow().values().filter(|lease| fits(lease)).count()
    }

    /// The KV must be computed here.
    async fn lost(
        &self,
        writer: &mut LogWriter,
        output: &mut OutputText,
        reason: String,
    ) -> Result<Remote, RequestError> {
        tracing::warn!(log = %self.log, reason, "prefilling here instead");
        // The prefill worker may have said so itself.
        if writer.state().phase != Phase::Claimed {
            writer.append(Body::KvLost(KvLost { reason })).await?;
        }
        release(self.worker, writer.state());
        // A prefill that completed in the moment that it was given up has drawn a token all the same.
        self.take_tokens(writer.state(), output);
        Ok(output.finish().map_or(Remote::Lost, Remote::Finished))
    }

    /// Tokens, and their text, that somebody else appended.
    fn take_tokens(&self, state: &Lifecycle, output: &mut OutputText) {
        let known = output.tokens().len();
        state.tokens[known..].iter().for_each(|token| output.push(*token));
        output.release();
    }

    /// Follows the log until the prefill is done. The inner error says why it will not be.
    async fn await_prefill(
        &self,
        writer: &mut LogWriter,
        mut follow: Follow,
    ) -> Result<Result<(), String>, RequestError> {
        let patience = self.worker.config.prefill_patience;
        let attempt = writer.state().attempt;
        let mut give_up = Instant::now() + patience;
        loop {
            let recorded = match tokio::time::timeout_at(give_up, follow.next()).await {
                Ok(Ok(recorded)) => recorded,
                Ok(Err(error)) => {
                    tracing::debug!(log = %self.log, %error, "the log can't be read now; trying again");
                    tokio::time::sleep(READ_PAUSE).await;
                    continue;
                }
                Err(_) => return Ok(Err(format!("nothing of the prefill for {patience:?}"))),
            };
            give_up = Instant::now() + patience;
            writer.observe(recorded.seq, &recorded.event)?;
            if writer.state().attempt != attempt {
                return Err(RequestError::ClaimedElsewhere(writer.state().attempt));
            }
            match recorded.event.body {
                Body::PrefillCompleted(_) => return Ok(Ok(())),
                Body::KvLost(lost) => return Ok(Err(lost.reason)),
                body if body.is_terminal() => {
                    return Err(RequestError::ClaimedElsewhere(attempt));
                }
                _ => {}
            }
        }
    }

    /// Reads the sealed KV of all tokens into the slot.
    async fn read(&self, state: &Lifecycle, tokens: u32) -> Result<KvTransferred, ReadError> {
        if state.kv.last().map(|handle| handle.tokens.end()) != Some(tokens) {
            return Err(ReadError::BadHandle(format!("the handles do not cover the {tokens} tokens")));
        }
        // Decode steps meanwhile write one position of this slot: not one that is being filled.
        self.worker.runner.park(self.slot.index(), tokens).await;
        let (worker, slot, handles) = (self.worker.clone(), self.slot.clone(), state.kv.clone());
        // The copy can't be interrupted: it holds the slot until it is done, whatever becomes of the request.
        let read = move || {
            let transport = transport(&worker, &handles[0])?;
            let layout = &worker.runner.card().layout;
            let report = read_kv(&*transport, &handles, worker.runner.kv(), layout, slot.index())?;
            Ok(KvTransferred {
                bytes: report.bytes,
                tokens: report.tokens,
                read_us: report.micros,
                transport: transport.name().to_owned(),
            })
        };
        off_thread(read).await
    }

    /// Appends tokens as they come. One append is outstanding at a time; tokens made meanwhile share the next.
    async fn generate(
        &self,
        writer: &mut LogWriter,
        output: &mut OutputText,
        mut outputs: mpsc::Receiver<Output>,
    ) -> Result<FinishReason, RequestError> {
        let mut batch = Vec::with_capacity(BATCH_MAX);
        loop {
            if outputs.recv_many(&mut batch, BATCH_MAX).await == 0 {
                return Err(EngineStopped.into());
            }
            let first_index = output.tokens().len();
            let mut failure = None;
            for item in batch.drain(..) {
                match item {
                    Output::Token(token) => output.push(token),
                    Output::Failed(error) => failure = Some(error),
                    Output::Filled(_) => {}
                }
            }
            let tokens = output.tokens()[first_index..].to_vec();
            if !tokens.is_empty() {
                let text = output.release();
                let generated = TokensGenerated { first_index: first_index as u32, tokens, text };
                writer.append(Body::TokensGenerated(generated)).await?;
            }
            match (output.finish(), failure) {
                (Some(reason), _) => return Ok(reason),
                (None, Some(error)) => return Err(error.into()),
                (None, None) => {}
            }
        }
    }
}

/// Gives back sealed KV that nobody will read (any more). Best effort, and not waited for: the lease ends by itself.
fn release(worker: &Arc<Worker>, state: &Lifecycle) {
    let Some(first) = state.kv.first().cloned() else { return };
    let worker = worker.clone();
    let give_back = move || {
        if let Ok(transport) = transport(&worker, &first)
            && transport.claim(&first).is_ok()
        {
            transport.release(&first);
        }
    };
    environment::spawn(off_thread(give_back));
}

/// The way to the worker that holds a handle's bytes. Blocks, for a moment, the first time.
fn transport(worker: &Worker, handle: &KvHandle) -> Result<Arc<dyn Transport>, ReadError> {
    let lease = worker.workers.borrow().get(&handle.agent).cloned();
    worker.peers.transport(handle, lease.as_deref())
}

async fn complete(writer: &mut LogWriter, reason: FinishReason) -> Result<(), RequestError> {
    let usage = writer.state().usage();
    Ok(writer.append(Body::RequestCompleted(RequestCompleted { reason, usage })).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_prompts_and_lonely_workers_prefill_locally() {
        assert_eq!(place(100, 128, 2), Placement::Local);
        assert_eq!(place(1000, 128, 0), Placement::Local);
        assert!(matches!(place(129, 128, 1), Placement::Remote { reason } if reason.contains("129 > ")));
    }
}
