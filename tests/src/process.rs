//! One process of a deployment: started, watched through its log, signalled, and gone with its handle.

use crate::PATIENCE;
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs::File,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// How often something is looked at that tells nobody.
pub(crate) const POLL: Duration = Duration::from_millis(20);

/// Lines of a log that a failed test shows.
const LINES_SHOWN: usize = 80;

/// A running process. Killed when dropped; a test that fails shows what it logged.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a command whose output goes to a file.
    ///
    /// # Panics
    /// If it can't be started.
    pub fn start(name: &str, command: &mut Command, log: PathBuf) -> Process {
        let output = File::create(&log).expect("a log can be written");
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a file has another handle"))
            .stderr(output)
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        Process { name: name.to_owned(), child, log }
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(pid(&self.child), signal).expect("a child can be signalled until it is waited for");
    }

    /// Ends it at once, as the kernel does when memory runs out.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// How it ended; none while it runs.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// The first line with this in it that it has logged, if there is one.
    pub fn said(&self, text: &str) -> Option<String> {
        let log = self.log();
        // The last line may be half written.
        let whole = &log[..log.rfind('\n').unwrap_or(0)];
        whole.lines().find(|line| line.contains(text)).map(str::to_owned)
    }

    /// Waits until it has ended by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        let give_up = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.exited() {
                return status;
            }
            assert!(Instant::now() < give_up, "{} does not end", self.name);
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until it has logged a line with this in it, and returns the line.
    pub async fn says(&mut self, text: &str) -> String {
        let give_up = Instant::now() + PATIENCE;
        loop {
            let ended = self.exited();
            if let Some(line) = self.said(text) {
                return line;
            }
            if let Some(status) = ended {
                panic!("{} ended ({status}) before it said {text:?}", self.name);
            }
            assert!(Instant::now() < give_up, "{} does not say {text:?}", self.name);
            tokio::time::sleep(POLL).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let shown = lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n");
            eprintln!("--- {} logged:\n{shown}\n---", self.name);
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32).expect("a child has a pid")
}

/// Kills other processes once this one is gone, however it goes: a nats-server of a test that was aborted would
/// stay for ever. Does nothing more once it is dropped in good order.
#[derive(Debug)]
pub(crate) struct Watchdog(Child);

impl Watchdog {
    pub(crate) fn over(pids: &[u32]) -> Watchdog {
        let pids = pids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
        // Its standard input closes with the last process that has the other end.
        let script = format!("trap '' INT TERM; read order || kill -9 {pids}");
        let mut command = Command::new("sh");
        command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Watchdog(command.process_group(0).spawn().expect("a shell can be started"))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
