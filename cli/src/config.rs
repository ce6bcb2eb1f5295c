//! Settings that several commands share, and where they come from: flags, the environment, a file.

use anyhow::{Context, bail};
use clap::Args;
use forebay_streams::{
    Streams,
    etcd::Etcd,
    jetstream::{self, Limits, Options},
};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Heading of flags that choose what is shown. They are no settings, even where they are called like one.
pub(crate) const FILTERS: &str = "Filters";

/// Where NATS is, and what is Forebay's there.
#[derive(Args, Clone, Debug)]
pub(crate) struct NatsArgs {
    /// NATS server; several of a cluster are separated by commas.
    #[arg(long, env = "FOREBAY_NATS", default_value = "nats://127.0.0.1:4222", value_name = "URL")]
    pub(crate) nats: String,
    #[command(flatten)]
    account: AccountArgs,
}

/// What is Forebay's on a NATS server.
#[derive(Args, Clone, Debug)]
pub(crate) struct AccountArgs {
    /// Credentials for the NATS server.
    #[arg(long, env = "FOREBAY_NATS_CREDENTIALS", value_name = "FILE")]
    nats_credentials: Option<PathBuf>,
    #[command(flatten)]
    limits: LimitArgs,
}

/// Bounds and times of the streams, for where they are made.
#[derive(Args, Clone, Debug)]
pub(crate) struct LimitArgs {
    /// Copies of each stream on a NATS cluster.
    #[arg(long, env = "FOREBAY_REPLICAS", default_value_t = 1, value_name = "N")]
    replicas: usize,
    /// Hours that logs are kept.
    #[arg(long, env = "FOREBAY_LOG_HOURS", default_value_t = 24, value_name = "HOURS")]
    log_hours: u64,
    /// GiB that all logs together may take; the oldest go first. NATS sets this much of its disk aside.
    #[arg(long, env = "FOREBAY_LOG_GIB", default_value_t = 4, value_name = "GIB")]
    log_gib: u64,
    /// Tasks that wait in one role's queues; more are refused with 429.
    #[arg(long, env = "FOREBAY_QUEUE_MAX", default_value_t = 65_536, value_name = "TASKS")]
    queue_max: u64,
    /// Seconds without a sign of life after which a task goes to another worker.
    #[arg(long, env = "FOREBAY_ACK_WAIT_S", default_value_t = 30, value_name = "SECONDS")]
    ack_wait_s: u64,
    /// Seconds without a sign of life after which a worker counts as dead.
    #[arg(long, env = "FOREBAY_LEASE_S", default_value_t = 1.5, value_name = "SECONDS")]
    lease_s: f64,
    /// Append without the fence: only to measure what it costs.
    #[arg(long, env = "FOREBAY_BENCH_NO_FENCE", hide = true)]
    bench_no_fence: bool,
}

impl NatsArgs {
    /// Connects as a role, and makes what is missing of the streams.
    pub(crate) async fn connect(&self, role: &str, name: &str) -> anyhow::Result<Streams> {
        self.account.connect(&self.nats, role, name).await
    }
}

impl AccountArgs {
    /// Connects to a server as a role, and makes what is missing of the streams.
    pub(crate) async fn connect(&self, url: &str, role: &str, name: &str) -> anyhow::Result<Streams> {
        let limits = Limits {
            replicas: self.limits.replicas,
            log_age: Duration::from_secs(self.limits.log_hours * 3600),
            log_bytes: self.limits.log_gib << 30,
            queue_max: self.limits.queue_max,
            ack_wait: Duration::from_secs(self.limits.ack_wait_s),
            lease_time: Duration::from_secs_f64(self.limits.lease_s.clamp(0.2, 3600.0)),
            fence: !self.limits.bench_no_fence,
            ..Limits::default()
        };
        let options = Options {
            url: url.to_owned(),
            name: format!("forebay {name}"),
            inbox_prefix: format!("_INBOX_fb_{role}"),
            credentials: self.nats_credentials.clone(),
            limits,
        };
        Ok(jetstream::connect(options).await?)
    }
}

/// Where leases of workers and live settings are.
#[derive(Args, Clone, Debug)]
pub(crate) struct RegistryArgs {
    /// Where workers' leases and live settings are kept: `nats`, or etcd at
    /// `etcd://[user:password@]host:port[,host:port…]`. The same for all processes.
    #[arg(long, env = "FOREBAY_REGISTRY", default_value = NATS, value_name = "WHERE", hide_env_values = true)]
    registry: String,
}

const NATS: &str = "nats";

