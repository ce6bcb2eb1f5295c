//! What long prompts do to the pace of answers that are being generated: with a prefill and a decode worker, against two
//! workers that do both, on as many cores.

use super::{
    engine::random_model,
    http::client_runtime,
    percentile,
    processes::Deployment,
    stream::{stream, words},
};
use clap::Args;
use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct InterferenceArgs {
    /// A checkpoint of yours instead of a random one of Qwen3-0.6B's shape.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Answers that run all along.
    #[arg(long, default_value_t = 4, value_name = "N")]
    running: u64,
    /// Prompts that arrive meanwhile, one after another.
    #[arg(long, default_value_t = 4, value_name = "N")]
    prompts: u64,
    /// Tokens of each of these.
    #[arg(long, default_value_t = 2048, value_name = "N")]
    tokens: usize,
    /// Only with the simulated engine.
    #[arg(long)]
    sim_only: bool,
}

impl Default for InterferenceArgs {
    fn default() -> Self {
        InterferenceArgs { model: None, running: 4, prompts: 4, tokens: 2048, sim_only: false }
    }
}

/// Step times like those of Qwen3-0.6B on two cores, in microseconds.
const SIM: [&str; 6] = ["--engine", "sim", "--sim-step-us", "20000", "--sim-prefill-token-us", "5000"];

/// Two workers: which, and with what else.
const SETUPS: [(&str, &[&str]); 3] = [
    ("prefill + decode", &["--prefill", "1", "--decode", "1"]),
    ("two that do both", &["--prefill", "0", "--decode", "2"]),
    ("the same, step of 256 tokens", &["--prefill", "0", "--decode", "2", "--step-tokens", "256"]),
];

pub(crate) fn run(args: &InterferenceArgs) -> anyhow::Result<()> {
    let mut engines = vec![("simulated engine", SIM.map(str::to_owned).to_vec())];
    let folder = args.model.clone().map_or_else(random_model, Ok)?.display().to_string();
    let model = ["--model", &folder, "--weights", "int4", "--threads", "1"].map(str::to_owned).to_vec();
    // Words are tokens with the random checkpoint's tokenizer, for the simulated engine too.
    engines[0].1.extend(["--model".to_owned(), folder]);
    if !args.sim_only {
        engines.push(("Qwen3-0.6B's shape, one core each", model));
    }
    for (name, engine) in engines {
        println!(
            "\n# {} running answers while {} prompts of {} tokens arrive ({name})\n",
            args.running, args.prompts, args.tokens
        );
        println!("{:>30} {:>10} {:>10} {:>10} {:>16}", "", "ITL p50", "ITL p99", "longest", "prompts' TTFT");
        for (name, flags) in SETUPS {
            let engine: Vec<&str> = engine.iter().map(String::as_str).collect();
            let (gaps, ttft) = measure(args, &[&engine[..], flags].concat())?;
            println!(
                "{name:>30} {:>7.1} ms {:>7.1} ms {:>7.1} ms {:>13.0} ms",
                percentile(&gaps, 0.5),
                percentile(&gaps, 0.99),
                percentile(&gaps, 1.0),
                super::median(ttft)
            );
        }
    }
    Ok(())
}

/// Times between two texts of the running answers while prompts arrive, sorted, and the prompts' TTFT; milliseconds.
fn measure(args: &InterferenceArgs, arguments: &[&str]) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let arguments = [arguments, &["--context", "8192", "--cache-gib", "0"]].concat();
    let deployment = Arc::new(Deployment::start(&arguments)?);
    let client = reqwest::Client::builder().no_proxy().build()?;
    client_runtime()?.block_on(async {
        let times: Vec<Arc<Mutex<Vec<Instant>>>> = (0..args.running).map(|_| Arc::default()).collect();
        let mut running = tokio::task::JoinSet::new();
        for (number, times) in (1000..).zip(&times) {
            let (client, deployment, times) = (client.clone(), deployment.clone(), times.clone());
            running.spawn(async move {
                let note = |now| times.lock().expect("no panics while held").push(now);
                stream(&client, &deployment, &words(number, 64), 4096, note).await
            });
        }
        let begun = |times: &Arc<Mutex<Vec<Instant>>>| times.lock().expect("no panics while held").len() > 4;
        while !times.iter().all(begun) {
            if let Some(ended) = running.try_join_next() {
                ended??;
                anyhow::bail!("an answer that was to run all along has ended");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let from = Instant::now();
        let mut ttft = Vec::new();
        for number in 0..args.prompts {
            ttft.push(stream(&client, &deployment, &words(number, args.tokens), 1, |_| {}).await?.ttft_ms());
        }
        let to = Instant::now();
        running.shutdown().await;
        let mut gaps = Vec::new();
        for times in times {
            let times = times.lock().expect("no panics while held");
            let within = times.windows(2).filter(|pair| pair[1] > from && pair[0] < to);
            gaps.extend(within.map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3));
        }
        gaps.sort_by(f64::total_cmp);
        Ok((gaps, ttft))
    })
}
