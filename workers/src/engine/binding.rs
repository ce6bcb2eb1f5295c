//! The thin unsafe layer between the engine and ONNX Runtime, and the mapping of weight files.
//!
//! `ort`'s safe API covers graphs and sessions. It does not cover what this engine lives on: initializers over
//! memory that is not copied, and a `Run` whose past and present KV are the same memory (`IoBinding` copies
//! borrowed inputs). Everything unsafe is in this file, behind types that are safe to use.

#![allow(unsafe_code)]

use forebay_kernels::Region;
use forebay_schemas::kv::{KvDtype, KvLayout};
use ort::{
    AsPointer,
    editor::{Graph, Model},
    environment::Environment,
    session::builder::SessionBuilder,
    sys::{self, ONNXTensorElementDataType as Type},
};
use std::{
    any::Any,
    collections::BTreeMap,
    ffi::{CString, c_void},
    fs::File,
    ops::Range,
    path::Path,
    ptr::{self, NonNull},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

/// A file mapped read-only.
pub(super) struct MappedFile(Option<memmap2::Mmap>);

impl MappedFile {
    /// Maps a file; an empty one is an empty slice.
    pub(super) fn open(path: &Path) -> std::io::Result<MappedFile> {
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(MappedFile(None));
        }
        // SAFETY: the mapping is read-only and private to this type. A weight file that another process truncates
        // or rewrites while it is served is outside what any reader of mapped files can defend against; weights are
        // installed by renaming, not by writing in place.
        Ok(MappedFile(Some(unsafe { memmap2::Mmap::map(&file)? })))
    }

    /// The file's bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }

    /// Lets the system take back the memory of a range that was read for the last time, or will be for a while.
    pub(super) fn release(&self, range: Range<usize>) {
        let Some(map) = &self.0 else { return };
        // SAFETY: dropping pages of a mapping that is never written loses nothing: they are read from the file again.
        let advised = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        // Advice may be refused, and then the pages stay.
        let _ = advised;
    }
}

/// Runs `work` compiled for 256-bit vectors where the processor has them. The same operations in the same order, so
/// the same results: nothing is contracted into fused multiply-adds.
#[inline]
pub(super) fn with_wide_vectors<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2")]
        fn wide<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        // SAFETY: the processor was just found to have AVX2.
        return unsafe { wide(work) };
    }
    work()
}

/// Checks a status and frees it.
fn check(status: sys::OrtStatusPtr) -> ort::Result<()> {
    // SAFETY: every status passed here was just returned by the C API, and is passed once.
    unsafe { ort::Error::result_from_status(status) }
}

/// "Memory of the CPU", as the C API wants to be told with every tensor.
fn cpu_memory() -> *const sys::OrtMemoryInfo {
    struct Info(NonNull<sys::OrtMemoryInfo>);
    // SAFETY: the description is immutable once made, and never freed.
    unsafe impl Send for Info {}
    // SAFETY: as above.
    unsafe impl Sync for Info {}
    static INFO: OnceLock<Info> = OnceLock::new();
    INFO.get_or_init(|| {
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
        Info(NonNull::new(info).expect("a successful call sets its result"))
    })
    .0
    .as_ptr()
}

/// An `OrtValue` over memory that it does not own.
struct Value(NonNull<sys::OrtValue>);

// SAFETY: a value is an immutable description of memory, tied to no thread; whoever owns the memory answers for
// access to it.
unsafe impl Send for Value {}

