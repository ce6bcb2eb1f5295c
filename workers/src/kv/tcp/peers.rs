//! The reader's side: owners, and what is asked of them.

use super::{
    TcpOptions,
    connection::{Failure, Target},
    pool::{Pool, Taken},
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
    sync::{Arc, Mutex},
    time::Instant,
};

/// Peers whose connections are kept; the one that was not read for the longest time goes first.
const PEERS_MAX: usize = 256;

/// Bytes from which on a read is worth another connection.
const STREAM_BYTES: usize = 4 << 20;

/// The most streams of one read.
const STREAMS_MAX: usize = 4;

/// Owners that are read over TCP.
#[derive(Debug)]
pub struct TcpPeers {
    options: TcpOptions,
    known: Mutex<BTreeMap<(WorkerId, u64), Known>>,
}

/// A peer, and when it was asked for last.
#[derive(Debug)]
struct Known {
    peer: Arc<TcpPeer>,
    used: Instant,
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
        Ok(self.tcp_peer(handle, lease)?)
    }

    /// The same, with what only `tcp` answers.
    pub(in crate::kv) fn tcp_peer(
        &self,
        handle: &KvHandle,
        lease: Option<&WorkerLease>,
    ) -> Result<Arc<TcpPeer>, ReadError> {
        let key = (handle.agent.clone(), handle.incarnation);
        let mut known = self.known.lock().expect("no panics while held");
        let advertised = lease.and_then(|lease| lease.kv_tcp.as_deref());
        let greeting = Greeting::of(handle);
        if let Some(Known { peer, used }) = known.get_mut(&key)
            && advertised.is_none_or(|address| address == peer.pool.address())
            // The first handle may have been wrong about the owner.
            && *peer.pool.greeting() == greeting
        {
            *used = Instant::now();
            return Ok(peer.clone());
        }
        let Some(address) = advertised else {
            let cause =
                if lease.is_none() { "it has no lease in the registry" } else { "it serves no reads" };
            return Err(unreachable(handle, cause.into()));
        };
        // Owners that are gone are never asked again, and would keep their connections for ever.
        known.values().for_each(|known| known.peer.pool.drop_old());
        if known.len() >= PEERS_MAX
            && let Some(oldest) = known.iter().min_by_key(|(_, known)| known.used).map(|(key, _)| key.clone())
        {
            known.remove(&oldest);
        }
        let pool = Pool::to(address, greeting, self.options.tls.clone());
        let peer = Arc::new(TcpPeer { pool, streams: self.options.streams.clamp(1, STREAMS_MAX) });
        known.insert(key, Known { peer: peer.clone(), used: Instant::now() });
        Ok(peer)
    }
}

fn unreachable(handle: &KvHandle, cause: String) -> ReadError {
    ReadError::Unreachable { agent: handle.agent.clone(), transport: "tcp", cause }
}

/// One owner.
#[derive(Debug)]
pub(in crate::kv) struct TcpPeer {
    pool: Pool,
    streams: usize,
}

impl TcpPeer {
    /// How to read by other means; empty if there are none.
    pub(in crate::kv) fn introduction(&self, handle: &KvHandle) -> Result<Vec<u8>, ReadError> {
        self.pool
            .with(|connection| connection.introduction(handle))
            .map_err(|failure| self.failed(failure, handle))
    }

    /// Whether a read would be served now.
    pub(in crate::kv) fn check(&self, handle: &KvHandle) -> Result<(), ReadError> {
        self.ask(&Operation::Check, handle).map(drop)
    }

    fn ask(&self, operation: &Operation, handle: &KvHandle) -> Result<u64, ReadError> {
        self.pool
            .with(|connection| connection.ask(operation.clone(), handle))
            .map_err(|failure| self.failed(failure, handle))
    }

    fn failed(&self, failure: Failure, handle: &KvHandle) -> ReadError {
        let refused = |cause| ReadError::Refused { agent: handle.agent.clone(), slot: handle.slot, cause };
        match failure {
            Failure::Broken(error) => unreachable(handle, format!("{}: {error}", self.pool.address())),
            Failure::Answered(Answer::Denied(Denied::Over(found))) => lease_over(handle, found),
            Failure::Answered(Answer::Denied(Denied::Lapsed)) => refused("the lease's time is over"),
            Failure::Answered(Answer::Denied(Denied::Capability)) => refused("the capability is another"),
            Failure::Answered(Answer::OutOfRange) => refused("its region has no such range"),
            Failure::Answered(Answer::Stranger) => {
                unreachable(handle, format!("{}: another worker, or another life of it", self.pool.address()))
            }
            Failure::Answered(Answer::Busy) => {
                unreachable(handle, format!("{}: it serves no more connections", self.pool.address()))
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
            match self.pool.take(false) {
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
            let again = |planes: &Range<u32>| {
                self.pool.with(|connection| connection.read(handle, planes.clone(), into))
            };
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
        let told = match self.pool.idle() {
            Some(mut taken) => taken
                .ask(|connection| connection.ask_briefly(Operation::Release, handle))
                .map_err(|failure| self.failed(failure, handle)),
            None => self.ask(&Operation::Release, handle),
        };
        if let Err(error) = told {
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
        assert_eq!(split(0..16, 4), [0..4, 4..8, 8..12, 12..16]);
    }
}
