//! What lies beneath the KV cache: memory shared between processes, and copies with checksums. With the thin
//! ONNX Runtime binding in `forebay-workers`, this is the only place for `unsafe`.

mod copy;
mod region;
mod words;

pub use copy::{Checksum, checksum, copy_summed};
pub use region::{Region, RegionError};
pub use words::Words;
