//! Finds and loads `libonnxruntime`, once for the process.

use forebay_kernels::cuda;
use ort::{LoadDynamicError, environment::Environment};
use std::{
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

/// Why ONNX Runtime could not be loaded. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// No file was found where one was expected, or anywhere.
    #[error(
        "ONNX Runtime was not found ({reason}): run `make setup`, or set ORT_DYLIB_PATH to libonnxruntime.so of \
         version 1.31 or newer"
    )]
    NotFound {
        /// What was tried.
        reason: String,
    },
    /// A file was found, but it is no usable library.
    #[error("{} is no usable ONNX Runtime ({reason}): run `make setup`, or set ORT_DYLIB_PATH to another", path.display())]
    Unusable {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// What computing on a GPU takes is not there.
    #[error(
        "{name} is needed to compute on a GPU ({cause}): run `scripts/setup.sh gpu`, or name a folder with the libraries in \
         FOREBAY_CUDA; --device cpu runs without"
    )]
    NoCuda {
        /// Which library.
        name: String,
        /// What is wrong.
        cause: String,
    },
    /// The library is older than the functions it is used for.
    #[error(
        "{} is ONNX Runtime {version}, but 1.31 or newer is needed: run `make setup`, or set ORT_DYLIB_PATH to a \
         newer one",
        path.display()
    )]
    TooOld {
        /// Which file.
        path: PathBuf,
        /// Its version.
        version: String,
    },
}

/// What ONNX Runtime's provider for CUDA is linked with, each before those that need it.
const CUDA_LIBRARIES: [&str; 4] =
    ["libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10"];

/// Its own file, beside ONNX Runtime.
const CUDA_PROVIDER: &str = "libonnxruntime_providers_cuda.so";

/// Name of the library on this platform, without a version.
const NAME: &str = "libonnxruntime.so";

/// Loads ONNX Runtime from `explicit`, or the first found of: `ORT_DYLIB_PATH`; `.forebay/lib` in the working
/// directory, in the executable's, or in one above either; beside the executable; where the system's loader looks.
///
/// The first library loaded stays for the life of the process, whatever later calls ask for.
pub fn load(explicit: Option<&Path>) -> Result<Environment, LibraryError> {
    let mut loaded = loaded();
    if let Some(environment) = &*loaded {
        return Ok(environment.clone());
    }
    let path = find(explicit)?;
    open(path).map(|environment| loaded.insert(environment).clone())
}

/// Loads an ONNX Runtime that computes on GPUs too, and what it needs: see [`find_cuda`].
pub fn load_cuda(explicit: Option<&Path>) -> Result<Environment, LibraryError> {
    let mut loaded = loaded();
    if let Some(environment) = &*loaded {
        return Ok(environment.clone());
    }
    let path = find_cuda(explicit)?;
    open(path).map(|environment| loaded.insert(environment).clone())
}

/// An ONNX Runtime that computes on GPUs too: `explicit`, or the first that is there of `ORT_DYLIB_PATH` and [`cuda_folder`].
/// What NVIDIA's libraries it needs are loaded, from that folder or from where the system's loader looks.
pub fn find_cuda(explicit: Option<&Path>) -> Result<PathBuf, LibraryError> {
    let none = |name: &str, cause: String| LibraryError::NoCuda { name: name.to_owned(), cause };
    let folder = cuda_folder();
    let path = match (named(explicit)?, &folder) {
        (Some(path), _) => path,
        (None, Some(folder)) => {
            newest_in(folder).ok_or_else(|| none(NAME, format!("{} has none", folder.display())))?
        }
        (None, None) => return Err(none(NAME, "there is no .forebay/cuda here or above".to_owned())),
    };
    if !path.with_file_name(CUDA_PROVIDER).is_file() {
        return Err(none(CUDA_PROVIDER, format!("{} is for CPUs only", path.display())));
    }
    for name in CUDA_LIBRARIES {
        cuda::preload(folder.as_deref(), name).map_err(|cause| none(name, cause))?;
    }
    Ok(path)
}

