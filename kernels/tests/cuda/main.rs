//! GPUs: kernels against their references, and memory and copies. Without a GPU, on the stand-in of `driver.c`, where kernels run
//! on the processor: what they compute is the same on a GPU, how fast is not. `FOREBAY_TEST_GPU=1` takes the real driver.

mod adjust;
mod memory;
mod rows;
mod sampler;
mod shared;
mod stand_in;
mod sum;
mod transfer;

use forebay_kernels::cuda::{DeviceBuffer, HostBuffer, Plain, Stream};

/// A buffer of the GPU that holds `data`.
fn buffer<T: Plain>(stream: &Stream, data: &[T]) -> DeviceBuffer<T> {
    let mut host = HostBuffer::new(stream.device(), data.len()).unwrap();
    host.data().unwrap().copy_from_slice(data);
    let buffer = DeviceBuffer::new(stream.device(), data.len()).unwrap();
    stream.copy_in(&mut host, data.len(), &buffer, 0).unwrap();
    buffer
}

/// What a buffer of the GPU holds.
fn contents<T: Plain>(stream: &Stream, buffer: &DeviceBuffer<T>) -> Vec<T> {
    let mut host = HostBuffer::new(stream.device(), buffer.len()).unwrap();
    stream.copy_out(buffer, buffer.len(), &mut host).unwrap();
    host.data().unwrap().to_vec()
}
