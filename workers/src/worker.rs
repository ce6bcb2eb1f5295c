//! One worker process: its identity, what it shares between requests, and its life from registration to drain.

use crate::{
    decode,
    engine::{Engine, EngineCard},
    kv::{
        BlockCache, KvOptions, KvPeers, Leases, ReadError, Sealed, Slot, SlotPool, Transport, publish, shm,
        sums,
        tcp::{TcpListen, TcpOwner},
    },
    prefill,
    runner::{EngineStopped, Runner},
    scheduler::Budget,
};
use forebay_schemas::{
    card::{ModelCard, WorkerLease},
    dead_letter::DeadLetter,
    event::FailureCode,
    ids::{RequestId, WorkerId},
    kv::{KvHandle, TokenRange},
    task::Role,
};
use forebay_streams::{
    StreamError, Streams,
    environment::{self, in_process, off_thread},
    log::LogRef,
    own_queues::Owner,
    registry::Workers,
    settings::{self, Live},
    tasks::{Delivery, Verdict},
};
use futures::StreamExt;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokenizers::Tokenizer;
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

/// Pause after a pull that failed.
const PULL_PAUSE: Duration = Duration::from_millis(500);

/// How often a worker that stops looks whether its pulls are over.
const PULLS_POLL: Duration = Duration::from_millis(10);

/// Deliveries after which a task whose log can't be found is dropped: the log has expired or was removed, or was never
/// begun.
pub(crate) const NO_LOG_TRIES: u64 = 8;

/// Pause between them: on a cluster, the server that answered may lag behind.
pub(crate) const NO_LOG_PAUSE: Duration = Duration::from_millis(250);

/// Pause before a task that came to a worker that stops is delivered again: not at once, or its other pulls, which are
/// not over yet, would get it.
const BACK_PAUSE: Duration = Duration::from_millis(50);

/// How often the engine is asked whether it still runs.
const ENGINE_CHECK: Duration = Duration::from_secs(5);

/// How long one step of the engine may take. A longer one will not end: a driver that hangs, most likely.
const STEP_MAX: Duration = Duration::from_secs(60);

/// How long a worker that ends waits for word that its lease is over.
const RESIGN_MAX: Duration = Duration::from_millis(500);

/// How often it is looked whether the number of free slots is still what the lease says; also the shortest time between
/// two renewals for that.
const SLOTS_LOOK: Duration = Duration::from_millis(25);
/// How often the token budget is looked up.
const BUDGET_POLL: Duration = Duration::from_millis(200);

/// How often a slot is looked at that a copy still holds.
const SLOT_POLL: Duration = Duration::from_millis(1);

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

/// Raised when a request is no longer wanted; carries the cause.
#[derive(Clone, Default)]
pub(crate) struct CancelFlag {
    raised: CancellationToken,
    cause: Arc<Mutex<String>>,
}

impl CancelFlag {
    fn raise(&self, cause: String) {
        *self.cause.lock().expect("no panics while held") = cause;
        self.raised.cancel();
    }

    /// Waits until the request is no longer wanted, and says why.
    pub(crate) async fn raised(&self) -> String {
        self.raised.cancelled().await;
        self.cause.lock().expect("no panics while held").clone()
    }
}

