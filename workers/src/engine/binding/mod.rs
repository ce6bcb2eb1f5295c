//! The thin unsafe layer between the engine and ONNX Runtime, and the mapping of weight files.
//!
//! `ort`'s safe API covers graphs and sessions. It does not cover what this engine lives on: initializers over
//! memory that is not copied, and a `Run` whose past and present KV are the same memory (`IoBinding` copies
//! borrowed inputs). Everything unsafe of the engine is in this folder, behind types that are safe to use.

#![allow(unsafe_code)]

mod cuda;
mod initializer;
mod mapped;
mod program;
mod tensor;

pub use cuda::Provider;
pub(super) use cuda::{CudaTensor, CudaTensorError, with_cuda};
pub(super) use initializer::{MappedType, add_mapped, add_owned};
pub(super) use mapped::MappedFile;
pub(super) use program::{Program, RunOptions, Step};
pub(super) use tensor::{KvView, Tensor};

use ort::sys::{self, ONNXTensorElementDataType as Type};
use std::{
    ffi::c_void,
    ptr::{self, NonNull},
    sync::OnceLock,
};

/// Checks a status and frees it.
fn check(status: sys::OrtStatusPtr) -> ort::Result<()> {
    // SAFETY: every status passed here was just returned by the C API, and is passed once.
    unsafe { ort::Error::result_from_status(status) }
}

/// What kind of memory something is in, as the C API wants to be told with every tensor.
#[derive(Clone, Copy)]
struct Memory(NonNull<sys::OrtMemoryInfo>);

// SAFETY: the description is immutable once made, and never freed.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// "Memory of the CPU".
fn cpu_memory() -> Memory {
    static MEMORY: OnceLock<Memory> = OnceLock::new();
    *MEMORY.get_or_init(|| {
        let mut info = ptr::null_mut();
        // SAFETY: the out-pointer is valid; the call has no other conditions.
        let made = check(unsafe {
            (ort::api().CreateCpuMemoryInfo)(
                sys::OrtAllocatorType::OrtDeviceAllocator,
                sys::OrtMemType::OrtMemTypeDefault,
                &mut info,
            )
        });
        made.expect("describing CPU memory allocates a few bytes");
        Memory(NonNull::new(info).expect("a successful call sets its result"))
    })
}

/// An `OrtValue` over memory that it does not own.
pub(super) struct Value(NonNull<sys::OrtValue>);

// SAFETY: a value is an immutable description of memory, tied to no thread; whoever owns the memory answers for
// access to it.
unsafe impl Send for Value {}

impl Value {
    /// # Safety
    /// `data` must stay valid for `bytes` bytes of that memory until the value and everything that ONNX Runtime made of it is
    /// gone.
    unsafe fn over(
        memory: Memory,
        data: *mut c_void,
        bytes: usize,
        shape: &[i64],
        element: Type,
    ) -> ort::Result<Value> {
        let mut value = ptr::null_mut();
        // SAFETY: shape and out-pointer are valid for the call; the caller answers for the data.
        check(unsafe {
            (ort::api().CreateTensorWithDataAsOrtValue)(
                memory.0.as_ptr(),
                data,
                bytes,
                shape.as_ptr(),
                shape.len(),
                element,
                &mut value,
            )
        })?;
        Ok(Value(NonNull::new(value).expect("a successful call sets its result")))
    }
}

impl Drop for Value {
    fn drop(&mut self) {
        // SAFETY: the value was made by the C API and is released once.
        unsafe { (ort::api().ReleaseValue)(self.0.as_ptr()) };
    }
}

/// A tensor that a run of a graph reads or writes.
pub(super) trait AsValue {
    #[doc(hidden)]
    fn value(&self) -> &Value;
}

/// Element types of tensors made here.
pub(super) trait Element: Copy + Default + Send + 'static {
    #[doc(hidden)]
    const TYPE: Type;
}

impl Element for f32 {
    const TYPE: Type = Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

impl Element for half::f16 {
    const TYPE: Type = Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
}

impl Element for half::bf16 {
    const TYPE: Type = Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
}

impl Element for i32 {
    const TYPE: Type = Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
}

impl Element for i64 {
    const TYPE: Type = Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
}

impl Element for u8 {
    const TYPE: Type = Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
}
