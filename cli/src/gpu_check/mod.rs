//! `forebay gpu-check`: whether a GPU computes what a CPU computes, and how fast.
//!
//! [`correct`], on the demo model; then [`speed`], on random weights of real models' shapes; both into a [`report`].

mod correct;
mod report;
mod speed;

use crate::{
    config::{data_folder, init_logging},
    show::date_and_time,
};
use anyhow::bail;
use clap::Args;
use forebay_kernels::cuda::{Device, Kernels};
use forebay_workers::{
    engine::{
        Engine,
        checkpoint::Checkpoint,
        cuda::{CudaEngine, CudaOptions, Provider},
        graph::Precision,
        library,
    },
    model::ModelText,
};
use report::Report;
use std::{
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

#[derive(Args, Debug)]
pub(crate) struct GpuCheckArgs {
    /// Which GPU, by its number.
    #[arg(long, default_value_t = 0, value_name = "N")]
    gpu: usize,
    /// Shapes to measure with random weights: `0.6b` (1.2 GB on disk) and `8b` (16 GB). An empty list only checks what is
    /// computed.
    #[arg(long, value_delimiter = ',', default_value = "0.6b,8b", value_name = "SHAPE,…")]
    shapes: Vec<String>,
    /// A file of Markdown whose table of findings is replaced, such as docs/gpu.md.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Folder for the models.
    #[arg(long, env = "FOREBAY_DATA", value_name = "DIR")]
    data: Option<PathBuf>,
    /// Have the CPU run the graph over the memory of a stand-in for a GPU: to test this check.
    #[arg(long, env = "FOREBAY_BENCH_STAND_IN", hide = true)]
    bench_stand_in: bool,
}

/// What the checks share.
struct Setting {
    device: Device,
    kernels: Kernels,
    provider: Provider,
    data: PathBuf,
}

impl Setting {
    /// An engine with a few slots, and what else is said, ready for its first step.
    fn engine(
        &self,
        checkpoint: &Checkpoint,
        change: impl FnOnce(&mut CudaOptions),
    ) -> anyhow::Result<CudaEngine> {
        let stand_in = self.provider == Provider::Cpu;
        let mut options = CudaOptions {
            device: self.device.facts().ordinal,
            precision: if stand_in { Precision::F32 } else { Precision::Bf16 },
            slots: 4,
            kernel_cache: Some(self.data.join("kernels")),
            provider: self.provider,
            ..CudaOptions::default()
        };
        change(&mut options);
        let mut engine = CudaEngine::with_checkpoint(checkpoint, &options)?;
        engine.warm_up()?;
        Ok(engine)
    }
}

pub(crate) fn run(args: GpuCheckArgs) -> anyhow::Result<()> {
    init_logging("warn");
    let device = match Device::open(args.gpu) {
        Ok(device) => device,
        Err(error) => {
            println!("SKIPPED: {error}");
            return Ok(());
        }
    };
    let data = data_folder(args.data);
    let provider = if args.bench_stand_in { Provider::Cpu } else { Provider::Cuda };
    // Whichever ONNX Runtime is loaded first stays: the CPU's engine, too, runs on the one for GPUs.
    if provider == Provider::Cuda {
        library::load_cuda(None)?;
    }
    let kernels = Kernels::load(&device, library::cuda_folder().as_deref(), Some(&data.join("kernels")))?;
    println!("{}\n", device.facts());
    let setting = Setting { device, kernels, provider, data };
    let mut report = Report::default();
    let demo = crate::demo::unpack(&setting.data.join("models"))?;
    let tokenizer = ModelText::open(&demo)?.tokenizer;
    correct::check(&setting, &Checkpoint::open(&demo)?, &tokenizer, &mut report)?;
    let measured = match report.wrong() {
        0 => speed::measure(&setting, &args.shapes, &mut report),
        _ => Ok(()),
    };
    if let Some(file) = &args.report {
        let library = library::loaded_from().and_then(|path| path.file_name()).unwrap_or_default();
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() as u64;
        let now = date_and_time(now);
        let day = now.split(' ').next().unwrap_or_default();
        let heading = format!("{}; {}; {day}", setting.device.facts(), library.to_string_lossy());
        report::put(file, &report.markdown(&heading))?;
    }
    match report.wrong() {
        0 => measured,
        wrong => bail!("{wrong} of the checks failed; nothing was measured"),
    }
}
