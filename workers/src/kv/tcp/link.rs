//! A connection's bytes, whoever asks on it: what is small is copied, what is large goes between socket and region.

use super::{
    IO_TIMEOUT,
    tls::{Encrypted, Tls},
};
use forebay_kernels::{Checksum, Region, receive, send};
use rustix::net::SendFlags;
use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::fd::AsFd,
    time::Duration,
};

/// Bytes of a region that are encrypted or decrypted at once.
const TLS_STRIDE: usize = 64 << 10;

/// A TCP connection on which both sides give up after a while.
#[derive(Debug)]
pub(super) struct Link {
    stream: TcpStream,
    /// The same stream, encrypted.
    tls: Option<Box<dyn Encrypted>>,
}

impl Link {
    /// The owner's end.
    pub(super) fn accepted(stream: TcpStream, tls: Option<&Tls>) -> io::Result<Link> {
        let tls = tls.map(|tls| tls.accept(stream.try_clone()?)).transpose()?;
        Link::over(stream, tls)
    }

    /// The reader's end.
    pub(super) fn connected(stream: TcpStream, tls: Option<&Tls>) -> io::Result<Link> {
        let tls = tls.map(|tls| tls.connect(stream.try_clone()?)).transpose()?;
        Link::over(stream, tls)
    }

    fn over(stream: TcpStream, tls: Option<Box<dyn Encrypted>>) -> io::Result<Link> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(IO_TIMEOUT))?;
        stream.set_write_timeout(Some(IO_TIMEOUT))?;
        Ok(Link { stream, tls })
    }

    /// How long to wait for the next bytes.
    pub(super) fn patience(&self, timeout: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(timeout))
    }

    /// Sends all of it; with `more`, not before what follows.
    pub(super) fn send(&mut self, mut bytes: &[u8], more: bool) -> io::Result<()> {
        if let Some(tls) = &mut self.tls {
            return tls.write_all(bytes);
        }
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
        let Some(tls) = &mut self.tls else { return send(from, bytes, self.stream.as_fd()) };
        let mut buffer = vec![0; TLS_STRIDE.min(bytes)];
        for at in (0..bytes).step_by(TLS_STRIDE) {
            let piece = &mut buffer[..TLS_STRIDE.min(bytes - at)];
            from.0.read(from.1 + at, piece);
            tls.write_all(piece)?;
        }
        Ok(())
    }

    pub(super) fn receive(&mut self, into: &mut [u8]) -> io::Result<()> {
        match &mut self.tls {
            Some(tls) => tls.read_exact(into),
            None => self.stream.read_exact(into),
        }
    }

    pub(super) fn receive_region(
        &mut self,
        into: (&Region, usize),
        bytes: usize,
        sum: &mut Checksum,
    ) -> io::Result<()> {
        let Some(tls) = &mut self.tls else { return receive(self.stream.as_fd(), into, bytes, Some(sum)) };
        let mut buffer = vec![0; TLS_STRIDE.min(bytes)];
        for at in (0..bytes).step_by(TLS_STRIDE) {
            let piece = &mut buffer[..TLS_STRIDE.min(bytes - at)];
            tls.read_exact(piece)?;
            into.0.write(into.1 + at, piece);
            sum.update(piece);
        }
        Ok(())
    }
}
