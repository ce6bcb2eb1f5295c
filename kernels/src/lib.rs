//! What lies beneath the KV cache: memory shared between processes, copies with checksums, and sockets to fill
//! it from. With the thin ONNX Runtime binding in `forebay-workers`, this is the only place for `unsafe`.

mod copy;
mod region;
mod socket;
mod words;

pub use copy::{Checksum, checksum, copy_summed};
pub use region::{Region, RegionError};
pub use socket::{receive, send};
pub use words::Words;
