//! Tensors that a step reads and writes: small ones over buffers of their own, and views of the KV region.

use super::{AsValue, Element, Memory, Type, Value, cpu_memory};
use forebay_kernels::Region;
use forebay_schemas::kv::{KvDtype, KvLayout};
use std::{
    any::Any,
    ffi::c_void,
    ops::Range,
    ptr::{self, NonNull},
    sync::Arc,
};

/// A tensor over its own buffer, which keeps its address while the shape changes from step to step.
pub(in super::super) struct Tensor<T: Element> {
    value: Value,
    len: usize,
    capacity: usize,
    data: NonNull<T>,
}

// SAFETY: the buffer is owned, and borrowed by the rules of Rust through `data` and `data_mut`.
unsafe impl<T: Element> Send for Tensor<T> {}

impl<T: Element> Tensor<T> {
    /// A tensor of zeros that can take any shape up to that many elements.
    pub(in super::super) fn with_capacity(capacity: usize) -> ort::Result<Tensor<T>> {
        let buffer = Box::leak(vec![T::default(); capacity].into_boxed_slice());
        let data = NonNull::from(buffer).cast::<T>();
        // SAFETY: the buffer lives until `drop`, where the value goes first or is never used again.
        let value = unsafe {
            Value::over(
                cpu_memory(),
                data.as_ptr().cast(),
                capacity * size_of::<T>(),
                &[capacity as i64],
                T::TYPE,
            )
        };
        Ok(Tensor { value: value?, len: capacity, capacity, data })
    }

    /// Gives the tensor another shape over the same memory.
    ///
    /// # Panics
    /// If the shape has more elements than the capacity.
    pub(in super::super) fn set_shape(&mut self, shape: &[i64]) -> ort::Result<()> {
        let len = shape.iter().product::<i64>() as usize;
        assert!(len <= self.capacity, "{shape:?} exceeds a capacity of {}", self.capacity);
        // SAFETY: the first `len` elements of the buffer, which lives until `drop`.
        self.value = unsafe {
            Value::over(cpu_memory(), self.data.as_ptr().cast(), len * size_of::<T>(), shape, T::TYPE)?
        };
        self.len = len;
        Ok(())
    }

    /// The elements of the present shape.
    pub(in super::super) fn data(&self) -> &[T] {
        // SAFETY: the buffer is initialized and owned; ONNX Runtime writes to it only during `Program::run`, which
        // borrows the tensor exclusively for that.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }

    /// The elements of the present shape.
    pub(in super::super) fn data_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `data`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl<T: Element> AsValue for Tensor<T> {
    fn value(&self) -> &Value {
        &self.value
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
pub(in super::super) struct KvView {
    pub(super) values: Vec<Value>,
    /// Keeps the memory where it is.
    _owner: Box<dyn Any + Send>,
}

impl KvView {
    /// A view of `slots` of a region laid out by `layout`.
    ///
    /// # Panics
    /// If the slots are not within the layout, or the region is smaller than it.
    pub(in super::super) fn new(
        region: &Arc<Region>,
        layout: &KvLayout,
        slots: Range<u32>,
    ) -> ort::Result<KvView> {
        let start = region.at(0, layout.region_bytes(), true);
        // SAFETY: the region has so many bytes, and stays mapped as long as its owner.
        unsafe { KvView::over(cpu_memory(), start.cast(), Box::new(region.clone()), layout, slots) }
    }

    /// # Safety
    /// From `start` on, memory must hold all that is laid out by `layout` for as long as `owner` lives.
    pub(super) unsafe fn over(
        memory: Memory,
        start: *mut c_void,
        owner: Box<dyn Any + Send>,
        layout: &KvLayout,
        slots: Range<u32>,
    ) -> ort::Result<KvView> {
        assert!(slots.start < slots.end && slots.end <= layout.slots, "slots {slots:?} of {}", layout.slots);
        let element = match layout.geometry.dtype {
            KvDtype::F32 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
            KvDtype::F16 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
            KvDtype::Bf16 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
            KvDtype::F8 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN,
            KvDtype::Int8 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,
        };
        let count = slots.end - slots.start;
        let shape =
            [count, layout.geometry.kv_heads, layout.positions, layout.geometry.head_dim].map(i64::from);
        let bytes = count as usize * layout.slot_stride();
        let plane = |plane| {
            let at = start.wrapping_byte_add(layout.slot_offset(plane, slots.start as usize));
            // SAFETY: these slots are within the layout, whose memory the owner keeps.
            unsafe { Value::over(memory, at, bytes, &shape, element) }
        };
        let values = (0..2 * layout.geometry.layers as usize).map(plane).collect::<ort::Result<_>>()?;
        Ok(KvView { values, _owner: owner })
    }
}
