//! Reading KV from another worker, over each transport, against a plain copy of as many bytes over the same way.

mod owner;
mod plain;

use super::median;
use crate::kv::NixlArgs;
use clap::Args;
use forebay_kernels::{Region, copy_summed, receive};
use forebay_schemas::kv::{KvDtype, KvGeometry, KvLayout, TokenRange};
use forebay_workers::kv::{Choice, KvOptions, KvPeers, nixl::Library, read_kv, tcp::TcpOptions};
use owner::{HASH, Owner};
use plain::{Feed, MemoryCopy};
use std::{net::TcpStream, os::fd::AsFd, time::Instant};

#[derive(Args, Debug)]
pub(crate) struct KvArgs {
    /// MB of KV that are read at once.
    #[arg(long, default_value_t = 256, value_name = "MB")]
    megabytes: usize,
    /// Reads of each kind, taken in turns.
    #[arg(long, default_value_t = 9, value_name = "N")]
    repeats: usize,
    #[command(flatten)]
    nixl: NixlArgs,
}

impl Default for KvArgs {
    fn default() -> Self {
        KvArgs { megabytes: 256, repeats: 9, nixl: NixlArgs::default() }
    }
}

/// Qwen3-0.6B in fp32.
const LARGE: KvGeometry = KvGeometry { layers: 28, kv_heads: 8, head_dim: 128, dtype: KvDtype::F32 };

/// The built-in model in fp32: 4 KiB a token.
const SMALL: KvGeometry = KvGeometry { layers: 4, kv_heads: 4, head_dim: 32, dtype: KvDtype::F32 };

/// Tokens of the small read: 64 KiB.
const SMALL_TOKENS: u32 = 16;

/// Small reads are taken this many times as often: each is soon over.
const SMALL_REPEATS: usize = 100;

pub(crate) fn run(args: &KvArgs) -> anyhow::Result<()> {
    show(args, None)?;
    // By itself: its threads poll, and take from the others what cores there are.
    match args.nixl.load() {
        Ok(library) => show(args, Some(&library)),
        Err(error) => {
            println!("\nnixl: not measured: {error}");
            Ok(())
        }
    }
}

/// Measures reads over NIXL, if there is one; otherwise those that need none.
fn show(args: &KvArgs, nixl: Option<&Library>) -> anyhow::Result<()> {
    let over = if nixl.is_some() { " over nixl" } else { "" };
    let count = (args.megabytes * 1_000_000 / LARGE.bytes_per_token()).max(1) as u32;
    let layout = KvLayout { geometry: LARGE, slots: 1, positions: count };
    let bytes = layout.region_bytes() as f64;
    println!("\n# KV read{over}: {:.0} MB ({count} tokens of Qwen3-0.6B in fp32)\n", bytes / 1e6);
    for Row { what, than, seconds, base } in measure(layout, args.repeats, nixl)? {
        let than = if than == Than::Memory { "memcpy" } else { "socket" };
        println!("{what:<44} {:>8.2} GB/s   {:>5.2} of {than}", bytes / seconds / 1e9, base / seconds);
    }
    let layout = KvLayout { geometry: SMALL, slots: 1, positions: SMALL_TOKENS };
    println!("\n# KV read{over}: 64 KiB ({SMALL_TOKENS} tokens of the built-in model in fp32)\n");
    for Row { what, seconds, .. } in measure(layout, args.repeats * SMALL_REPEATS, nixl)? {
        println!("{what:<44} {:>8.1} µs", seconds * 1e6);
    }
    Ok(())
}

/// What a read is compared with.
#[derive(Clone, Copy, PartialEq)]
enum Than {
    Memory,
    Socket,
}

struct Row {
    what: String,
    than: Than,
    /// Median.
    seconds: f64,
    /// Median of what it is compared with.
    base: f64,
}

/// One way to move the bytes: returns the seconds that it took.
type Move<'a> = Box<dyn FnMut() -> anyhow::Result<f64> + 'a>;

