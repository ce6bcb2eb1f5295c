//! An etcd of a test's own. There may be none on the machine: `scripts/setup.sh test` gets one.

use crate::{PATIENCE, files, skipped};
use forebay_streams::server::{find_tool, free_port};
use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// A running etcd on loopback ports. Killed when dropped.
#[derive(Debug)]
pub struct EtcdServer {
    process: Child,
    program: PathBuf,
    folder: TempDir,
    port: u16,
    peer_port: u16,
}

impl EtcdServer {
    /// Starts one; none, and a word about it, if there is no etcd on this machine.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start() -> Option<EtcdServer> {
        let Some(program) = find_tool("FOREBAY_ETCD_SERVER", "etcd") else {
            skipped("there is no etcd on this machine; `scripts/setup.sh test` gets one");
            return None;
        };
        let (port, peer_port) = (free_port().expect("a port"), free_port().expect("a port"));
        let folder = files::scratch();
        let process = launch(&program, &folder, port, peer_port);
        let mut server = EtcdServer { process, program, folder, port, peer_port };
        server.wait();
        Some(server)
    }

    /// Where it is, as `--registry` takes it.
    pub fn url(&self) -> String {
        format!("etcd://{}", self.address())
    }

    /// Where it is, as `host:port`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Kills it as a power cut would.
    pub fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Starts it again, on its files and ports.
    pub fn restart(&mut self) {
        self.kill();
        self.process = launch(&self.program, &self.folder, self.port, self.peer_port);
        self.wait();
    }

    /// Starts it again, with nothing of what it had.
    pub fn restart_empty(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.folder.path().join("data")).expect("its files");
        self.restart();
    }

    /// Calls it over its HTTP gateway.
    ///
    /// # Panics
    /// If it refuses.
    pub async fn call(&self, path: &str, body: serde_json::Value) -> serde_json::Value {
        let url = format!("http://{}/v3/{path}", self.address());
        let answer = reqwest::Client::new().post(url).json(&body).send().await.expect("etcd answers");
        assert!(answer.status().is_success(), "{path}: {answer:?}");
        answer.json().await.expect("JSON")
    }

    fn wait(&mut self) {
        let give_up = Instant::now() + PATIENCE;
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let ended = self.process.try_wait().expect("it can be asked");
            let log = || std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(ended.is_none() && Instant::now() < give_up, "etcd does not start: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn launch(program: &PathBuf, folder: &TempDir, port: u16, peer_port: u16) -> Child {
    let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer_port}"));
    let log = std::fs::File::options().create(true).append(true).open(folder.path().join("log"));
    let log = log.expect("a log");
    Command::new(program)
        .args(["--name", "test", "--data-dir"])
        .arg(folder.path().join("data"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("test={peer}")])
        // Debian's etcd refuses to run on other architectures than it is told of.
        .env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH.replace("aarch64", "arm64"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a log"))
        .stderr(log)
        .spawn()
        .expect("etcd can be run")
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.kill();
    }
}
