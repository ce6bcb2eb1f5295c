//! A connection's bytes, whoever asks on it: what is small is copied, what is large goes between socket and region.

use super::IO_TIMEOUT;
use forebay_kernels::{Checksum, Region, receive, send};
use rustix::net::SendFlags;
use std::{
    io::{self, Read},
    net::TcpStream,
    os::fd::AsFd,
    time::Duration,
};

/// A TCP connection on which both sides give up after a while.
#[derive(Debug)]
pub(super) struct Link {
    stream: TcpStream,
}

impl Link {
    pub(super) fn over(stream: TcpStream) -> io::Result<Link> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(IO_TIMEOUT))?;
        stream.set_write_timeout(Some(IO_TIMEOUT))?;
        Ok(Link { stream })
    }

    /// How long to wait for the next bytes.
    pub(super) fn patience(&self, timeout: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(timeout))
    }

    /// Sends all of it; with `more`, not before what follows.
    pub(super) fn send(&mut self, mut bytes: &[u8], more: bool) -> io::Result<()> {
        let flags = if more { SendFlags::NOSIGNAL | SendFlags::MORE } else { SendFlags::NOSIGNAL };
        while !bytes.is_empty() {
            match rustix::net::send(&self.stream, bytes, flags) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => bytes = &bytes[sent..],
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    pub(super) fn send_region(&mut self, from: (&Region, usize), bytes: usize) -> io::Result<()> {
        send(from, bytes, self.stream.as_fd())
    }

    pub(super) fn receive(&mut self, into: &mut [u8]) -> io::Result<()> {
        self.stream.read_exact(into)
    }

    pub(super) fn receive_region(
        &mut self,
        into: (&Region, usize),
        bytes: usize,
        sum: &mut Checksum,
    ) -> io::Result<()> {
        receive(self.stream.as_fd(), into, bytes, Some(sum))
    }
}