/// Runs a worker until `stop` is cancelled and its requests have ended, or the grace period is over.
///
/// `model` is published as the model's card; its `context_tokens` and `layout_hash` must be the engine's.
pub async fn run(
    config: WorkerConfig,
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
    let leases = Leases::create(layout.slots)?;
    let cache = BlockCache::new(layout.geometry, config.cache_bytes)?;
    let kv = (runner.kv().clone(), layout, layout_hash);
    let owner = shm::ShmOwner::listen(&config.socket_folder, &id, incarnation, kv.clone(), leases.clone())
        .map_err(|source| WorkerError::Socket { folder: config.socket_folder.clone(), source })?;
    let serve = |listen: &TcpListen| {
        TcpOwner::listen(listen, &id, incarnation, kv, leases.clone())
            .map_err(|source| WorkerError::Listen { address: listen.address, source })
    };
    let tcp_owner = config.kv.listen.as_ref().map(serve).transpose()?;
    streams.tasks.ensure(&model.key).await?;
    streams.catalog.publish_model(&model).await?;
    let worker = Arc::new(Worker {
        id,
        incarnation,
        eos: model.eos_token_ids.clone().into(),
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
        peers: KvPeers::new(layout_hash, &config.kv),
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
    let kv_tcp = tcp_owner.as_ref().map(|owner| owner.advertised().to_owned());
    background.spawn(in_process(worker.clone().hold_lease(owner.path().display().to_string(), kv_tcp)));
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
    outcome
}

impl Worker {
    /// One loop for each slot, each: pull → see the task to its end → pull the next; and one for the worker's own queue.
    /// The worker never holds more tasks than it has room for.
    async fn serve(self: Arc<Self>, stop: CancellationToken) {
        let mut loops = JoinSet::new();
        let room = Arc::new(Semaphore::new(self.slots.total() as usize));
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
                    loops.spawn(in_process(decode::serve(self.clone(), stop.clone(), room.clone())))
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

    /// Makes this worker's own queue. Without one it gets its tasks from the shared queue.
    async fn open_own(&self, owner: &Owner) {
        match self.streams.own_queues.open(owner).await {
            Ok(()) => self.has_own_queue.store(true, Ordering::Relaxed),
            Err(error) => tracing::warn!(%error, "no queue of its own for this worker; trying again"),
        }
    }

    /// Passes on what still comes into the own queue of a worker that stops: from a gateway that has not heard of it yet.
    async fn pass_on(self: Arc<Self>) {
        self.stop.cancelled().await;
        let owner = self.owner();
        loop {
            self.pull_own(&owner, &self.stop).await;
        }
    }

    /// Tells routers what is in the prefix cache, if anything ever is.
    async fn tell_of_cache(self: Arc<Self>) {
        if !self.cache.is_off() {
            let events = self.streams.cache_events.clone();
            publish(events, self.owner(), self.incarnation, self.cache.clone()).await;
        }
    }

    /// Leaves what is in this worker's own queue to others, and takes back what was told of its cache.
    async fn bow_out(&self) {
        if self.config.role != Role::Decode {
            return;
        }
        let owner = self.owner();
        let closed = self.streams.own_queues.close(&owner);
        let forgotten = self.streams.cache_events.forget(&owner);
        let both = async { (closed.await, forgotten.await) };
        if !matches!(tokio::time::timeout(RESIGN_MAX, both).await, Ok((Ok(_), Ok(())))) {
            tracing::debug!("the own queue is left to the gateways");
        }
    }

    /// Names this worker's own queue.
    pub(crate) fn owner(&self) -> Owner {
        Owner { model: self.model.key.clone(), worker: self.id.clone() }
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

    /// The next task, or none when the worker is to stop.
    pub(crate) async fn next_task(&self, stop: &CancellationToken) -> Option<Delivery> {
        while !stop.is_cancelled() {
            if let Some(delivery) = self.pull(stop).await {
                return Some(delivery);
            }
        }
        None
    }

    /// One pull from the queue that all workers share; none if it brought nothing that is for this worker.
    pub(crate) async fn pull(&self, stop: &CancellationToken) -> Option<Delivery> {
        let _pulling = Pulling::begin(&self.pulling);
        match self.streams.tasks.pull(self.config.role, &self.model.key, self.pull_wait()).await {
            // A pull is never dropped: what it brings would come again only after the ack wait.
            Ok(Some(delivery)) if stop.is_cancelled() => {
                self.answer(&delivery, Verdict::Later(BACK_PAUSE)).await;
                None
            }
            Ok(delivery) => delivery,
            Err(error) => {
                tracing::debug!(%error, "pull failed; trying again");
                tokio::time::sleep(PULL_PAUSE).await;
                None
            }
        }
    }

    /// One pull from this worker's own queue. Nothing of it stays with a worker that stops: it moves to the shared queue.
    pub(crate) async fn pull_own(&self, owner: &Owner, stop: &CancellationToken) -> Option<Delivery> {
        // A pull that is begun when the worker stops brings nothing that it keeps.
        let _pulling = (!stop.is_cancelled()).then(|| Pulling::begin(&self.pulling));
        match self.streams.own_queues.pull_own(owner, self.pull_wait()).await {
            Ok(Some(delivery)) if stop.is_cancelled() => {
                self.answer(&delivery, Verdict::Nak).await;
                None
            }
            Ok(delivery) => delivery,
            Err(error) => {
                // A gateway that took this worker for dead has closed the queue, or the server is away.
                tracing::debug!(%error, "pull from the own queue failed; opening it again");
                self.open_own(owner).await;
                tokio::time::sleep(PULL_PAUSE).await;
                None
            }
        }
    }

    /// Waits until nothing more can be delivered to a worker that was told to stop.
    pub(crate) async fn pulls_over(&self) {
        self.stop.cancelled().await;
        // A watch would wake its waiters in random order, and a simulation not repeat itself.
        while *self.pulling.borrow() > 0 {
            tokio::time::sleep(PULLS_POLL).await;
        }
    }

    /// How long one pull waits at the server. The pulls of a worker that hangs must be over before its tasks are
    /// given to others, or they would take them again.
    fn pull_wait(&self) -> Duration {
        self.streams.tasks.ack_wait().min(self.streams.registry.lease_time()) / 2
    }

    /// Keeps a delivered task from being delivered again for as long as the guard lives.
    pub(crate) fn keep_alive(&self, delivery: &Delivery) -> KeepAlive {
        let (tasks, subject) = (self.streams.tasks.clone(), delivery.ack_subject.clone());
        KeepAlive(environment::spawn(async move {
            loop {
                tokio::time::sleep(tasks.ack_wait() / 3).await;
                let _ = tasks.answer(&subject, Verdict::Progress).await;
            }
        }))
    }

    /// Whether a log is gone, as far as several looks at it tell. A task's deliveries do not: others may have given it
    /// back unread, and one read may be answered by a server that lags.
    pub(crate) async fn has_no_log(&self, log: &LogRef) -> bool {
        for _ in 0..NO_LOG_TRIES {
            tokio::time::sleep(NO_LOG_PAUSE).await;
            if !matches!(self.streams.log.last_seq(log).await, Ok(0)) {
                return false;
            }
        }
        true
    }

    /// Says how a delivered task went. An answer that gets lost costs a redelivery.
    pub(crate) async fn answer(&self, delivery: &Delivery, verdict: Verdict) {
        if let Err(error) = self.streams.tasks.answer(&delivery.ack_subject, verdict).await {
            tracing::debug!(%error, "a verdict was not sent; the task will come again");
        }
    }

    /// Waits until nobody but the caller uses a slot: its KV may still be being kept, or read, although the request is
    /// over.
    pub(crate) async fn unused(&self, slot: &Arc<Slot>) {
        while Arc::strong_count(slot) > 1 {
            tokio::time::sleep(SLOT_POLL).await;
        }
    }

    /// Notes that a request runs here, so that a cancel finds it.
    pub(crate) fn enter(&self, request: RequestId) -> CancelFlag {
        let flag = CancelFlag::default();
        self.running.lock().expect("no panics while held").insert(request, flag.clone());
        flag
    }

    /// Notes that it no longer does.
    pub(crate) fn leave(&self, request: RequestId, flag: &CancelFlag) {
        let mut running = self.running.lock().expect("no panics while held");
        // A newer attempt at the same request, in another slot, has its own.
        if running.get(&request).is_some_and(|current| Arc::ptr_eq(&current.cause, &flag.cause)) {
            running.remove(&request);
        }
    }

    async fn hear_cancels(self: Arc<Self>) {
        loop {
            match self.streams.tasks.cancel_signals(&self.id).await {
                Ok(mut signals) => {
                    while let Some(signal) = signals.next().await {
                        let flag =
                            self.running.lock().expect("no panics while held").get(&signal.request).cloned();
                        if let Some(flag) = flag {
                            flag.raise(signal.cause);
                        }
                    }
                }
                Err(error) => tracing::debug!(%error, "no cancel signals; the log still tells"),
            }
            tokio::time::sleep(PULL_PAUSE).await;
        }
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

    /// The way to the worker that holds a handle's bytes. Blocks, for a moment, the first time.
    pub(crate) fn transport(&self, handle: &KvHandle) -> Result<Arc<dyn Transport>, ReadError> {
        let lease = self.workers.borrow().get(&handle.agent).cloned();
        self.peers.transport(handle, lease.as_deref())
    }

    /// Seals a range of a slot's positions, which nobody writes any more, under a lease.
    pub(crate) async fn seal(
        self: &Arc<Self>,
        slot: &Arc<Slot>,
        lease: &Sealed,
        tokens: TokenRange,
    ) -> KvHandle {
        let layout = self.runner.card().layout;
        let (worker, held) = (self.clone(), slot.clone());
        let checksums = off_thread(move || sums(worker.runner.kv(), &layout, held.index(), tokens)).await;
        self.handle(slot, lease, tokens, checksums)
    }

    /// What an event says of sealed KV in one of this worker's slots.
    fn handle(&self, slot: &Slot, lease: &Sealed, tokens: TokenRange, checksums: Vec<u64>) -> KvHandle {
        KvHandle {
            agent: self.id.clone(),
            incarnation: self.incarnation,
            layout: self.runner.card().layout,
            layout_hash: self.model.layout_hash,
            slot: slot.index(),
            generation: lease.generation(),
            tokens,
            checksums,
            lease_remaining_ms: lease.remaining().as_millis() as u32,
            capability: lease.capability(),
        }
    }

    /// Renews the worker's lease several times within its time, at once when the worker is told to stop, and soon when it
    /// has another number of free slots: gateways route by that.
    async fn hold_lease(self: Arc<Self>, kv_socket: String, kv_tcp: Option<String>) {
        let host = shm::host_id();
        let pause = self.streams.registry.lease_time() / 4;
        loop {
            let lease = WorkerLease {
                worker: self.id.clone(),
                incarnation: self.incarnation,
                role: self.config.role,
                model: self.model.key.clone(),
                layout_hash: self.model.layout_hash,
                slots: self.slots.total(),
                free_slots: self.slots.free(),
                host: host.clone(),
                kv_socket: kv_socket.clone(),
                kv_tcp: kv_tcp.clone(),
                kv_nixl: self.config.kv.nixl.is_some() && kv_tcp.is_some(),
                active_tokens: self.runner.active_tokens(),
                draining: self.stop.is_cancelled(),
                kv_leases: self.leases.held(),
                own_queue: self.has_own_queue.load(Ordering::Relaxed),
            };
            if let Err(error) = self.streams.registry.renew(&lease).await {
                tracing::warn!(%error, "the worker's lease was not renewed");
            }
            let stops = async {
                match lease.draining {
                    true => std::future::pending().await,
                    false => self.stop.cancelled().await,
                }
            };
            tokio::select! {
                biased;
                () = stops => {}
                () = self.slots_change(&lease, pause) => {}
            }
        }
    }

    /// Resolves when a lease says something of the slots that is no longer so, or after `most`.
    async fn slots_change(&self, lease: &WorkerLease, most: Duration) {
        let until = Instant::now() + most;
        loop {
            tokio::time::sleep(SLOTS_LOOK).await;
            let own_queue = self.has_own_queue.load(Ordering::Relaxed);
            if (self.slots.free(), own_queue) != (lease.free_slots, lease.own_queue)
                || Instant::now() >= until
            {
                return;
            }
        }
    }
}

/// A loop that may be given a task at any moment.
struct Pulling<'a>(&'a watch::Sender<u32>);

impl Pulling<'_> {
    fn begin(pulls: &watch::Sender<u32>) -> Pulling<'_> {
        pulls.send_modify(|pulls| *pulls += 1);
        Pulling(pulls)
    }
}

impl Drop for Pulling<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|pulls| *pulls -= 1);
    }
}

/// See [`Worker::keep_alive`].
pub(crate) struct KeepAlive(tokio::task::JoinHandle<()>);

impl Drop for KeepAlive {
    fn drop(&mut self) {
        self.0.abort();
    }
}