/// The folder of libraries for GPUs: `FOREBAY_CUDA`, or `.forebay/cuda` in the working directory, in the executable's, or in one
/// above either.
pub fn cuda_folder() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("FOREBAY_CUDA").filter(|folder| !folder.is_empty()) {
        return Some(folder.into());
    }
    above().map(|dir| dir.join("cuda")).find(|dir| dir.is_dir())
}

fn loaded() -> MutexGuard<'static, Option<Environment>> {
    static LOADED: Mutex<Option<Environment>> = Mutex::new(None);
    LOADED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The file that ONNX Runtime was loaded from, if it was.
pub fn loaded_from() -> Option<&'static Path> {
    LOADED_FROM.get().map(PathBuf::as_path)
}

static LOADED_FROM: OnceLock<PathBuf> = OnceLock::new();

fn open(path: PathBuf) -> Result<Environment, LibraryError> {
    let builder = ort::init_from(&path).map_err(|error| match error {
        LoadDynamicError::BadVersion { version_str, path } => {
            LibraryError::TooOld { path, version: version_str }
        }
        LoadDynamicError::Dlopen { error, .. } if path.as_os_str() == NAME => LibraryError::NotFound {
            reason: format!("no .forebay/lib here or above, and the system has none: {error}"),
        },
        other => LibraryError::Unusable { path: path.clone(), reason: other.to_string() },
    })?;
    let environment = builder.with_name("forebay").with_telemetry(false).build();
    let environment = environment
        .map_err(|error| LibraryError::Unusable { path: path.clone(), reason: error.to_string() })?;
    let _ = LOADED_FROM.set(path);
    Ok(environment)
}

/// The file that is named, if one is.
fn named(explicit: Option<&Path>) -> Result<Option<PathBuf>, LibraryError> {
    let from_env = std::env::var_os("ORT_DYLIB_PATH").filter(|path| !path.is_empty()).map(PathBuf::from);
    for (given, by) in [(explicit.map(Path::to_owned), "the library option"), (from_env, "ORT_DYLIB_PATH")] {
        let Some(path) = given else { continue };
        // Absolute, because `ort` takes a relative path from the executable's directory.
        return match std::path::absolute(&path) {
            Ok(path) if path.is_file() => Ok(Some(path)),
            _ => Err(LibraryError::NotFound {
                reason: format!("{by} names {}, which is no file", path.display()),
            }),
        };
    }
    Ok(None)
}

fn find(explicit: Option<&Path>) -> Result<PathBuf, LibraryError> {
    if let Some(path) = named(explicit)? {
        return Ok(path);
    }
    let executable_dir = std::env::current_exe().ok().and_then(|path| path.parent().map(Path::to_owned));
    let found = above().map(|dir| dir.join("lib")).chain(executable_dir).find_map(|dir| newest_in(&dir));
    Ok(found.unwrap_or_else(|| PathBuf::from(NAME)))
}

/// Where `.forebay` may be.
fn above() -> impl Iterator<Item = PathBuf> {
    let executable_dir = std::env::current_exe().ok().and_then(|path| path.parent().map(Path::to_owned));
    let starts = [std::env::current_dir().ok(), executable_dir];
    let starts = starts.into_iter().flatten();
    starts.flat_map(|dir| dir.ancestors().map(|dir| dir.join(".forebay")).collect::<Vec<_>>())
}

/// The library in a directory; of several versions, the highest.
fn newest_in(dir: &Path) -> Option<PathBuf> {
    let version = |name: &str| -> Vec<u32> {
        name[NAME.len()..].split('.').filter_map(|part| part.parse().ok()).collect()
    };
    std::fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(NAME))
        .max_by_key(|name| version(name))
        .map(|name| dir.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_several_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        for name in
            ["libonnxruntime.so.1.9.0", "libonnxruntime.so.1.32.0", "libonnxruntime.so.1.4.0", "other.so"]
        {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(newest_in(dir.path()), Some(dir.path().join("libonnxruntime.so.1.32.0")));
        assert_eq!(newest_in(&dir.path().join("nowhere")), None);
    }

    #[test]
    fn a_path_that_is_given_must_exist() {
        let error = find(Some(Path::new("nowhere/lib.so"))).unwrap_err().to_string();
        assert!(error.contains("nowhere/lib.so") && error.contains("make setup"), "{error}");
    }
}
