//! The reader's side: a few connections to each owner, kept between reads.

use super::{
    IDLE_USE_MAX, IO_TIMEOUT, TcpOptions,
    connection::{Connection, Failure, Target},
    wire::{Answer, Operation},
};
use crate::kv::{
    greeting::Greeting,
    lease::Denied,
    read::{ReadError, Transport, lease_over},
};
use forebay_kernels::{Checksum, Region};
use forebay_schemas::{
    card::WorkerLease,
    ids::WorkerId,
    kv::{KvHandle, KvLayout},
};
use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, Condvar, Mutex},
    time::Instant,
};

/// Peers whose connections are kept; the one with the oldest life goes first.
const PEERS_MAX: usize = 256;

/// Connections to one peer at once. A read that finds none free waits for one.
const CONNECTIONS_MAX: usize = 16;

/// Bytes from which on a read is worth another connection.
const STREAM_BYTES: usize = 4 << 20;

/// The most streams of one read.
const STREAMS_MAX: usize = 4;

/// Owners that are read over TCP.
#[derive(Debug)]
pub struct TcpPeers {
    options: TcpOptions,
    known: Mutex<BTreeMap<(WorkerId, u64), Arc<TcpPeer>>>,
}

impl TcpPeers {
    /// None known yet.
    pub fn new(options: TcpOptions) -> TcpPeers {
        TcpPeers { options, known: Mutex::default() }
    }

    /// The owner of a handle's bytes. Connects only when it is asked something.
    pub fn peer(
        &self,
        handle: &KvHandle,
        lease: Option<&WorkerLease>,
    ) -> Result<Arc<dyn Transport>, ReadError> {
        let key = (handle.agent.clone(), handle.incarnation);
        let mut known = self.known.lock().expect("no panics while held");
        let advertised = lease.and_then(|lease| lease.kv_tcp.as_deref());
        let greeting = Greeting::of(handle);
        if let Some(peer) = known.get(&key)
            && advertised.is_none_or(|address| address == peer.address)
            // The first handle may have been wrong about the owner.
            && peer.greeting == greeting
        {
            return Ok(peer.clone());
        }
        let Some(address) = advertised else {
            let cause =
                if lease.is_none() { "it has no lease in the registry" } else { "it serves no reads" };
            return Err(unreachable(handle, cause.into()));
        };
        if known.len() >= PEERS_MAX
            && let Some(oldest) = known.keys().min_by_key(|(_, incarnation)| *incarnation).cloned()
        {
            known.remove(&oldest);
        }
        let peer = Arc::new(TcpPeer {
            address: address.to_owned(),
            greeting,
            streams: self.options.streams.clamp(1, STREAMS_MAX),
            pool: Mutex::default(),
            given_back: Condvar::new(),
        });
        known.insert(key, peer.clone());
        Ok(peer)
    }
}

fn unreachable(handle: &KvHandle, cause: String) -> ReadError {
    ReadError::Unreachable { agent: handle.agent.clone(), transport: "tcp", cause }
}

/// One owner, and the connections to it.
#[derive(Debug)]
struct TcpPeer {
    address: String,
    greeting: Greeting,
    streams: usize,
    pool: Mutex<Pool>,
    given_back: Condvar,
}

#[derive(Debug, Default)]
struct Pool {
    idle: Vec<(Connection, Instant)>,
    open: usize,
}

/// A connection in use; goes back when dropped, if it is whole.
struct Taken<'a> {
    peer: &'a TcpPeer,
    connection: Option<Connection>,
    reused: bool,
}

