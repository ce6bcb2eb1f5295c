//! The prefill worker: runs prompts for decode workers, and keeps the KV sealed until they have read it.
//!
//! pull → claim → take what is known of the prefix → run the rest chunk by chunk, sealing each → append the first token →
//! acknowledge → wait for the reader.

use crate::{
    engine::EngineError,
    kv::{KvRead, Sealed, Slot},
    logits::LogitsProcessors,
    output::OutputText,
    runner::{EngineStopped, Output},
    scheduler::Sequence,
    worker::{NO_LOG_PAUSE, NO_LOG_TRIES, Worker},
};
use forebay_schemas::{
    event::{Body, KvLost, KvReady, PrefillClaimed, PrefillCompleted},
    format::FormatError,
    kv::TokenRange,
    lifecycle::{Illegal, Lifecycle, Phase},
    task::{PrefillTask, Role, Task},
};
use forebay_streams::{
    environment::off_thread,
    log::LogRef,
    tasks::{Delivery, Verdict},
    writer::{LogWriter, WriteError},
};
use std::{sync::Arc, time::Duration};
use tokio::{sync::Semaphore, time::Instant};
use tokio_util::sync::CancellationToken;

/// Prompts that a worker holds in front of their prefill: one that runs, and one to go on with. Further ones stay
/// in the queue, where other workers can take them.
pub(crate) const COMPUTING_MAX: usize = 2;

/// Pause before a prefill that failed is tried again, here or elsewhere.
const FAILED_PAUSE: Duration = Duration::from_millis(200);

/// Claims of one prefill after which no prefill worker tries it any more: it may be what ends them.
const CLAIMS_MAX: u32 = 3;

