//! One attempt at one request: from the claim to its end, or to where another worker goes on.

use super::{
    RequestError,
    handover::Leave,
    placement::{Placement, Prompt, place},
    release, transport,
};
use crate::{
    engine::EngineError,
    kv::{ReadError, Sealed, Slot, read_kv},
    output::OutputText,
    runner::{EngineStopped, Output},
    scheduler::Sequence,
    worker::Worker,
};
use forebay_schemas::{
    event::{
        Body, Claimed, EngineRef, FinishReason, KvLost, KvTransferred, PrefillQueued, RequestCompleted,
        TokensGenerated,
    },
    lifecycle::{Lifecycle, Phase},
    task::PrefillTask,
};
use forebay_streams::{
    environment::off_thread,
    follow::Follow,
    log::LogRef,
    tasks::{Delivery, enqueue},
    writer::LogWriter,
};
use std::{sync::Arc, time::Duration};
use tokio::{sync::mpsc, time::Instant};

/// Outputs taken from the engine at once; they become one event.
const BATCH_MAX: usize = 64;

/// Pause before a log that could not be read is read again.
const READ_PAUSE: Duration = Duration::from_millis(500);

/// How an attempt went.
pub(super) enum Outcome {
    /// The request has ended.
    Ended,
    /// Another worker goes on; with a lease, its KV waits here to be read.
    Left(Option<Sealed>),
}

/// What there is before the first step.
enum Start {
    /// KV of this many tokens is in the slot; the rest is computed here.
    Filled(u32),
    /// The prefill's token was the last: there is nothing to decode.
    Finished(FinishReason),
    /// The worker is to stop before anything was computed here.
    Leave(Leave),
}

/// How waiting for a remote prefill ended.
enum Waited {
    /// It is done.
    Done,
    /// It will not be.
    Lost(String),
    /// The worker's grace is over.
    Leave(Leave),
}

/// One attempt at one request.
pub(super) struct Attempt<'a> {
    pub(super) worker: &'a Arc<Worker>,
    pub(super) log: &'a LogRef,
    pub(super) slot: &'a Arc<Slot>,
}