impl RegistryArgs {
    /// Whether it is not NATS.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.registry != NATS
    }

    /// Connects to etcd, where leases are to last that long.
    pub(crate) async fn etcd(&self, lease_time: Duration) -> anyhow::Result<Etcd> {
        Ok(Etcd::connect(&self.registry, lease_time).await?)
    }

    /// What is on NATS, with leases and settings where they are kept.
    pub(crate) async fn apply(&self, streams: Streams) -> anyhow::Result<Streams> {
        if !self.is_elsewhere() {
            return Ok(streams);
        }
        let etcd = Arc::new(self.etcd(streams.registry.lease_time()).await?);
        Ok(Streams { registry: etcd.clone(), settings: etcd, ..streams })
    }
}

/// Logs to standard error, at the level of `FOREBAY_LOG`, or else at `default`.
pub(crate) fn init_logging(default: &str) {
    let filter = EnvFilter::try_from_env("FOREBAY_LOG")
        .unwrap_or_else(|_| EnvFilter::new(format!("{default},async_nats=warn")));
    let plain =
        std::env::var_os("NO_COLOR").is_some() || !std::io::IsTerminal::is_terminal(&std::io::stderr());
    let format =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // Another subscriber can only be there already in a test.
    let _ = format.with_ansi(!plain).compact().try_init();
}

/// A runtime for a role, with that many threads.
pub(crate) fn runtime(threads: usize) -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads.max(1))
        .max_blocking_threads(8)
        .enable_all()
        .build()
        .context("starting the async runtime")
}

/// The folder for what outlives a process.
pub(crate) fn data_folder(given: Option<PathBuf>) -> PathBuf {
    let home =
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/tmp".into())).join(".local/share");
    given
        .unwrap_or_else(|| std::env::var_os("XDG_DATA_HOME").map_or_else(home, PathBuf::from).join("forebay"))
}

/// A child of `forebay up` must not outlive it, however it ends.
pub(crate) fn end_with_parent() {
    let Some(parent) = std::env::var("FOREBAY_PARENT").ok().and_then(|pid| pid.parse::<i32>().ok()) else {
        return;
    };
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM));
    if rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get()) != Some(parent) {
        std::process::exit(0);
    }
}

/// Resolves at Ctrl-C, SIGTERM or the end of the terminal. From this call on, none of them ends the process by itself.
pub(crate) fn told_to_stop() -> impl Future<Output = ()> {
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let mut signals = kinds.map(|kind| signal(kind).expect("signals can be handled"));
    async move {
        let [interrupt, terminate, hangup] = &mut signals;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// Reads the settings file, if one is named, and makes its values the defaults of the flags of those names: flags
/// and the environment still win.
pub(crate) fn apply_file(mut command: clap::Command) -> anyhow::Result<clap::Command> {
    let Some(path) = named_file() else { return Ok(command) };
    let text = std::fs::read_to_string(&path).with_context(|| format!("settings file {}", path.display()))?;
    let table: toml::Table = text.parse().with_context(|| format!("settings file {}", path.display()))?;
    for (key, value) in table {
        let text = match value {
            toml::Value::String(text) => text,
            toml::Value::Integer(_) | toml::Value::Float(_) | toml::Value::Boolean(_) => value.to_string(),
            _ => bail!("settings file {}: {key} must be a string, a number or a boolean", path.display()),
        };
        let is_setting = |arg: &clap::Arg| arg.get_help_heading() != Some(FILTERS);
        let has = |sub: &clap::Command| {
            sub.get_arguments().any(|arg| arg.get_long() == Some(&key) && is_setting(arg))
        };
        let names: Vec<String> =
            command.get_subcommands().filter(|sub| has(sub)).map(|sub| sub.get_name().to_owned()).collect();
        if names.is_empty() {
            bail!("settings file {}: no command has a flag --{key}", path.display());
        }
        for name in names {
            let id = key.replace('-', "_");
            command = command.mut_subcommand(name, |sub| {
                sub.mut_arg(id, |arg| arg.default_value(text.clone()).required(false))
            });
        }
    }
    Ok(command)
}

/// The values of a subcommand's flags, wherever they came from, as the environment variables that mean the same.
pub(crate) fn as_environment(command: &clap::Command, matches: &clap::ArgMatches) -> Vec<(String, String)> {
    let Some((name, matches)) = matches.subcommand() else { return Vec::new() };
    let Some(command) = command.find_subcommand(name) else { return Vec::new() };
    let value = |arg: &clap::Arg| {
        let given = matches.try_get_raw(arg.get_id().as_str()).ok().flatten()?.next()?;
        Some((arg.get_env()?.to_str()?.to_owned(), given.to_str()?.to_owned()))
    };
    command.get_arguments().filter_map(value).collect()
}

fn named_file() -> Option<PathBuf> {
    let mut args = std::env::args_os().skip(1);
    while let Some(arg) = args.next() {
        if arg == "--config" {
            return args.next().map(PathBuf::from);
        }
        if let Some(path) = arg.to_str().and_then(|arg| arg.strip_prefix("--config=")) {
            return Some(path.into());
        }
    }
    std::env::var_os("FOREBAY_CONFIG").map(PathBuf::from)
}
