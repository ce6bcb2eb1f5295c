//! Starting a nats-server: for `forebay up`, which brings its own, and for tests against the real thing.

mod cluster;

pub use cluster::Cluster;

use std::{
    net::TcpListener,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// How long a server may take until it accepts connections. Recovering large streams takes longest.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a server may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// No program of that name.
    #[error(
        "no nats-server found: run `make setup`, install one, or name it with --nats-server or FOREBAY_NATS_SERVER"
    )]
    Missing,
    /// It can't be run, or ended at once.
    #[error("{program}: {cause}; its log is {log}")]
    Failed {
        /// Which program.
        program: PathBuf,
        /// What happened.
        cause: String,
        /// Where its log is.
        log: PathBuf,
    },
    /// Files for it could not be written.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
}

/// A running nats-server with JetStream on a loopback port. Killed when dropped.
#[derive(Debug)]
pub struct Server {
    process: Child,
    program: PathBuf,
    folder: PathBuf,
    port: u16,
}

/// Finds a tool that `make setup` installs or the user has: the environment variable, `.forebay/bin` in the
/// current folder or above, or `PATH`.
pub fn find_tool(variable: &str, name: &str) -> Option<PathBuf> {
    if let Some(named) = std::env::var_os(variable) {
        return Some(named.into());
    }
    let here = std::env::current_dir().unwrap_or_default();
    let program = std::env::current_exe().unwrap_or_default();
    let installed =
        here.ancestors().chain(program.ancestors()).map(|folder| folder.join(".forebay/bin").join(name));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join(name)).collect::<Vec<_>>();
    installed.chain(on_path).find(|candidate| candidate.is_file())
}

/// A port that is free now.
pub fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

impl Server {
    /// Starts a server that keeps its streams in `folder`, on a port (0: any free one) of the loopback interface,
    /// and waits until it serves JetStream.
    pub fn start(program: Option<PathBuf>, folder: &Path, port: u16) -> Result<Server, ServerError> {
        let program = program
            .or_else(|| find_tool("FOREBAY_NATS_SERVER", "nats-server"))
            .ok_or(ServerError::Missing)?;
        let port = if port == 0 { free_port().map_err(io(folder))? } else { port };
        let mut server = Server::spawn(program, folder, port, "server_name: forebay\n")?;
        server.wait()?;
        Ok(server)
    }

    /// Starts one with these lines in its configuration besides, and does not wait for it.
    fn spawn(program: PathBuf, folder: &Path, port: u16, more: &str) -> Result<Server, ServerError> {
        std::fs::create_dir_all(folder).map_err(io(folder))?;
        Server::stop_leftover(folder);
        let config = folder.join("nats.conf");
        let text = format!(
            "listen: 127.0.0.1:{port}\n\
             {more}\
             log_file: {log:?}\n\
             pid_file: {pid:?}\n\
             ping_interval: \"5s\"\n\
             ping_max: 2\n\
             jetstream {{ store_dir: {store:?} }}\n",
            log = folder.join("nats.log"),
            pid = folder.join("nats.pid"),
            store = folder,
        );
        std::fs::write(&config, text).map_err(io(&config))?;
        Ok(Server { process: spawn(&program, folder)?, program, folder: folder.to_owned(), port })
    }

    /// Where clients connect.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }

    /// Kills it, as a power cut would, and leaves its files.
    pub fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Stops it in good order.
    pub fn stop(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.process.id() as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let give_up = Instant::now() + STOP_TIMEOUT;
        while self.is_running() && Instant::now() < give_up {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill();
    }

    /// Stops the server that an earlier process left running on a folder. Returns whether there was one.
    pub fn stop_leftover(folder: &Path) -> bool {
        let pid = std::fs::read_to_string(folder.join("nats.pid"))
            .ok()
            .and_then(|pid| pid.trim().parse::<i32>().ok());
        let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) else { return false };
        let process = PathBuf::from(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
        let is_it = || {
            let command = std::fs::read(&process).unwrap_or_default();
            String::from_utf8_lossy(&command).contains(&*folder.join("nats.conf").to_string_lossy())
        };
        if !is_it() {
            return false;
        }
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let give_up = Instant::now() + STOP_TIMEOUT;
        while is_it() && Instant::now() < give_up {
            std::thread::sleep(Duration::from_millis(10));
        }
        true
    }

    /// Starts it again on its files and port.
    pub fn restart(&mut self) -> Result<(), ServerError> {
        self.kill();
        self.process = spawn(&self.program, &self.folder)?;
        self.wait()
    }

    fn wait(&mut self) -> Result<(), ServerError> {
        let give_up = Instant::now() + START_TIMEOUT;
        loop {
            let status = self.process.try_wait().ok().flatten();
            let cause = match status {
                Some(status) => format!("ended with {status}"),
                None if std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok() => return Ok(()),
                None if Instant::now() > give_up => format!("not ready after {START_TIMEOUT:?}"),
                None => {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                }
            };
            let log = self.folder.join("nats.log");
            return Err(ServerError::Failed { program: self.program.clone(), cause, log });
        }
    }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> ServerError {
    let path = path.to_owned();
    move |source| ServerError::Io { path, source }
}

fn spawn(program: &Path, folder: &Path) -> Result<Child, ServerError> {
    Command::new(program)
        .arg("-c")
        .arg(folder.join("nats.conf"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Ctrl-C is for whoever started this, who stops it last.
        .process_group(0)
        .spawn()
        .map_err(|error| ServerError::Failed {
            program: program.to_owned(),
            cause: error.to_string(),
            log: folder.join("nats.log"),
        })
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}
