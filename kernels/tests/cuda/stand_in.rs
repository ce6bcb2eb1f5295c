//! The GPU that tests run on: a real one, where there is one; otherwise `driver.c`.

#![allow(unsafe_code)]

use forebay_kernels::cuda::{Device, Kernels};
use std::{path::Path, process::Command, sync::OnceLock};

/// The driver's name.
pub(crate) const DRIVER: &str = "libcuda.so.1";

/// The first GPU, or the stand-in.
pub(crate) fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let open = || {
        // A driver that is not there can't be asked whether it is: the library is looked for first.
        let real = std::env::var_os("FOREBAY_TEST_GPU").is_some();
        if !real {
            load();
        }
        Device::open(0).expect("a GPU, or the stand-in")
    };
    DEVICE.get_or_init(open).clone()
}

/// The kernels on it.
#[allow(dead_code)]
pub(crate) fn kernels(device: &Device) -> Kernels {
    if is_real(device) {
        let nvrtc = std::env::var_os("FOREBAY_CUDA").map(std::path::PathBuf::from);
        return Kernels::load(device, nvrtc.as_deref(), None)
            .expect("NVRTC is in FOREBAY_CUDA, or with the system's libraries");
    }
    // The stand-in has them already, whatever code it is given.
    Kernels::from_code(device, [(); 3].map(|()| b"code".to_vec())).unwrap()
}

/// Whether it is a GPU.
pub(crate) fn is_real(device: &Device) -> bool {
    device.facts().name != "stand-in"
}

/// Bytes in use, parts of memory, streams and marks, and copies that took a detour; none of them on a GPU.
#[allow(dead_code)]
pub(crate) fn counts() -> Option<[usize; 4]> {
    let library = STAND_IN.get()?;
    let mut counts = [0; 4];
    // SAFETY: the function has this type, and writes four counts.
    unsafe {
        let count: libloading::Symbol<'_, unsafe extern "C" fn(*mut usize)> =
            library.get(b"stand_in_counts").unwrap();
        count(counts.as_mut_ptr());
    }
    Some(counts)
}

static STAND_IN: OnceLock<libloading::Library> = OnceLock::new();

/// Makes the stand-in the process's driver: whoever looks for it by its name finds it loaded.
fn load() {
    STAND_IN.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join(DRIVER);
        build(&library);
        // SAFETY: it was just made of the sources beside this file, and runs nothing when it is loaded.
        unsafe { libloading::Library::new(library) }.unwrap()
    });
}

/// Compiles the stand-in. Its sources are C, so the C compiler that links Rust programs compiles them.
pub(crate) fn build(library: &Path) {
    let here = Path::new(file!()).parent().map(|folder| folder.to_owned()).unwrap();
    let sources = [here.clone(), Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(here)];
    let here =
        sources.iter().find(|folder| folder.join("driver.c").is_file()).expect("its sources are there");
    let flags = "-x c -std=gnu11 -O2 -ffp-contract=off -Wall -Wextra -Werror -fPIC -shared -pthread -fvisibility=hidden \
                 -Wl,-soname,libcuda.so.1";
    let status = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".to_owned()))
        .args(flags.split_whitespace())
        .arg("-I")
        .arg(here)
        .arg(here.join("driver.c"))
        .arg("-o")
        .arg(library)
        .status()
        .expect("there is a C compiler: Rust links with it");
    assert!(status.success(), "the stand-in compiles");
}
