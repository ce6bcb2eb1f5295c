//! A `forebay up` to measure, and what its processes use.

use anyhow::{Context, bail};
use forebay_streams::{
    Streams,
    jetstream::{self, Limits, Options},
    server::free_port,
};
use std::{
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// What clients call the model that is measured.
pub(super) const MODEL: &str = "bench";

/// A deployment on free ports, stopped when dropped.
pub(super) struct Deployment {
    up: Child,
    pub(super) address: SocketAddr,
    folder: std::path::PathBuf,
}

/// What a process has used so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Used {
    pub(super) cpu_seconds: f64,
    pub(super) resident_mib: f64,
}

impl Deployment {
    /// Starts `forebay up` with these arguments and waits until it serves.
    pub(super) fn start(arguments: &[&str]) -> anyhow::Result<Deployment> {
        let folder = std::env::temp_dir().join(format!("forebay-bench-{}", std::process::id()));
        std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let address: SocketAddr = ([127, 0, 0, 1], free_port()?).into();
        let mut command = Command::new(std::env::current_exe()?);
        // What is measured is what the arguments say, whatever else is set.
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_setting(name)) {
            command.env_remove(name);
        }
        let up = command
            .args(["up", "--name", MODEL, "--nats-port", "0", "--listen", &address.to_string(), "--data"])
            .arg(&folder)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(folder.join("up.log"))?)
            .spawn()?;
        let mut deployment = Deployment { up, address, folder };
        deployment.wait()?;
        Ok(deployment)
    }

    fn wait(&mut self) -> anyhow::Result<()> {
        let give_up = Instant::now() + Duration::from_secs(300);
        loop {
            let log = std::fs::read_to_string(self.folder.join("up.log")).unwrap_or_default();
            if log.lines().any(|line| line.trim_start().starts_with("ready")) {
                return Ok(());
            }
            if let Some(status) = self.up.try_wait()? {
                bail!("`forebay up` ended with {status}:\n{log}");
            }
            if Instant::now() > give_up {
                bail!("`forebay up` was not ready in time:\n{log}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A connection to its NATS server, to read what its log says.
    pub(super) async fn streams(&self) -> anyhow::Result<Streams> {
        let log = std::fs::read_to_string(self.folder.join("up.log"))?;
        let url =
            log.split_whitespace().find(|word| word.starts_with("nats://")).context("no NATS server")?;
        let options = Options {
            url: url.to_owned(),
            name: "forebay bench".into(),
            inbox_prefix: "_INBOX_fb_bench".into(),
            credentials: None,
            limits: Limits::default(),
        };
        Ok(jetstream::connect(options).await?)
    }

    /// What its processes have used: (name, used), in a fixed order.
    pub(super) fn used(&self) -> Vec<(&'static str, Used)> {
        let mut sums = vec![
            ("gateway", Used::default()),
            ("workers", Used::default()),
            ("nats-server", Used::default()),
        ];
        for pid in children(self.up.id()) {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let name = ["gateway", "worker", "nats"].iter().position(|name| {
                command.contains(&format!("{name} ")) || command.contains(&format!("{name}.conf"))
            });
            if let Some(index) = name {
                let used = used_by(pid);
                sums[index].1.cpu_seconds += used.cpu_seconds;
                sums[index].1.resident_mib += used.resident_mib;
            }
        }
        sums
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.up.id() as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.up.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn is_setting(name: &std::ffi::OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with("FOREBAY_") && name != "FOREBAY_NATS_SERVER")
}

fn children(parent: u32) -> Vec<u32> {
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        stat(*pid).is_some_and(|fields| fields.get(1).is_some_and(|ppid| *ppid == parent.to_string()))
    })
    .collect()
}

/// The fields of `/proc/<pid>/stat` after the command's name: state, parent, …
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    Some(text.rsplit_once(") ")?.1.split_whitespace().map(str::to_owned).collect())
}

fn used_by(pid: u32) -> Used {
    let ticks_per_second = rustix::param::clock_ticks_per_second() as f64;
    let fields = stat(pid).unwrap_or_default();
    let number = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    Used {
        cpu_seconds: (number(11) + number(12)) / ticks_per_second,
        resident_mib: number(21) * rustix::param::page_size() as f64 / f64::from(1 << 20),
    }
}
