//! The router alone: decisions over an index of many blocks and workers.

use super::percentile;
use clap::Args;
use forebay_api::routing::{
    cost::{Candidate, Given, Weights, decide},
    index::Index,
};
use forebay_schemas::{
    cache::{BLOCK_TOKENS, BlockHash, block_hashes},
    cache_event::{CacheChange, CacheEvent, EVENT_BLOCKS_MAX},
    ids::WorkerId,
    kv::LayoutHash,
};
use std::{collections::BTreeMap, time::Instant};

#[derive(Args, Clone, Debug)]
pub(crate) struct RouteArgs {
    /// Blocks in all workers' caches together.
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    blocks: usize,
    /// Workers.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    workers: usize,
    /// Decisions.
    #[arg(long, default_value_t = 20_000, value_name = "N")]
    decisions: usize,
}

impl Default for RouteArgs {
    fn default() -> Self {
        RouteArgs { blocks: 1_000_000, workers: 1000, decisions: 20_000 }
    }
}

/// Blocks of a system prompt that many share, and of the rest of a prompt.
const SHARED: u32 = 32;
const REST: u32 = 96;

/// System prompts.
const SYSTEMS: u32 = 20;

const LAYOUT: LayoutHash = LayoutHash(7);

pub(crate) fn run(args: &RouteArgs) -> anyhow::Result<()> {
    let workers: Vec<WorkerId> = (0..args.workers)
        .map(|number| WorkerId::new(format!("decode-{number:08x}")))
        .collect::<Result<_, _>>()?;
    let begun = Instant::now();
    let index = fill(args, &workers);
    let filled = begun.elapsed();
    let mut times = Vec::with_capacity(args.decisions);
    let (mut hits, mut hashed) = (0, 0.0);
    for number in 0..args.decisions as u32 {
        let prompt =
            prompt(number.wrapping_mul(2_654_435_761) % (args.blocks as u32 / REST).max(1), number % 3 == 0);
        let begun = Instant::now();
        let hashes = block_hashes(LAYOUT, None, &prompt);
        hashed += begun.elapsed().as_secs_f64();
        let overlap: BTreeMap<&WorkerId, u32> = index.overlap(&hashes).into_iter().collect();
        let candidates: Vec<Candidate<'_>> = workers
            .iter()
            .enumerate()
            .map(|(at, worker)| Candidate {
                worker,
                hit_blocks: overlap.get(worker).copied().unwrap_or(0),
                kv_blocks: (at as u32 * 37) % 400,
                active: at as u32 % 8,
                free_slots: 8 - at as u32 % 8,
                queued_blocks: 0,
                just_routed: Given::default(),
            })
            .collect();
        hits += u32::from(decide(SHARED + REST, &candidates, Weights::default()).worker.is_some());
        times.push(begun.elapsed().as_secs_f64());
    }
    let total: f64 = times.iter().sum();
    times.sort_by(f64::total_cmp);
    println!(
        "\n# Router ({} blocks, {} workers, prompts of {} tokens)\n",
        index.held(),
        args.workers,
        (SHARED + REST) * BLOCK_TOKENS
    );
    println!("{:>28} {:>10.1} ms", "to read all events", filled.as_secs_f64() * 1e3);
    println!("{:>28} {:>10.0} /s", "decisions, one thread", args.decisions as f64 / total);
    println!("{:>28} {:>10.1} µs", "median", percentile(&times, 0.5) * 1e6);
    println!("{:>28} {:>10.1} µs", "p99", percentile(&times, 0.99) * 1e6);
    println!("{:>28} {:>10.1} µs", "of that, hashing the prompt", hashed / args.decisions as f64 * 1e6);
    println!("{:>28} {:>10.1} %", "to a worker", f64::from(hits) / args.decisions as f64 * 1e2);
    Ok(())
}

/// Each worker has all system prompts, and prompts of its own.
fn fill(args: &RouteArgs, workers: &[WorkerId]) -> Index {
    let mut index = Index::default();
    let each = args.blocks / workers.len();
    for (at, worker) in workers.iter().enumerate() {
        let mut blocks: Vec<BlockHash> = Vec::with_capacity(each + 256);
        let mut next = (at * each) as u32 / REST;
        while blocks.len() < each {
            blocks.extend(block_hashes(LAYOUT, None, &prompt(next, false)));
            next += 1;
        }
        blocks.truncate(each);
        for (number, part) in blocks.chunks(EVENT_BLOCKS_MAX).enumerate() {
            let change = CacheChange::Stored { blocks: part.to_vec() };
            index.apply(&CacheEvent {
                worker: worker.clone(),
                incarnation: 1,
                number: number as u64,
                change,
            });
        }
    }
    index
}

/// The prompt of that number, or one that has only its system prompt in common with others.
fn prompt(number: u32, fresh: bool) -> Vec<u32> {
    let system = number % SYSTEMS;
    let shared = (0..SHARED * BLOCK_TOKENS).map(|token| system * 10_007 + token);
    let offset = if fresh { 1 << 30 } else { 1 << 20 };
    let rest = (0..REST * BLOCK_TOKENS).map(|token| offset + number * 4096 + token);
    shared.chain(rest).collect()
}
