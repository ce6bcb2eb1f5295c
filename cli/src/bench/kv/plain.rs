//! What reads of KV are compared with: the same number of bytes, moved as plainly as can be.

use super::timed;
use forebay_kernels::{Region, send};
use std::{
    io::{self, Write},
    net::{TcpListener, TcpStream},
    os::fd::AsFd,
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
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
        let from = vec![1; bytes];
        Feed::sending(move |socket| socket.write_all(&from))
    }

    /// It sends pieces of a region, `(offset, bytes)` each, as the `tcp` transport does.
    pub(super) fn of_pieces(region: Arc<Region>, pieces: Vec<(usize, usize)>) -> io::Result<Feed> {
        Feed::sending(move |socket| {
            pieces.iter().try_for_each(|(offset, bytes)| send((&region, *offset), *bytes, socket.as_fd()))
        })
    }

    fn sending(what: impl Fn(&mut TcpStream) -> io::Result<()> + Send + 'static) -> io::Result<Feed> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut far = TcpStream::connect(listener.local_addr()?)?;
        let (socket, _) = listener.accept()?;
        far.set_nodelay(true)?;
        let (ask, asked) = channel();
        std::thread::spawn(move || while asked.recv().is_ok() && what(&mut far).is_ok() {});
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
