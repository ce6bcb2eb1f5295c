//! ONNX Runtime on a GPU: its provider, and tensors in the GPU's memory.

use super::{AsValue, Element, KvView, Memory, Value, check, cpu_memory};
use forebay_kernels::cuda::{Arena, Device, DeviceBuffer, DeviceError, Plain, Stream};
use ort::{AsPointer, session::builder::SessionBuilder, sys};
use std::{
    collections::BTreeMap,
    ffi::CString,
    ops::Range,
    ptr::{self, NonNull},
    sync::{Arc, Mutex, PoisonError},
};

/// Who runs a graph over a GPU's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Provider {
    /// ONNX Runtime's provider for CUDA.
    #[default]
    Cuda,
    /// That for the processor. Only the memory of a stand-in for a GPU can be reached so, which tests on machines without a GPU
    /// have.
    Cpu,
}

/// "Memory of a GPU".
fn memory(provider: Provider, device: &Device) -> ort::Result<Memory> {
    static KNOWN: Mutex<BTreeMap<i32, Memory>> = Mutex::new(BTreeMap::new());
    if provider == Provider::Cpu {
        return Ok(cpu_memory());
    }
    let ordinal = device.facts().ordinal as i32;
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(memory) = known.get(&ordinal) {
        return Ok(*memory);
    }
    let mut info = ptr::null_mut();
    // SAFETY: name and out-pointer are valid for the call.
    check(unsafe {
        (ort::api().CreateMemoryInfo)(
            c"Cuda".as_ptr(),
            sys::OrtAllocatorType::OrtDeviceAllocator,
            ordinal,
            sys::OrtMemType::OrtMemTypeDefault,
            &mut info,
        )
    })?;
    let memory = Memory(NonNull::new(info).expect("a successful call sets its result"));
    known.insert(ordinal, memory);
    Ok(memory)
}

/// Has a session run on a GPU: what it queues, it queues on `stream`. `entries` are further options of the provider.
pub(in super::super) fn with_cuda(
    options: SessionBuilder,
    stream: &Stream,
    entries: &[(&str, &str)],
) -> ort::Result<SessionBuilder> {
    struct Options(NonNull<sys::OrtCUDAProviderOptionsV2>);
    impl Drop for Options {
        fn drop(&mut self) {
            // SAFETY: the options were made by the C API and are released once.
            unsafe { (ort::api().ReleaseCUDAProviderOptions)(self.0.as_ptr()) };
        }
    }
    let mut cuda = ptr::null_mut();
    // SAFETY: the out-pointer is valid.
    check(unsafe { (ort::api().CreateCUDAProviderOptions)(&mut cuda) })?;
    let cuda = Options(NonNull::new(cuda).expect("a successful call sets its result"));
    let text = |text: &str| CString::new(text).expect("options hold no NUL");
    let (keys, values): (Vec<CString>, Vec<CString>) =
        entries.iter().map(|(key, value)| (text(key), text(value))).unzip();
    let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
    let (keys, values) = (pointers(&keys), pointers(&values));
    // SAFETY: as many valid keys as values.
    check(unsafe {
        (ort::api().UpdateCUDAProviderOptions)(cuda.0.as_ptr(), keys.as_ptr(), values.as_ptr(), keys.len())
    })?;
    // SAFETY: the engine keeps the stream for as long as the session.
    check(unsafe {
        (ort::api().UpdateCUDAProviderOptionsWithValue)(
            cuda.0.as_ptr(),
            c"user_compute_stream".as_ptr(),
            stream.as_ptr(),
        )
    })?;
    // SAFETY: both are valid; the builder is owned, so that nobody else uses its options.
    check(unsafe {
        (ort::api().SessionOptionsAppendExecutionProvider_CUDA_V2)(options.ptr().cast_mut(), cuda.0.as_ptr())
    })?;
    Ok(options)
}

/// A tensor in a GPU's memory, at an address that stays the same while the shape changes from step to step.
pub(in super::super) struct CudaTensor<T: Element + Plain> {
    value: Value,
    buffer: DeviceBuffer<T>,
    memory: Memory,
}

impl<T: Element + Plain> CudaTensor<T> {
    /// A tensor that can take any shape up to that many elements. Nothing is known of them.
    pub(in super::super) fn with_capacity(
        provider: Provider,
        device: &Device,
        capacity: usize,
    ) -> Result<CudaTensor<T>, CudaTensorError> {
        let (buffer, memory) = (DeviceBuffer::new(device, capacity)?, memory(provider, device)?);
        let value = value(memory, &buffer, &[capacity as i64])?;
        Ok(CudaTensor { value, buffer, memory })
    }

    /// Gives the tensor another shape over the same memory.
    ///
    /// # Panics
    /// If the shape has more elements than the capacity.
    pub(in super::super) fn set_shape(&mut self, shape: &[i64]) -> ort::Result<()> {
        self.value = value(self.memory, &self.buffer, shape)?;
        Ok(())
    }

    /// Its memory, with room for as many elements as the capacity.
    pub(in super::super) fn buffer(&self) -> &DeviceBuffer<T> {
        &self.buffer
    }
}

fn value<T: Element + Plain>(memory: Memory, buffer: &DeviceBuffer<T>, shape: &[i64]) -> ort::Result<Value> {
    let len = shape.iter().product::<i64>() as usize;
    assert!(len <= buffer.len(), "{shape:?} exceeds a capacity of {}", buffer.len());
    let data = ptr::with_exposed_provenance_mut(buffer.address() as usize);
    // SAFETY: the buffer has so many elements, and its owner drops the value first or never uses it again.
    unsafe { Value::over(memory, data, len * size_of::<T>(), shape, T::TYPE) }
}

impl<T: Element + Plain> AsValue for CudaTensor<T> {
    fn value(&self) -> &Value {
        &self.value
    }
}

/// Why there is no tensor.
#[derive(Debug, thiserror::Error)]
pub(in super::super) enum CudaTensorError {
    /// The GPU has no memory for it.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// ONNX Runtime refused it.
    #[error(transparent)]
    Runtime(#[from] ort::Error),
}

impl KvView {
    /// A view of slots of an arena.
    ///
    /// # Panics
    /// If the slots are not within its layout.
    pub(in super::super) fn of_arena(
        provider: Provider,
        device: &Device,
        arena: &Arc<Arena>,
        slots: Range<u32>,
    ) -> ort::Result<KvView> {
        let start = ptr::with_exposed_provenance_mut(arena.address() as usize);
        // SAFETY: an arena has addresses for all of its layout, with memory behind them, and the view keeps it.
        unsafe {
            KvView::over(memory(provider, device)?, start, Box::new(arena.clone()), arena.layout(), slots)
        }
    }
}
