//! Reading KV from a worker on the same host, against a plain copy of as many bytes.

use super::median;
use clap::Args;
use forebay_kernels::{Region, copy_summed};
use forebay_schemas::{
    card::WorkerLease,
    ids::{ModelKey, WorkerId},
    kv::{KvDtype, KvGeometry, KvHandle, KvLayout, LayoutHash, TokenRange},
    task::Role,
};
use forebay_workers::kv::{KvOptions, KvPeers, Leases, Sealed, read_kv, shm, sums};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

#[derive(Args, Debug)]
pub(crate) struct KvArgs {
    /// MB of KV that are read at once.
    #[arg(long, default_value_t = 256, value_name = "MB")]
    megabytes: usize,
    /// Reads, each between two plain copies.
    #[arg(long, default_value_t = 9, value_name = "N")]
    repeats: usize,
}

impl Default for KvArgs {
    fn default() -> Self {
        KvArgs { megabytes: 256, repeats: 9 }
    }
}

/// Qwen3-0.6B in fp32.
const GEOMETRY: KvGeometry = KvGeometry { layers: 28, kv_heads: 8, head_dim: 128, dtype: KvDtype::F32 };

const HASH: LayoutHash = LayoutHash(1);

pub(crate) fn run(args: &KvArgs) -> anyhow::Result<()> {
    let count = (args.megabytes * 1_000_000 / GEOMETRY.bytes_per_token()).max(1) as u32;
    let layout = KvLayout { geometry: GEOMETRY, slots: 1, positions: count };
    let tokens = TokenRange { start: 0, count };
    let owner = Owner::start(layout)?;
    let into = Region::create("bench-reader", layout.region_bytes())?;
    let peers = KvPeers::new(HASH, &KvOptions::default());
    let mut memcpy = PlainCopy::new(layout.region_bytes());
    let (mut copies, mut plain, mut checked) = (Vec::new(), Vec::new(), Vec::new());
    println!(
        "\n# KV read: {:.0} MB ({count} tokens of Qwen3-0.6B in fp32), one thread\n",
        layout.region_bytes() as f64 / 1e6
    );
    for repeat in 0..=args.repeats {
        let copy = memcpy.seconds();
        let unchecked = timed(|| copy_pieces(&owner.region, &into, &layout, tokens));
        let (handle, sealed) = owner.seal(tokens);
        let transport = peers.transport(&handle, Some(&owner.lease))?;
        let begun = Instant::now();
        read_kv(&*transport, &[handle], &into, &layout, 0)?;
        let read = begun.elapsed().as_secs_f64();
        drop(sealed);
        // The first round maps the peer and touches every page.
        if repeat > 0 {
            copies.push(copy);
            plain.push(unchecked);
            checked.push(read);
        }
    }
    let bytes = layout.region_bytes() as f64;
    let base = median(copies);
    let row = |what: &str, seconds: f64| {
        println!("{what:<42} {:>8.2} GB/s   {:>5.2} of memcpy", bytes / seconds / 1e9, base / seconds);
    };
    row("memcpy", base);
    row("shm read, pieces only", median(plain));
    row("shm read, lease + pieces + checksums", median(checked));
    Ok(())
}

/// A copy between two plain buffers, as fast as one thread copies.
struct PlainCopy {
    from: Vec<u8>,
    into: Vec<u8>,
}

impl PlainCopy {
    fn new(bytes: usize) -> PlainCopy {
        PlainCopy { from: vec![1; bytes], into: vec![2; bytes] }
    }

    fn seconds(&mut self) -> f64 {
        let (from, into) = (std::hint::black_box(&self.from), std::hint::black_box(&mut self.into));
        timed(|| into.copy_from_slice(from))
    }
}

fn timed(run: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    run();
    begun.elapsed().as_secs_f64()
}

fn copy_pieces(from: &Region, into: &Region, layout: &KvLayout, tokens: TokenRange) {
    for (offset, bytes) in layout.pieces(0, tokens, 0..layout.geometry.layers * 2) {
        copy_summed((from, offset), (into, offset), bytes, None);
    }
}

/// The worker that holds the KV. In this process, but reached as from any other: by its socket and descriptors.
struct Owner {
    region: Arc<Region>,
    layout: KvLayout,
    leases: Leases,
    lease: WorkerLease,
    _socket: shm::ShmOwner,
}

impl Owner {
    fn start(layout: KvLayout) -> anyhow::Result<Owner> {
        let region = Arc::new(Region::create("bench-owner", layout.region_bytes())?);
        let block: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for offset in (0..layout.region_bytes()).step_by(block.len()) {
            region.write(offset, &block[..block.len().min(layout.region_bytes() - offset)]);
        }
        let leases = Leases::create(1)?;
        let worker = WorkerId::random("bench");
        let kv = (region.clone(), layout, HASH);
        let socket = shm::ShmOwner::listen(&std::env::temp_dir(), &worker, 1, kv, leases.clone())?;
        let lease = WorkerLease {
            worker,
            incarnation: 1,
            role: Role::Prefill,
            model: ModelKey::of("bench"),
            layout_hash: HASH,
            slots: 1,
            free_slots: 0,
            host: shm::host_id(),
            kv_socket: socket.path().display().to_string(),
            kv_tcp: None,
            active_tokens: 0,
            draining: false,
            kv_leases: 0,
            own_queue: false,
        };
        Ok(Owner { region, layout, leases, lease, _socket: socket })
    }

    fn seal(&self, tokens: TokenRange) -> (KvHandle, Sealed) {
        let sealed = self.leases.seal(0, Duration::from_secs(60));
        let handle = KvHandle {
            agent: self.lease.worker.clone(),
            incarnation: 1,
            layout: self.layout,
            layout_hash: HASH,
            slot: 0,
            generation: sealed.generation(),
            tokens,
            checksums: sums(&self.region, &self.layout, 0, tokens),
            lease_remaining_ms: 60_000,
            capability: sealed.capability(),
        };
        (handle, sealed)
    }
}
