//! The prefill worker: runs prompts for decode workers, and keeps the KV sealed until they have read it.
//!
//! pull → claim → run chunk by chunk, sealing each → append the first token → acknowledge → wait for the reader.

use crate::{
    engine::EngineError,
    kv::{Sealed, Slot, sums},
    output::OutputText,
    runner::{EngineStopped, Output},
    scheduler::Sequence,
    worker::{NO_LOG_PAUSE, NO_LOG_TRIES, Worker},
};
use forebay_schemas::{
    event::{Body, KvLost, KvReady, PrefillClaimed, PrefillCompleted},
    kv::{KvHandle, TokenRange},
    lifecycle::{Illegal, Phase},
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
            Err(PrefillError::Engine(error)) => {
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
    if writer.state().prefills >= CLAIMS_MAX {
        let reason = format!("{} prefill workers began and did not finish", writer.state().prefills);
        tracing::warn!(log = %writer.log(), reason, "left to the decode worker");
        worker.bury(writer.log(), Role::Prefill, None, reason.clone(), CLAIMS_MAX.into()).await;
        writer.append(Body::KvLost(KvLost { reason })).await?;
        return Ok(None);
    }
    let claimed = PrefillClaimed {
        worker: worker.id.clone(),
        ack_subject: delivery.ack_subject.clone(),
        delivery: delivery.delivery,
    };
    writer.append(Body::PrefillClaimed(claimed)).await?;

    let state = writer.state();
    let mut output = OutputText::resume(worker.tokenizer.clone(), worker.eos.clone(), state);
    let first_index = state.tokens.len() as u32;
    let sequence = Sequence {
        slot: slot.index(),
        tokens: state.sequence(),
        filled: 0,
        sampling: Arc::new(state.accepted.sampling.clone()),
        next_index: first_index,
        remaining: 1,
        eos: Arc::default(),
    };
    let begun = Instant::now();
    let mut outputs = worker.runner.add(sequence).await?;
    let mut sealed: Option<Sealed> = None;
    let mut sealed_to = 0;
    loop {
        match outputs.recv().await.ok_or(EngineStopped)? {
            Output::Filled(filled) => {
                let lease =
                    sealed.get_or_insert_with(|| worker.leases.seal(slot.index(), worker.config.kv_lease));
                lease.renew(worker.config.kv_lease);
                let tokens = TokenRange { start: sealed_to, count: filled - sealed_to };
                let handle = seal(worker, slot, lease, tokens).await;
                writer.append(Body::KvReady(KvReady { handle })).await?;
                sealed_to = filled;
            }
            Output::Token(token) => {
                output.push(token);
                let completed = PrefillCompleted {
                    worker: worker.id.clone(),
                    first_index,
                    token,
                    text: output.release(),
                    compute_us: begun.elapsed().as_micros() as u64,
                    cached_tokens: 0,
                };
                writer.append(Body::PrefillCompleted(completed)).await?;
                return Ok(sealed);
            }
            Output::Failed(error) => return Err(error.into()),
        }
    }
}

async fn give_up(worker: &Worker, task: &PrefillTask, error: &EngineError) {
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

/// Describes positions that the engine has filled and no longer touches.
async fn seal(worker: &Arc<Worker>, slot: &Arc<Slot>, lease: &Sealed, tokens: TokenRange) -> KvHandle {
    let layout = worker.runner.card().layout;
    let (runner, held) = (worker.runner.clone(), slot.clone());
    let checksums = off_thread(move || sums(runner.kv(), &layout, held.index(), tokens)).await;
    worker.handle(slot, lease, tokens, checksums)
}