impl Attempt<'_> {
    pub(super) async fn run(
        &self,
        mut writer: LogWriter,
        delivery: &Delivery,
    ) -> Result<Outcome, RequestError> {
        let worker = self.worker;
        let engine =
            EngineRef { layout_hash: worker.model.layout_hash, weights: worker.model.weights.clone() };
        let claimed = Claimed {
            worker: worker.id.clone(),
            ack_subject: delivery.ack_subject.clone(),
            delivery: delivery.delivery,
            engine: Some(engine),
        };
        writer.append(Body::Claimed(claimed)).await?;

        let mut output = OutputText::resume(worker.tokenizer.clone(), worker.eos.clone(), writer.state());
        if let Some(reason) = output.finish() {
            // An earlier attempt generated everything and died before it could say so.
            release(worker, writer.state());
            return self.complete(&mut writer, reason).await;
        }
        self.check_context(writer.state())?;
        let filled = match self.start(&mut writer, &mut output).await? {
            Start::Filled(filled) => filled,
            Start::Finished(reason) => return self.complete(&mut writer, reason).await,
            Start::Leave(why) => {
                let (_, nothing) = mpsc::channel(1);
                return self.hand_over(&mut writer, &mut output, nothing, why).await;
            }
        };
        let outputs = worker.runner.add(self.sequence(writer.state(), filled)).await?;
        self.generate(&mut writer, &mut output, outputs).await
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

    /// Gets what KV there is: what the attempt before has left, or that of a remote prefill, if it is to be remote.
    async fn start(&self, writer: &mut LogWriter, output: &mut OutputText) -> Result<Start, RequestError> {
        if writer.state().handed_over {
            match self.read(writer.state()).await {
                Ok(transferred) => {
                    let filled = transferred.tokens;
                    writer.append(Body::KvTransferred(transferred)).await?;
                    return Ok(Start::Filled(filled));
                }
                Err(error) => self.lost(writer, output, error.to_string()).await?,
            };
        }
        let tokens = writer.state().sequence().len() as u32;
        let prompt = Prompt { tokens, cached: 0 };
        let reason = match place(prompt, self.worker.limits(), self.worker.prefill()) {
            Placement::Remote { reason } => reason,
            Placement::Local { reason } => {
                tracing::debug!(log = %self.log, reason, "prefilling here");
                return Ok(Start::Filled(0));
            }
        };
        // Subscribed before the task is queued, on the same connection: nothing that follows can be missed.
        let follow = Follow::watch(self.worker.streams.log.clone(), self.log.clone(), writer.seq()).await?;
        writer
            .append(Body::PrefillQueued(PrefillQueued {
                tokens,
                reason,
                cached_tokens: 0,
                layout_hash: None,
                kv: None,
            }))
            .await?;
        let task = PrefillTask {
            request: self.log.request,
            gateway: self.log.gateway.clone(),
            model: self.worker.model.key.clone(),
            attempt: writer.state().attempt,
        };
        if let Err(error) = enqueue(&*self.worker.streams.tasks, &task).await {
            return self.lost(writer, output, error.to_string()).await;
        }
        match self.await_prefill(writer, follow).await? {
            Waited::Done => {}
            Waited::Lost(reason) => return self.lost(writer, output, reason).await,
            Waited::Leave(why) => return Ok(Start::Leave(why)),
        }
        self.take_tokens(writer.state(), output);
        if let Some(reason) = output.finish() {
            release(self.worker, writer.state());
            return Ok(Start::Finished(reason));
        }
        let end = writer.state().kv.last().map(|handle| handle.tokens.end());
        let read = match end == Some(tokens) {
            true => self.read(writer.state()).await,
            false => Err(ReadError::BadHandle(format!("the handles do not cover the {tokens} tokens"))),
        };
        match read {
            Ok(transferred) => {
                writer.append(Body::KvTransferred(transferred)).await?;
                Ok(Start::Filled(tokens))
            }
            Err(error) => self.lost(writer, output, error.to_string()).await,
        }
    }

    /// The KV must be computed here.
    async fn lost(
        &self,
        writer: &mut LogWriter,
        output: &mut OutputText,
        reason: String,
    ) -> Result<Start, RequestError> {
        tracing::warn!(log = %self.log, reason, "computing the KV here instead");
        // The prefill worker may have said so itself.
        if writer.state().phase != Phase::Claimed || writer.state().handed_over {
            writer.append(Body::KvLost(KvLost { reason })).await?;
        }
        release(self.worker, writer.state());
        // A prefill that completed in the moment that it was given up has drawn a token all the same.
        self.take_tokens(writer.state(), output);
        Ok(output.finish().map_or(Start::Filled(0), Start::Finished))
    }

    /// Tokens, and their text, that somebody else appended.
    fn take_tokens(&self, state: &Lifecycle, output: &mut OutputText) {
        let known = output.tokens().len();
        state.tokens[known..].iter().for_each(|token| output.push(*token));
        output.release();
    }

    /// Follows the log until the prefill is done, or will not be.
    async fn await_prefill(
        &self,
        writer: &mut LogWriter,
        mut follow: Follow,
    ) -> Result<Waited, RequestError> {
        let patience = self.worker.config.prefill_patience;
        let attempt = writer.state().attempt;
        let mut give_up = Instant::now() + patience;
        let deserted = self.worker.no_prefill_worker_left();
        tokio::pin!(deserted);
        loop {
            let news = tokio::select! {
                biased;
                news = tokio::time::timeout_at(give_up, follow.next()) => news,
                // A prefill under way is worth waiting for: the sequence can then leave with its KV.
                () = self.worker.grace_over.cancelled() => return Ok(Waited::Leave(Leave::TimeIsUp)),
                () = &mut deserted => return Ok(Waited::Lost("no prefill worker is left".into())),
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
                Body::PrefillCompleted(_) => return Ok(Waited::Done),
                Body::KvLost(lost) => return Ok(Waited::Lost(lost.reason)),
                body if body.is_terminal() => {
                    return Err(RequestError::ClaimedElsewhere(attempt));
                }
                _ => {}
            }
        }
    }

    /// Reads all sealed KV into the slot.
    async fn read(&self, state: &Lifecycle) -> Result<KvTransferred, ReadError> {
        let tokens = state.kv.last().map_or(0, |handle| handle.tokens.end());
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

    pub(super) async fn complete(
        &self,
        writer: &mut LogWriter,
        reason: FinishReason,
    ) -> Result<Outcome, RequestError> {
        let usage = writer.state().usage();
        writer.append(Body::RequestCompleted(RequestCompleted { reason, usage })).await?;
        Ok(Outcome::Ended)
    }

    /// Appends tokens as they come. One append is outstanding at a time; tokens made meanwhile share the next.
    async fn generate(
        &self,
        writer: &mut LogWriter,
        output: &mut OutputText,
        mut outputs: mpsc::Receiver<Output>,
    ) -> Result<Outcome, RequestError> {
        let mut batch = Vec::with_capacity(BATCH_MAX);
        let leave_now = self.worker.leave_now();
        tokio::pin!(leave_now);
        loop {
            let received = tokio::select! {
                biased;
                why = &mut leave_now => return self.hand_over(writer, output, outputs, why).await,
                received = outputs.recv_many(&mut batch, BATCH_MAX) => received,
            };
            if received == 0 {
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
                let generated =
                    TokensGenerated { first_index: first_index as u32, tokens, text, cached_tokens: 0 };
                writer.append(Body::TokensGenerated(generated)).await?;
            }
            match (output.finish(), failure) {
                (Some(reason), _) => return self.complete(writer, reason).await,
                (None, Some(error)) => return Err(error.into()),
                (None, None) => {}
            }
        }
    }
}
