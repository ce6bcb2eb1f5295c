//! Runs many seeds, or one with all that happens in it: `make simulate`.

use clap::Parser;
use forebay_tests::simulation::{Mutation, Options, Report, replay, run, run_many};
use std::{process::ExitCode, time::Duration};

/// Deterministic simulation of Forebay: gateways, workers and their KV under seeded faults.
#[derive(Parser)]
struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    from: u64,
    /// Run this seed alone.
    #[arg(long, value_name = "SEED", conflicts_with_all = ["seeds", "from"])]
    seed: Option<u64>,
    /// With `--seed`: print all that happens, and what the processes say of it.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Break something on purpose, to see that it is noticed: `fence` or `probe`.
    #[arg(long, value_name = "NAME")]
    mutate: Option<Mutation>,
    /// Seeds that run at once.
    #[arg(long, default_value_t = 2, value_name = "N")]
    threads: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let options = Options { traced: args.trace, mutation: args.mutate.unwrap_or_default() };
    if let Some(seed) = args.seed {
        return one(seed, options);
    }
    let progress = |report: &Report| eprintln!("{report}");
    let seeds = args.from..args.from + args.seeds;
    let report = run_many(seeds, args.threads, options, Duration::from_secs(5), progress);
    println!("{report}");
    let faults = report.faults.iter().map(|(fault, count)| (*fault, count));
    let events = report.events.iter().map(|(kind, count)| (kind.as_str(), count));
    faults.chain(events).for_each(|(what, count)| println!("{count:>10} {what}"));
    for failed in &report.failed {
        println!("\nseed {}:", failed.seed);
        failed.violations.iter().for_each(|violation| println!("  {violation}"));
        println!("{}\n  {}", failed.logs, replay(failed.seed));
    }
    if report.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn one(seed: u64, options: Options) -> ExitCode {
    if options.traced {
        let filter = tracing_subscriber::EnvFilter::new("warn,forebay=debug");
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    }
    let outcome = run(seed, options);
    outcome.trace.iter().for_each(|line| println!("{line}"));
    println!("{}", outcome.logs);
    outcome.violations.iter().for_each(|violation| println!("violated: {violation}"));
    println!("digest {:016x}, {:?} of virtual time", outcome.digest, outcome.lasted);
    if outcome.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
