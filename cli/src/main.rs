//! `forebay`: one binary, all roles.

mod ask;
mod bench;
mod calibrate;
mod cancel;
mod config;
mod demo;
mod device;
mod dlq;
mod doctor;
mod export;
mod gateway;
mod gpu_check;
mod kv;
mod log;
mod model;
mod replay;
mod request;
mod route;
mod settings;
mod show;
mod tail;
mod up;
mod worker;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use forebay_workers::kv::nixl;
use std::process::ExitCode;

/// Serves large language models: requests wait in NATS JetStream, workers take what they can, and everything that
/// happens to a request is an event in its log.
#[derive(Parser)]
#[command(name = "forebay", version, max_term_width = 110)]
#[command(
    after_help = "Begin with `forebay up`: it starts everything on this machine, with a small built-in model.\n\
Settings come from flags, then the environment, then a TOML file (--config, or FOREBAY_CONFIG) whose keys \
are the long names of flags."
)]
struct Cli {
    /// File with settings, in TOML.
    #[arg(long, global = true, env = "FOREBAY_CONFIG", value_name = "FILE")]
    config: Option<std::path::PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run everything on this machine: NATS, gateway, prefill and decode workers.
    Up(up::UpArgs),
    /// Run a gateway: the OpenAI-compatible HTTP API.
    Gateway(gateway::GatewayArgs),
    /// Run a worker, which takes tasks from the queues and runs the model.
    Worker(worker::WorkerArgs),
    /// Show what happened to a request, as a timeline.
    Log(log::LogArgs),
    /// Show what happens to all requests, as it happens.
    Tail(tail::TailArgs),
    /// Write a request's log to a file, for a bug report.
    Export(export::ExportArgs),
    /// Put an exported request into the log.
    Import(export::ImportArgs),
    /// Go through a request again: its state at any event, or its tokens on an engine here.
    Replay(replay::ReplayArgs),
    /// Show where a prompt would go now, and why.
    Route(route::RouteArgs),
    /// End a request.
    Cancel(cancel::CancelArgs),
    /// Look at requests that no worker could do, and try them again.
    Dlq(dlq::DlqArgs),
    /// Look at live settings, and change them for everything that runs.
    Config(settings::ConfigArgs),
    /// Check this machine, the NATS server and a model, and say what to do about problems.
    Doctor(doctor::DoctorArgs),
    /// Measure how large a model's keys and values get, which workers need for --kv-type int8.
    Calibrate(calibrate::CalibrateArgs),
    /// Check that a GPU computes what a CPU computes, and measure it.
    GpuCheck(gpu_check::GpuCheckArgs),
    /// Measure: the control plane, the engine, KV reads, or any OpenAI-compatible server.
    Bench(bench::BenchArgs),
}

fn main() -> ExitCode {
    let outcome = config::apply_file(Cli::command()).and_then(|mut command| {
        let matches = command.get_matches_mut();
        let settings = config::as_environment(&command, &matches);
        run(Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()).command, settings)
    });
    let status = match outcome {
        Ok(()) => 0,
        Err(error) if show::reader_is_gone(&error) => 0,
        Err(error) => {
            eprintln!("forebay: {error:#}");
            1
        }
    };
    nixl::end_process(status);
    status.into()
}

/// `settings`: the given flags as environment variables, for processes that this one starts.
fn run(command: Command, settings: Vec<(String, String)>) -> anyhow::Result<()> {
    match command {
        Command::Up(args) => up::run(&args, settings),
        Command::Gateway(args) => gateway::run(args),
        Command::Worker(args) => worker::run(args),
        Command::Log(args) => log::run(&args),
        Command::Tail(args) => tail::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Import(args) => export::import(&args),
        Command::Replay(args) => replay::run(args),
        Command::Route(args) => route::run(&args),
        Command::Cancel(args) => cancel::run(&args),
        Command::Dlq(args) => dlq::run(&args),
        Command::Config(args) => settings::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::GpuCheck(args) => gpu_check::run(args),
        Command::Bench(args) => bench::run(args),
    }
}
