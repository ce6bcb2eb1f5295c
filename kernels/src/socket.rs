//! Regions over sockets: bytes go from a region into a socket, and from a socket into a region, without a buffer
//! between.

#![allow(unsafe_code)]

use crate::{Checksum, Region};
use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};
use std::{io, os::fd::BorrowedFd};

/// Bytes received before they are summed: what fits the second-level cache, and few enough system calls.
const STRIDE: usize = 256 << 10;

/// Sends bytes of a region into a socket that blocks. The kernel takes them from the region's pages, maybe only
/// later: if the range is overwritten meanwhile, the other side may get what was written. It has to check.
pub fn send(from: (&Region, usize), bytes: usize, socket: BorrowedFd<'_>) -> io::Result<()> {
    let (region, offset) = from;
    region.at(offset, bytes, false);
    let (mut position, end) = (offset as u64, (offset + bytes) as u64);
    while position < end {
        let rest = (end - position) as usize;
        match rustix::fs::sendfile(socket, region.fd(), Some(&mut position), rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Receives exactly that many bytes from a socket that blocks, straight into a region, and adds them to `sum` while
/// they are in cache. The caller owns the range. Fails with what the socket's own time-out makes of it, or
/// `UnexpectedEof`; what has come by then stays in the region.
pub fn receive(
    socket: BorrowedFd<'_>,
    into: (&Region, usize),
    bytes: usize,
    mut sum: Option<&mut Checksum>,
) -> io::Result<()> {
    let target = into.0.at(into.1, bytes, true);
    let mut done = 0;
    while done < bytes {
        let step = STRIDE.min(bytes - done);
        // SAFETY: `done + step` stays within the checked range. It is owned by the caller, so nothing else writes
        // there while the slice lives, and any bytes are valid `u8`s.
        let room = unsafe { std::slice::from_raw_parts_mut(target.add(done), step) };
        match recv(socket, &mut *room, RecvFlags::WAITALL) {
            Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((_, received)) => {
                if let Some(sum) = sum.as_deref_mut() {
                    sum.update(&room[..received]);
                }
                done += received;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{net::Shutdown, os::fd::AsFd, os::unix::net::UnixStream};

    #[test]
    fn a_region_arrives_as_it_was_and_summed() {
        let bytes = 3 * STRIDE + 77;
        let (from, into) =
            (Region::create("from", bytes + 5).unwrap(), Region::create("into", bytes).unwrap());
        let data: Vec<u8> = (0..bytes).map(|i| (i * 7 + i / 251) as u8).collect();
        from.write(5, &data);
        let (here, there) = UnixStream::pair().unwrap();
        let sending = std::thread::spawn(move || send((&from, 5), bytes, here.as_fd()).unwrap());
        let mut sum = Checksum::default();
        receive(there.as_fd(), (&into, 0), bytes, Some(&mut sum)).unwrap();
        sending.join().unwrap();
        let mut stored = vec![0; bytes];
        into.read(0, &mut stored);
        assert_eq!(stored, data);
        let mut expected = Checksum::default();
        expected.update(&data);
        assert_eq!(sum.value(), expected.value());
    }

    #[test]
    fn a_sender_that_leaves_is_an_error() {
        let into = Region::create("into", 100).unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut &here, b"half").unwrap();
        here.shutdown(Shutdown::Write).unwrap();
        let error = receive(there.as_fd(), (&into, 0), 100, None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
