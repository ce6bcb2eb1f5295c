//! Three servers on one machine that are a cluster: for tests of what replication is for.

use super::{Server, ServerError, find_tool, free_port, io};
use std::{
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Servers of a cluster: the fewest that outlive the loss of one.
const SERVERS: usize = 3;

/// How long a cluster may take to have a leader and all servers in step with it.
const HEALTHY_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a server may take to answer a question about its health.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause between two such questions.
const ASK_PAUSE: Duration = Duration::from_millis(50);

/// A running cluster of nats-servers with JetStream on loopback ports. Killed when dropped.
#[derive(Debug)]
pub struct Cluster {
    servers: Vec<Server>,
    /// Where each server tells about itself, by HTTP.
    monitors: Vec<u16>,
}

impl Cluster {
    /// Starts one that keeps its streams in folders below `folder`, and waits until all of its servers are in step.
    pub fn start(program: Option<PathBuf>, folder: &Path) -> Result<Cluster, ServerError> {
        let program = program
            .or_else(|| find_tool("FOREBAY_NATS_SERVER", "nats-server"))
            .ok_or(ServerError::Missing)?;
        let ports = || (0..SERVERS).map(|_| free_port()).collect::<Result<Vec<_>, _>>().map_err(io(folder));
        let (clients, peers, monitors) = (ports()?, ports()?, ports()?);
        let routes: Vec<String> = peers.iter().map(|port| format!("\"nats://127.0.0.1:{port}\"")).collect();
        let mut servers = Vec::new();
        for (index, ((client, peer), monitor)) in clients.iter().zip(&peers).zip(&monitors).enumerate() {
            // Clients go by the addresses that they were given: what stands between them and a server stays there.
            let more = format!(
                "server_name: {name}\n\
                 http: \"127.0.0.1:{monitor}\"\n\
                 cluster {{ name: forebay, listen: \"127.0.0.1:{peer}\", no_advertise: true, routes: [{routes}] }}\n",
                name = name(index),
                routes = routes.join(", "),
            );
            servers.push(Server::spawn(program.clone(), &folder.join(name(index)), *client, &more)?);
        }
        let mut cluster = Cluster { servers, monitors };
        for server in &mut cluster.servers {
            server.wait()?;
        }
        cluster.wait_in_step()?;
        Ok(cluster)
    }

    /// Where clients connect: all servers, separated by commas.
    pub fn url(&self) -> String {
        self.servers.iter().map(Server::url).collect::<Vec<_>>().join(",")
    }

    /// Its servers, to be killed and restarted. A server that was restarted is not in step yet.
    pub fn servers(&mut self) -> &mut [Server] {
        &mut self.servers
    }

    /// Process ids of all servers.
    pub fn pids(&self) -> Vec<u32> {
        self.servers.iter().map(Server::pid).collect()
    }

    /// Which server leads a stream, as any server knows; none during an election.
    pub fn leader(&self, stream: &str) -> Option<usize> {
        let leader = self.monitors.iter().find_map(|port| {
            let (_, body) = get(*port, "/jsz?streams=true")?;
            let known: serde_json::Value = serde_json::from_str(&body).ok()?;
            let mut streams = known["account_details"].as_array()?.iter().flat_map(|account| {
                account["stream_detail"].as_array().map(Vec::as_slice).unwrap_or_default().iter()
            });
            let found = streams.find(|detail| detail["name"] == stream)?;
            Some(found["cluster"]["leader"].as_str()?.to_owned())
        })?;
        (0..self.servers.len()).find(|index| name(*index) == leader)
    }

    /// Waits until all servers say that their streams are in step with the others'.
    pub fn wait_in_step(&self) -> Result<(), ServerError> {
        let give_up = Instant::now() + HEALTHY_TIMEOUT;
        for (server, port) in self.servers.iter().zip(&self.monitors) {
            while get(*port, "/healthz").is_none_or(|(status, _)| status != 200) {
                if Instant::now() > give_up {
                    let cause = format!("not in step with its cluster after {HEALTHY_TIMEOUT:?}");
                    let log = server.folder.join("nats.log");
                    return Err(ServerError::Failed { program: server.program.clone(), cause, log });
                }
                std::thread::sleep(ASK_PAUSE);
            }
        }
        Ok(())
    }
}

fn name(index: usize) -> String {
    format!("n{index}")
}

/// Asks a server's monitoring endpoint; returns status and body.
fn get(port: u16, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(ASK_TIMEOUT)).ok()?;
    // Of this version, the end of the connection is the end of the body.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}
