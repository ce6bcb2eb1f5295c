//! Finding a GPU, and what work on it is ordered by.

#![allow(unsafe_code)]

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};
use std::{fmt, sync::Arc};

/// The oldest CUDA that a driver must be for, as the driver counts: 1000 · major + 10 · minor.
const CUDA_MIN: i32 = 13_000;

/// The oldest compute capability that kernels are made for.
const CAPABILITY_MIN: u32 = 80;

/// Why there is no GPU to compute on.
#[derive(Debug, thiserror::Error)]
pub enum NoDevice {
    /// The driver's library is not there.
    #[error("no NVIDIA driver: libcuda.so.1 was not found")]
    NoDriver,
    /// The driver is too old for the libraries that are used.
    #[error(
        "the NVIDIA driver is for CUDA {}.{}, and CUDA 13.0 is needed: install driver 580 or newer",
        found / 1000,
        found % 1000 / 10
    )]
    OldDriver {
        /// CUDA's version, as the driver counts.
        found: i32,
    },
    /// The driver sees no GPU.
    #[error("the NVIDIA driver sees no GPU")]
    NoGpu,
    /// There are fewer.
    #[error("there is no GPU {asked}: the driver sees {found}, counted from 0")]
    NoSuchGpu {
        /// Its number.
        asked: usize,
        /// How many there are.
        found: usize,
    },
    /// The GPU is too old.
    #[error("{name} has compute capability {}.{}, and 8.0 is needed", capability / 10, capability % 10)]
    OldGpu {
        /// Its name.
        name: String,
        /// Ten times its compute capability.
        capability: u32,
    },
    /// A call of the driver failed.
    #[error(transparent)]
    Driver(#[from] DeviceError),
}

/// A call of the driver failed.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("CUDA: {doing}: {}", self.cause())]
pub struct DeviceError {
    doing: &'static str,
    error: DriverError,
}

impl DeviceError {
    /// Whether memory is what is missing.
    pub fn is_out_of_memory(&self) -> bool {
        self.error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY
    }

    fn cause(&self) -> String {
        let text =
            |text: Result<&std::ffi::CStr, DriverError>| text.map(|text| text.to_string_lossy().into_owned());
        text(self.error.error_string()).unwrap_or_else(|_| format!("error {}", self.error.0 as u32))
    }
}

/// Says what was being done when a call failed.
pub(super) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, DeviceError>;
}

impl<T> Doing<T> for Result<T, DriverError> {
    fn doing(self, doing: &'static str) -> Result<T, DeviceError> {
        self.map_err(|error| DeviceError { doing, error })
    }
}

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Its number, from 0.
    pub ordinal: usize,
    /// Its name, such as `NVIDIA H200`.
    pub name: String,
    /// Ten times its compute capability: 90 for Hopper.
    pub capability: u32,
    /// Bytes of its memory.
    pub bytes: usize,
    /// The newest CUDA that the driver is for: 1000 · major + 10 · minor.
    pub cuda: i32,
}

impl fmt::Display for DeviceFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DeviceFacts { ordinal, name, capability, bytes, cuda } = self;
        let gib = *bytes as f64 / f64::from(1 << 30);
        write!(
            f,
            "cuda:{ordinal} {name}, {gib:.0} GiB, sm_{capability}, driver for CUDA {}.{}",
            cuda / 1000,
            cuda % 1000 / 10
        )
    }
}

/// A GPU in use by this process.
#[derive(Clone, Debug)]
pub struct Device {
    pub(super) context: Arc<CudaContext>,
    facts: Arc<DeviceFacts>,
    /// Whether kernels reach pinned memory of the host by the address that the host has for it.
    pub(super) one_address: bool,
    /// Whether memory can be exported as descriptors.
    pub(super) exports: bool,
    uuid: DeviceUuid,
}

/// Which GPU it is, or which part of one, in every process.
pub type DeviceUuid = [u8; 16];

