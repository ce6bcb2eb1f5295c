//! One connection as its owner serves it: greet, then answer one request after another.

use super::{
    IDLE_MAX, IO_TIMEOUT,
    link::Link,
    tls::Tls,
    wire::{ANSWER_BYTES, Answer, GATHER_BELOW, MAGIC, Operation, REQUEST_BYTES, Request, frames},
};
use crate::kv::{
    greeting::{GREETING_MAX, Greeting},
    lease::{Denied, Leases, Word},
};
use forebay_kernels::Region;
use forebay_schemas::kv::TokenRange;
use std::{
    io::{self, ErrorKind},
    ops::Range,
    sync::{Arc, OnceLock},
};

/// What an owner serves.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) greeting: Greeting,
    pub(super) region: Arc<Region>,
    pub(super) leases: Leases,
    pub(super) tls: Option<Tls>,
    /// How to read by other means, if there are any.
    pub(super) introduction: OnceLock<Vec<u8>>,
}

impl Served {
    /// Answers until the reader leaves, is silent for too long, or says what makes no sense.
    pub(super) fn serve(&self, link: &mut Link) -> io::Result<()> {
        if !self.greet(link)? {
            return Ok(());
        }
        let mut bytes = [0; REQUEST_BYTES];
        loop {
            link.patience(IDLE_MAX)?;
            match link.receive(&mut bytes[..1]) {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
                received => received?,
            }
            link.patience(IO_TIMEOUT)?;
            link.receive(&mut bytes[1..])?;
            let request = Request::decode(&bytes).ok_or(ErrorKind::InvalidData)?;
            self.answer(&request, link)?;
        }
    }

    /// Whether the reader means this owner.
    fn greet(&self, link: &mut Link) -> io::Result<bool> {
        let mut head = [0; MAGIC.len() + 4];
        link.receive(&mut head)?;
        let (magic, length) = head.split_at(MAGIC.len());
        let length = u32::from_le_bytes(length.try_into().expect("4 bytes")) as usize;
        if magic != MAGIC || length > GREETING_MAX {
            return Err(ErrorKind::InvalidData.into());
        }
        let mut greeting = vec![0; length];
        link.receive(&mut greeting)?;
        let meant: Greeting = serde_json::from_slice(&greeting)?;
        let answer = if meant == self.greeting { Answer::Done(0) } else { Answer::Stranger };
        link.send(&answer.encode(), false)?;
        Ok(answer == Answer::Done(0))
    }

    fn answer(&self, request: &Request, link: &mut Link) -> io::Result<()> {
        let shown = request.shown;
        let done = |checked: Result<(), _>| checked.map_or_else(Answer::Denied, |()| Answer::Done(0));
        let answer = match &request.operation {
            _ if !request.is_within(&self.greeting.layout) => Answer::OutOfRange,
            Operation::Claim => done(self.leases.claim(shown)),
            Operation::Release => done(self.leases.release(shown)),
            // No secret, and a reader that is late is to be told.
            Operation::Generation => Answer::Done(self.leases.word(shown.slot).generation()),
            Operation::Check => self.readable(request),
            Operation::Introduction => match self.leases.check(shown) {
                // Who knows the agent can read all of the region.
                Err(denied) => Answer::Denied(denied),
                Ok(()) => return self.introduce(link),
            },
            Operation::Read(tokens, planes) => return self.send(request, *tokens, planes.clone(), link),
        };
        link.send(&answer.encode(), false)
    }

    fn introduce(&self, link: &mut Link) -> io::Result<()> {
        let said = self.introduction.get().map_or(&[][..], Vec::as_slice);
        link.send(&[&Answer::Done(said.len() as u64).encode()[..], said].concat(), false)
    }

    fn send(
        &self,
        request: &Request,
        tokens: TokenRange,
        planes: Range<u32>,
        link: &mut Link,
    ) -> io::Result<()> {
        let mut gathered = Vec::with_capacity(ANSWER_BYTES + GATHER_BELOW);
        for frame in frames(self.greeting.layout.pieces(request.shown.slot, tokens, planes)) {
            let answer = self.readable(request);
            gathered.extend_from_slice(&answer.encode());
            if answer != Answer::Done(0) {
                return link.send(&gathered, false);
            }
            for (offset, bytes) in frame {
                if bytes < GATHER_BELOW {
                    let before = gathered.len();
                    gathered.resize(before + bytes, 0);
                    self.region.read(offset, &mut gathered[before..]);
                }
                let large = bytes >= GATHER_BELOW;
                if large || gathered.len() >= GATHER_BELOW {
                    link.send(&gathered, large)?;
                    gathered.clear();
                }
                if large {
                    link.send_region((&self.region, offset), bytes)?;
                }
            }
        }
        link.send(&gathered, false)
    }

    /// Whether the next frame may be sent: the lease stands, and somebody has claimed it.
    fn readable(&self, request: &Request) -> Answer {
        match (self.leases.check(request.shown), self.leases.word(request.shown.slot)) {
            (Err(denied), _) => Answer::Denied(denied),
            (Ok(()), Word::Claimed(_) | Word::Released(_)) => Answer::Done(0),
            (Ok(()), word) => Answer::Denied(Denied::Over(word.generation())),
        }
    }
}
