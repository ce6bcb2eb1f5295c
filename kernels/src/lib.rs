//! What lies beneath the KV cache: memory shared between processes, copies with checksums, and sockets to fill
//! it from; how tokens are drawn; and the same for GPUs ([`cuda`]). With the thin ONNX Runtime binding in
//! `forebay-workers`, this is the only place for `unsafe`.

mod adjust;
mod copy;
mod crc;
pub mod cuda;
mod region;
mod sampler;
mod socket;
mod wide;
mod words;

pub use adjust::{Adjustments, Normalizer, Penalties, TokenAdjustment, adjust, most_probable};
pub use copy::{Checksum, checksum, copy_summed};
pub use crc::{join, stretch_sums};
pub use region::{Region, RegionError};
pub use sampler::{NotFinite, exp, sample};
pub use socket::{receive, send};
pub use wide::with_wide_vectors;
pub use words::Words;