impl Device {
    /// Opens a GPU; the first of them, if none is named.
    pub fn open(ordinal: usize) -> Result<Device, NoDevice> {
        // SAFETY: looks for the driver's library and loads it, which whoever installed it vouches for.
        if !unsafe { sys::is_culib_present() } {
            return Err(NoDevice::NoDriver);
        }
        let mut cuda = 0;
        // SAFETY: the pointer is valid; this call needs no initialization.
        unsafe { sys::cuDriverGetVersion(&mut cuda) }.result().doing("asking for the driver's version")?;
        if cuda < CUDA_MIN {
            return Err(NoDevice::OldDriver { found: cuda });
        }
        let found = match CudaContext::device_count() {
            Ok(0) | Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Err(NoDevice::NoGpu),
            count => count.doing("counting GPUs")? as usize,
        };
        if ordinal >= found {
            return Err(NoDevice::NoSuchGpu { asked: ordinal, found });
        }
        let context = CudaContext::new(ordinal).doing("opening a GPU")?;
        // Buffers and their order are this crate's: `cudarc` has none to track.
        // SAFETY: no slice of `cudarc` is used.
        unsafe { context.disable_event_tracking() };
        let (major, minor) = context.compute_capability().doing("asking for the compute capability")?;
        let (name, bytes) =
            (context.name().doing("asking for a name")?, context.total_mem().doing("asking for memory")?);
        let capability = (10 * major + minor) as u32;
        if capability < CAPABILITY_MIN {
            return Err(NoDevice::OldGpu { name, capability });
        }
        let one_address =
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM;
        let one_address = context.attribute(one_address).doing("asking how pinned memory is reached")? != 0;
        let exports =
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED;
        let exports = context.attribute(exports).doing("asking whether memory can be exported")? != 0;
        let uuid = context.uuid().doing("asking which GPU it is")?;
        Ok(Device {
            one_address,
            exports,
            uuid: uuid.bytes.map(|byte| byte as u8),
            context,
            facts: Arc::new(DeviceFacts { ordinal, name, capability, bytes, cuda }),
        })
    }

    /// What it is.
    pub fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    /// Which GPU it is.
    pub fn uuid(&self) -> DeviceUuid {
        self.uuid
    }

    /// Whether it reaches the memory of a GPU: its own, or one's that this process sees and the driver says so of.
    pub fn reaches(&self, uuid: &DeviceUuid) -> Result<bool, DeviceError> {
        if self.uuid == *uuid {
            return Ok(true);
        }
        let count = CudaContext::device_count().doing("counting GPUs")?;
        for ordinal in 0..count {
            let other = result::device::get(ordinal).doing("finding a GPU")?;
            let found = result::device::get_uuid(other).doing("asking which GPU it is")?;
            if found.bytes.map(|byte| byte as u8) != *uuid {
                continue;
            }
            let mut can = 0;
            // SAFETY: the pointer is valid, and both are GPUs of the driver's.
            unsafe { sys::cuDeviceCanAccessPeer(&mut can, self.context.cu_device(), other).result() }
                .doing("asking whether a GPU is reached")?;
            return Ok(can != 0);
        }
        Ok(false)
    }

    /// Bytes of its memory that nobody uses.
    pub fn free_bytes(&self) -> Result<usize, DeviceError> {
        Ok(self.context.mem_get_info().doing("asking for free memory")?.0)
    }

    /// A queue of work. What is in one queue is done in order; queues know nothing of each other.
    pub fn stream(&self) -> Result<Stream, DeviceError> {
        Ok(Stream { stream: self.context.new_stream().doing("making a stream")?, device: self.clone() })
    }

    /// Waits for everything. Not for the hot path: it waits for all streams of the process.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.context.synchronize().doing("waiting for the GPU")
    }

    pub(super) fn bind(&self) -> Result<(), DeviceError> {
        self.context.bind_to_thread().doing("choosing the GPU")
    }

    pub(super) fn location(&self) -> sys::CUmemLocation {
        let id = self.facts.ordinal as i32;
        sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id }
    }
}

/// A queue of work for a GPU.
#[derive(Clone, Debug)]
pub struct Stream {
    pub(super) stream: Arc<CudaStream>,
    pub(super) device: Device,
}

impl Stream {
    /// Waits for all that was queued.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.stream.synchronize().doing("waiting for a stream")
    }

    /// Marks what was queued so far.
    pub fn mark(&self) -> Result<Mark, DeviceError> {
        self.device.bind()?;
        // A thread that waits sleeps: it has no better use for the processor.
        let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC;
        let event = self.stream.record_event(Some(flags)).doing("marking a stream")?;
        Ok(Mark(Arc::new(event)))
    }

    /// The same for who waits a moment only: a thread that waits does not sleep.
    pub(super) fn mark_to_spin(&self) -> Result<Mark, DeviceError> {
        self.device.bind()?;
        let event = self.stream.record_event(None).doing("marking a stream")?;
        Ok(Mark(Arc::new(event)))
    }

    /// What is queued from here on begins after what another stream had queued when it was marked.
    pub fn after(&self, mark: &Mark) -> Result<(), DeviceError> {
        self.stream.wait(&mark.0).doing("ordering streams")
    }

    /// The driver's name for it, for libraries that queue their own work.
    pub fn as_ptr(&self) -> *mut std::ffi::c_void {
        self.stream.cu_stream().cast()
    }

    /// The GPU that it is of.
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }
}

/// What a stream had queued at some moment.
#[derive(Clone, Debug)]
pub struct Mark(Arc<CudaEvent>);

impl Mark {
    /// Waits until it is done.
    pub fn wait(&self) -> Result<(), DeviceError> {
        self.0.synchronize().doing("waiting for a mark")
    }
}
