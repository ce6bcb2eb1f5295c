//! The kernels compile for every GPU that they are meant for. That takes NVRTC, and no GPU.

use forebay_kernels::cuda::{CompileError, Compiler, SOURCES};
use std::path::{Path, PathBuf};

/// Ampere (A100), Hopper (H100, H200) and Blackwell (B200).
const CAPABILITIES: [u32; 3] = [80, 90, 100];

#[test]
fn kernels_compile_for_every_capability() {
    let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.forebay/cuda");
    let folder = std::env::var_os("FOREBAY_CUDA").map(PathBuf::from).or(fetched.is_dir().then_some(fetched));
    let compiler = match Compiler::load(folder.as_deref()) {
        Ok(compiler) => compiler,
        Err(error @ CompileError::NotFound { .. }) => {
            // On the descriptor itself: the harness keeps what a test prints to itself if it passes.
            let line = format!("SKIPPED kernels_compile_for_every_capability: {error}\n");
            rustix::io::write(rustix::stdio::stderr(), line.as_bytes()).unwrap();
            return;
        }
        Err(error) => panic!("{error}"),
    };
    for source in SOURCES {
        for capability in CAPABILITIES {
            let code = compiler
                .compile(source, capability)
                .unwrap_or_else(|error| panic!("{}: {error}", source.name));
            assert_eq!(code[..4], *b"\x7fELF", "{} for sm_{capability}", source.name);
        }
    }
}
