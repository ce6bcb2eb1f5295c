//! One connection as its reader uses it.

use super::{
    BRIEF_TIMEOUT, CONNECT_TIMEOUT, IO_TIMEOUT,
    link::Link,
    tls::Tls,
    wire::{ANSWER_BYTES, Answer, GATHER_BELOW, INTRODUCTION_MAX, MAGIC, Operation, Request, frames},
};
use crate::kv::greeting::Greeting;
use forebay_kernels::{Checksum, Region};
use forebay_schemas::kv::{KvHandle, KvLayout};
use std::{
    io,
    net::{TcpStream, ToSocketAddrs},
    ops::Range,
};

/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 4;

/// Why an operation failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The connection is of no more use.
    Broken(io::Error),
    /// The owner said no; the connection goes on.
    Answered(Answer),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Broken(error)
    }
}

/// Where bytes go: a slot of the reader's region.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'a> {
    pub(super) region: &'a Region,
    pub(super) layout: &'a KvLayout,
    pub(super) slot: u32,
}

/// A connection to an owner that has greeted.
#[derive(Debug)]
pub(super) struct Connection {
    link: Link,
}

impl Connection {
    /// Connects to `host:port`, and makes sure that it is the owner that is meant.
    pub(super) fn open(address: &str, meant: &Greeting, tls: Option<&Tls>) -> Result<Connection, Failure> {
        let mut link = Link::connected(connect(address)?, tls)?;
        let greeting = serde_json::to_vec(meant).expect("plain data always encodes");
        let length = (greeting.len() as u32).to_le_bytes();
        link.patience(CONNECT_TIMEOUT)?;
        link.send(&[&MAGIC[..], &length, &greeting].concat(), false)?;
        let mut connection = Connection { link };
        connection.answer()?;
        connection.link.patience(IO_TIMEOUT)?;
        Ok(connection)
    }

    /// Asks for anything but bytes.
    pub(super) fn ask(&mut self, operation: Operation, handle: &KvHandle) -> Result<u64, Failure> {
        self.link.send(&Request::new(operation, handle).encode(), false)?;
        self.answer()
    }

    /// Asks for what is not worth waiting for: a reader that is done may be in a hurry.
    pub(super) fn ask_briefly(&mut self, operation: Operation, handle: &KvHandle) -> Result<u64, Failure> {
        self.link.patience(BRIEF_TIMEOUT)?;
        let answer = self.ask(operation, handle);
        self.link.patience(IO_TIMEOUT)?;
        answer
    }

    /// Asks how to read by other means; empty if there are none.
    pub(super) fn introduction(&mut self, handle: &KvHandle) -> Result<Vec<u8>, Failure> {
        let length = self.ask(Operation::Introduction, handle)?;
        if length > INTRODUCTION_MAX as u64 {
            return Err(Failure::Broken(io::ErrorKind::InvalidData.into()));
        }
        let mut said = vec![0; length as usize];
        self.link.receive(&mut said)?;
        Ok(said)
    }

    /// Reads these planes of the handle's tokens, and returns the sum of the bytes.
    pub(super) fn read(
        &mut self,
        handle: &KvHandle,
        planes: Range<u32>,
        into: Target<'_>,
    ) -> Result<Checksum, Failure> {
        let request = Request::new(Operation::Read(handle.tokens, planes.clone()), handle);
        self.link.send(&request.encode(), false)?;
        let mut sum = Checksum::default();
        let mut gathered = vec![0; 2 * GATHER_BELOW];
        for frame in frames(into.layout.pieces(into.slot, handle.tokens, planes)) {
            self.answer()?;
            for runs in frame.chunk_by(|(_, one), (_, next)| (*one < GATHER_BELOW) == (*next < GATHER_BELOW))
            {
                if runs[0].1 < GATHER_BELOW {
                    self.receive_small(runs, into.region, &mut gathered, &mut sum)?;
                    continue;
                }
                for (offset, bytes) in runs {
                    self.link.receive_region((into.region, *offset), *bytes, &mut sum)?;
                }
            }
        }
        Ok(sum)
    }

    /// Receives small runs together and copies each to its place.
    fn receive_small(
        &mut self,
        mut runs: &[(usize, usize)],
        into: &Region,
        gathered: &mut [u8],
        sum: &mut Checksum,
    ) -> io::Result<()> {
        while !runs.is_empty() {
            let (mut count, mut total) = (0, 0);
            while count < runs.len() && total + runs[count].1 <= gathered.len() {
                total += runs[count].1;
                count += 1;
            }
            let received = &mut gathered[..total];
            self.link.receive(received)?;
            sum.update(received);
            let mut from = 0;
            for (offset, bytes) in &runs[..count] {
                into.write(*offset, &received[from..from + bytes]);
                from += bytes;
            }
            runs = &runs[count..];
        }
        Ok(())
    }

    fn answer(&mut self) -> Result<u64, Failure> {
        let mut bytes = [0; ANSWER_BYTES];
        self.link.receive(&mut bytes)?;
        match Answer::decode(&bytes) {
            Some(Answer::Done(value)) => Ok(value),
            Some(answer) => Err(Failure::Answered(answer)),
            None => Err(Failure::Broken(io::ErrorKind::InvalidData.into())),
        }
    }
}

fn connect(address: &str) -> io::Result<TcpStream> {
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()?.take(ADDRESSES_MAX) {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}
