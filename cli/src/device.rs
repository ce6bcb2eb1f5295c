//! Where a model is computed.

use crate::model::EngineArgs;
use anyhow::bail;
use clap::Args;
use forebay_kernels::cuda;
use forebay_workers::engine::{
    Engine, KvType,
    checkpoint::Checkpoint,
    cuda::{CudaEngine, CudaOptions, Provider},
    graph::Precision,
    library,
};
use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

/// What computes, and how its memory is used.
#[derive(Args, Clone, Debug)]
pub(crate) struct DeviceArgs {
    /// What computes: `cpu`, a GPU by its number, such as `cuda:0`, or `auto`: the first GPU, or the CPU where there is none.
    #[arg(long, env = "FOREBAY_DEVICE", default_value = "auto", value_name = "DEVICE")]
    device: Choice,
    /// How keys and values are held: auto (as what is computed with: fp32 on a CPU, bf16 or fp16 on a GPU), int8 (a byte, once `forebay
    /// calibrate` has measured the model), or on a GPU fp8 (a byte, and less exact).
    #[arg(long, env = "FOREBAY_KV_TYPE", default_value = "auto", value_parser = ["auto", "int8", "fp8"], value_name = "TYPE")]
    kv_type: String,
    /// What `forebay calibrate` has written, if not kv_ranges.safetensors in the model's folder.
    #[arg(long, env = "FOREBAY_KV_RANGES", value_name = "FILE")]
    pub(crate) kv_ranges: Option<PathBuf>,
    /// How much of the memory that a GPU has left once the model is loaded may hold KV, from 0 to 1. Default: 0.9; workers of `up`
    /// share that.
    #[arg(long, env = "FOREBAY_GPU_MEMORY", value_name = "PART")]
    pub(crate) gpu_memory: Option<f64>,
    /// GiB of the host's memory that are pinned at most, for KV on its way between a GPU and other workers. More KV than that
    /// takes longer. Default: 16, or a quarter of the memory if that is less.
    #[arg(long, env = "FOREBAY_PINNED_GIB", value_name = "GIB")]
    pinned_gib: Option<f64>,
    /// Run the steps of a GPU as captured CUDA graphs.
    #[arg(long, env = "FOREBAY_CUDA_GRAPHS", default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    cuda_graphs: bool,
    /// Have the CPU run the graph over the memory of a stand-in for a GPU: for tests without one.
    #[arg(long, env = "FOREBAY_BENCH_STAND_IN", hide = true)]
    bench_stand_in: bool,
}

impl DeviceArgs {
    /// How keys and values are held.
    pub(crate) fn kv(&self) -> KvType {
        match self.kv_type.as_str() {
            "int8" => KvType::Int8,
            "fp8" => KvType::Fp8,
            _ => KvType::Auto,
        }
    }
}

/// How much of a GPU's memory holds KV, unless something else is said.
pub(crate) const GPU_MEMORY: f64 = 0.9;

fn pinned_bytes() -> usize {
    let pages = rustix::system::sysinfo();
    let all = pages.totalram as usize * pages.mem_unit.max(1) as usize;
    (all / 4).min(16 << 30)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Choice, String> {
        match text {
            "auto" => Ok(Choice::Auto),
            "cpu" => Ok(Choice::Cpu),
            "cuda" => Ok(Choice::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Choice::Cuda)
                .ok_or_else(|| "cpu, cuda:0 (or another number), or auto".to_owned()),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Choice::Auto => f.write_str("auto"),
            Choice::Cpu => f.write_str("cpu"),
            Choice::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    /// The processor.
    Cpu,
    /// A GPU.
    Cuda(usize),
}

impl Device {
    /// One default for a CPU, another for a GPU.
    pub(crate) fn pick<T>(self, cpu: T, cuda: T) -> T {
        match self {
            Device::Cpu => cpu,
            Device::Cuda(_) => cuda,
        }
    }
}

impl EngineArgs {
    /// What computes, of what was asked for.
    pub(crate) fn device(&self) -> Device {
        match self.device.device {
            _ if self.engine == "sim" => Device::Cpu,
            Choice::Cpu => Device::Cpu,
            Choice::Cuda(number) => Device::Cuda(number),
            Choice::Auto => {
                let Ok(gpu) = cuda::Device::open(0) else { return Device::Cpu };
                // A GPU is there. Without the libraries it is of no use.
                match library::load_cuda(self.onnxruntime.as_deref()) {
                    Ok(_) => Device::Cuda(0),
                    Err(error) => {
                        tracing::warn!("{} is not used: {error}", gpu.facts());
                        Device::Cpu
                    }
                }
            }
        }
    }

    /// Opens the engine of a GPU, with that many slots, for chunks of prompts of that many tokens.
    pub(crate) fn open_cuda(
        &self,
        checkpoint: &Checkpoint,
        device: usize,
        slots: u32,
        chunk_tokens: u32,
        data: &Path,
    ) -> anyhow::Result<Box<dyn Engine>> {
        let DeviceArgs { gpu_memory, pinned_gib, cuda_graphs, bench_stand_in, .. } = self.device;
        let gpu_memory = gpu_memory.unwrap_or(GPU_MEMORY);
        if !(0.01..=1.0).contains(&gpu_memory) {
            bail!("--gpu-memory {gpu_memory}: a part from 0.01 to 1");
        }
        let precision = match self.weights.as_str() {
            "auto" if bench_stand_in => Precision::F32,
            "auto" | "bf16" => Precision::Bf16,
            "fp16" => Precision::F16,
            "int4" => Precision::Int4 { block: self.block },
            "int8" => Precision::Int8 { block: self.block },
            other => bail!("--weights {other} is for CPUs: a GPU has bf16, fp16, int4 and int8"),
        };
        let defaults = CudaOptions::default();
        let options = CudaOptions {
            device,
            precision,
            kv: self.device.kv(),
            kv_ranges: self.device.kv_ranges.clone(),
            slots,
            positions: (self.context + 1).min(checkpoint.config().positions_max as u32 + 1),
            chunk_tokens,
            memory: gpu_memory,
            pinned_bytes: pinned_gib
                .map_or_else(pinned_bytes, |gib| (gib.max(0.0) * f64::from(1 << 30)) as usize),
            graphs: cuda_graphs,
            threads: self.threads.unwrap_or(defaults.threads),
            library: self.onnxruntime.clone(),
            kernel_cache: Some(data.join("kernels")),
            provider: if bench_stand_in { Provider::Cpu } else { Provider::Cuda },
        };
        Ok(Box::new(CudaEngine::with_checkpoint(checkpoint, &options)?))
    }
}
