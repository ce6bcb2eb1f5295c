//! One attempt at one request: from the claim to its end, or to where another worker goes on.

use super::{
    RequestError,
    handover::Leave,
    placement::{Placement, Prompt, place},
    release,
};
use crate::{
    engine::EngineError,
    kv::{KvRead, ReadError, Sealed, Slot},
    logits::LogitsProcessors,
    output::OutputText,
    runner::{EngineStopped, Output},
    scheduler::Sequence,
    worker::Worker,
};
use forebay_schemas::{
    event::{
        Body, Claimed, EngineRef, FinishReason, KvLost, KvTransferred, RequestCompleted, TokensGenerated,
    },
    lifecycle::{Lifecycle, Phase},
};
use forebay_streams::{
    environment::{off_thread, pause},
    log::LogRef,
    tasks::Delivery,
    writer::LogWriter,
};
use std::{mem, sync::Arc};
use tokio::sync::mpsc;

/// Outputs taken from the engine at once; they become one event.
const BATCH_MAX: usize = 64;

/// How an attempt went.
pub(super) enum Outcome {
    /// The request has ended.
    Ended,
    /// Another worker goes on; with a lease, its KV waits here to be read.
    Left(Option<Sealed>),
}

/// What there is before the first step.
pub(super) enum Start {
    /// KV of `filled` tokens is in the slot, of which the first `cached` come from this worker's prefix cache; the rest is
    /// computed here.
    Filled { filled: u32, cached: u32 },
    /// The prefill's token was the last: there is nothing to decode.
    Finished(FinishReason),
    /// The worker is to stop before anything was computed here.
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
        worker.check_context(self.slot, writer.state())?;
        let (filled, cached) = match self.start(&mut writer, &mut output).await? {
            Start::Filled { filled, cached } => (filled, cached),
            Start::Finished(reason) => return self.complete(&mut writer, reason).await,
            Start::Leave(why) => {
                let (_, nothing) = mpsc::channel(1);
                return self.hand_over(&mut writer, &mut output, nothing, why, 0).await;
            }
        };
        let processors = LogitsProcessors::resume(writer.state(), &worker.vocabulary).await?;
        let outputs = worker.runner.add(self.sequence(writer.state(), processors, filled)).await?;
        self.generate(&mut writer, &mut output, outputs, cached).await
    }

    fn sequence(&self, state: &Lifecycle, processors: LogitsProcessors, filled: u32) -> Sequence {
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
            processors,
        }
    }

    /// Gets what KV there is: what the attempt before has left, or that of a remote prefill, if it is to be remote.
    async fn start(&self, writer: &mut LogWriter, output: &mut OutputText) -> Result<Start, RequestError> {
        if writer.state().handed_over {
            match self.read(writer.state()).await {
                Ok(transferred) => {
                    let filled = transferred.tokens;
                    writer.append(Body::KvTransferred(transferred)).await?;
                    // Where a first token is still to be drawn, what the attempt before has found counts.
                    return Ok(Start::Filled { filled, cached: writer.state().cached_tokens });
                }
                Err(error) => {
                    self.lost(writer, output, error.to_string(), 0, 0).await?;
                }
            }
        }
        let cached = self.worker.load_prefix(self.slot, writer.state()).await;
        let prompt = Prompt { tokens: writer.state().sequence().len() as u32, cached };
        match place(prompt, self.worker.limits(), self.worker.prefill()) {
            Placement::Remote { reason } => self.prefill_remotely(writer, output, cached, reason).await,
            Placement::Local { reason } => {
                tracing::debug!(log = %self.log, reason, "prefilling here");
                Ok(Start::Filled { filled: cached, cached })
            }
        }
    }

    /// What comes after the `filled` positions must be computed here.
    pub(super) async fn lost(
        &self,
        writer: &mut LogWriter,
        output: &mut OutputText,
        reason: String,
        filled: u32,
        cached: u32,
    ) -> Result<Start, RequestError> {
        tracing::warn!(log = %self.log, reason, "computing the KV here instead");
        // The prefill worker may have said so itself.
        if writer.state().phase != Phase::Claimed || writer.state().handed_over {
            writer.append(Body::KvLost(KvLost { reason })).await?;
        }
        release(self.worker, writer.state());
        // A prefill that completed in the moment that it was given up has drawn a token all the same.
        self.take_tokens(writer.state(), output);
        // All of the KV may be here, and not the token that follows: the last one is run once more for its logits.
        let filled = filled.min(writer.state().sequence().len() as u32 - 1);
        Ok(output.finish().map_or(Start::Filled { filled, cached }, Start::Finished))
    }

    /// Tokens, and their text, that somebody else appended.
    pub(super) fn take_tokens(&self, state: &Lifecycle, output: &mut OutputText) {
        let known = output.tokens().len();
        state.tokens[known..].iter().for_each(|token| output.push(*token));
        output.release();
    }

    /// Reads all sealed KV into the slot.
    async fn read(&self, state: &Lifecycle) -> Result<KvTransferred, ReadError> {
        let tokens = state.kv.last().map_or(0, |handle| handle.tokens.end());
        // Decode steps meanwhile write one position of this slot: not one that is being filled.
        if !self.worker.runner.park(self.slot.index(), tokens).await {
            return Err(EngineError::KvFull { slot: self.slot.index() }.into());
        }
        let (worker, slot, handles) = (self.worker.clone(), self.slot.clone(), state.kv.clone());
        // The copy can't be interrupted: it holds the slot until it is done, whatever becomes of the request.
        let read = move || {
            let mut read = KvRead::begin(worker.transport(&handles[0])?, &handles[0])?;
            pause();
            handles.iter().try_for_each(|handle| worker.read_into(&slot, &mut read, handle))?;
            let report = read.report();
            Ok(KvTransferred {
                bytes: report.bytes,
                tokens: report.tokens,
                read_us: report.micros,
                after_us: 0,
                transport: read.transport().to_owned(),
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

    /// Keeps the whole sequence's KV for the next turn of the conversation. The last token was drawn and not run.
    async fn keep(&self, state: &Lifecycle) {
        if self.worker.cache.is_off() {
            return;
        }
        let mut tokens = state.sequence();
        tokens.pop();
        self.worker.store_prefix(self.slot, state, &tokens).await;
    }

    /// Appends tokens as they come. One append is outstanding at a time; tokens made meanwhile share the next.
    async fn generate(
        &self,
        writer: &mut LogWriter,
        output: &mut OutputText,
        mut outputs: mpsc::Receiver<Output>,
        cached: u32,
    ) -> Result<Outcome, RequestError> {
        let prompt = writer.state().sequence();
        let mut kept = false;
        let mut batch = Vec::with_capacity(BATCH_MAX);
        let leave_now = self.worker.leave_now();
        tokio::pin!(leave_now);
        loop {
            let received = tokio::select! {
                biased;
                why = &mut leave_now => return self.hand_over(writer, output, outputs, why, cached).await,
                received = outputs.recv_many(&mut batch, BATCH_MAX) => received,
            };
            if received == 0 {
                return Err(EngineStopped.into());
            }
            let first_index = output.tokens().len();
            let mut failure = None;
            for item in batch.drain(..) {
                match item {
                    Output::Token(sampled) => output.draw(sampled),
                    Output::Failed(error) => failure = Some(error),
                    Output::Filled(_) => {}
                }
            }
            let tokens = output.tokens()[first_index..].to_vec();
            if !tokens.is_empty() {
                let text = output.release();
                let cached_tokens = if first_index == 0 { cached } else { 0 };
                let first_index = first_index as u32;
                let logprobs = self.worker.logprobs(output);
                let generated = TokensGenerated { first_index, tokens, text, cached_tokens, logprobs };
                writer.append(Body::TokensGenerated(generated)).await?;
                if !mem::replace(&mut kept, true) {
                    // Whoever asks something with the same beginning need not wait for the end of this answer.
                    self.worker.store_prefix_soon(self.slot, writer.state(), &prompt);
                }
            }
            match (output.finish(), failure) {
                (Some(reason), _) => {
                    let outcome = self.complete(writer, reason).await?;
                    self.keep(writer.state()).await;
                    return Ok(outcome);
                }
                (None, Some(error)) => return Err(error.into()),
                (None, None) => {}
            }
        }
    }
}
