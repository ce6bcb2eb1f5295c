//! `make chaos`: harms a deployment at random, and says which promises it kept.

use anyhow::Context;
use clap::{Parser, ValueEnum};
use forebay_streams::environment;
use forebay_tests::chaos::{self, Engine, Options, fault::Fault};
use std::{path::PathBuf, process::ExitCode, time::Duration};
use tokio_util::sync::CancellationToken;

/// Harms a deployment under load at random, and checks that no request suffers.
///
/// A nats-server, gateways and workers are started on this machine; clients ask all the time. Processes are killed,
/// frozen, told to stop and cut off from NATS, half of the time at a chosen moment of a request; nats-server is killed,
/// clients leave. At the end, and as far as it goes on the way, the invariants of ARCHITECTURE.md are checked on every log and
/// every answer. The first broken one ends the run: its request's log, the seed and the command to repeat it are
/// printed, and the exit status is 1. A seed repeats what happens to whom; when is up to the machine.
#[derive(Parser)]
#[command(name = "chaos", max_term_width = 110)]
struct Arguments {
    /// What computes tokens. With `sim` they must be those of an undisturbed run.
    #[arg(long, value_enum, default_value = "both")]
    engine: EngineArg,
    /// Faults to inject, with each engine.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    faults: usize,
    /// Where chance comes from. Drawn, and printed, if not given.
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Clients that ask all the time.
    #[arg(long, default_value_t = 16, value_name = "N")]
    clients: usize,
    /// Gateways.
    #[arg(long, default_value_t = 2, value_name = "N")]
    gateways: usize,
    /// Decode workers.
    #[arg(long, default_value_t = 3, value_name = "N")]
    decode: usize,
    /// Prefill workers.
    #[arg(long, default_value_t = 2, value_name = "N")]
    prefill: usize,
    /// Faults that go on at the same time.
    #[arg(long, default_value_t = 4, value_name = "N")]
    at_once: usize,
    /// Only faults of kinds with this in their names, such as `killed` or `decode worker frozen`; may be repeated
    #[arg(long, value_name = "KIND", value_parser = kind)]
    only: Vec<String>,
    /// Milliseconds of calm after each fault: with `--at-once 1`, what each costs by itself
    #[arg(long, default_value_t = 0, value_name = "MS")]
    pause_ms: u64,
    /// Milliseconds of a simulated decode step.
    #[arg(long, default_value_t = 15, value_name = "MS")]
    step_ms: u64,
    /// What computes with `--engine onnx`: `cpu`, `cuda:0` or another GPU.
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: String,
    /// NATS is a cluster of three, whose servers are killed one at a time.
    #[arg(long)]
    cluster: bool,
    /// Print the logs of so many requests that were silent longest.
    #[arg(long, default_value_t = 0, value_name = "N")]
    slowest: usize,
    /// Also writes the report as JSON, a line an engine.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum EngineArg {
    Sim,
    Onnx,
    Both,
}

/// Part of the name of a kind of fault.
fn kind(text: &str) -> Result<String, String> {
    let kinds = Fault::kinds();
    match kinds.iter().any(|kind| kind.contains(text)) {
        true => Ok(text.to_owned()),
        false => Err(format!("there is none; the kinds are: {}", kinds.join(", "))),
    }
}

impl Arguments {
    fn options(&self, engine: Engine, seed: u64) -> Options {
        Options {
            clients: self.clients.max(1),
            gateways: self.gateways.max(1),
            decode: self.decode.max(1),
            prefill: self.prefill,
            at_once: self.at_once.max(1),
            only: self.only.clone(),
            pause: Duration::from_millis(self.pause_ms),
            step: Duration::from_millis(self.step_ms),
            device: self.device.clone(),
            cluster: self.cluster,
            slowest: self.slowest,
            ..Options::new(engine, self.faults, seed)
        }
    }

    /// How to run one engine again.
    fn again(&self, engine: Engine, seed: u64) -> String {
        let device = if self.device == "cpu" { String::new() } else { format!(" --device {}", self.device) };
        let cluster = if self.cluster { " --cluster" } else { "" };
        let only: String = self.only.iter().map(|kind| format!(" --only '{kind}'")).collect();
        format!(
            "cargo run --release -p forebay-tests --bin chaos -- --engine {engine} --seed {seed} --faults {} --clients {} \
             --gateways {} --decode {} --prefill {} --at-once {} --step-ms {} --pause-ms {}{only}{device}{cluster}",
            self.faults,
            self.clients,
            self.gateways,
            self.decode,
            self.prefill,
            self.at_once,
            self.step_ms,
            self.pause_ms
        )
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 4)]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let engines: &[Engine] = match arguments.engine {
        EngineArg::Sim => &[Engine::Sim],
        EngineArg::Onnx => &[Engine::Onnx],
        EngineArg::Both => &[Engine::Sim, Engine::Onnx],
    };
    let seed = arguments.seed.unwrap_or_else(|| environment::random() >> 32);
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            stopping.cancel();
        }
    });
    let (mut lines, mut good) = (String::new(), true);
    for engine in engines {
        println!("chaos: engine {engine}, seed {seed}, {} faults", arguments.faults);
        let say = |line: &str| println!("chaos: {line}");
        let report = chaos::run(&arguments.options(*engine, seed), &stop, say).await?;
        println!("\n{report}");
        lines.push_str(&format!("{}\n", report.json()));
        for slow in &report.slowest {
            println!("{slow}");
        }
        for violation in &report.violations {
            println!("{}\n{}\n", violation.broken, violation.shown);
        }
        if !report.violations.is_empty() {
            println!("again: {}\n", arguments.again(*engine, seed));
            good = false;
        }
    }
    if let Some(path) = &arguments.json {
        std::fs::write(path, lines).with_context(|| path.display().to_string())?;
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
