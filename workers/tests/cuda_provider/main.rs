//! The graph that a GPU gets, given to ONNX Runtime's own provider for CUDA: every node is one that it has a kernel for, and a
//! decode step is captured without anything that breaks a capture. What the kernels compute is not seen: driver and runtime are
//! stand-ins (`driver.c`, `runtime.c`), whose kernels do nothing.
//!
//! Runs where `scripts/setup.sh gpu` has put ONNX Runtime for GPUs; on a GPU, `forebay gpu-check` says more.

#[path = "../parity_support/mod.rs"]
mod parity_support;
#[allow(dead_code)]
#[path = "../../../kernels/tests/cuda/stand_in.rs"]
mod stand_in;

use forebay_workers::engine::{
    Engine, EngineError, KvType, Row,
    checkpoint::{Checkpoint, KvRanges, ModelConfig},
    cuda::{CudaEngine, CudaOptions},
    graph::Precision,
    library, random_checkpoint,
};
use parity_support::{CASES, dir, greedy};
use std::{os::unix::fs::symlink, path::Path, process::Command};

/// Says to the process that this test starts anew which one it is.
const CHILD: &str = "FOREBAY_TEST_PROVIDER";

const NAME: &str = "the_provider_takes_every_node_and_captures_every_step";

#[test]
fn the_provider_takes_every_node_and_captures_every_step() {
    if std::env::var_os(CHILD).is_some() {
        return capture_all();
    }
    let libraries =
        library::cuda_folder().filter(|folder| folder.join("libonnxruntime_providers_cuda.so").is_file());
    let Some(libraries) = libraries else {
        eprintln!("SKIPPED: ONNX Runtime's provider for CUDA: run scripts/setup.sh gpu to fetch it");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&libraries).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with("libonnxruntime") || name.starts_with("libnvrtc") {
            let target = std::fs::canonicalize(entry.path()).unwrap();
            // The provider looks for others beside itself, and finds the links.
            symlink(target, folder.path().join(name)).unwrap();
        }
    }
    stand_in::build(&folder.path().join(stand_in::DRIVER));
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_provider");
    for (name, source) in [
        ("libcudart.so.13", Some("runtime.c")),
        ("libcublas.so.13", Some("cublas.c")),
        ("libcublasLt.so.13", Some("cublaslt.c")),
        ("libcurand.so.10", None),
    ] {
        build(&folder.path().join(name), name, source.map(|source| here.join(source)).as_deref());
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture"])
        .env(CHILD, "1")
        // It then says which kernel each attention takes.
        .env("ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO", "1")
        .env("FOREBAY_CUDA", folder.path())
        .env("LD_LIBRARY_PATH", folder.path())
        .env_remove("ORT_DYLIB_PATH")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    let (kernels, rest): (Vec<&str>, Vec<&str>) = said.lines().partition(|line| line.contains("SdpaKernel="));
    eprintln!("{}\n{}", rest.join("\n"), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success(), "{}", child.status);
    // What comes before the line of a setting is of that setting; the one chunk of a prompt takes another kernel.
    let mut settings = said.split_inclusive(" kernels in a step\n").filter(|text| text.contains("\nfast, "));
    assert!(settings.clone().count() >= 9 && !kernels.is_empty());
    let slow = settings.find(|text| !text.contains("SdpaKernel=XQA"));
    assert_eq!(slow, None, "decode steps expand quantized KV");
}

/// Compiles a library whose functions have the version that its users were linked with, which is its name.
fn build(library: &Path, name: &str, source: Option<&Path>) {
    let versions = library.with_extension("map");
    std::fs::write(&versions, format!("{name} {{ global: *; }};")).unwrap();
    let nothing = library.with_extension("c");
    std::fs::write(&nothing, "int forebay_stand_in;").unwrap();
    let status = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".to_owned()))
        .args(["-std=gnu11", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unused-value"])
        .arg(format!("-Wl,-soname,{name},--version-script,{}", versions.display()))
        .arg(source.unwrap_or(&nothing))
        .arg("-o")
        .arg(library)
        .status()
        .expect("there is a C compiler: Rust links with it");
    assert!(status.success(), "{name} compiles");
}

fn capture_all() {
    let int4 = Precision::Int4 { block: 32 };
    // Shapes of which ONNX Runtime expands quantized KV, and one whose decode steps read it as it is.
    let folder = tempfile::tempdir().unwrap();
    let shape = ModelConfig {
        hidden: 256,
        layers: 2,
        heads: 8,
        kv_heads: 2,
        head_dim: 64,
        intermediate: 512,
        vocab: 320,
        positions_max: 512,
        ..ModelConfig::qwen3_0_6b()
    };
    let fast = folder.path().join("fast");
    random_checkpoint::write(&fast, &shape, 1).unwrap();
    for case in [dir(CASES[0]), dir(CASES[1]), fast] {
        let checkpoint = Checkpoint::open(&case).unwrap();
        let case = case.file_name().unwrap().to_string_lossy();
        let config = checkpoint.config();
        let ones = vec![1.0; config.kv_width()];
        let ranges = KvRanges { layers: vec![[ones.clone(), ones]; config.layers], tokens: 1 };
        let kv_ranges = folder.path().join(format!("{case}.safetensors"));
        ranges.write(&checkpoint, &kv_ranges).unwrap();
        for (precision, kv) in [
            (Precision::Bf16, KvType::Auto),
            (Precision::F16, KvType::Auto),
            (int4, KvType::Auto),
            (Precision::Int8 { block: 32 }, KvType::Auto),
            (Precision::Bf16, KvType::Fp8),
            (int4, KvType::Fp8),
            (Precision::Bf16, KvType::Int8),
            (Precision::F16, KvType::Int8),
            (int4, KvType::Int8),
        ] {
            let options = CudaOptions {
                precision,
                kv,
                kv_ranges: Some(kv_ranges.clone()),
                slots: 3,
                positions: 200,
                chunk_tokens: 16,
                ..CudaOptions::default()
            };
            let mut engine = CudaEngine::with_checkpoint(&checkpoint, &options).unwrap();
            let [before, _, replays, _] = counts();
            engine.warm_up().unwrap();
            let [after, launches, warm_replays, mistakes] = counts();
            let what = format!("{case}, {precision}, KV {kv:?}");
            // Batches of 1, 2 and 3.
            assert_eq!((after - before, mistakes), (3, 0), "{what}");
            assert!(launches > 10, "{what}: {launches} kernels in a step");
            let row = Row { slot: 1, position: 5, token: 3, draw: greedy(0) };
            match engine.decode(&[row], &[0], &mut Vec::new()) {
                // Nothing was computed.
                Ok(()) | Err(EngineError::NotFinite { .. }) => {}
                Err(error) => panic!("{what}: {error}"),
            }
            let [captures, .., last] = [counts()[0], counts()[2]];
            assert_eq!((captures, last), (after, warm_replays + 1), "{what}: the step is replayed");
            assert!(warm_replays >= replays);
            println!("{what}: {launches} kernels in a step");
        }
    }
}

#[allow(unsafe_code)]
fn counts() -> [usize; 4] {
    let mut counts = [0; 4];
    // SAFETY: the runtime's stand-in is loaded, and the function writes four counts.
    unsafe {
        let runtime = libloading::Library::new("libcudart.so.13").unwrap();
        let count: libloading::Symbol<'_, unsafe extern "C" fn(*mut usize)> =
            runtime.get(b"stand_in_captures").unwrap();
        count(counts.as_mut_ptr());
    }
    counts
}
