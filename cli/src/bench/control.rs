//! What the control plane costs: NATS, gateway and worker around an engine that takes no time.

use super::{
    http::{Load, Report, client_runtime, measure, words},
    median, percentile,
    processes::{Deployment, Used},
};
use anyhow::bail;
use clap::Args;

#[derive(Args, Debug)]
pub(crate) struct ControlArgs {
    /// Clients at once, one number after another.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32,128", value_name = "N,…")]
    concurrency: Vec<usize>,
    /// Tokens of each answer.
    #[arg(long, default_value_t = 256, value_name = "N")]
    tokens: u32,
    /// Tokens that each concurrency generates in all.
    #[arg(long, default_value_t = 200_000, value_name = "N")]
    total: u64,
    /// Compare with appends that are not fenced, instead.
    #[arg(long)]
    fence: bool,
}

impl Default for ControlArgs {
    fn default() -> Self {
        ControlArgs { concurrency: vec![1, 8, 32, 128], tokens: 256, total: 200_000, fence: false }
    }
}

/// A step that is long enough for its token to be on its way alone, in microseconds.
const STEP_US: f64 = 5000.0;

pub(crate) fn run(args: &ControlArgs) -> anyhow::Result<()> {
    if args.fence {
        return fence(args);
    }
    println!("\n# Control plane (simulated engine, every token in the log, all processes on this machine)\n");
    added_latency(args)?;
    println!("an engine as fast as its tokens are taken, which then come several to an event:");
    throughput(args, &args.concurrency, "0")?;
    println!("\nan engine with a step of 2 ms, whatever the batch:");
    throughput(args, &args.concurrency[args.concurrency.len().saturating_sub(1)..], "2000")
}

fn throughput(args: &ControlArgs, concurrency: &[usize], step_us: &str) -> anyhow::Result<()> {
    let deployment = Deployment::start(&[
        "--engine",
        "sim",
        "--prefill",
        "0",
        "--slots",
        "128",
        "--sim-step-us",
        step_us,
    ])?;
    let runtime = client_runtime()?;
    println!("{}  CPU seconds: gateway  workers  nats-server  (gateway MiB)", Report::HEADER);
    for clients in concurrency {
        let requests = (args.total / u64::from(args.tokens) / *clients as u64).clamp(4, 400);
        let load = load(&deployment, *clients, requests, args.tokens);
        runtime.block_on(measure(&Load { requests: 2, ..load.clone() }));
        let before = deployment.used();
        let report = runtime.block_on(measure(&load));
        let after = deployment.used();
        let cpu = |index: usize| after[index].1.cpu_seconds - before[index].1.cpu_seconds;
        let Used { resident_mib, .. } = after[0].1;
        println!("{} {:>20.2} {:>8.2} {:>12.2} {resident_mib:>10.1}", report.row(), cpu(0), cpu(1), cpu(2));
        if let Some(failure) = report.first_failure {
            bail!("a request failed: {failure}");
        }
    }
    Ok(())
}

fn load(deployment: &Deployment, clients: usize, requests: u64, tokens: u32) -> Load {
    Load {
        url: format!("http://{}", deployment.address),
        model: super::processes::MODEL.into(),
        clients,
        requests,
        words: 16,
        tokens,
        vocabulary: words(),
    }
}

/// Pairs of runs with and without the fence: see [`fence`].
const FENCE_PAIRS: usize = 3;

/// What compare-and-append costs: the same load with and without it, in turns.
fn fence(args: &ControlArgs) -> anyhow::Result<()> {
    println!("\n# The fence (simulated engine, step of 2 ms; with and without it in turns, medians)\n");
    println!("{:>8} {:>14} {:>14} {:>7}", "clients", "fenced tok/s", "unfenced", "ratio");
    let runtime = client_runtime()?;
    for clients in &args.concurrency {
        let mut rates = [Vec::new(), Vec::new()];
        for _ in 0..FENCE_PAIRS {
            for (index, fenced) in [(0, true), (1, false)] {
                let mut arguments =
                    vec!["--engine", "sim", "--prefill", "0", "--slots", "128", "--sim-step-us", "2000"];
                if !fenced {
                    arguments.push("--bench-no-fence");
                }
                let deployment = Deployment::start(&arguments)?;
                let load = load(&deployment, *clients, 8, args.tokens);
                runtime.block_on(measure(&Load { requests: 2, ..load.clone() }));
                rates[index].push(runtime.block_on(measure(&load)).tokens_per_s());
            }
        }
        let [fenced, unfenced] = rates.map(median);
        println!("{clients:>8} {fenced:>14.0} {unfenced:>14.0} {:>7.3}", fenced / unfenced);
    }
    Ok(())
}

/// One client, and an engine that steps every few milliseconds: what is beyond the step is added.
fn added_latency(args: &ControlArgs) -> anyhow::Result<()> {
    let runtime = client_runtime()?;
    let step = STEP_US.to_string();
    let deployment = Deployment::start(&["--engine", "sim", "--prefill", "0", "--sim-step-us", &step])?;
    runtime.block_on(measure(&load(&deployment, 1, 5, 8)));
    let report = runtime.block_on(measure(&load(&deployment, 1, 100, 16.min(args.tokens))));
    println!(
        "added at concurrency 1: TTFT p50 {:.2} ms, p99 {:.2} ms; ITL {:.3} ms beyond a step of {:.1} ms\n",
        percentile(&report.ttft, 0.5),
        percentile(&report.ttft, 0.99),
        percentile(&report.itl, 0.5) - STEP_US / 1e3,
        STEP_US / 1e3,
    );
    Ok(())
}
