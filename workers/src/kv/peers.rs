//! Which transport leads to which worker.

use super::{
    nixl::{self, NixlPeers},
    read::{ReadError, Transport},
    shm::{self, ShmPeers},
    tcp::{TcpListen, TcpOptions, TcpPeers},
};
use forebay_kernels::cuda::Device;
use forebay_schemas::{
    card::WorkerLease,
    kv::{KvHandle, LayoutHash},
};
use std::sync::Arc;

/// Which transports a worker may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// On the same host from GPU to GPU where both ends can, or over shared memory; elsewhere or where that fails, `nixl` if both sides have it, and `tcp` if not.
    Auto,
    /// Shared memory only.
    #[default]
    Shm,
    /// TCP only, even on the same host.
    Tcp,
    /// NIXL only, even on the same host.
    Nixl,
}

/// How a worker reads from others, and how others read from it.
#[derive(Clone, Debug, Default)]
pub struct KvOptions {
    /// Which transports it reads over.
    pub choice: Choice,
    /// Where it serves reads over TCP, if it does.
    pub listen: Option<TcpListen>,
    /// How it reads over TCP.
    pub tcp: TcpOptions,
    /// NIXL, where it was found: the worker then serves reads over it too, and reads so.
    pub nixl: Option<nixl::Library>,
}

/// The peers that this worker can read from.
#[derive(Debug)]
pub struct KvPeers {
    shm: ShmPeers,
    tcp: TcpPeers,
    nixl: Option<NixlPeers>,
    choice: Choice,
    layout_hash: LayoutHash,
}

impl KvPeers {
    /// No peer known yet; all must have this layout hash.
    pub fn new(layout_hash: LayoutHash, options: &KvOptions) -> KvPeers {
        let (shm, tcp) = (ShmPeers::default(), TcpPeers::new(options.tcp.clone()));
        let nixl = options.nixl.as_ref().map(NixlPeers::new);
        KvPeers { shm, tcp, nixl, choice: options.choice, layout_hash }
    }

    /// Has KV read from other GPUs' memory straight into this one's, if all ways may be taken.
    pub fn on_gpu(mut self, device: &Device) -> KvPeers {
        if self.choice == Choice::Auto {
            self.shm.read_gpus(device);
        }
        self
    }

    /// The transport to the worker that holds a handle's bytes; `lease` is what the registry knows of it.
    pub fn transport(
        &self,
        handle: &KvHandle,
        lease: Option<&WorkerLease>,
    ) -> Result<Arc<dyn Transport>, ReadError> {
        if handle.layout_hash != self.layout_hash {
            let agent = handle.agent.clone();
            return Err(ReadError::Layout { agent, expected: self.layout_hash, found: handle.layout_hash });
        }
        match self.choice {
            Choice::Shm => self.shm.peer(handle, lease),
            Choice::Tcp => self.tcp.peer(handle, lease),
            Choice::Nixl => self.nixl(handle, lease),
            Choice::Auto => self.nearest(handle, lease),
        }
    }

    fn far(&self, handle: &KvHandle, lease: Option<&WorkerLease>) -> Result<Arc<dyn Transport>, ReadError> {
        let both = self.nixl.is_some() && lease.is_some_and(|lease| lease.kv_nixl);
        if !both {
            return self.tcp.peer(handle, lease);
        }
        self.nixl(handle, lease).or_else(|error| {
            tracing::debug!(%error, "reading over tcp instead");
            self.tcp.peer(handle, lease)
        })
    }

    fn nixl(&self, handle: &KvHandle, lease: Option<&WorkerLease>) -> Result<Arc<dyn Transport>, ReadError> {
        let Some(nixl) = &self.nixl else {
            let (agent, cause) = (handle.agent.clone(), "this worker has no NIXL".into());
            return Err(ReadError::Unreachable { agent, transport: "nixl", cause });
        };
        nixl.peer(handle, self.tcp.tcp_peer(handle, lease)?)
    }

    fn nearest(
        &self,
        handle: &KvHandle,
        lease: Option<&WorkerLease>,
    ) -> Result<Arc<dyn Transport>, ReadError> {
        let elsewhere = lease.is_some_and(|lease| lease.host != shm::host_id());
        if elsewhere {
            return self.far(handle, lease);
        }
        // On this host; or without a lease any more, but its memory may be mapped here.
        self.shm.peer(handle, lease).or_else(|near| {
            let far = self.far(handle, lease).map_err(|_| near);
            if far.is_ok() {
                tracing::debug!(worker = %handle.agent, "no shared memory with it; reading over the network");
            }
            far
        })
    }
}
