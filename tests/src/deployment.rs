//! A deployment whose processes are started one by one, so that a test can kill, stop and replace each.

use crate::{
    PATIENCE,
    client::{Answer, Client},
    files, invariants,
    namespaces::Namespace,
    process::{POLL, Process, Watchdog},
    soon,
};
use forebay_schemas::{
    event::Event,
    ids::{ModelKey, RequestId, WorkerId},
    lifecycle::Lifecycle,
    task::Role,
};
use forebay_streams::{
    Streams,
    environment::off_thread,
    etcd::Etcd,
    jetstream::{self, Limits, Options},
    log::Recorded,
    registry::Workers,
    server::{Cluster, Server},
    tasks::Depth,
};
use rustix::process::Signal;
use std::{
    process::{Command, Output},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::sync::{Semaphore, SemaphorePermit, watch};

/// Time without a verdict after which a task goes to another worker.
pub const ACK_WAIT: Duration = Duration::from_secs(2);

/// How long a worker's lease lasts; it is renewed three times as often.
pub const LEASE: Duration = Duration::from_secs(3);

/// How long sealed KV waits for its reader.
pub const KV_LEASE: Duration = Duration::from_secs(5);

/// The model that all workers serve unless told otherwise.
pub const MODEL: &str = "demo";

/// Deployments at once: each is half a dozen processes, and machines that run tests have few cores.
static ROOM: Semaphore = Semaphore::const_new(2);

/// A nats-server, and what was started on it.
pub struct Deployment {
    /// This test's own connection, to look behind the scenes.
    pub streams: Streams,
    workers: watch::Receiver<Workers>,
    settings: Vec<(String, String)>,
    started: AtomicU32,
    // In this order: the server ends before its files go.
    watchdog: Mutex<Watchdog>,
    nats: Arc<Mutex<Nats>>,
    folder: TempDir,
    _room: SemaphorePermit<'static>,
}

/// What a deployment runs on.
enum Nats {
    One(Server),
    Three(Cluster),
}

/// A running gateway.
pub struct Gateway {
    /// Its process.
    pub process: Process,
    /// A client of it.
    pub client: Client,
    /// `http://host:port`.
    pub url: String,
}

/// A running worker.
pub struct Worker {
    /// Its process.
    pub process: Process,
    /// Its name in events and in the registry.
    pub id: WorkerId,
}

impl Deployment {
    /// Starts a nats-server. Workers will run the built-in model.
    pub async fn start() -> Deployment {
        let room = ROOM.acquire().await.expect("never closed");
        let folder = files::scratch();
        let nats = Server::start(None, &folder.path().join("nats"), 0).expect("nats-server starts");
        Deployment::on(Nats::One(nats), folder, room).await
    }

    /// The same on a cluster of three, with three copies of everything.
    pub async fn start_on_cluster() -> Deployment {
        let room = ROOM.acquire().await.expect("never closed");
        let folder = files::scratch();
        let files = folder.path().join("nats");
        let nats = off_thread(move || Cluster::start(None, &files).expect("a cluster starts")).await;
        Deployment::on(Nats::Three(nats), folder, room).await
    }

    /// A single server with a monitoring endpoint, whose URL is returned.
    pub async fn start_monitored() -> (Deployment, String) {
        let deployment = Deployment::start().await;
        let Deployment { nats, folder, _room: room, watchdog, .. } = deployment;
        drop(watchdog);
        let nats = Arc::into_inner(nats).expect("nobody else has it");
        let Nats::One(mut nats) = nats.into_inner().expect("no panics while held") else {
            unreachable!("one was started")
        };
        let port = forebay_streams::server::free_port().expect("a port is free");
        let config = folder.path().join("nats/nats.conf");
        let text = std::fs::read_to_string(&config).expect("the server's configuration");
        std::fs::write(&config, format!("{text}http: \"127.0.0.1:{port}\"\n")).expect("it can be written");
        nats.restart().expect("nats-server starts again");
        (Deployment::on(Nats::One(nats), folder, room).await, format!("http://127.0.0.1:{port}"))
    }

    async fn on(nats: Nats, folder: TempDir, room: SemaphorePermit<'static>) -> Deployment {
        let watchdog = Watchdog::over(&nats.pids());
        let replicas = nats.pids().len();
        let limits = Limits { replicas, ack_wait: ACK_WAIT, lease_time: LEASE, ..Limits::default() };
        let options = Options {
            url: nats.url(),
            name: "test".into(),
            inbox_prefix: "_INBOX_fb_test".into(),
            credentials: None,
            limits,
        };
        let streams = jetstream::connect(options).await.expect("NATS answers");
        let workers = streams.registry.workers().await.expect("the registry can be followed");
        let path = |name: &str| folder.path().join(name).display().to_string();
        let settings = [
            ("FOREBAY_NATS", nats.url()),
            ("FOREBAY_REPLICAS", replicas.to_string()),
            ("FOREBAY_DATA", path("data")),
            ("FOREBAY_SOCKETS", path("s")),
            ("FOREBAY_ACK_WAIT_S", ACK_WAIT.as_secs().to_string()),
            ("FOREBAY_LEASE_S", LEASE.as_secs().to_string()),
            // Where there is a prefill worker, it is to be used.
            ("FOREBAY_MAX_LOCAL_PREFILL_LENGTH", "0".to_owned()),
            ("FOREBAY_KV_LEASE_S", KV_LEASE.as_secs().to_string()),
            ("FOREBAY_MODEL_NAME", MODEL.to_owned()),
            ("FOREBAY_LISTEN", "127.0.0.1:0".to_owned()),
            // Several workers share few cores.
            ("FOREBAY_THREADS", "1".to_owned()),
            ("FOREBAY_SPIN", "false".to_owned()),
            // A process whose test is gone, goes: see `end_with_parent`.
            ("FOREBAY_PARENT", std::process::id().to_string()),
        ];
        let settings = settings.map(|(name, value)| (name.to_owned(), value)).to_vec();
        Deployment {
            streams,
            workers,
            settings,
            started: AtomicU32::new(0),
            watchdog: Mutex::new(watchdog),
            nats: Arc::new(Mutex::new(nats)),
            folder,
            _room: room,
        }
    }

    /// Lets workers that are started from now on simulate, with that much time for a decode step: tokens are then
    /// a function of prompt, seed and index, and nothing else.
    pub fn simulate(&mut self, step: Duration) {
        self.set("FOREBAY_ENGINE", "sim");
        self.set("FOREBAY_SIM_STEP_US", &step.as_micros().to_string());
    }

    /// A setting of all processes that are started from now on, by its environment variable.
    pub fn set(&mut self, name: &str, value: &str) {
        self.settings.push((name.to_owned(), value.to_owned()));
    }

    /// Keeps leases and settings there, as `--registry` takes it, for all processes that are started from now on.
    pub async fn keep_registry_at(&mut self, url: &str) {
        let etcd = Etcd::connect(url, LEASE).await.expect("etcd answers");
        let etcd = Arc::new(etcd);
        self.streams = Streams { registry: etcd.clone(), settings: etcd, ..self.streams.clone() };
        self.workers = self.streams.registry.workers().await.expect("the registry can be followed");
        self.set("FOREBAY_REGISTRY", url);
    }

    /// Where NATS is.
    pub fn nats_url(&self) -> String {
        self.nats().url()
    }

    /// Where NATS is, as `host:port`, each server.
    pub fn nats_addresses(&self) -> Vec<String> {
        self.nats_url().split(',').map(|url| url.trim_start_matches("nats://").to_owned()).collect()
    }

    fn nats(&self) -> MutexGuard<'_, Nats> {
        self.nats.lock().expect("no panics while held")
    }

    /// Kills the nats-server as a power cut would, and starts it again after a while. Of a cluster, it is the server
    /// that leads the log stream, and all are in step again afterwards.
    pub async fn interrupt_nats(&self, pause: Duration) {
        // Not with `block_in_place`: the thread would be another one afterwards, and end some time, and with it the
        // processes that it started (see `FOREBAY_PARENT`).
        let nats = self.nats.clone();
        let killed = off_thread(move || nats.lock().expect("no panics while held").kill()).await;
        tokio::time::sleep(pause).await;
        let nats = self.nats.clone();
        let restart = move || {
            let mut nats = nats.lock().expect("no panics while held");
            nats.restart(killed);
            nats.pids()
        };
        let pids = off_thread(restart).await;
        *self.watchdog.lock().expect("no panics while held") = Watchdog::over(&pids);
    }

    /// A `forebay` command on this deployment.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = forebay(arguments);
        command.envs(self.settings.iter().cloned());
        command
    }

    /// Runs a `forebay` command on this deployment to its end.
    pub async fn run(&self, arguments: &[&str]) -> Output {
        let mut command = tokio::process::Command::from(self.command(arguments));
        soon("the end of a command", command.kill_on_drop(true).output()).await.expect("forebay runs")
    }

    fn launch(&self, name: &str, arguments: &[&str]) -> Process {
        self.launch_with(name, &mut self.command(arguments))
    }

    /// Starts a command of [`Deployment::command`] that was given settings of its own.
    pub fn launch_with(&self, name: &str, command: &mut Command) -> Process {
        let number = self.started.fetch_add(1, Ordering::Relaxed) + 1;
        Process::start(name, command, self.folder.path().join(format!("{name}-{number}.log")))
    }

    /// Starts a gateway, with these flags besides, and waits until it is ready.
    pub async fn gateway(&self, flags: &[&str]) -> Gateway {
        let mut process = self.launch("gateway", &[&["gateway"], flags].concat());
        let line = process.says("listening on http://").await;
        let address = line.split("http://").nth(1).and_then(|rest| rest.split_whitespace().next());
        let url = format!("http://{}", address.expect("an address follows"));
        let client = Client::new(&url);
        soon("the gateway is ready", client.wait_ready()).await;
        Gateway { process, client, url }
    }

    /// Starts a worker, with these flags besides, and waits until the registry has it.
    pub async fn worker(&self, role: Role, flags: &[&str]) -> Worker {
        self.started(role, self.worker_command(role, flags)).await
    }

    /// The same, on a machine of its own as far as the network tells.
    pub async fn worker_in(&self, namespace: &Namespace, role: Role, flags: &[&str]) -> Worker {
        self.started(role, namespace.within(&self.worker_command(role, flags))).await
    }

    fn worker_command(&self, role: Role, flags: &[&str]) -> Command {
        self.command(&[&["worker", "--role", role.as_str()], flags].concat())
    }

    async fn started(&self, role: Role, mut command: Command) -> Worker {
        let mut process = self.launch_with(role.as_str(), &mut command);
        let line = process.says(" worker=").await;
        let id = line.split(" worker=").nth(1).and_then(|rest| rest.split_whitespace().next());
        let id: WorkerId = id.and_then(|id| id.parse().ok()).expect("an id follows");
        let mut workers = self.workers.clone();
        soon("the worker is registered", workers.wait_for(|all| all.contains_key(&id)))
            .await
            .expect("the registry");
        Worker { process, id }
    }

    /// Starts a decode worker.
    pub async fn decode(&self) -> Worker {
        self.worker(Role::Decode, &[]).await
    }

    /// Starts a prefill worker.
    pub async fn prefill(&self) -> Worker {
        self.worker(Role::Prefill, &[]).await
    }

    /// Waits until the registry no longer has a worker.
    pub async fn gone(&self, worker: &WorkerId) {
        let mut workers = self.workers.clone();
        soon("a worker's lease is over", workers.wait_for(|all| !all.contains_key(worker)))
            .await
            .expect("the registry");
    }

    /// Waits until a worker holds a request.
    pub async fn busy(&self, worker: &WorkerId) {
        let mut workers = self.workers.clone();
        let busy = |all: &Workers| all.get(worker).is_some_and(|lease| lease.free_slots < lease.slots);
        soon("a worker is busy", workers.wait_for(busy)).await.expect("the registry");
    }

    /// Invariant 5: no slot stays held after its request has ended, but for the time of a lease.
    pub async fn all_slots_free(&self) {
        // What a lease says is as old as its last renewal.
        tokio::time::sleep(LEASE / 2).await;
        let mut workers = self.workers.clone();
        let all_free = |all: &Workers| all.values().all(|lease| lease.free_slots == lease.slots);
        soon("all slots are free", workers.wait_for(all_free)).await.expect("the registry");
    }

    /// How much work waits in a role's queue.
    pub async fn depth(&self, role: Role) -> Depth {
        self.streams.tasks.depth(role, &ModelKey::of(MODEL)).await.expect("the queue's depth")
    }

    /// Waits until no task is left in a role's queue.
    pub async fn queue_empty(&self, role: Role) {
        let empty = async {
            while self.depth(role).await != Depth::default() {
                tokio::time::sleep(crate::process::POLL).await;
            }
        };
        soon("the queue is empty", empty).await;
    }

    /// A request's events so far; none if it has no log.
    pub async fn events(&self, request: RequestId) -> Vec<Recorded> {
        match self.streams.log.find(request).await.expect("the log can be searched") {
            Some(log) => self.streams.log.read(&log, 0).await.expect("the log can be read"),
            None => Vec::new(),
        }
    }

    /// Waits until a request's log has an event like this.
    pub async fn logged(&self, request: RequestId, like: impl Fn(&Event) -> bool) {
        let logged = async {
            while !self.events(request).await.iter().any(|recorded| like(&recorded.event)) {
                tokio::time::sleep(crate::process::POLL).await;
            }
        };
        soon("an event is in the log", logged).await;
    }

    /// Living workers, kept up to date.
    pub fn registered(&self) -> watch::Receiver<Workers> {
        self.workers.clone()
    }

    /// Waits for a request's end, and checks that its log keeps the invariants. Returns how it ended.
    pub async fn check_log(&self, request: RequestId) -> Lifecycle {
        self.logged(request, |event| event.body.is_terminal()).await;
        let events = self.events(request).await;
        invariants::of_log(&events)
            .unwrap_or_else(|broken| panic!("{broken} in the log of {request}:\n{}", shown(&events)))
    }

    /// [`Deployment::check_log`], and that the client has read what the log says.
    pub async fn check(&self, answer: &Answer) -> Lifecycle {
        let state = self.check_log(answer.request).await;
        if let Err(broken) = invariants::of_answer(&state, answer) {
            panic!("{broken} in the answer to {}: {answer:?}\n{state:?}", answer.request);
        }
        state
    }
}

