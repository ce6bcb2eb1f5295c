//! `forebay up`: all of it on one machine, each role a process of its own, so that any of them may die.

use crate::{
    ask,
    config::{AccountArgs, RegistryArgs, data_folder, init_logging, runtime, told_to_stop},
    device::GPU_MEMORY,
    gateway::{HttpArgs, listen},
    model::ModelArgs,
    worker::WorkArgs,
};
use anyhow::{Context, bail};
use clap::Args;
use forebay_schemas::task::Role;
use forebay_streams::{Streams, server::Server};
use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};
use tokio::process::{Child, Command};

/// Before everything was ready once, a process that ends this often within [`QUICK_END`] of its start is given up.
const QUICK_ENDS_MAX: u32 = 3;

/// The longest pause before a process that keeps ending is started again.
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(5);

/// Sequences that a prefill worker holds.
const PREFILL_SLOTS: u32 = 4;

/// How often the NATS server is looked at.
const NATS_CHECK: Duration = Duration::from_secs(1);

/// The shortest pause before a process is started again.
const RESTART_PAUSE: Duration = Duration::from_millis(100);

/// See [`QUICK_ENDS_MAX`].
const QUICK_END: Duration = Duration::from_secs(20);

/// How long loading the model may take before `up` gives up.
const READY_TIMEOUT: Duration = Duration::from_secs(600);

#[derive(Args, Debug)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    http: HttpArgs,
    /// Prefill workers.
    #[arg(long, env = "FOREBAY_PREFILL", default_value_t = 1, value_name = "N")]
    prefill: u32,
    /// Decode workers.
    #[arg(long, env = "FOREBAY_DECODE", default_value_t = 1, value_name = "N")]
    decode: u32,
    /// Sequences that each decode worker holds at once (prefill workers hold 4). Default: 8, and 64 on a GPU.
    #[arg(long, env = "FOREBAY_SLOTS", value_name = "N")]
    slots: Option<u32>,
    #[command(flatten)]
    work: WorkArgs,
    /// Use this NATS server instead of starting one.
    #[arg(long, env = "FOREBAY_NATS", value_name = "URL")]
    nats: Option<String>,
    /// Port of the NATS server that is started; 0 takes any free one.
    #[arg(long, env = "FOREBAY_NATS_PORT", default_value_t = 4222, value_name = "PORT")]
    nats_port: u16,
    /// The nats-server program, where it is not found by itself.
    #[arg(long, env = "FOREBAY_NATS_SERVER", value_name = "FILE")]
    nats_server: Option<PathBuf>,
    #[command(flatten)]
    account: AccountArgs,
    #[command(flatten)]
    registry: RegistryArgs,
    /// Folder for streams, logs and unpacked models. Default: $XDG_DATA_HOME/forebay or ~/.local/share/forebay.
    #[arg(long, env = "FOREBAY_DATA", value_name = "DIR")]
    data: Option<PathBuf>,
    /// Once everything runs, ask this and show the answer.
    #[arg(long, value_name = "TEXT")]
    ask: Option<String>,
    /// Seconds that running requests get to finish at Ctrl-C.
    #[arg(long, env = "FOREBAY_GRACE_S", default_value_t = 10, value_name = "SECONDS")]
    grace_s: u64,
}

/// `settings` are the flags of this command as environment variables: how children get them.
pub(crate) fn run(args: &UpArgs, mut settings: Vec<(String, String)>) -> anyhow::Result<()> {
    init_logging("warn");
    let address = listen(args.http.listen)?.local_addr()?;
    let data = data_folder(args.data.clone());
    std::fs::create_dir_all(data.join("logs")).with_context(|| format!("making {}", data.display()))?;
    let _lock = lock(&data)?;
    let model = args.model.find(&data)?;
    say("model", &format!("{} ({})", model.name, model.folder.display()));
    let runtime = runtime(2)?;
    let _context = runtime.enter();
    let stop = told_to_stop();
    let mut server = match &args.nats {
        Some(_) => None,
        None => Some(start_nats(args, &data)?),
    };
    let url = args.nats.clone().or_else(|| server.as_ref().map(Server::url)).expect("one of them");
    say("nats", &format!("{url}{}", if server.is_some() { " (started here)" } else { "" }));
    settings.push(("FOREBAY_NATS".into(), url.clone()));
    settings.push(("FOREBAY_LISTEN".into(), address.to_string()));
    settings.push(("FOREBAY_DATA".into(), data.display().to_string()));
    settings.push(("FOREBAY_PARENT".into(), std::process::id().to_string()));
    settings.extend(compute_share(args));
    let place = Place { address, data, url, model: model.name };
    let outcome = runtime.block_on(serve(args, &settings, &place, &mut server, stop));
    if let Some(server) = &mut server {
        server.stop();
    }
    outcome
}

