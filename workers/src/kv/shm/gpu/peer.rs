//! The reader's side: one owner's memory, as much of it as was asked for.

use super::{
    VERSION,
    wire::{ANSWER_BYTES, Answer, Asked, BATCH, Question, Timed, encode_granules, read_granules},
};
use crate::kv::{greeting::GpuOffer, lease::Shown};
use forebay_kernels::cuda::{Device, ShareError, SharedArena, SharedSlot};
use forebay_schemas::kv::{KvHandle, KvLayout};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::retry_on_intr,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags},
};
use std::{
    io::{self, ErrorKind, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Granules of one owner that are mapped at most: 64 GiB of the usual ones. They cost addresses and page tables.
const MAPPED_MAX: usize = 32 << 10;

/// Why an owner's memory of a GPU is not read. It is then read from the region.
#[derive(Debug, thiserror::Error)]
pub(in super::super) enum NotShared {
    /// The owner speaks another version.
    #[error("the owner answers in version {0}, not in {VERSION}")]
    Version(u32),
    /// The connection failed, or the owner is gone.
    #[error("asking the owner: {0}")]
    Connection(#[from] io::Error),
    /// The connection has ended before.
    #[error("the owner does not answer any more")]
    Closed,
    /// The owner says no.
    #[error("the owner answers {0:?}")]
    Refused(Answer),
    /// Descriptors were lost: this process has too many, most likely.
    #[error("{found} of {asked} descriptors arrived: the limit of open files is too low")]
    Descriptors {
        /// How many came.
        found: usize,
        /// How many should have come.
        asked: usize,
    },
    /// They can't be mapped.
    #[error(transparent)]
    Share(#[from] ShareError),
}

/// One owner's memory of a GPU, for as long as the connection stands: with the owner its memory is given up, too.
#[derive(Debug)]
pub(in super::super) struct GpuPeer {
    connected: Arc<Mutex<Option<Connected>>>,
    /// To end the connection.
    stream: UnixStream,
}

#[derive(Debug)]
struct Connected {
    stream: UnixStream,
    arena: Arc<SharedArena>,
}

impl GpuPeer {
    /// The connection is one that brought an owner's greeting, with this offer.
    pub(in super::super) fn new(
        device: &Device,
        stream: UnixStream,
        offer: &GpuOffer,
        layout: KvLayout,
    ) -> Result<GpuPeer, NotShared> {
        if offer.version != VERSION {
            return Err(NotShared::Version(offer.version));
        }
        let arena = SharedArena::new(device, (offer.uuid, offer.granule), layout, MAPPED_MAX)?;
        let (watched, end) = (stream.try_clone()?, stream.try_clone()?);
        let connected = Arc::new(Mutex::new(Some(Connected { stream, arena: Arc::new(arena) })));
        let of = connected.clone();
        // A worker that starts in the stead of one that died must find its memory free, whether or not anybody reads meanwhile.
        std::thread::Builder::new().name("kv-gpu-peer".into()).spawn(move || {
            wait_for_end(&watched);
            lock(&of).take();
        })?;
        Ok(GpuPeer { connected, stream: end })
    }

    /// Whether the connection has ended.
    pub(in super::super) fn is_over(&self) -> bool {
        // Where somebody asks or unmaps just now, the next one will know.
        self.connected.try_lock().is_ok_and(|connected| connected.is_none())
    }

    /// Has what a handle names mapped. Blocks while the owner answers, and while others ask it.
    pub(in super::super) fn slot(&self, handle: &KvHandle) -> Result<SharedSlot, NotShared> {
        let mut connected = lock(&self.connected);
        let Some(Connected { stream, arena }) = &mut *connected else { return Err(NotShared::Closed) };
        let slot = ask_for_slot(stream, arena, handle);
        if matches!(slot, Err(NotShared::Connection(_))) {
            // What comes next would be the answer to another question.
            *connected = None;
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        slot
    }
}

impl Drop for GpuPeer {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        // Unmapped when this is done, by the thread that waits for the end or here: the process may end next, and the driver with it.
        lock(&self.connected).take();
    }
}

fn lock(connected: &Mutex<Option<Connected>>) -> MutexGuard<'_, Option<Connected>> {
    connected.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait_for_end(stream: &UnixStream) {
    loop {
        let mut watched = [PollFd::new(stream, PollFlags::RDHUP)];
        match poll(&mut watched, None) {
            Ok(_) if watched[0].revents().is_empty() => {}
            Err(rustix::io::Errno::INTR) => {}
            _ => return,
        }
    }
}

fn ask_for_slot(
    stream: &UnixStream,
    arena: &Arc<SharedArena>,
    handle: &KvHandle,
) -> Result<SharedSlot, NotShared> {
    let KvHandle { slot, generation, capability, .. } = *handle;
    let (shown, positions) = (Shown { slot, generation, capability }, handle.tokens.end());
    let question = |question| Asked { question, positions, shown }.encode();
    // For all of it, since others wait meanwhile.
    let mut stream = Timed::new(stream);
    stream.write_all(&question(Question::Where))?;
    let mut answer = [0; ANSWER_BYTES];
    stream.read_exact(&mut answer)?;
    let granules = match decoded(&answer)? {
        // The number is the owner's word: no more are read than the slot has.
        Answer::Done(count) if count as usize == arena.granules(slot, positions) => {
            read_granules(&mut stream, count as usize)?
        }
        Answer::Done(_) => return Err(io::Error::from(ErrorKind::InvalidData).into()),
        answer => return Err(NotShared::Refused(answer)),
    };
    arena.slot((slot, positions), &granules, BATCH, |granules| {
        let question = question(Question::Pass(granules.len()));
        stream.write_all(&[&question[..], &encode_granules(granules)].concat())?;
        receive(&stream, granules.len())
    })
}

fn decoded(answer: &[u8; ANSWER_BYTES]) -> io::Result<Answer> {
    Answer::decode(answer).ok_or(ErrorKind::InvalidData.into())
}

fn receive(stream: &Timed<'_>, asked: usize) -> Result<Vec<OwnedFd>, NotShared> {
    let mut answer = [0; ANSWER_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let stream = stream.to_read()?;
    let receive = || {
        let mut into = [IoSliceMut::new(&mut answer)];
        rustix::net::recvmsg(stream, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    };
    let received = retry_on_intr(receive).map_err(io::Error::from)?;
    if received.bytes != ANSWER_BYTES {
        return Err(io::Error::from(ErrorKind::UnexpectedEof).into());
    }
    let descriptors: Vec<OwnedFd> = ancillary
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
            _ => Vec::new(),
        })
        .collect();
    match decoded(&answer)? {
        Answer::Done(_) if descriptors.len() == asked => Ok(descriptors),
        Answer::Done(_) => Err(NotShared::Descriptors { found: descriptors.len(), asked }),
        answer => Err(NotShared::Refused(answer)),
    }
}
