//! The `tcp` transport: workers on different hosts. The reader asks, and the owner sends from its region.
//!
//! A connection begins with a greeting, in which the reader names the owner, its life and its layout. Then the reader
//! sends requests of a fixed size, one at a time: claim, read, generation, release. The owner checks each against the
//! slot's lease: generation, time, capability and bounds. What a read sends comes in frames, and before each the owner
//! looks at the lease again. No length is taken from the other side: both derive them from the layout.
//!
//! Threads that block, and not the async runtime: a read runs on such a thread anyway, and the copies are what counts.

mod connection;
mod link;
mod owner;
mod peers;
mod pool;
mod serve;
mod tls;
mod wire;

pub use owner::{TcpListen, TcpOwner, has_port};
pub(super) use peers::TcpPeer;
pub use peers::TcpPeers;
pub use tls::{TLS_NAME, Tls, TlsError, TlsFiles};

use std::time::Duration;

/// How long a peer that does not answer is tried to reach.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long either side waits for bytes, or for room for them, in the middle of something.
const IO_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a reader waits for word that a lease was given back.
const BRIEF_TIMEOUT: Duration = Duration::from_millis(250);

/// How long an owner keeps a connection on which nothing is asked.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// How long a reader does: less, so that it does not ask on one that is being closed.
const IDLE_USE_MAX: Duration = Duration::from_secs(45);

/// How `tcp` reads.
#[derive(Clone, Debug)]
pub struct TcpOptions {
    /// Connections that one large read uses at once: 1 to 4. One is enough where cores are scarce, and as fast over
    /// loopback; a network that limits each connection may want more.
    pub streams: usize,
    /// Encrypts, and tells own workers from others; both sides must have it, or none.
    pub tls: Option<Tls>,
}

impl Default for TcpOptions {
    fn default() -> Self {
        TcpOptions { streams: 1, tls: None }
    }
}
