//! One worker process: its identity, what it shares between requests, and its life from registration to drain.

mod cancels;
mod lease;
mod pulls;
mod slots;

pub(crate) use cancels::CancelFlag;
use lease::Ways;
use pulls::RESIGN_MAX;
pub(crate) use pulls::{NO_LOG_PAUSE, NO_LOG_TRIES};

use crate::{
    decode,
    engine::{Engine, EngineCard},
    kv::{
        BlockCache, Choice, KvOptions, KvPeers, Leases, SlotPool,
        nixl::{NixlError, NixlOwner},
        publish, shm,
        tcp::{TcpListen, TcpOwner},
    },
    output::OutputText,
    prefill,
    runner::{EngineStopped, Runner, StartError},
    scheduler::Budget,
    vocabulary::Vocabulary,
};
use forebay_kernels::Region;
use forebay_schemas::{
    card::ModelCard,
    dead_letter::DeadLetter,
    event::FailureCode,
    ids::{RequestId, WorkerId},
    sampling::Logprobs,
    task::Role,
};
use forebay_streams::{
    StreamError, Streams,
    environment::{self, in_process},
    log::LogRef,
    registry::Workers,
    settings::{self, Live},
};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    pin::pin,
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::Duration,
};
use tokenizers::Tokenizer;
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// How often the engine is asked whether it still runs.
const ENGINE_CHECK: Duration = Duration::from_secs(5);

/// How long one step of the engine may take. A longer one will not end: a driver that hangs, most likely.
const STEP_MAX: Duration = Duration::from_secs(60);

/// How often the token budget is looked up.
const BUDGET_POLL: Duration = Duration::from_millis(200);

