//! `forebay doctor`: what this machine has, and what to do about what it lacks.

use crate::{
    config::{NatsArgs, RegistryArgs, data_folder, init_logging, runtime},
    kv::NixlArgs,
    model::ModelArgs,
};
use clap::Args;
use forebay_kernels::{
    Region,
    cuda::{self, Kernels, NoDevice},
};
use forebay_streams::{registry::Registry, server::find_tool, settings::SettingsStore};
use forebay_workers::{
    engine::{checkpoint::Checkpoint, library},
    kv::nixl::{NixlError, NixlOwner},
};
use std::{fmt, path::PathBuf, process::Command, time::Duration};

#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    nats: NatsArgs,
    #[command(flatten)]
    registry: RegistryArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    nixl: NixlArgs,
    /// Folder for unpacked models.
    #[arg(long, env = "FOREBAY_DATA", value_name = "DIR")]
    data: Option<PathBuf>,
}

/// What a check found: `Err` is a problem, with what to do about it.
type Finding = Result<String, String>;

pub(crate) fn run(args: &DoctorArgs) -> anyhow::Result<()> {
    init_logging("error");
    let checks: [(&str, Finding); 9] = [
        ("processor", processor()),
        ("memory", memory()),
        ("open files", open_files()),
        ("shared memory", shared_memory()),
        ("ONNX Runtime", onnxruntime(args)),
        ("GPU", gpu(args)),
        ("KV between workers", transports(args)),
        ("model", model(args)),
        ("nats-server", nats_program()),
    ];
    let mut problems = 0;
    let registry = args.registry.is_elsewhere().then(|| ("registry", registry(args)));
    for (what, finding) in checks.into_iter().chain([("NATS", nats(args))]).chain(registry) {
        match finding {
            Ok(text) => println!("ok       {what}: {text}"),
            Err(text) => {
                problems += 1;
                println!("PROBLEM  {what}: {text}");
            }
        }
    }
    match problems {
        0 => Ok(()),
        1 => anyhow::bail!("1 problem"),
        _ => anyhow::bail!("{problems} problems"),
    }
}

fn processor() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let is_list = |line: &&str| line.starts_with("flags") || line.starts_with("Features");
    let flags = info.lines().find(is_list).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|found| found == flag);
    let int8 = ["avx512_vnni", "avx_vnni", "avx2", "i8mm", "asimddp"].into_iter().find(|flag| has(flag));
    match int8 {
        Some("avx2") => Ok(format!("{cores} cores, avx2 (int4 is faster with VNNI)")),
        Some(flag) => Ok(format!("{cores} cores, {flag}")),
        None => Ok(format!("{cores} cores, without instructions for 8-bit products: int4 will be slow")),
    }
}

fn memory() -> Finding {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("MemAvailable")).unwrap_or_default();
    let kib: u64 = line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or(0);
    match kib >> 20 {
        0 => Err(format!(
            "{} MiB available; the demo model needs about 200 MiB, others their weights",
            kib >> 10
        )),
        gib => Ok(format!("{gib} GiB available")),
    }
}

fn open_files() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    if limit < 4096 {
        return Err(format!(
            "at most {limit}; a busy gateway needs one for each client: raise it with `ulimit -n 65536`"
        ));
    }
    Ok(format!("at most {limit}"))
}

fn shared_memory() -> Finding {
    Region::create("doctor", 1 << 30)
        .map(|_| "regions can be made".to_owned())
        .map_err(|error| format!("{error}; workers keep their KV cache in memfd regions"))
}

fn onnxruntime(args: &DoctorArgs) -> Finding {
    library::load(args.model.engine.onnxruntime.as_deref())
        .map(|_| "loads".to_owned())
        .map_err(|error| error.to_string())
}

/// No GPU is no problem; one that can't be used is, and so is a driver that is too old.
fn gpu(args: &DoctorArgs) -> Finding {
    let device = match cuda::Device::open(0) {
        Ok(device) => device,
        Err(error @ (NoDevice::NoDriver | NoDevice::NoGpu)) => {
            return Ok(format!("none ({error}); workers compute on the CPU"));
        }
        Err(error) => return Err(error.to_string()),
    };
    let missing = |error: &dyn fmt::Display| format!("{}: {error}", device.facts());
    Kernels::load(&device, library::cuda_folder().as_deref(), None).map_err(|error| missing(&error))?;
    // Checked last: the ONNX Runtime that was loaded above stays for the life of this process.
    library::find_cuda(args.model.engine.onnxruntime.as_deref()).map_err(|error| missing(&error))?;
    let free = device.free_bytes().map_err(|error| error.to_string())?;
    Ok(format!("{}, {} GiB free", device.facts(), free >> 30))
}

/// Shared memory and TCP are always there; NIXL has to show that it can serve a region.
fn transports(args: &DoctorArgs) -> Finding {
    let region = Region::create("doctor", 1 << 20).map_err(|error| error.to_string())?;
    match args.nixl.load().and_then(|library| NixlOwner::register(&library, &region)) {
        Ok(_) => Ok("shm, nixl and tcp".to_owned()),
        Err(error @ NixlError::NotBuilt) => Ok(format!("shm and tcp ({error})")),
        Err(error @ NixlError::NotFound { .. }) if !args.nixl.is_named() => {
            Ok(format!("shm and tcp ({error})"))
        }
        Err(error) => Err(format!("{error}; without it KV is read over shm and tcp")),
    }
}

fn model(args: &DoctorArgs) -> Finding {
    let found = args.model.find(&data_folder(args.data.clone())).map_err(|error| format!("{error:#}"))?;
    let checkpoint = Checkpoint::open(&found.folder).map_err(|error| error.to_string())?;
    forebay_workers::model::ModelText::open(&found.folder).map_err(|error| error.to_string())?;
    let config = checkpoint.config();
    Ok(format!(
        "{}: {} layers, hidden size {}, vocabulary {}, context {}",
        found.name, config.layers, config.hidden, config.vocab, config.positions_max
    ))
}

fn nats_program() -> Finding {
    let program = find_tool("FOREBAY_NATS_SERVER", "nats-server").ok_or(
        "not found, and `forebay up` starts one unless it is given --nats: run `make setup`, or install it",
    )?;
    let output = Command::new(&program)
        .arg("--version")
        .output()
        .map_err(|error| format!("{}: {error}", program.display()))?;
    Ok(format!("{} ({})", String::from_utf8_lossy(&output.stdout).trim(), program.display()))
}

fn nats(args: &DoctorArgs) -> Finding {
    let connected = runtime(1)
        .map_err(|error| error.to_string())?
        .block_on(async { args.nats.connect("doctor", "doctor").await.map(drop) });
    match connected {
        Ok(()) => Ok(format!("{} serves JetStream, streams and buckets are as needed", args.nats.nats)),
        Err(error) => Err(format!("{error:#}")),
    }
}

fn registry(args: &DoctorArgs) -> Finding {
    let check = async {
        // The time of a lease does not matter for a look.
        let etcd = args.registry.etcd(Duration::ZERO).await?;
        let (workers, settings) = (etcd.workers().await?, etcd.watch().await?);
        anyhow::Ok((workers.borrow().len(), settings.borrow().len()))
    };
    let found = runtime(1).map_err(|error| error.to_string())?.block_on(check);
    let (workers, settings) = found.map_err(|error| format!("{error:#}"))?;
    Ok(format!("etcd answers: {workers} workers, {settings} settings"))
}