/// What was found or chosen at the start.
struct Place {
    address: SocketAddr,
    data: PathBuf,
    url: String,
    model: String,
}

fn start_nats(args: &UpArgs, data: &Path) -> anyhow::Result<Server> {
    let port = args.nats_port;
    if port != 0 && std::net::TcpListener::bind(("127.0.0.1", port)).is_err() {
        let folder = data.join("nats");
        if !Server::stop_leftover(&folder) || std::net::TcpListener::bind(("127.0.0.1", port)).is_err() {
            bail!(
                "port {port} is taken: use the NATS server there with --nats nats://127.0.0.1:{port}, or start another \
                 with --nats-port 0"
            );
        }
    }
    Ok(Server::start(args.nats_server.clone(), &data.join("nats"), port)?)
}

/// Two of these on one folder would run two NATS servers on the same streams.
fn lock(data: &Path) -> anyhow::Result<File> {
    let path = data.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path)?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).with_context(|| {
        format!(
            "another `forebay up` uses {}; stop it, or give this one its own folder with --data",
            data.display()
        )
    })?;
    Ok(file)
}

async fn serve(
    args: &UpArgs,
    settings: &[(String, String)],
    place: &Place,
    server: &mut Option<Server>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let mut processes = Vec::new();
    let mut add = |name: String, arguments: &[&str], settings: &[(String, String)]| {
        processes.push(Process::new(name, arguments, settings, &place.data));
    };
    for number in 0..args.decode {
        add(format!("decode-{number}"), &["worker", "--role", "decode"], settings);
    }
    let prefill = [settings, &[("FOREBAY_SLOTS".into(), PREFILL_SLOTS.to_string())]].concat();
    for number in 0..args.prefill {
        add(format!("prefill-{number}"), &["worker", "--role", "prefill"], &prefill);
    }
    add("gateway".into(), &["gateway"], settings);
    let ready = AtomicBool::new(false);
    let greeting = async {
        greet(args, place).await?;
        ready.store(true, Ordering::Relaxed);
        std::future::pending::<anyhow::Result<()>>().await
    };
    let outcome = tokio::select! {
        () = stop => Ok(()),
        outcome = supervise(&mut processes, &ready) => outcome,
        outcome = supervise_nats(server) => outcome,
        outcome = greeting => outcome,
    };
    let again = told_to_stop();
    eprintln!("\nstopping (up to {} s for running requests; Ctrl-C again ends it now)", args.grace_s);
    tokio::select! {
        () = end(&mut processes, Duration::from_secs(args.grace_s)) => {}
        () = again => {}
    }
    outcome
}

/// Starts the NATS server again when it ends. Ends only with an error.
async fn supervise_nats(server: &mut Option<Server>) -> anyhow::Result<()> {
    let Some(server) = server else { return std::future::pending().await };
    loop {
        tokio::time::sleep(NATS_CHECK).await;
        if !server.is_running() {
            eprintln!("nats-server ended; starting it again on its files");
            tokio::task::block_in_place(|| server.restart())?;
        }
    }
}

/// Workers that share cores don't spin: a spinning thread would take the other's time. Those that share a GPU share its memory.
fn compute_share(args: &UpArgs) -> Vec<(String, String)> {
    let (workers, engine) = (args.prefill + args.decode, &args.model.engine);
    let mut share = Vec::new();
    if workers > 1 && engine.spin.is_none() {
        share.push(("FOREBAY_SPIN".into(), "false".into()));
    }
    if workers > 1 && engine.device.gpu_memory.is_none() {
        share.push(("FOREBAY_GPU_MEMORY".into(), format!("{:.3}", GPU_MEMORY / f64::from(workers))));
    }
    share
}

/// Waits until all serve, says so, and asks the first question.
async fn greet(args: &UpArgs, place: &Place) -> anyhow::Result<()> {
    let begun = Instant::now();
    let streams = args.account.connect(&place.url, "up", "up").await?;
    let streams = args.registry.apply(streams).await?;
    let (address, data) = (place.address, &place.data);
    tokio::time::timeout(READY_TIMEOUT, async {
        workers_ready(&streams, args, begun).await?;
        ask::wait_ready(address).await
    })
    .await
    .with_context(|| format!("not ready after {READY_TIMEOUT:?}; see {}", data.join("logs").display()))??;
    say(
        "ready",
        &format!(
            "http://{address}/v1 after {:.1} s; logs in {}",
            begun.elapsed().as_secs_f32(),
            data.join("logs").display()
        ),
    );
    if let Some(question) = &args.ask {
        ask::ask(address, &place.url, &place.model, question).await?;
    }
    println!("\nServing on http://{address}. Ctrl-C stops everything.");
    Ok(())
}

