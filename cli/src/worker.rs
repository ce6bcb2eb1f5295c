//! `forebay worker`.

use crate::{
    config::{NatsArgs, RegistryArgs, data_folder, end_with_parent, init_logging, runtime, told_to_stop},
    kv::KvArgs,
    model::ModelArgs,
};
use anyhow::Context;
use clap::Args;
use forebay_schemas::task::Role;
use forebay_workers::{
    model::ModelText,
    worker::{self, WorkerConfig},
};
use std::{path::PathBuf, time::Duration};
use tokio_util::sync::CancellationToken;

/// How workers work, whatever their role.
#[derive(Args, Clone, Debug)]
pub(crate) struct WorkArgs {
    /// Prompts of at most this many uncached tokens are prefilled by the decode worker itself. `forebay config` changes
    /// it for all workers while they run.
    #[arg(long, env = "FOREBAY_MAX_LOCAL_PREFILL_LENGTH", default_value_t = 128, value_name = "TOKENS")]
    max_local_prefill_length: u32,
    /// While this many tasks wait for a prefill worker, decode workers prefill themselves. `forebay config` changes it
    /// for all workers while they run.
    #[arg(long, env = "FOREBAY_MAX_PREFILL_QUEUE_SIZE", default_value_t = 64, value_name = "TASKS")]
    max_prefill_queue_size: u32,
    /// Tokens of prompts that are run at once while nothing decodes. Default: 256 on a CPU, 2048 on a GPU.
    #[arg(long, env = "FOREBAY_CHUNK", value_name = "TOKENS")]
    chunk: Option<u32>,
    /// Tokens of a step while something decodes: one for each running answer, the rest for prompts. Less keeps the
    /// pace of answers, more lets prompts through. Default: 32 on a CPU, 512 on a GPU.
    #[arg(long, env = "FOREBAY_STEP_TOKENS", value_name = "TOKENS")]
    step_tokens: Option<u32>,
    /// GiB of memory for the KV of prefixes that were seen before; 0 turns the prefix cache off.
    #[arg(long, env = "FOREBAY_CACHE_GIB", default_value_t = 2.0, value_name = "GIB")]
    cache_gib: f64,
    /// Read KV only once the whole prompt is run: to measure what reading it earlier saves.
    #[arg(long, env = "FOREBAY_BENCH_NO_OVERLAP", hide = true)]
    bench_no_overlap: bool,
    /// Seconds that a prefill worker keeps KV for the decode worker.
    #[arg(long, env = "FOREBAY_KV_LEASE_S", default_value_t = 60, value_name = "SECONDS")]
    kv_lease_s: u64,
    /// Seconds without any sign of a remote prefill after which a decode worker does it itself.
    #[arg(long, env = "FOREBAY_PREFILL_PATIENCE_S", default_value_t = 60, value_name = "SECONDS")]
    prefill_patience_s: u64,
    /// Attempts in a row without a token after which a request fails and goes to the dead letters.
    #[arg(long, env = "FOREBAY_MAX_ATTEMPTS", default_value_t = 5, value_name = "N")]
    max_attempts: u32,
}

#[derive(Args, Debug)]
pub(crate) struct WorkerArgs {
    /// `decode` owns requests and generates; `prefill` runs prompts for decode workers.
    #[arg(long, value_parser = ["prefill", "decode"], value_name = "ROLE")]
    role: String,
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    registry: RegistryArgs,
    #[command(flatten)]
    model: ModelArgs,
    /// Sequences that the worker holds at once. Default: to decode 8 on a CPU and 64 on a GPU, to prefill 4 and 8.
    #[arg(long, env = "FOREBAY_SLOTS", value_name = "N")]
    slots: Option<u32>,
    #[command(flatten)]
    work: WorkArgs,
    #[command(flatten)]
    kv: KvArgs,
    /// Seconds that running requests get to finish after Ctrl-C or SIGTERM.
    #[arg(long, env = "FOREBAY_GRACE_S", default_value_t = 30, value_name = "SECONDS")]
    grace_s: u64,
    /// Folder for unpacked models.
    #[arg(long, env = "FOREBAY_DATA", value_name = "DIR")]
    data: Option<PathBuf>,
    /// Folder for Unix sockets; workers on one host that read each other's KV share it.
    #[arg(long, env = "FOREBAY_SOCKETS", value_name = "DIR")]
    sockets: Option<PathBuf>,
}

pub(crate) fn run(args: WorkerArgs) -> anyhow::Result<()> {
    init_logging("info");
    end_with_parent();
    let role = if args.role == "prefill" { Role::Prefill } else { Role::Decode };
    let data = data_folder(args.data);
    let model = args.model.find(&data)?;
    let text = ModelText::open(&model.folder)?;
    let device = args.model.engine.device();
    let slots = match role {
        Role::Decode => device.pick(8, 64),
        Role::Prefill => device.pick(4, 8),
    };
    let slots = args.slots.unwrap_or(slots).max(1);
    let chunk_tokens = args.work.chunk.unwrap_or(device.pick(256, 2048)).max(1);
    let vocab = text.tokenizer.get_vocab_size(true) as u32;
    let begun = std::time::Instant::now();
    let engine = args.model.engine.open(device, &model, vocab, (slots, chunk_tokens), &data)?;
    tracing::info!(
        model = model.name,
        weights = engine.card().weights,
        "model loaded in {:.1?}",
        begun.elapsed()
    );
    let config = WorkerConfig {
        role,
        max_local_prefill_length: args.work.max_local_prefill_length,
        max_prefill_queue_size: args.work.max_prefill_queue_size,
        chunk_tokens,
        step_tokens: args.work.step_tokens.unwrap_or(device.pick(32, 512)),
        cache_bytes: (args.work.cache_gib.max(0.0) * f64::from(1 << 30)) as u64,
        overlap: !args.work.bench_no_overlap,
        kv_lease: Duration::from_secs(args.work.kv_lease_s),
        attempts_max: args.work.max_attempts.max(1),
        prefill_patience: Duration::from_secs(args.work.prefill_patience_s),
        grace: Duration::from_secs(args.grace_s),
        socket_folder: args.sockets.unwrap_or_else(socket_folder),
        kv: args.kv.options(&args.nats.nats)?,
    };
    let runtime = runtime(2)?;
    runtime.block_on(async move {
        let streams = args.registry.apply(args.nats.connect("worker", role.as_str()).await?).await?;
        let card = text.card(&model.name, engine.card(), &streams).await?;
        let stop = CancellationToken::new();
        let stopping = stop.clone();
        tokio::spawn(async move {
            told_to_stop().await;
            stopping.cancel();
        });
        worker::run(config, engine, card, text.tokenizer, streams, stop).await.context("worker")
    })
}

/// A folder for this user's sockets: short, since the path of a socket may have at most 107 bytes.
fn socket_folder() -> PathBuf {
    let uid = rustix::process::getuid().as_raw();
    std::env::var_os("XDG_RUNTIME_DIR").map_or_else(
        || PathBuf::from(format!("/tmp/forebay-{uid}")),
        |folder| PathBuf::from(folder).join("forebay"),
    )
}
