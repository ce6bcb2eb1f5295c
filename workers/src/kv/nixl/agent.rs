//! The thin binding to NIXL: a library that was found, an agent with the UCX backend, and reads by it.

#![allow(unsafe_code)]

use super::{NixlError, READ_TIMEOUT, Span};
use forebay_kernels::Region;
use forebay_streams::environment;
use nixl_sys::{
    AgentConfig, Backend, MemType, MemoryRegion, NixlDescriptor, OptArgs, RegistrationHandle, ThreadSync,
    XferDescList, XferOp, XferStatus,
};
use std::{
    error::Error,
    mem::ManuallyDrop,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

const NAME: &str = "libnixl_capi.so";

/// An agent has begun in this process.
static USED: AtomicBool = AtomicBool::new(false);

/// Regions that one agent knows: a worker has one.
const REGIONS_MAX: usize = 4;

/// NIXL is loaded in this process: only then may anything be asked of it.
#[derive(Clone, Debug)]
pub struct Library(());

impl Library {
    /// Loads it from a folder, or from where the system's loader looks.
    pub fn load(folder: Option<&Path>) -> Result<Library, NixlError> {
        let path = folder.map_or_else(|| PathBuf::from(NAME), |folder| folder.join(NAME));
        // SAFETY: whoever names or installs the library vouches for what it does when it is loaded.
        let loaded = unsafe { libloading::Library::new(&path) };
        let library = loaded.map_err(|error| {
            let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            NixlError::NotFound { path, cause }
        })?;
        // The stub looks for it by its bare name, and finds it only for as long as it is loaded.
        std::mem::forget(library);
        Ok(Library(()))
    }
}

/// A mapping that NIXL reads from or into.
#[derive(Debug)]
struct Mapped(Region);

impl MemoryRegion for Mapped {
    unsafe fn as_ptr(&self) -> *const u8 {
        self.0.as_ptr()
    }

    fn size(&self) -> usize {
        self.0.len()
    }
}

impl NixlDescriptor for Mapped {
    fn mem_type(&self) -> MemType {
        MemType::Dram
    }

    fn device_id(&self) -> u64 {
        0
    }
}

type Registered = ((u64, u64), Mapped, ManuallyDrop<RegistrationHandle>);

/// One side of reads.
#[derive(Debug)]
pub(super) struct Agent {
    agent: nixl_sys::Agent,
    backend: Backend,
    /// By device and inode of the memory. Mappings of the agent's own, so that none can end under a transfer.
    regions: Mutex<Vec<Registered>>,
}

impl Agent {
    pub(super) fn start(_library: &Library) -> Result<Agent, NixlError> {
        let name = environment::name::<forebay_schemas::ids::WorkerId>("kv").to_string();
        USED.store(true, Ordering::Relaxed);
        let config = AgentConfig { thread_sync: ThreadSync::Strict, ..AgentConfig::default() };
        let agent = nixl_sys::Agent::new_configured(&name, &config).map_err(failed("agent"))?;
        let (_, params) = agent.get_plugin_params("UCX").map_err(failed("plugin UCX"))?;
        let backend = agent.create_backend("UCX", &params).map_err(failed("backend UCX"))?;
        Ok(Agent { agent, backend, regions: Mutex::default() })
    }

    fn with_backend(&self) -> Result<OptArgs, NixlError> {
        let mut options = OptArgs::new().map_err(failed("options"))?;
        options.add_backend(&self.backend).map_err(failed("options"))?;
        Ok(options)
    }

    /// Where the agent has a region; made known to it the first time.
    pub(super) fn register(&self, region: &Region) -> Result<u64, NixlError> {
        let mapping =
            |error: &dyn std::fmt::Display| NixlError::Failed { call: "mapping", cause: error.to_string() };
        let stat = rustix::fs::fstat(region.fd()).map_err(|error| mapping(&error))?;
        let key = (stat.st_dev, stat.st_ino);
        let mut regions = self.regions.lock().expect("no panics while held");
        if let Some((_, known, _)) = regions.iter().find(|(known, ..)| *known == key) {
            return Ok(known.0.as_ptr() as u64);
        }
        if regions.len() >= REGIONS_MAX {
            return Err(mapping(&"an agent knows no more regions"));
        }
        let fd = region.fd().try_clone_to_owned().map_err(|error| mapping(&error))?;
        let mapped = Mapped(Region::open(fd, region.len(), true).map_err(|error| mapping(&error))?);
        let registered = self
            .agent
            .register_memory(&mapped, Some(&self.with_backend()?))
            .map_err(failed("registering memory"))?;
        let at = mapped.0.as_ptr() as u64;
        regions.push((key, mapped, ManuallyDrop::new(registered)));
        Ok(at)
    }

    /// What another agent must know of this one.
    pub(super) fn metadata(&self) -> Result<Vec<u8>, NixlError> {
        self.agent.get_local_md().map_err(failed("metadata"))
    }

    /// Gets to know another agent, and returns its name.
    pub(super) fn meet(&self, metadata: &[u8]) -> Result<String, NixlError> {
        self.agent.load_remote_md(metadata).map_err(failed("loading metadata"))
    }

    /// Ends the connection to another agent, and with it what is under way on it.
    pub(super) fn forget(&self, name: &str) {
        if let Err(error) = self.agent.invalidate_remote_md(name) {
            tracing::debug!(name, %error, "NIXL does not forget a worker");
        }
    }

    /// Reads from another agent's memory. When it returns, nothing is written any more.
    pub(super) fn read(&self, from: &str, spans: &[Span]) -> Result<(), NixlError> {
        let mut local = XferDescList::new(MemType::Dram).map_err(failed("descriptors"))?;
        let mut remote = XferDescList::new(MemType::Dram).map_err(failed("descriptors"))?;
        for Span { local: into, remote: at, bytes } in spans {
            local.add_desc(*into as usize, *bytes, 0);
            remote.add_desc(*at as usize, *bytes, 0);
        }
        let options = self.with_backend()?;
        let request = self
            .agent
            .create_xfer_req(XferOp::Read, &local, &remote, from, Some(&options))
            .map_err(failed("making a read"))?;
        if !self.agent.post_xfer_req(&request, Some(&options)).map_err(failed("posting a read"))? {
            return Ok(());
        }
        let (begun, mut given_up) = (Instant::now(), false);
        loop {
            let status = self.agent.get_xfer_status(&request).map_err(|error| {
                // Some of it may be under way all the same: that ends with the connection.
                self.forget(from);
                failed("a read")(error)
            })?;
            match status {
                XferStatus::Success if given_up => return Err(NixlError::TimedOut),
                XferStatus::Success => return Ok(()),
                XferStatus::InProgress if !given_up && begun.elapsed() > READ_TIMEOUT => {
                    given_up = true;
                    self.forget(from);
                }
                XferStatus::InProgress if begun.elapsed() > READ_TIMEOUT * 2 => {
                    // It may write into a slot at any later time. A worker that dies loses no request.
                    tracing::error!(from, "a NIXL read neither ends nor can be ended: the worker leaves");
                    std::process::abort();
                }
                XferStatus::InProgress => std::thread::yield_now(),
            }
        }
    }
}

/// Ends the process without what libraries do at its exit, if NIXL was used: its threads still run then.
pub fn end_process(status: u8) {
    if USED.load(Ordering::Relaxed) {
        // SAFETY: it takes a number and does not return. What must be written was written before.
        unsafe { libc::_exit(status.into()) }
    }
}

fn failed(call: &'static str) -> impl Fn(nixl_sys::NixlError) -> NixlError {
    move |error| NixlError::Failed { call, cause: error.to_string() }
}
