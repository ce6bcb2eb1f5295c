//! Loops compiled for the vectors that a processor has.

#![allow(unsafe_code)]

/// Runs `work` compiled for 256-bit vectors where the processor has them. The same operations in the same order, so
/// the same results: nothing is contracted into fused multiply-adds.
#[inline]
pub fn with_wide_vectors<R>(work: impl FnOnce() -> R) -> R {
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
