//! The worker that holds the KV. In this process, but reached as from any other: by its sockets.

use forebay_kernels::Region;
use forebay_schemas::{
    card::WorkerLease,
    ids::{ModelKey, WorkerId},
    kv::{KvHandle, KvLayout, LayoutHash, TokenRange},
    task::Role,
};
use forebay_workers::kv::{
    Leases, Sealed,
    nixl::{Library, NixlOwner},
    shm, sums,
    tcp::{TcpListen, TcpOwner},
};
use std::{net::Ipv4Addr, sync::Arc, time::Duration};

pub(super) const HASH: LayoutHash = LayoutHash(1);

pub(super) struct Owner {
    pub(super) region: Arc<Region>,
    pub(super) layout: KvLayout,
    pub(super) lease: WorkerLease,
    leases: Leases,
    checksums: Vec<u64>,
    _shm: shm::ShmOwner,
    _tcp: TcpOwner,
    _nixl: Option<NixlOwner>,
}

impl Owner {
    /// With one slot, full; read over NIXL too, if there is one.
    pub(super) fn start(layout: KvLayout, library: Option<&Library>) -> anyhow::Result<Owner> {
        let region = Arc::new(Region::create("bench-owner", layout.region_bytes())?);
        let block: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for offset in (0..layout.region_bytes()).step_by(block.len()) {
            region.write(offset, &block[..block.len().min(layout.region_bytes() - offset)]);
        }
        let leases = Leases::create(1)?;
        let worker = WorkerId::random("bench");
        let kv = (region.clone(), layout, HASH);
        let shm = shm::ShmOwner::listen(&std::env::temp_dir(), &worker, 1, kv.clone(), leases.clone(), None)?;
        let listen = TcpListen { address: (Ipv4Addr::LOCALHOST, 0).into(), advertise: None, tls: None };
        let tcp = TcpOwner::listen(&listen, &worker, 1, kv, leases.clone())?;
        let nixl = library.map(|library| NixlOwner::register(library, &region)).transpose()?;
        if let Some(nixl) = &nixl {
            nixl.introduce_by(&tcp);
        }
        let lease = WorkerLease {
            incarnation: 1,
            layout_hash: HASH,
            slots: 1,
            host: shm::host_id(),
            kv_socket: shm.path().display().to_string(),
            kv_tcp: Some(tcp.advertised().to_owned()),
            kv_nixl: nixl.is_some(),
            ..WorkerLease::of(worker, Role::Prefill, ModelKey::of("bench"))
        };
        let tokens = TokenRange { start: 0, count: layout.positions };
        let checksums = sums(&region, &layout, 0, tokens);
        Ok(Owner { region, layout, lease, leases, checksums, _shm: shm, _tcp: tcp, _nixl: nixl })
    }

    pub(super) fn seal(&self) -> (KvHandle, Sealed) {
        let sealed = self.leases.seal(0, Duration::from_secs(60));
        let handle = KvHandle {
            agent: self.lease.worker.clone(),
            incarnation: 1,
            layout: self.layout,
            layout_hash: HASH,
            slot: 0,
            generation: sealed.generation(),
            tokens: TokenRange { start: 0, count: self.layout.positions },
            checksums: self.checksums.clone(),
            lease_remaining_ms: 60_000,
            capability: sealed.capability(),
        };
        (handle, sealed)
    }
}