/// Kept of the grace for what must still be said when it is over.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Settings of one worker.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// What it does.
    pub role: Role,
    /// Prompts of at most this many uncached tokens are prefilled by the decode worker itself, where live
    /// configuration does not say otherwise.
    pub max_local_prefill_length: u32,
    /// While this many tasks wait for a prefill worker, decode workers prefill themselves; the same.
    pub max_prefill_queue_size: u32,
    /// Tokens of a prompt that are run at once while nothing decodes.
    pub chunk_tokens: u32,
    /// Tokens of a step while something decodes: one for each running sequence, the rest for prompts.
    pub step_tokens: u32,
    /// Bytes that the prefix cache may take.
    pub cache_bytes: u64,
    /// Read KV while the prefill goes on. Without it, a read begins after the prefill's end: only to measure what
    /// that costs.
    pub overlap: bool,
    /// How long sealed KV waits for its reader.
    pub kv_lease: Duration,
    /// Attempts in a row without a token after which a request is given up.
    pub attempts_max: u32,
    /// How long a decode worker waits for any sign of a remote prefill before it does it itself.
    pub prefill_patience: Duration,
    /// How long running requests may go on after the worker was told to stop.
    pub grace: Duration,
    /// Folder for the Unix socket of the `shm` transport.
    pub socket_folder: PathBuf,
    /// How KV moves between this worker and others.
    pub kv: KvOptions,
}

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// NATS failed at start.
    #[error(transparent)]
    Streams(#[from] StreamError),
    /// Shared memory could not be had.
    #[error(transparent)]
    Region(#[from] forebay_kernels::RegionError),
    /// The socket of the `shm` transport could not be made.
    #[error("socket folder {folder}: {source}")]
    Socket {
        /// Which folder.
        folder: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// Other hosts can't be served.
    #[error("listening for reads of KV on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What happened.
        source: std::io::Error,
    },
    /// NIXL was asked for, and can't be used.
    #[error("{0}; any other --kv-transport works without it")]
    Nixl(#[from] NixlError),
    /// The engine could not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The engine panicked. What ran here goes on elsewhere.
    #[error(transparent)]
    Engine(#[from] EngineStopped),
    /// The engine hangs. What ran here goes on elsewhere; a new process may do better.
    #[error("a step of the engine has not ended within {STEP_MAX:?}")]
    EngineHangs,
}

/// What all requests of a worker share.
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    pub(crate) incarnation: u64,
    pub(crate) config: WorkerConfig,
    pub(crate) model: ModelCard,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) eos: Arc<[u32]>,
    pub(crate) vocabulary: Arc<Vocabulary>,
    pub(crate) streams: Streams,
    pub(crate) runner: Runner,
    pub(crate) slots: SlotPool,
    pub(crate) leases: Leases,
    pub(crate) cache: BlockCache,
    pub(crate) peers: KvPeers,
    pub(crate) workers: watch::Receiver<Workers>,
    /// What is set for all workers, now.
    pub(crate) live: Live,
    /// How many tasks wait for prefill workers. Only kept by decode workers.
    pub(crate) prefill_queue: decode::PrefillQueue,
    /// The worker was told to stop.
    pub(crate) stop: CancellationToken,
    /// What still runs is to be left as it is.
    pub(crate) grace_over: CancellationToken,
    /// Tasks may be queued for this worker alone.
    has_own_queue: AtomicBool,
    /// How many loops wait for a task.
    pulling: watch::Sender<u32>,
    /// Where sequences can go when this worker stops.
    pub(crate) places: decode::SharedPlaces,
    running: Mutex<BTreeMap<RequestId, CancelFlag>>,
}

/// Runs a worker until `stop` is cancelled and its requests have ended, or the grace period is over.
///
/// `model` is published as the model's card; its `context_tokens` and `layout_hash` must be the engine's.
pub async fn run(
    mut config: WorkerConfig,
    engine: Box<dyn Engine>,
    model: ModelCard,
    tokenizer: Arc<Tokenizer>,
    streams: Streams,
    stop: CancellationToken,
) -> Result<(), WorkerError> {
    let id: WorkerId = environment::name(config.role.as_str());
    let incarnation = environment::now_us();
    let EngineCard { layout, layout_hash, .. } = *engine.card();
    let budget = Budget { chunk_tokens: config.chunk_tokens, step_tokens: config.step_tokens };
    let runner = Runner::start(engine, budget);
    runner.started().await?;
    let leases = Leases::create(layout.slots)?;
    let cache = BlockCache::new(&layout, config.cache_bytes)?;
    let kv = (runner.kv().clone(), layout, layout_hash);
    let arena = runner.mover().map(|mover| mover.arena().clone());
    let owner = shm::ShmOwner::listen(
        &config.socket_folder,
        &id,
        incarnation,
        kv.clone(),
        leases.clone(),
        arena.as_ref(),
    )
    .map_err(|source| WorkerError::Socket { folder: config.socket_folder.clone(), source })?;
    let serve = |listen: &TcpListen| {
        TcpOwner::listen(listen, &id, incarnation, kv, leases.clone())
            .map_err(|source| WorkerError::Listen { address: listen.address, source })
    };
    let tcp_owner = config.kv.listen.as_ref().map(serve).transpose()?;
    let nixl_owner = serve_over_nixl(&mut config.kv, tcp_owner.as_ref(), runner.kv())?;
    let mut peers = KvPeers::new(layout_hash, &config.kv);
    if let Some(arena) = &arena {
        peers = peers.on_gpu(arena.device());
    }
    // Its memory is the engine's, and goes with it.
    drop(arena);
    streams.tasks.ensure(&model.key).await?;
    streams.catalog.publish_model(&model).await?;
    let eos: Arc<[u32]> = model.eos_token_ids.clone().into();
    let vocabulary = Vocabulary::new(tokenizer.clone(), eos.clone(), model.vocab_size);
    let worker = Arc::new(Worker {
        id,
        incarnation,
        eos,
        vocabulary: Arc::new(vocabulary),
        model,
        tokenizer,
        workers: streams.registry.workers().await?,
        live: settings::follow(&*streams.settings).await?,
        prefill_queue: decode::PrefillQueue::default(),
        streams,
        runner,
        slots: SlotPool::new(layout.slots),
        leases,
        cache,
        peers,
        stop: stop.clone(),
        grace_over: CancellationToken::new(),
        has_own_queue: AtomicBool::new(false),
        pulling: watch::channel(0).0,
        places: Mutex::default(),
        running: Mutex::default(),
        config,
    });
    tracing::info!(worker = %worker.id, model = worker.model.name, slots = layout.slots, "ready");
    let mut background = JoinSet::new();
    let ways = Ways {
        socket: owner.path().display().to_string(),
        tcp: tcp_owner.as_ref().map(|owner| owner.advertised().to_owned()),
        nixl: nixl_owner.is_some(),
    };
    background.spawn(in_process(worker.clone().hold_lease(ways)));
    background.spawn(in_process(worker.clone().hear_cancels()));
    background.spawn(in_process(worker.clone().keep_budget()));
    if worker.config.role == Role::Decode {
        background.spawn(in_process(decode::watch_queue(worker.clone())));
        background.spawn(in_process(worker.clone().tell_of_cache()));
    }
    let outcome = tokio::select! {
        biased;
        () = worker.clone().serve(stop) => Ok(()),
        () = worker.runner.stopped() => Err(EngineStopped.into()),
        () = worker.engine_hangs() => Err(WorkerError::EngineHangs),
    };
    drop(background);
    let resigned = tokio::time::timeout(RESIGN_MAX, worker.streams.registry.resign(&worker.id)).await;
    if !matches!(resigned, Ok(Ok(()))) {
        tracing::debug!("the lease will lapse by itself");
    }
    worker.bow_out().await;
    if !matches!(outcome, Err(WorkerError::EngineHangs)) {
        worker.runner.stop().await;
    }
    outcome
}

/// Has this worker's KV read over NIXL too, if there is one. Where it does not work, and nobody insists on it, it is as
/// if there were none.
fn serve_over_nixl(
    kv: &mut KvOptions,
    tcp: Option<&TcpOwner>,
    region: &Region,
) -> Result<Option<NixlOwner>, NixlError> {
    let (Some(library), Some(tcp)) = (&kv.nixl, tcp) else { return Ok(None) };
    match NixlOwner::register(library, region) {
        Ok(owner) => {
            owner.introduce_by(tcp);
            tracing::info!("nixl: KV is read over it, if both sides have it");
            Ok(Some(owner))
        }
        Err(error) if kv.choice == Choice::Nixl => {
            tracing::warn!(%error, "no nixl");
            Err(error)
        }
        Err(error) => {
            tracing::info!(%error, "no nixl; KV is read without it");
            kv.nixl = None;
            Ok(None)
        }
    }
}

impl Worker {
    /// One loop for each slot, each: pull → see the task to its end → pull the next; and one for the worker's own queue.
    /// The worker never holds more tasks than it has room for.
    async fn serve(self: Arc<Self>, stop: CancellationToken) {
        let mut loops = JoinSet::new();
        let room = Arc::new(Semaphore::new(self.slots.total() as usize));
        let turn = Arc::new(Semaphore::new(decode::PULLS_MAX));
        let mut aside = JoinSet::new();
        if self.config.role == Role::Decode {
            self.open_own(&self.owner()).await;
            aside.spawn(in_process(self.clone().pass_on()));
            loops.spawn(in_process(decode::serve_own(self.clone(), stop.clone(), room.clone())));
        }
        let prefills = Arc::new(Semaphore::new(prefill::COMPUTING_MAX));
        for _ in 0..self.slots.total() {
            match self.config.role {
                Role::Decode => {
                    let (room, turn) = (room.clone(), turn.clone());
                    loops.spawn(in_process(decode::serve(self.clone(), stop.clone(), room, turn)))
                }
                Role::Prefill => {
                    loops.spawn(in_process(prefill::serve(self.clone(), stop.clone(), prefills.clone())))
                }
            };
        }
        stop.cancelled().await;
        tracing::info!(running = self.running.lock().expect("no panics while held").len(), "draining");
        let mut drained = pin!(async { while loops.join_next().await.is_some() {} });
        let grace = self.config.grace.saturating_sub(LAST_WORDS);
        if tokio::time::timeout(grace, &mut drained).await.is_err() {
            tracing::warn!("the grace period is over; the rest is left to other workers");
            self.grace_over.cancel();
            let _ = tokio::time::timeout(self.config.grace - grace, drained).await;
        }
    }

    /// Tells routers what is in the prefix cache, if anything ever is.
    async fn tell_of_cache(self: Arc<Self>) {
        if !self.cache.is_off() {
            let events = self.streams.cache_events.clone();
            publish(events, self.owner(), self.incarnation, self.cache.clone()).await;
        }
    }

    /// Gives the engine the token budget that is set for all workers, or this one's own.
    async fn keep_budget(self: Arc<Self>) {
        let own = Budget { chunk_tokens: self.config.chunk_tokens, step_tokens: self.config.step_tokens };
        let mut given = own;
        loop {
            let step_tokens = self.live.borrow().step_tokens.unwrap_or(own.step_tokens);
            let budget = Budget { step_tokens, ..own };
            if budget != given {
                self.runner.set_budget(budget).await;
                given = budget;
            }
            tokio::time::sleep(BUDGET_POLL).await;
        }
    }

    /// Resolves when a step takes too long. Everything else of the worker would go on, so that nobody would notice.
    async fn engine_hangs(&self) {
        loop {
            tokio::time::sleep(ENGINE_CHECK).await;
            if tokio::time::timeout(STEP_MAX, self.runner.answers()).await.is_err() {
                return;
            }
        }
    }

    /// What is told of the tokens of an output since this was asked last.
    pub(crate) fn logprobs(&self, output: &mut OutputText) -> Vec<Logprobs> {
        output.release_told().iter().filter_map(|sampled| self.vocabulary.logprobs(sampled)).collect()
    }

    /// Keeps what is known of a task that failed as often as it may. Best effort: the log has the rest.
    pub(crate) async fn bury(
        &self,
        log: &LogRef,
        role: Role,
        code: Option<FailureCode>,
        reason: String,
        attempts: u64,
    ) {
        let letter = DeadLetter {
            request: log.request,
            gateway: log.gateway.clone(),
            model: self.model.key.clone(),
            role,
            code,
            reason,
            attempts,
            time_us: environment::now_us(),
        };
        if let Err(error) = self.streams.dead_letters.bury(&letter).await {
            tracing::warn!(%log, %error, "a dead letter was not kept");
        }
    }
}