fn measure(layout: KvLayout, repeats: usize, nixl: Option<&Library>) -> anyhow::Result<Vec<Row>> {
    let tokens = TokenRange { start: 0, count: layout.positions };
    let owner = Owner::start(layout, nixl)?;
    let into = Region::create("bench-reader", layout.region_bytes())?;
    let mut memory = MemoryCopy::new(layout.region_bytes());
    let mut plain = Feed::of_bytes(layout.region_bytes())?;
    let (region, pieces) = (owner.region.clone(), all_pieces(&layout, tokens));
    let mut bare = Feed::of_pieces(region.clone(), pieces.clone())?;
    let mut received = vec![0; layout.region_bytes()];
    let (owner, into) = (&owner, &into);
    let mut moves: Vec<(String, Than, Move<'_>)> =
        vec![("memcpy".into(), Than::Memory, Box::new(|| Ok(memory.seconds())))];
    let mut add = |what: &str, than, run| moves.push((what.to_owned(), than, run));
    let read = |options| reading(owner, into, &options);
    if nixl.is_some() {
        let options = KvOptions { nixl: nixl.cloned(), ..over(Choice::Nixl) };
        add("nixl: lease, pieces, checksums", Than::Memory, read(options));
    } else {
        let copy = || {
            for (offset, bytes) in &pieces {
                copy_summed((&region, *offset), (into, *offset), *bytes, None);
            }
        };
        add("shm: pieces only", Than::Memory, Box::new(move || Ok(timed(copy))));
        add("shm: lease, pieces, checksums", Than::Memory, read(over(Choice::Shm)));
        let run = || plain.seconds(|socket| std::io::Read::read_exact(socket, &mut received));
        add("socket: one thread writes, one reads", Than::Socket, Box::new(run));
        let receive_all = |socket: &mut TcpStream| {
            let each =
                |(offset, bytes): &(usize, usize)| receive(socket.as_fd(), (into, *offset), *bytes, None);
            pieces.iter().try_for_each(each)
        };
        add("tcp: pieces only", Than::Socket, Box::new(move || bare.seconds(receive_all)));
        let tcp = |streams| KvOptions { tcp: TcpOptions { streams, tls: None }, ..over(Choice::Tcp) };
        add("tcp: lease, pieces, checksums", Than::Socket, read(tcp(1)));
        add("tcp, 2 streams: lease, pieces, checksums", Than::Socket, read(tcp(2)));
    }
    let mut taken = vec![Vec::new(); moves.len()];
    for repeat in 0..=repeats {
        for ((_, _, run), taken) in moves.iter_mut().zip(&mut taken) {
            let seconds = run()?;
            // The first round connects, maps and touches every page.
            if repeat > 0 {
                taken.push(seconds);
            }
        }
    }
    let medians: Vec<f64> = taken.into_iter().map(median).collect();
    let base = |than| {
        let at =
            moves.iter().position(|(_, kind, _)| *kind == than).expect("the first of its kind is the base");
        medians[at]
    };
    let rows = moves.iter().zip(&medians).map(|((what, than, _), seconds)| Row {
        what: what.clone(),
        than: *than,
        seconds: *seconds,
        base: base(*than),
    });
    Ok(rows.collect())
}

/// A whole read, as a decode worker does it.
fn reading<'a>(owner: &'a Owner, into: &'a Region, options: &KvOptions) -> Move<'a> {
    let peers = KvPeers::new(HASH, options);
    Box::new(move || {
        let (handle, sealed) = owner.seal();
        let transport = peers.transport(&handle, Some(&owner.lease))?;
        let begun = Instant::now();
        read_kv(&*transport, &[handle], into, &owner.layout, 0)?;
        let seconds = begun.elapsed().as_secs_f64();
        drop(sealed);
        Ok(seconds)
    })
}

fn over(choice: Choice) -> KvOptions {
    KvOptions { choice, ..KvOptions::default() }
}

fn all_pieces(layout: &KvLayout, tokens: TokenRange) -> Vec<(usize, usize)> {
    layout.pieces(0, tokens, 0..layout.geometry.layers * 2).collect()
}

fn timed(run: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    run();
    begun.elapsed().as_secs_f64()
}
