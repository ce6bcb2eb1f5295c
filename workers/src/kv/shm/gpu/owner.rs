//! The owner's side: what it offers, and whom it answers.

use super::{
    VERSION,
    wire::{
        ANSWER_BYTES, Answer, Asked, BATCH, QUESTION_BYTES, Question, Timed, encode_granules, read_granules,
    },
};
use crate::kv::{
    greeting::GpuOffer,
    lease::{Leases, Shown},
};
use forebay_kernels::cuda::{Arena, DeviceError, SharedGranule};
use rustix::{
    io::retry_on_intr,
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
};
use std::{
    io::{self, ErrorKind, IoSlice, Read, Write},
    mem::MaybeUninit,
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

/// Peers whose questions are answered at the same time. Others are greeted, and read from the region.
const SERVED_MAX: usize = 64;

/// Answers questions about an arena.
#[derive(Clone, Debug)]
pub(in super::super) struct GpuOwner {
    /// It may go while peers are connected: memory is held by who computes, not by who answers.
    arena: Weak<Arena>,
    leases: Leases,
    served: Arc<Mutex<Vec<Arc<UnixStream>>>>,
    /// Held while descriptors are open: one batch at a time, however many peers ask.
    exporting: Arc<Mutex<()>>,
}

/// A peer that is answered.
struct Served {
    owner: GpuOwner,
    peer: Arc<UnixStream>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.owner.served().retain(|served| !Arc::ptr_eq(served, &self.peer));
    }
}

impl GpuOwner {
    /// None if its memory can't be given to other processes.
    pub(in super::super) fn new(arena: &Arc<Arena>, leases: Leases) -> Option<(GpuOwner, GpuOffer)> {
        let granule = arena.shared_granule()?;
        let offer = GpuOffer { version: VERSION, uuid: arena.device().uuid(), granule };
        let arena = Arc::downgrade(arena);
        Some((GpuOwner { arena, leases, served: Arc::default(), exporting: Arc::default() }, offer))
    }

    /// Answers a peer that was greeted, on a thread of its own, until it hangs up.
    pub(in super::super) fn serve(&self, peer: UnixStream) -> io::Result<()> {
        let served = Served { owner: self.clone(), peer: Arc::new(peer) };
        {
            let mut all = self.served();
            if all.len() >= SERVED_MAX {
                drop(all);
                return Err(io::Error::other(format!("{SERVED_MAX} peers are answered already")));
            }
            all.push(served.peer.clone());
        }
        let answer = move || match served.owner.answer_all(&served.peer) {
            Err(error) if error.kind() != ErrorKind::UnexpectedEof => {
                tracing::debug!(%error, "a peer that asked for memory of the GPU is answered no more");
            }
            _ => {}
        };
        std::thread::Builder::new().name("kv-gpu".into()).spawn(answer).map(drop)
    }

    /// Hangs up on everybody.
    pub(in super::super) fn close(&self) {
        self.served().iter().for_each(|peer| drop(peer.shutdown(Shutdown::Both)));
    }

    fn served(&self) -> MutexGuard<'_, Vec<Arc<UnixStream>>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer_all(&self, mut peer: &UnixStream) -> io::Result<()> {
        loop {
            let mut question = [0; QUESTION_BYTES];
            // The next question may come at any time.
            peer.set_read_timeout(None)?;
            peer.read_exact(&mut question[..1])?;
            let mut peer = Timed::new(peer);
            peer.read_exact(&mut question[1..])?;
            let asked = Asked::decode(&question).ok_or(ErrorKind::InvalidData)?;
            match asked.question {
                Question::Where => {
                    let found = self.granules(asked.shown, asked.positions);
                    let answer =
                        found.as_ref().map_or_else(|no| *no, |found| Answer::Done(found.len() as u32));
                    let granules = encode_granules(&found.unwrap_or_default());
                    peer.write_all(&[&answer.encode()[..], &granules].concat())?;
                }
                Question::Pass(count) => {
                    let wanted = read_granules(&mut peer, count)?;
                    let _exporting = self.exporting.lock().unwrap_or_else(PoisonError::into_inner);
                    let found = self.descriptors(asked.shown, asked.positions, &wanted);
                    let answer =
                        found.as_ref().map_or_else(|no| *no, |found| Answer::Done(found.len() as u32));
                    // Closed here, as soon as they were sent.
                    send(&peer, answer, &found.unwrap_or_default())?;
                }
            }
        }
    }

    /// Where the first positions of a slot are, for who shows a lease on it that stands.
    fn granules(&self, shown: Shown, positions: u32) -> Result<Vec<SharedGranule>, Answer> {
        let arena = self.arena.upgrade().ok_or(Answer::Absent)?;
        let layout = arena.layout();
        if shown.slot >= layout.slots || positions > layout.positions {
            return Err(Answer::Absent);
        }
        self.leases.check(shown).map_err(|_| Answer::Denied)?;
        arena.shared(shown.slot, positions).ok_or(Answer::Absent)
    }

    /// Descriptors of granules that are among these.
    fn descriptors(
        &self,
        shown: Shown,
        positions: u32,
        wanted: &[SharedGranule],
    ) -> Result<Vec<OwnedFd>, Answer> {
        let granules = self.granules(shown, positions)?;
        let arena = self.arena.upgrade().ok_or(Answer::Absent)?;
        let export = |wanted: &SharedGranule| {
            let at = granules.binary_search_by_key(&wanted.at, |granule| granule.at).ok();
            at.filter(|at| granules[*at] == *wanted).map_or(Ok(None), |_| arena.export(*wanted))
        };
        let exported = wanted.iter().map(export).collect::<Result<Option<_>, DeviceError>>();
        exported
            .map_err(|error| {
                tracing::debug!(%error, "memory of the GPU could not be passed to a peer");
                Answer::Failed
            })?
            .ok_or(Answer::Moved)
    }
}

fn send(peer: &Timed<'_>, answer: Answer, descriptors: &[OwnedFd]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    if !borrowed.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&borrowed));
    }
    let bytes = answer.encode();
    let peer = peer.to_write()?;
    let send = || rustix::net::sendmsg(peer, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL);
    match retry_on_intr(send)? {
        ANSWER_BYTES => Ok(()),
        _ => Err(ErrorKind::WriteZero.into()),
    }
}