impl Value {
    /// # Safety
    /// `data` must stay valid for `bytes` bytes until the value and everything that ONNX Runtime made of it is gone.
    unsafe fn over(data: *mut c_void, bytes: usize, shape: &[i64], element: Type) -> ort::Result<Value> {
        let mut value = ptr::null_mut();
        // SAFETY: shape and out-pointer are valid for the call; the caller answers for the data.
        check(unsafe {
            (ort::api().CreateTensorWithDataAsOrtValue)(
                cpu_memory(),
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

/// Element types of tensors made here.
pub(super) trait Element: Copy + Default + Send + 'static {
    #[doc(hidden)]
    const TYPE: Type;
}

impl Element for f32 {
    const TYPE: Type = Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
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

/// A tensor over its own buffer, which keeps its address while the shape changes from step to step.
pub(super) struct Tensor<T: Element> {
    value: Value,
    len: usize,
    capacity: usize,
    data: NonNull<T>,
}

// SAFETY: the buffer is owned, and borrowed by the rules of Rust through `data` and `data_mut`.
unsafe impl<T: Element> Send for Tensor<T> {}

impl<T: Element> Tensor<T> {
    /// A tensor of zeros that can take any shape up to that many elements.
    pub(super) fn with_capacity(capacity: usize) -> ort::Result<Tensor<T>> {
        let buffer = Box::leak(vec![T::default(); capacity].into_boxed_slice());
        let data = NonNull::from(buffer).cast::<T>();
        // SAFETY: the buffer lives until `drop`, where the value goes first or is never used again.
        let value = unsafe { Value::over(data.as_ptr().cast(), capacity * size_of::<T>(), &[capacity as i64], T::TYPE) };
        Ok(Tensor { value: value?, len: capacity, capacity, data })
    }

    /// Gives the tensor another shape over the same memory.
    ///
    /// # Panics
    /// If the shape has more elements than the capacity.
    pub(super) fn set_shape(&mut self, shape: &[i64]) -> ort::Result<()> {
        let len = shape.iter().product::<i64>() as usize;
        assert!(len <= self.capacity, "{shape:?} exceeds a capacity of {}", self.capacity);
        // SAFETY: the first `len` elements of the buffer, which lives until `drop`.
        self.value = unsafe { Value::over(self.data.as_ptr().cast(), len * size_of::<T>(), shape, T::TYPE)? };
        self.len = len;
        Ok(())
    }

    /// The elements of the present shape.
    pub(super) fn data(&self) -> &[T] {
        // SAFETY: the buffer is initialized and owned; ONNX Runtime writes to it only during `Program::run`, which
        // borrows the tensor exclusively for that.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }

    /// The elements of the present shape.
    pub(super) fn data_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `data`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl<T: Element> Drop for Tensor<T> {
    fn drop(&mut self) {
        let buffer = ptr::slice_from_raw_parts_mut(self.data.as_ptr(), self.capacity);
        // SAFETY: the buffer was leaked from a box of this length in `with_capacity`. The value, dropped after it,
        // only frees its description.
        drop(unsafe { Box::from_raw(buffer) });
    }
}

/// The KV of a range of slots, as the tensors `[slots, kv_heads, positions, head_dim]` of every plane.
pub(super) struct KvView {
    values: Vec<Value>,
    /// Keeps the memory mapped.
    _region: Arc<Region>,
}

impl KvView {
    /// A view of `slots` of a region laid out by `layout`.
    ///
    /// # Panics
    /// If the slots are not within the layout, or the region is smaller than it.
    pub(super) fn new(region: &Arc<Region>, layout: &KvLayout, slots: Range<u32>) -> ort::Result<KvView> {
        assert!(slots.start < slots.end && slots.end <= layout.slots, "slots {slots:?} of {}", layout.slots);
        let element = match layout.geometry.dtype {
            KvDtype::F32 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
            KvDtype::F16 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
            KvDtype::Bf16 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
            KvDtype::Int8 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,
        };
        let count = slots.end - slots.start;
        let shape = [count, layout.geometry.kv_heads, layout.positions, layout.geometry.head_dim].map(i64::from);
        let bytes = count as usize * layout.slot_stride();
        let plane = |plane| {
            let at = region.at(layout.slot_offset(plane, slots.start as usize), bytes, true);
            // SAFETY: `at` checked the bounds; the region is kept mapped by `_region`.
            unsafe { Value::over(at.cast(), bytes, &shape, element) }
        };
        let values = (0..2 * layout.geometry.layers as usize).map(plane).collect::<ort::Result<_>>()?;
        Ok(KvView { values, _region: region.clone() })
    }
}

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
    cpu_memory()
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
pub(super) fn add_owned<T: Element>(graph: &mut Graph, name: &str, mut data: Vec<T>, shape: &[i64]) -> ort::Result<()> {
    assert_eq!(data.len() as i64, shape.iter().product::<i64>(), "{name}: {shape:?}");
    let (address, bytes) = (data.as_mut_ptr().cast(), size_of_val(&data[..]));
    // SAFETY: the vector is moved into the owner, which keeps its buffer where it is.
    unsafe { add(graph, name, address, bytes, T::TYPE, shape, Box::new(data)) }
}

/// Element types of a file's tensors that go into a graph as they are.
#[derive(Clone, Copy)]
pub(super) enum MappedType {
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

/// Adds a tensor of a mapped file to a graph, without a copy. The file stays mapped as long as it is needed.
pub(super) fn add_mapped(
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
    unsafe { add(graph, name, bytes.as_ptr().cast_mut().cast(), bytes.len(), element, shape, Box::new(file.clone())) }
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
        (editor.AddInitializerToGraph)(graph.ptr_mut(), name.as_ptr(), value.0.as_ptr(), bytes >= EXTERNAL_BYTES)
    })?;
    std::mem::forget(value);
    Ok(())
}

/// What one run of the graph reads and writes.
pub(super) struct Step<'a> {
    /// `[batch, tokens]`: token ids.
    pub(super) input_ids: &'a Tensor<i64>,
    /// `[batch]`: tokens in each slot after this step, less one.
    pub(super) seqlens_k: &'a Tensor<i32>,
    /// `[1]`: the largest number of tokens in a slot after this step.
    pub(super) total_len: &'a Tensor<i32>,
    /// `[rows, 2]`: (batch, token) of each row whose logits are wanted.
    pub(super) last: &'a Tensor<i64>,
    /// Past KV, and the place of the present.
    pub(super) kv: &'a KvView,
    /// `[rows, vocab]`: written.
    pub(super) logits: &'a mut Tensor<f32>,
}

/// A session, released when dropped.
struct RawSession(NonNull<sys::OrtSession>);

impl Drop for RawSession {
    fn drop(&mut self) {
        // SAFETY: the session was made by the C API and is released once.
        unsafe { (ort::api().ReleaseSession)(self.0.as_ptr()) };
    }
}

/// A session with the names of its inputs and outputs, in the order of [`Step`].
pub(super) struct Program {
    session: RawSession,
    inputs: Vec<CString>,
    outputs: Vec<CString>,
    /// Holds the environment and our operators, which the session calls: dropped after it.
    _options: SessionBuilder,
}

// SAFETY: a session is tied to no thread. Of the options only what is `Send` anyway is left to drop: the environment,
// and operators, which `Operator` wants `Send`.
unsafe impl Send for Program {}

impl Program {
    /// Makes a session that adds `model` to the serialized model `base`. (A session of a [`Model`] alone does not
    /// look at custom operators, and `ort`'s editable session asks for facts that a session has only when it is
    /// complete.)
    pub(super) fn new(
        environment: &Environment,
        options: SessionBuilder,
        base: &[u8],
        model: &Model,
        layers: usize,
    ) -> ort::Result<Program> {
        let editor = ort::editor::editor_api()?;
        let mut session = ptr::null_mut();
        // SAFETY: environment, bytes and options are valid for the call.
        check(unsafe {
            (editor.CreateModelEditorSessionFromArray)(
                environment.ptr(),
                base.as_ptr().cast(),
                base.len(),
                options.ptr(),
                &mut session,
            )
        })?;
        let session = RawSession(NonNull::new(session).expect("a successful call sets its result"));
        // SAFETY: session and model are valid; the model is only read.
        check(unsafe { (editor.ApplyModelToModelEditorSession)(session.0.as_ptr(), model.ptr().cast_mut()) })?;
        // SAFETY: session and options are valid; no container of prepacked weights is allowed to be null.
        check(unsafe { (editor.FinalizeModelEditorSession)(session.0.as_ptr(), options.ptr(), ptr::null()) })?;
        let name = |name: String| CString::new(name).expect("names of the graph hold no NUL");
        let kv = |what: &'static str| (0..layers).flat_map(move |l| [format!("{what}.{l}.k"), format!("{what}.{l}.v")]);
        let inputs = ["input_ids", "seqlens_k", "total_len", "last"].map(str::to_owned);
        Ok(Program {
            session,
            inputs: inputs.into_iter().chain(kv("past")).map(name).collect(),
            outputs: ["logits".to_owned()].into_iter().chain(kv("present")).map(name).collect(),
            _options: options,
        })
    }

    /// Runs the graph once, on the calling thread and the session's pool.
    pub(super) fn run(&mut self, step: &mut Step<'_>) -> ort::Result<()> {
        let pointers = |names: &[CString]| names.iter().map(|name| name.as_ptr()).collect::<Vec<_>>();
        let (input_names, output_names) = (pointers(&self.inputs), pointers(&self.outputs));
        let first = [&step.input_ids.value, &step.seqlens_k.value, &step.total_len.value, &step.last.value];
        let inputs = first.into_iter().chain(&step.kv.values).map(|value| value.0.as_ptr().cast_const());
        let inputs: Vec<_> = inputs.collect();
        let outputs = [&step.logits.value].into_iter().chain(&step.kv.values).map(|value| value.0.as_ptr());
        let mut outputs: Vec<_> = outputs.collect();
        assert!(inputs.len() == input_names.len() && outputs.len() == output_names.len(), "a view of another model");
        // SAFETY: names and values are valid for the call and of equal number. The inputs are borrowed, the logits
        // borrowed exclusively, the KV reachable only by raw pointers; past and present may share memory because
        // GroupQueryAttention then appends in place. `&mut self` keeps runs of one session apart.
        check(unsafe {
            (ort::api().Run)(
                self.session.0.as_ptr(),
                ptr::null(),
                input_names.as_ptr(),
                inputs.as_ptr(),
                inputs.len(),
                output_names.as_ptr(),
                output_names.len(),
                outputs.as_mut_ptr(),
            )
        })
    }
}
