//! The owner's side: listens, and serves each connection on a thread of its own.

use super::{CONNECT_TIMEOUT, link::Link, serve::Served, tls::Tls, wire::Answer};
use crate::kv::{greeting::Greeting, lease::Leases};
use forebay_kernels::Region;
use forebay_schemas::{
    ids::WorkerId,
    kv::{KvLayout, LayoutHash},
};
use std::{
    collections::BTreeMap,
    io,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::runtime::Handle;

/// Connections that an owner serves at once. More are turned away, and their readers compute the KV themselves.
const CONNECTIONS_MAX: usize = 256;

/// Pause after a connection could not be taken up: for want of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves a region's reads over TCP until dropped.
#[derive(Debug)]
pub struct TcpOwner {
    listener: Arc<TcpListener>,
    advertised: String,
    over: Arc<AtomicBool>,
    connections: Connections,
    served: Arc<Served>,
}

/// Where an owner listens.
#[derive(Clone, Debug)]
pub struct TcpListen {
    /// The address; port 0 takes any.
    pub address: SocketAddr,
    /// What peers are told instead, as `host` or `host:port`: for addresses that are translated on the way.
    pub advertise: Option<String>,
    /// Required of readers, if there is any.
    pub tls: Option<Tls>,
}

/// Those that are open, so that they can be ended.
#[derive(Clone, Debug, Default)]
struct Connections(Arc<Mutex<(u64, BTreeMap<u64, TcpStream>)>>);

impl TcpOwner {
    /// Listens, and serves this region under these leases.
    pub fn listen(
        listen: &TcpListen,
        worker: &WorkerId,
        incarnation: u64,
        kv: (Arc<Region>, KvLayout, LayoutHash),
        leases: Leases,
    ) -> io::Result<TcpOwner> {
        let listener = Arc::new(TcpListener::bind(listen.address)?);
        let address = listener.local_addr()?;
        let advertised = match &listen.advertise {
            Some(host) if has_port(host) => host.clone(),
            Some(host) => format!("{host}:{}", address.port()),
            None if address.ip().is_unspecified() => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!(
                        "{} is every address: name the one that peers are to use with --kv-advertise",
                        address.ip()
                    ),
                ));
            }
            None => address.to_string(),
        };
        let (region, layout, layout_hash) = kv;
        let greeting = Greeting { worker: worker.clone(), incarnation, layout, layout_hash, gpu: None };
        let served = Arc::new(Served {
            greeting,
            region,
            leases,
            tls: listen.tls.clone(),
            introduction: OnceLock::new(),
        });
        let owner = TcpOwner {
            listener,
            advertised,
            over: Arc::default(),
            connections: Connections::default(),
            served: served.clone(),
        };
        let (listener, over, connections) =
            (owner.listener.clone(), owner.over.clone(), owner.connections.clone());
        // Leases are timed by the runtime's clock, which a test may have stopped.
        let clock = Handle::try_current().ok();
        std::thread::Builder::new().name("kv-tcp".into()).spawn(move || {
            while !over.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => connections.serve(stream, &served, clock.as_ref()),
                    Err(_) if over.load(Ordering::Relaxed) => {}
                    Err(error) => {
                        tracing::warn!(%error, "a reader's connection was not taken up");
                        std::thread::sleep(ACCEPT_PAUSE);
                    }
                }
            }
        })?;
        Ok(owner)
    }

    /// Says to whoever asks how to read by other means. Only the first time counts.
    pub(in crate::kv) fn introduce(&self, introduction: Vec<u8>) {
        let _ = self.served.introduction.set(introduction);
    }

    /// What peers connect to, as `host:port`.
    pub fn advertised(&self) -> &str {
        &self.advertised
    }
}

/// Whether a host's name or address ends with a port.
pub fn has_port(host: &str) -> bool {
    // An IPv6 address has colons of its own, and a port only after brackets.
    host.rsplit_once(':').is_some_and(|(before, port)| {
        port.parse::<u16>().is_ok() && (!before.contains(':') || before.ends_with(']'))
    })
}

impl Drop for TcpOwner {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // On Linux this wakes the thread that accepts.
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        self.connections.end();
    }
}

impl Connections {
    fn serve(&self, stream: TcpStream, served: &Arc<Served>, clock: Option<&Handle>) {
        let begun = match self.enter(&stream) {
            Ok(Some(number)) => self.begin(number, stream, served.clone(), clock.cloned()),
            Ok(None) => turn_away(stream, served),
            Err(error) => Err(error),
        };
        if let Err(error) = begun {
            tracing::warn!(%error, "a reader's connection was not served");
        }
    }

    fn begin(
        &self,
        number: u64,
        stream: TcpStream,
        served: Arc<Served>,
        clock: Option<Handle>,
    ) -> io::Result<()> {
        let this = self.clone();
        let serve = move || {
            let _clock = clock.as_ref().map(Handle::enter);
            let outcome = Link::accepted(stream, served.tls.as_ref()).and_then(|mut link| {
                link.patience(CONNECT_TIMEOUT)?;
                served.serve(&mut link)
            });
            if let Err(error) = outcome {
                tracing::debug!(%error, "a reader's connection ended");
            }
            this.leave(number);
        };
        let begun = std::thread::Builder::new().name("kv-tcp-peer".into()).spawn(serve);
        begun.map(drop).inspect_err(|_| self.leave(number))
    }

    /// Notes a connection. None if there are too many.
    fn enter(&self, stream: &TcpStream) -> io::Result<Option<u64>> {
        let (numbered, open) = &mut *self.0.lock().expect("no panics while held");
        if open.len() >= CONNECTIONS_MAX {
            return Ok(None);
        }
        *numbered += 1;
        open.insert(*numbered, stream.try_clone()?);
        Ok(Some(*numbered))
    }

    fn leave(&self, number: u64) {
        self.0.lock().expect("no panics while held").1.remove(&number);
    }

    fn end(&self) {
        for stream in self.0.lock().expect("no panics while held").1.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Says why, where that takes no time: a fresh socket has room for so little.
fn turn_away(stream: TcpStream, served: &Served) -> io::Result<()> {
    match served.tls {
        Some(_) => Ok(()),
        None => Link::accepted(stream, None)?.send(&Answer::Busy.encode(), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_told_from_an_address() {
        for with in ["10.0.0.1:7", "kv.example:7000", "[fe80::1]:7"] {
            assert!(has_port(with), "{with}");
        }
        for without in ["10.0.0.1", "kv.example", "fe80::1", "[fe80::1]"] {
            assert!(!has_port(without), "{without}");
        }
    }
}