async fn workers_ready(streams: &Streams, args: &UpArgs, begun: Instant) -> anyhow::Result<()> {
    let mut workers = streams.registry.workers().await?;
    let started_us = forebay_streams::environment::now_us() - begun.elapsed().as_micros() as u64;
    for (role, wanted) in [(Role::Decode, args.decode), (Role::Prefill, args.prefill)] {
        // Leases of workers of an earlier run may not have lapsed yet.
        let living = |all: &forebay_streams::registry::Workers| {
            let fresh = all.values().filter(|lease| lease.role == role && lease.incarnation > started_us);
            fresh.count() >= wanted as usize
        };
        workers.wait_for(living).await.context("the registry is gone")?;
        if wanted > 0 {
            say(role.as_str(), &format!("{wanted} worker{} ready", if wanted == 1 { "" } else { "s" }));
        }
    }
    Ok(())
}

pub(crate) fn say(what: &str, text: &str) {
    eprintln!("{what:>8}  {text}");
}

/// A role's process, started again when it ends.
struct Process {
    name: String,
    arguments: Vec<String>,
    settings: Vec<(String, String)>,
    log: PathBuf,
    child: Option<(Child, Instant)>,
    quick_ends: u32,
    was_started: bool,
}

impl Process {
    fn new(name: String, arguments: &[&str], settings: &[(String, String)], data: &Path) -> Process {
        let log = data.join("logs").join(format!("{name}.log"));
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        Process {
            name,
            arguments,
            settings: settings.to_vec(),
            log,
            child: None,
            quick_ends: 0,
            was_started: false,
        }
    }

    /// Starts it if it does not run. In a process group of its own: Ctrl-C reaches `up` alone, which stops
    /// everything in order.
    fn ensure(&mut self) -> anyhow::Result<()> {
        if self.child.is_some() {
            return Ok(());
        }
        let log = self.open_log().with_context(|| format!("writing {}", self.log.display()))?;
        let child = Command::new(std::env::current_exe()?)
            .args(&self.arguments)
            .envs(self.settings.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", self.name))?;
        self.child = Some((child, Instant::now()));
        Ok(())
    }

    /// Its log: emptied at its first start, and going on at later ones, so that it says why it ended before.
    fn open_log(&mut self) -> std::io::Result<File> {
        let first = !std::mem::replace(&mut self.was_started, true);
        let file = File::options().create(true).append(true).open(&self.log)?;
        if first {
            file.set_len(0)?;
        }
        Ok(file)
    }

    /// Waits for its end. An error if it is to be given up: before `ready`, for what a restart does not mend.
    async fn ended(&mut self, ready: &AtomicBool) -> anyhow::Result<()> {
        let Some((child, started)) = &mut self.child else { return Ok(()) };
        let status = child.wait().await?;
        let quick = started.elapsed() < QUICK_END;
        self.child = None;
        self.quick_ends = if quick { self.quick_ends + 1 } else { 0 };
        let hopeless = self.quick_ends >= QUICK_ENDS_MAX || (quick && status.code() == Some(1));
        if hopeless && !ready.load(Ordering::Relaxed) {
            bail!("{} does not start ({status}):\n{}", self.name, last_lines(&self.log));
        }
        eprintln!("{} ended ({status}); starting it again; its log is {}", self.name, self.log.display());
        Ok(())
    }

    /// How long to wait before it is started again.
    fn pause(&self) -> Duration {
        (RESTART_PAUSE * 2_u32.pow(self.quick_ends.min(8))).min(RESTART_PAUSE_MAX)
    }
}

fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

/// Keeps all processes running. Ends only with an error.
async fn supervise(processes: &mut [Process], ready: &AtomicBool) -> anyhow::Result<()> {
    loop {
        for process in processes.iter_mut() {
            process.ensure()?;
        }
        let endings = processes.iter_mut().map(|process| Box::pin(process.ended(ready)));
        futures::future::select_all(endings).await.0?;
        let pause = processes.iter().filter(|process| process.child.is_none()).map(Process::pause).max();
        tokio::time::sleep(pause.unwrap_or(RESTART_PAUSE)).await;
    }
}

async fn end(processes: &mut [Process], grace: Duration) {
    for process in processes.iter() {
        if let Some(pid) = process.child.as_ref().and_then(|(child, _)| child.id()) {
            let pid = rustix::process::Pid::from_raw(pid as i32).expect("a child has a pid");
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
    }
    let all = futures::future::join_all(
        processes.iter_mut().filter_map(|process| process.child.as_mut()).map(|(child, _)| child.wait()),
    );
    let _ = tokio::time::timeout(grace + Duration::from_secs(5), all).await;
}
