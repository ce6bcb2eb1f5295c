//! Weights lent to a graph: never copied, and given back as soon as ONNX Runtime needs them no more.

use super::{Element, MappedFile, Type, Value, check, cpu_memory};
use ort::{AsPointer, editor::Graph, sys};
use std::{
    any::Any,
    collections::BTreeMap,
    ffi::{CString, c_void},
    ops::Range,
    ptr::{self, NonNull},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

/// What keeps memory alive that was given to ONNX Runtime, by address, until it gives it back.
static LENT: Mutex<BTreeMap<usize, Vec<Box<dyn Any + Send>>>> = Mutex::new(BTreeMap::new());

fn lent() -> MutexGuard<'static, BTreeMap<usize, Vec<Box<dyn Any + Send>>>> {
    LENT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes lent memory back: ONNX Runtime calls this when it drops an initializer, which it does as soon as a kernel
/// has packed it into a layout of its own, and at the latest with the session.
unsafe extern "system" fn take_back(_: *mut sys::OrtAllocator, memory: *mut c_void) {
    let address = memory as usize;
    let mut lent = lent();
    let owners = lent.get_mut(&address);
    let owner = owners.and_then(Vec::pop);
    if lent.get(&address).is_some_and(Vec::is_empty) {
        lent.remove(&address);
    }
    drop(lent);
    drop(owner);
}

unsafe extern "system" fn allocate_nothing(_: *mut sys::OrtAllocator, _: usize) -> *mut c_void {
    ptr::null_mut()
}

unsafe extern "system" fn describe(_: *const sys::OrtAllocator) -> *const sys::OrtMemoryInfo {
    cpu_memory().0.as_ptr()
}

/// The "allocator" that frees lent memory. It lives for the life of the process, as ONNX Runtime wants.
fn lender() -> *mut sys::OrtAllocator {
    struct Lender(Box<sys::OrtAllocator>);
    // SAFETY: the table is never written after it was made.
    unsafe impl Send for Lender {}
    // SAFETY: as above.
    unsafe impl Sync for Lender {}
    static LENDER: OnceLock<Lender> = OnceLock::new();
    let lender = LENDER.get_or_init(|| {
        // SAFETY: a table of optional function pointers; those that are required are set below.
        let empty = unsafe { sys::OrtAllocator::default() };
        Lender(Box::new(sys::OrtAllocator {
            version: sys::ORT_API_VERSION,
            Alloc: Some(allocate_nothing),
            Free: Some(take_back),
            Info: Some(describe),
            ..empty
        }))
    });
    ptr::from_ref(&*lender.0).cast_mut()
}

/// Below this many bytes ONNX Runtime wants initializers inside the model rather than beside it.
const EXTERNAL_BYTES: usize = 128;

/// Adds a constant to a graph. The memory is lent, not copied, and freed when ONNX Runtime needs it no more.
pub(in super::super) fn add_owned<T: Element>(
    graph: &mut Graph,
    name: &str,
    mut data: Vec<T>,
    shape: &[i64],
) -> ort::Result<()> {
    assert_eq!(data.len() as i64, shape.iter().product::<i64>(), "{name}: {shape:?}");
    let (address, bytes) = (data.as_mut_ptr().cast(), size_of_val(&data[..]));
    // SAFETY: the vector is moved into the owner, which keeps its buffer where it is.
    unsafe { add(graph, name, address, bytes, T::TYPE, shape, Box::new(data)) }
}

/// Element types of a file's tensors that go into a graph as they are.
#[derive(Clone, Copy)]
pub(in super::super) enum MappedType {
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

/// Adds a tensor of a mapped file to a graph, without a copy. The file stays mapped as long as it is needed.
pub(in super::super) fn add_mapped(
    graph: &mut Graph,
    name: &str,
    file: &Arc<MappedFile>,
    range: Range<usize>,
    element: MappedType,
    shape: &[i64],
) -> ort::Result<()> {
    let element = match element {
        MappedType::Bf16 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
        MappedType::F16 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
        MappedType::F32 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
    };
    let bytes = &file.bytes()[range];
    // SAFETY: the owner keeps the file mapped. Initializers are only ever read, so a read-only mapping will do.
    unsafe {
        add(
            graph,
            name,
            bytes.as_ptr().cast_mut().cast(),
            bytes.len(),
            element,
            shape,
            Box::new(file.clone()),
        )
    }
}

/// # Safety
/// `address` must be valid for `bytes` bytes, holding elements of the type and shape, for as long as `owner` lives.
unsafe fn add(
    graph: &mut Graph,
    name: &str,
    address: *mut c_void,
    bytes: usize,
    element: Type,
    shape: &[i64],
    owner: Box<dyn Any + Send>,
) -> ort::Result<()> {
    let name = CString::new(name).expect("names of the graph hold no NUL");
    let editor = ort::editor::editor_api()?;
    lent().entry(address as usize).or_default().push(owner);
    let mut value = ptr::null_mut();
    // SAFETY: the memory stays valid until ONNX Runtime calls `take_back` with its address. Where it fails before
    // it took note of that, the memory stays lent: a leak after an error, not a dangling pointer.
    check(unsafe {
        (ort::api().CreateTensorWithDataAndDeleterAsOrtValue)(
            lender(),
            address,
            bytes,
            shape.as_ptr(),
            shape.len(),
            element,
            &mut value,
        )
    })?;
    let value = Value(NonNull::new(value).expect("a successful call sets its result"));
    // SAFETY: the graph and the value are valid; on success the graph takes the value over, hence `forget`.
    check(unsafe {
        (editor.AddInitializerToGraph)(
            graph.ptr_mut(),
            name.as_ptr(),
            value.0.as_ptr(),
            bytes >= EXTERNAL_BYTES,
        )
    })?;
    std::mem::forget(value);
    Ok(())
}