impl Nats {
    fn url(&self) -> String {
        match self {
            Nats::One(server) => server.url(),
            Nats::Three(cluster) => cluster.url(),
        }
    }

    fn pids(&self) -> Vec<u32> {
        match self {
            Nats::One(server) => vec![server.pid()],
            Nats::Three(cluster) => cluster.pids(),
        }
    }

    /// Kills a server, and says which.
    fn kill(&mut self) -> usize {
        match self {
            Nats::One(server) => {
                server.kill();
                0
            }
            Nats::Three(cluster) => {
                let give_up = Instant::now() + PATIENCE;
                let leader = loop {
                    match cluster.leader("FB_LOG") {
                        Some(leader) => break leader,
                        None => assert!(Instant::now() < give_up, "nobody leads the log stream"),
                    }
                    std::thread::sleep(POLL);
                };
                cluster.servers()[leader].kill();
                leader
            }
        }
    }

    fn restart(&mut self, killed: usize) {
        match self {
            Nats::One(server) => server.restart().expect("nats-server starts again"),
            Nats::Three(cluster) => {
                cluster.servers()[killed].restart().expect("nats-server starts again");
                cluster.wait_in_step().expect("the cluster is whole again");
            }
        }
    }
}

impl Worker {
    /// Tells it to stop.
    pub fn terminate(&self) {
        self.process.signal(Signal::TERM);
    }
}

/// A log for people, a line an event.
pub fn shown(events: &[Recorded]) -> String {
    let line = |Recorded { seq, event }: &Recorded| {
        let body = format!("{:?}", event.body);
        format!(
            "{seq}: {}.{:06}: {}: {body:.240}",
            event.time_us / 1_000_000,
            event.time_us % 1_000_000,
            event.attempt
        )
    };
    events.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A `forebay` command that has no settings but its arguments.
pub fn forebay(arguments: &[&str]) -> Command {
    let mut command = Command::new(files::forebay());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("FOREBAY_") && text != "FOREBAY_NATS_SERVER" {
            command.env_remove(name);
        }
    }
    // Everything that a test talks to is on this machine.
    command.env("NO_PROXY", "127.0.0.1").args(arguments);
    command
}
