//! Kernels made into machine code by NVRTC, for GPUs of any compute capability: none need be there.

#![allow(unsafe_code)]

use cudarc::nvrtc::{result, sys};
use forebay_schemas::ids::fnv1a;
use std::{
    ffi::{CStr, CString, c_char},
    path::{Path, PathBuf},
};

/// The name by which the driver's and the toolkit's loaders know it.
const LIBRARY: &str = "libnvrtc.so.13";

/// Why kernels could not be compiled.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// NVRTC is not there.
    #[error("NVRTC was not found ({}: {cause}): run `scripts/setup.sh cuda`, or name the folder of {LIBRARY} in FOREBAY_CUDA", path.display())]
    NotFound {
        /// What was looked for.
        path: PathBuf,
        /// What the loader says.
        cause: String,
    },
    /// A call failed, or the sources do not compile.
    #[error("NVRTC: {call}: {log}")]
    Failed {
        /// What was done.
        call: &'static str,
        /// What NVRTC says.
        log: String,
    },
}

/// A file of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its name.
    pub name: &'static str,
    text: &'static str,
}

/// What all of them include.
const HEADER: &str = concat!(include_str!("../../cuda/kernel.h"), include_str!("../../cuda/weights.h"));

/// Results must be those of the CPU: nothing is contracted, and divisions are exact.
const OPTIONS: [&str; 4] = ["--std=c++17", "--fmad=false", "--prec-div=true", "--ftz=false"];

/// All files of kernels.
pub const SOURCES: [Source; 3] = [
    Source { name: "adjust.cu", text: include_str!("../../cuda/adjust.cu") },
    Source { name: "kv.cu", text: include_str!("../../cuda/kv.cu") },
    Source { name: "sampler.cu", text: include_str!("../../cuda/sampler.cu") },
];

/// NVRTC is loaded in this process.
#[derive(Clone, Copy, Debug)]
pub struct Compiler(());

impl Source {
    /// Where its code is kept: the name changes with all that the code depends on.
    fn path(self, capability: u32, folder: &Path) -> PathBuf {
        let of = format!("{HEADER}{}{OPTIONS:?}", self.text);
        folder.join(format!("{}-sm_{capability}-{:016x}.cubin", self.name, fnv1a(of.as_bytes())))
    }

    /// Code that was kept in a folder.
    pub(super) fn cached(self, capability: u32, folder: &Path) -> Option<Vec<u8>> {
        std::fs::read(self.path(capability, folder)).ok().filter(|code| code.starts_with(b"\x7fELF"))
    }

    /// Keeps code in a folder for the next time. Where it can't be kept, it is compiled again.
    pub(super) fn keep(self, capability: u32, folder: &Path, code: &[u8]) {
        let path = self.path(capability, folder);
        let new = path.with_extension(std::process::id().to_string());
        let kept = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&new, code));
        // In one step: whoever starts at the same time reads all of it, or nothing.
        if kept.and_then(|()| std::fs::rename(&new, path)).is_err() {
            let _ = std::fs::remove_file(new);
        }
    }
}

impl Compiler {
    /// Loads NVRTC from a folder, or from where the system's loader looks.
    pub fn load(folder: Option<&Path>) -> Result<Compiler, CompileError> {
        // It looks for its own second library by its bare name, and not beside itself.
        if let Some(builtins) = folder.and_then(builtins) {
            load(builtins)?;
        }
        load(folder.map_or_else(|| PathBuf::from(LIBRARY), |folder| folder.join(LIBRARY)))?;
        Ok(Compiler(()))
    }

    /// Machine code of a file's kernels for GPUs of one compute capability, such as 90.
    pub fn compile(&self, source: Source, capability: u32) -> Result<Vec<u8>, CompileError> {
        let whole = format!("{HEADER}\n#line 1 \"{}\"\n{}", source.name, source.text);
        // What they include is in front of them.
        let whole: String = whole
            .lines()
            .filter(|line| !line.starts_with("#include \""))
            .fold(String::new(), |whole, line| whole + line + "\n");
        let whole = CString::new(whole).expect("sources have no zeros");
        let name = CString::new(source.name).expect("names have no zeros");
        let program =
            Program(result::create_program(&whole, Some(&name)).map_err(failed("creating a program"))?);
        let architecture = format!("--gpu-architecture=sm_{capability}");
        let options: Vec<&str> = [&architecture[..]].into_iter().chain(OPTIONS).collect();
        // SAFETY: the program was just created and is destroyed only when it is dropped.
        unsafe {
            if let Err(error) = result::compile_program(program.0, &options) {
                let log = result::get_program_log(program.0).unwrap_or_default();
                // SAFETY: NVRTC ends its log with a zero.
                let log = if log.is_empty() {
                    format!("{error:?}")
                } else {
                    CStr::from_ptr(log.as_ptr()).to_string_lossy().into_owned()
                };
                return Err(CompileError::Failed { call: "compiling", log });
            }
            let mut bytes = 0;
            sys::nvrtcGetCUBINSize(program.0, &mut bytes).result().map_err(failed("asking for code"))?;
            let mut code = vec![0u8; bytes];
            sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast::<c_char>())
                .result()
                .map_err(failed("asking for code"))?;
            Ok(code)
        }
    }
}

fn builtins(folder: &Path) -> Option<PathBuf> {
    let is_builtins = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libnvrtc-builtins.so."))
    };
    std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).find(is_builtins)
}

fn load(path: PathBuf) -> Result<(), CompileError> {
    // SAFETY: whoever names or installs the library vouches for what it does when it is loaded.
    let loaded = unsafe { libloading::Library::new(&path) };
    let library = loaded.map_err(|error| {
        let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        CompileError::NotFound { path, cause }
    })?;
    // The binding looks for it by its bare name, and finds it for as long as it is loaded.
    std::mem::forget(library);
    Ok(())
}

/// Loads one of NVIDIA's libraries for those that look for it later by its name: from a folder, if it is there, or from where the
/// system's loader looks. Says why it can't be had.
pub fn preload(folder: Option<&Path>, name: &str) -> Result<(), String> {
    let path = folder.map(|folder| folder.join(name)).filter(|path| path.is_file());
    load(path.unwrap_or_else(|| PathBuf::from(name))).map_err(|error| match error {
        CompileError::NotFound { cause, .. } | CompileError::Failed { log: cause, .. } => cause,
    })
}

/// Destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it was created, and nothing uses it any more.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

fn failed(call: &'static str) -> impl Fn(result::NvrtcError) -> CompileError {
    move |error| CompileError::Failed { call, log: format!("{error:?}") }
}
