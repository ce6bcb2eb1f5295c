//! What reads of KV are compared with: the same number of bytes, moved as plainly as can be.

use super::timed;
use std::{
    io::{self, Write},
    net::{TcpListener, TcpStream},
    sync::mpsc::{Sender, channel},
    time::Instant,
};

/// A copy between two plain buffers, as fast as one thread copies.
pub(super) struct MemoryCopy {
    from: Vec<u8>,
    into: Vec<u8>,
}

impl MemoryCopy {
    pub(super) fn new(bytes: usize) -> MemoryCopy {
        MemoryCopy { from: vec![1; bytes], into: vec![2; bytes] }
    }

    pub(super) fn seconds(&mut self) -> f64 {
        let (from, into) = (std::hint::black_box(&self.from), std::hint::black_box(&mut self.into));
        timed(|| into.copy_from_slice(from))
    }
}

/// A TCP connection over loopback on which a thread of its own sends, each time that it is asked to.
pub(super) struct Feed {
    socket: TcpStream,
    ask: Sender<()>,
}

impl Feed {
    /// It sends a plain buffer.
    pub(super) fn of_bytes(bytes: usize) -> io::Result<Feed> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut far = TcpStream::connect(listener.local_addr()?)?;
        let (socket, _) = listener.accept()?;
        far.set_nodelay(true)?;
        let (ask, asked) = channel();
        let from = vec![1; bytes];
        std::thread::spawn(move || while asked.recv().is_ok() && far.write_all(&from).is_ok() {});
        Ok(Feed { socket, ask })
    }

    /// Asks for the bytes and receives them.
    pub(super) fn seconds(
        &mut self,
        receive: impl FnOnce(&mut TcpStream) -> io::Result<()>,
    ) -> anyhow::Result<f64> {
        let begun = Instant::now();
        self.ask.send(())?;
        receive(&mut self.socket)?;
        Ok(begun.elapsed().as_secs_f64())
    }
}