/// Why a prefill was not done here.
#[derive(Debug, thiserror::Error)]
enum PrefillError {
    /// The log can't be extended (any more): the request ended, or another attempt has begun.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The engine refused or failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Nothing can be generated in the format that is asked for.
    #[error("the output's format: {0}")]
    Format(#[from] FormatError),
    /// The engine is gone.
    #[error(transparent)]
    Stopped(#[from] EngineStopped),
}

/// One slot's loop.
pub(crate) async fn serve(worker: Arc<Worker>, stop: CancellationToken, computing: Arc<Semaphore>) {
    loop {
        let Ok(permit) = computing.acquire().await else { return };
        let Some(delivery) = worker.next_task(&stop).await else { return };
        let Ok(task) = PrefillTask::decode(&delivery.payload) else {
            tracing::error!("a prefill task is not readable; dropped");
            worker.answer(&delivery, Verdict::Ack).await;
            continue;
        };
        let slot = Arc::new(worker.slots.take().expect("there are as many loops as slots"));
        let outcome = {
            let _alive = worker.keep_alive(&delivery);
            prefill(&worker, &delivery, &task, &slot).await
        };
        worker.runner.remove(slot.index()).await;
        drop(permit);
        match outcome {
            Ok(sealed) => {
                worker.answer(&delivery, Verdict::Ack).await;
                if let Some(sealed) = sealed {
                    let released = sealed.over().await;
                    tracing::debug!(request = %task.request, released, "the KV is no longer held");
                }
            }
            // Another worker does it now. An acknowledgement from here would take the task from there.
            Err(PrefillError::Write(WriteError::Overtaken {
                illegal: Illegal::OtherPrefill { .. }, ..
            })) => {}
            // Nobody waits for it any more.
            Err(PrefillError::Write(WriteError::Overtaken { .. } | WriteError::Corrupt { .. })) => {
                worker.answer(&delivery, Verdict::Ack).await;
            }
            // It would fail again: whoever waits for it is told, and tries it itself.
            Err(error @ (PrefillError::Engine(_) | PrefillError::Format(_))) => {
                tracing::warn!(request = %task.request, %error, "a prefill failed");
                give_up(&worker, &task, &error).await;
                worker.answer(&delivery, Verdict::Ack).await;
            }
            Err(PrefillError::Write(WriteError::Missing(_))) => {
                let log = LogRef { gateway: task.gateway.clone(), request: task.request };
                let gone = delivery.delivery >= NO_LOG_TRIES && worker.has_no_log(&log).await;
                let verdict = if gone { Verdict::Ack } else { Verdict::Later(NO_LOG_PAUSE) };
                worker.answer(&delivery, verdict).await;
            }
            Err(error) => {
                tracing::warn!(request = %task.request, %error, "a prefill failed");
                worker.answer(&delivery, Verdict::Later(FAILED_PAUSE)).await;
            }
        }
        worker.unused(&slot).await;
        worker.runner.free(slot.index()).await;
    }
}

/// Runs a prompt. Returns the lease on its KV, or none if nobody wants it any more.
async fn prefill(
    worker: &Arc<Worker>,
    delivery: &Delivery,
    task: &PrefillTask,
    slot: &Arc<Slot>,
) -> Result<Option<Sealed>, PrefillError> {
    let log = LogRef { gateway: task.gateway.clone(), request: task.request };
    let mut writer = LogWriter::open(worker.streams.log.clone(), log).await?;
    let waiting = matches!(writer.state().phase, Phase::PrefillQueued | Phase::Prefilling);
    if writer.state().attempt != task.attempt || !waiting {
        return Ok(None);
    }
    if let Some(reason) = refusal(worker, writer.state()) {
        tracing::warn!(log = %writer.log(), reason, "left to the decode worker");
        if writer.state().prefills >= CLAIMS_MAX {
            worker.bury(writer.log(), Role::Prefill, None, reason.clone(), CLAIMS_MAX.into()).await;
        }
        writer.append(Body::KvLost(KvLost { reason })).await?;
        return Ok(None);
    }
    let claimed = PrefillClaimed {
        worker: worker.id.clone(),
        ack_subject: delivery.ack_subject.clone(),
        delivery: delivery.delivery,
    };
    writer.append(Body::PrefillClaimed(claimed)).await?;

    worker.check_context(slot, writer.state())?;
    let begun = Instant::now();
    let filled = prefix(worker, slot, writer.state()).await;
    let state = writer.state();
    let mut output = OutputText::resume(worker.tokenizer.clone(), worker.eos.clone(), state);
    let first_index = state.tokens.len() as u32;
    let tokens = state.sequence();
    let processors = LogitsProcessors::resume(state, &worker.vocabulary).await?;
    let sequence = Sequence {
        slot: slot.index(),
        tokens: tokens.clone(),
        filled,
        sampling: Arc::new(state.accepted.sampling.clone()),
        next_index: first_index,
        remaining: 1,
        eos: Arc::default(),
        processors,
    };
    let mut sealed = Sealing { worker, slot, lease: None, to: state.kv_from() };
    sealed.seal(&mut writer, filled).await?;
    let mut outputs = worker.runner.add(sequence).await?;
    loop {
        match outputs.recv().await.ok_or(EngineStopped)? {
            Output::Filled(filled) => sealed.seal(&mut writer, filled).await?,
            Output::Token(sampled) => {
                let token = sampled.token;
                output.draw(sampled);
                // A prompt of which one token was left ran as a step, which says nothing of positions.
                sealed.seal(&mut writer, tokens.len() as u32).await?;
                let completed = PrefillCompleted {
                    worker: worker.id.clone(),
                    first_index,
                    token,
                    text: output.release(),
                    compute_us: begun.elapsed().as_micros() as u64,
                    cached_tokens: filled,
                    logprobs: worker.logprobs(&mut output).pop(),
                };
                writer.append(Body::PrefillCompleted(completed)).await?;
                worker.store_prefix_soon(slot, writer.state(), &tokens);
                return Ok(sealed.lease);
            }
            Output::Failed(error) => return Err(error.into()),
        }
    }
}

/// Why a prefill is not for this worker, or for none any more. Said at once: the decode worker then goes on by itself.
fn refusal(worker: &Worker, state: &Lifecycle) -> Option<String> {
    let found = worker.model.layout_hash;
    let wanted = state.asked.as_ref().and_then(|asked| asked.layout_hash).unwrap_or(found);
    if wanted != found {
        return Some(format!("worker {} has KV of layout {found}, and {wanted} is asked for", worker.id));
    }
    let claims = state.prefills;
    (claims >= CLAIMS_MAX).then(|| format!("{claims} prefill workers began and did not finish"))
}

/// Fills the beginning of a slot with what is known of a sequence here, or at the decode worker that asks, and returns
/// how many positions that are.
async fn prefix(worker: &Arc<Worker>, slot: &Arc<Slot>, state: &Lifecycle) -> u32 {
    let known = worker.load_prefix(slot, state).await;
    let Some(handle) = state.asked.as_ref().and_then(|asked| asked.kv.clone()) else { return known };
    let (end, tokens) = (handle.tokens.end(), state.sequence().len() as u32);
    if end <= known || end >= tokens {
        return known;
    }
    if !worker.runner.park(slot.index(), tokens).await {
        return known;
    }
    let (reader, into) = (worker.clone(), slot.clone());
    let read = off_thread(move || {
        let mut read = KvRead::begin(reader.transport(&handle)?, &handle)?;
        reader.read_into(&into, &mut read, &handle)
    });
    match read.await {
        Ok(()) => end,
        Err(error) => {
            tracing::info!(request = %state.request, %error, "what the decode worker has is computed again");
            // What was read may have gone over what was known.
            worker.load_prefix(slot, state).await
        }
    }
}

/// What is sealed of a slot that is being filled.
struct Sealing<'a> {
    worker: &'a Arc<Worker>,
    slot: &'a Arc<Slot>,
    lease: Option<Sealed>,
    /// Up to where it is sealed, or need not be.
    to: u32,
}

impl Sealing<'_> {
    /// Seals what the engine has filled and no longer touches, and says so.
    async fn seal(&mut self, writer: &mut LogWriter, filled: u32) -> Result<(), PrefillError> {
        if filled <= self.to {
            return Ok(());
        }
        let (worker, kv_lease) = (self.worker, self.worker.config.kv_lease);
        let lease = self.lease.get_or_insert_with(|| worker.leases.seal(self.slot.index(), kv_lease));
        lease.renew(kv_lease);
        let tokens = TokenRange { start: self.to, count: filled - self.to };
        let handle = match worker.seal(self.slot, lease, tokens).await {
            // It is computed again, and then sealed.
            Err(EngineError::KvGone { .. }) => return Ok(()),
            handle => handle?,
        };
        writer.append(Body::KvReady(KvReady { handle })).await?;
        self.to = filled;
        Ok(())
    }
}

async fn give_up(worker: &Worker, task: &PrefillTask, error: &PrefillError) {
    let log = LogRef { gateway: task.gateway.clone(), request: task.request };
    let lost = Body::KvLost(KvLost { reason: format!("{}: {error}", worker.id) });
    let told = async {
        let mut writer = LogWriter::open(worker.streams.log.clone(), log).await?;
        match writer.state().prefiller.as_ref() == Some(&worker.id) {
            true => writer.append(lost).await,
            false => Ok(()),
        }
    };
    if let Err(error) = told.await {
        tracing::debug!(request = %task.request, %error, "the decode worker was not told");
    }
}