impl TcpPeer {
    /// A connection: an idle one, or a new one if there is room, or, if that is wanted, the next that is given back.
    fn take(&self, wait: bool) -> Result<Option<Taken<'_>>, Failure> {
        let give_up = Instant::now() + IO_TIMEOUT;
        let mut pool = self.pool.lock().expect("no panics while held");
        loop {
            while let Some((connection, since)) = pool.idle.pop() {
                if since.elapsed() < IDLE_USE_MAX {
                    return Ok(Some(Taken { peer: self, connection: Some(connection), reused: true }));
                }
                pool.open -= 1;
            }
            if pool.open < CONNECTIONS_MAX {
                pool.open += 1;
                drop(pool);
                // Dropped without a connection, it makes room again.
                let mut taken = Taken { peer: self, connection: None, reused: false };
                taken.connection = Some(Connection::open(&self.address, &self.greeting)?);
                return Ok(Some(taken));
            }
            let left = give_up.saturating_duration_since(Instant::now());
            if !wait {
                return Ok(None);
            }
            if left.is_zero() {
                return Err(Failure::Broken(std::io::Error::new(
                    std::io::ErrorKind::TimedOut,
                    "all connections are in use",
                )));
            }
            pool = self.given_back.wait_timeout(pool, left).expect("no panics while held").0;
        }
    }

    fn drop_idle(&self) {
        let mut pool = self.pool.lock().expect("no panics while held");
        pool.open -= pool.idle.len();
        pool.idle.clear();
    }

    /// Does something on a connection. If one that lay idle turns out to be broken, all of them probably are: it is
    /// done again on a new one. Whatever is asked may be asked twice.
    fn with<T>(&self, ask: impl Fn(&mut Connection) -> Result<T, Failure>) -> Result<T, Failure> {
        let mut taken = self.take(true)?.expect("it was waited for");
        match taken.ask(&ask) {
            Err(Failure::Broken(_)) if taken.reused => {}
            outcome => return outcome,
        }
        drop(taken);
        self.drop_idle();
        self.take(true)?.expect("it was waited for").ask(&ask)
    }

    fn ask(&self, operation: &Operation, handle: &KvHandle) -> Result<u64, ReadError> {
        self.with(|connection| connection.ask(operation.clone(), handle))
            .map_err(|failure| self.failed(failure, handle))
    }

    fn failed(&self, failure: Failure, handle: &KvHandle) -> ReadError {
        let refused = |cause| ReadError::Refused { agent: handle.agent.clone(), slot: handle.slot, cause };
        match failure {
            Failure::Broken(error) => unreachable(handle, format!("{}: {error}", self.address)),
            Failure::Answered(Answer::Denied(Denied::Over(found))) => lease_over(handle, found),
            Failure::Answered(Answer::Denied(Denied::Lapsed)) => refused("the lease's time is over"),
            Failure::Answered(Answer::Denied(Denied::Capability)) => refused("the capability is another"),
            Failure::Answered(Answer::OutOfRange) => refused("its region has no such range"),
            Failure::Answered(Answer::Stranger) => {
                unreachable(handle, format!("{}: another worker, or another life of it", self.address))
            }
            Failure::Answered(Answer::Busy) => {
                unreachable(handle, format!("{}: it serves no more connections", self.address))
            }
            Failure::Answered(Answer::Done(_)) => unreachable(handle, "an answer out of turn".into()),
        }
    }

    /// Reads planes over several connections at once, as far as they are free.
    fn read_planes(
        &self,
        handle: &KvHandle,
        planes: Range<u32>,
        into: Target<'_>,
    ) -> Result<Checksum, Failure> {
        let bytes = handle.bytes() / handle.layout.geometry.layers as usize / 2 * planes.len();
        let wanted = self.streams.min(bytes / STREAM_BYTES).min(planes.len()).max(1);
        let mut others: Vec<Taken<'_>> = Vec::new();
        while others.len() + 1 < wanted {
            match self.take(false) {
                Ok(Some(taken)) => others.push(taken),
                Ok(None) | Err(_) => break,
            }
        }
        let parts = split(planes, others.len() as u32 + 1);
        std::thread::scope(|scope| {
            let read = |planes: &Range<u32>, mut taken: Taken<'_>| {
                taken.ask(|connection| connection.read(handle, planes.clone(), into))
            };
            let running: Vec<_> = parts[1..]
                .iter()
                .zip(others)
                .map(|(planes, taken)| (planes, scope.spawn(move || read(planes, taken))))
                .collect();
            let again =
                |planes: &Range<u32>| self.with(|connection| connection.read(handle, planes.clone(), into));
            let mut sum = again(&parts[0])?;
            for (planes, thread) in running {
                match thread.join().expect("reading does not panic") {
                    Ok(part) => sum.append(&part),
                    Err(Failure::Broken(_)) => sum.append(&again(planes)?),
                    Err(failure) => return Err(failure),
                }
            }
            Ok(sum)
        })
    }
}

/// Cuts a range into that many of about the same length.
fn split(range: Range<u32>, parts: u32) -> Vec<Range<u32>> {
    let cut = |part: u32| range.start + (range.end - range.start) * part / parts;
    (0..parts).map(|part| cut(part)..cut(part + 1)).collect()
}

impl Taken<'_> {
    fn ask<T>(&mut self, ask: impl FnOnce(&mut Connection) -> Result<T, Failure>) -> Result<T, Failure> {
        let mut connection = self.connection.take().expect("taken with a connection");
        let outcome = ask(&mut connection);
        if !matches!(outcome, Err(Failure::Broken(_))) {
            self.connection = Some(connection);
        }
        outcome
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut pool = self.peer.pool.lock().expect("no panics while held");
        match self.connection.take() {
            Some(connection) => pool.idle.push((connection, Instant::now())),
            None => pool.open -= 1,
        }
        self.peer.given_back.notify_one();
    }
}

impl Transport for TcpPeer {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn claim(&self, handle: &KvHandle) -> Result<(), ReadError> {
        self.ask(&Operation::Claim, handle).map(drop)
    }

    fn read(
        &self,
        handle: &KvHandle,
        group: usize,
        into: &Region,
        layout: &KvLayout,
        slot: u32,
    ) -> Result<u64, ReadError> {
        let planes = KvHandle::group_planes(&layout.geometry, group);
        self.read_planes(handle, planes, Target { region: into, layout, slot })
            .map(|sum| sum.value())
            .map_err(|failure| self.failed(failure, handle))
    }

    fn generation(&self, handle: &KvHandle) -> Result<u64, ReadError> {
        self.ask(&Operation::Generation, handle)
    }

    fn release(&self, handle: &KvHandle) {
        if let Err(error) = self.ask(&Operation::Release, handle) {
            tracing::debug!(%error, "a lease was not given back; it ends by itself");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_the_whole() {
        assert_eq!(split(16..32, 3), [16..21, 21..26, 26..32]);
        assert_eq!(split(0..1, 1), [0..1]);
    }
}
