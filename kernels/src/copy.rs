//! Copies that sum what they copy. KV moves once, and its checksum is taken while the bytes are in cache.

#![allow(unsafe_code)]

use crate::Region;
use crc_fast::{CrcAlgorithm, Digest};

/// Bytes copied before they are summed: small enough to stay in the first-level cache.
const STRIDE: usize = 16 << 10;

/// Fewer bytes are soon read again, and better off in the cache.
#[cfg(target_arch = "x86_64")]
const PAST_CACHE_MIN: usize = 4 << 10;

/// CRC-64/NVME over a sequence of pieces.
#[derive(Clone, Debug)]
pub struct Checksum(Digest);

impl Default for Checksum {
    fn default() -> Self {
        Checksum(Digest::new(CrcAlgorithm::Crc64Nvme))
    }
}

impl Checksum {
    /// Adds bytes to the sum.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Adds what another sum has seen, as if its bytes had come after these.
    pub fn append(&mut self, other: &Checksum) {
        self.0.combine(&other.0);
    }

    /// The sum of all bytes so far.
    pub fn value(&self) -> u64 {
        self.0.finalize()
    }
}

/// Adds `bytes` bytes of a region at `offset` to a sum. The caller owns the range: nothing writes to it.
pub fn checksum(region: &Region, offset: usize, bytes: usize, sum: &mut Checksum) {
    let from = region.at(offset, bytes, false);
    // SAFETY: the range lies in the mapping, and by contract nothing writes to it while it is summed.
    sum.update(unsafe { std::slice::from_raw_parts(from, bytes) });
}

/// Copies `bytes` bytes from one region into another and adds them to `sum`. Without a sum it only copies.
///
/// Each stride is copied and then summed where it came from: the copy has brought it into the cache, and has written past the
/// cache, so that a byte passes through memory twice, not three times. If the source's owner, another process perhaps, writes
/// between the two, what was summed is not what was stored. So whoever copies must know by other means that the source was left
/// alone, as readers of KV do by the slot's generation: its owner raises it before it writes, and they look at it after they
/// have read ([`Words`](crate::Words) keep these in order).
pub fn copy_summed(
    from: (&Region, usize),
    into: (&Region, usize),
    bytes: usize,
    mut sum: Option<&mut Checksum>,
) {
    let source = from.0.at(from.1, bytes, false);
    let target = into.0.at(into.1, bytes, true);
    let mut done = 0;
    while done < bytes {
        let step = STRIDE.min(bytes - done);
        // SAFETY: `done + step` stays within the checked ranges, and two regions are two mappings that do not overlap. The
        // source is bytes of a mapping that is not written while it is summed, or whose sum is then thrown away: see above.
        unsafe {
            copy(source.add(done), target.add(done), step);
            if let Some(sum) = sum.as_deref_mut() {
                sum.update(std::slice::from_raw_parts(source.add(done), step));
            }
        }
        done += step;
    }
}

/// Copies a stride: past the cache, if it is long enough to be one of many.
///
/// # Safety
/// As for [`std::ptr::copy_nonoverlapping`].
unsafe fn copy(source: *const u8, target: *mut u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    if bytes >= PAST_CACHE_MIN && std::arch::is_x86_feature_detected!("avx") {
        // SAFETY: the processor has the instructions; the rest is the caller's.
        return unsafe { copy_past_cache(source, target, bytes) };
    }
    // SAFETY: the caller's.
    unsafe { std::ptr::copy_nonoverlapping(source, target, bytes) };
}

/// # Safety
/// As for [`std::ptr::copy_nonoverlapping`]; and at least 64 bytes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn copy_past_cache(source: *const u8, target: *mut u8, bytes: usize) {
    use std::arch::x86_64::{_mm_sfence, _mm256_loadu_si256, _mm256_stream_si256};
    const LINE: usize = 64;
    // Whole lines of the target are written; what is before and after them is copied as ever.
    let before = target.align_offset(LINE);
    let lines = (bytes - before) / LINE;
    let after = before + lines * LINE;
    // SAFETY: all of it stays within `bytes`, and each half line is aligned.
    unsafe {
        std::ptr::copy_nonoverlapping(source, target, before);
        for line in 0..lines {
            let (from, into) = (source.add(before + line * LINE), target.add(before + line * LINE));
            let halves = [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(LINE / 2).cast())];
            _mm256_stream_si256(into.cast(), halves[0]);
            _mm256_stream_si256(into.add(LINE / 2).cast(), halves[1]);
        }
        std::ptr::copy_nonoverlapping(source.add(after), target.add(after), bytes - after);
    }
    // Such writes may be seen after later ones; whoever is told that the copy is done must find it done.
    _mm_sfence();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_of_pieces_is_the_sum_of_the_whole() {
        // The check value of CRC-64/NVME, from the catalogue of parametrised CRC algorithms.
        let mut sum = Checksum::default();
        sum.update(b"1234");
        sum.update(b"56789");
        assert_eq!(sum.value(), 0xae8b_1486_0a79_9888);
        let (mut first, mut second) = (Checksum::default(), Checksum::default());
        first.update(b"1234");
        second.update(b"56789");
        first.append(&second);
        assert_eq!(first.value(), sum.value());
    }

    #[test]
    fn a_summed_copy_stores_what_it_sums() {
        let bytes = 3 * STRIDE + 77;
        let (a, b) = (Region::create("a", bytes + 5).unwrap(), Region::create("b", bytes).unwrap());
        let data: Vec<u8> = (0..bytes).map(|i| (i * 7 + i / 251) as u8).collect();
        a.write(5, &data);
        let mut copied = Checksum::default();
        copy_summed((&a, 5), (&b, 0), bytes, Some(&mut copied));
        let mut expected = Checksum::default();
        expected.update(&data);
        assert_eq!(copied.value(), expected.value());
        let mut stored = vec![0; bytes];
        b.read(0, &mut stored);
        assert_eq!(stored, data);
        let mut again = Checksum::default();
        checksum(&b, 0, bytes, &mut again);
        assert_eq!(again.value(), expected.value());
    }

    #[test]
    fn a_copy_of_any_length_to_any_place_is_exact() {
        let size = 3 * STRIDE;
        let (a, b) = (Region::create("a", size).unwrap(), Region::create("b", size).unwrap());
        let data: Vec<u8> = (0..size).map(|i| (i * 13 + i / 253) as u8).collect();
        a.write(0, &data);
        for bytes in [0, 1, 31, 4095, 4096, 4097, 4130, STRIDE, STRIDE + 4099] {
            for (from, into) in [(0, 0), (1, 0), (0, 1), (7, 31), (33, 65)] {
                b.write(0, &vec![0xa5; size]);
                copy_summed((&a, from), (&b, into), bytes, None);
                let mut stored = vec![0; size];
                b.read(0, &mut stored);
                assert_eq!(stored[into..into + bytes], data[from..from + bytes], "{bytes} to {into}");
                let rest = stored[..into].iter().chain(&stored[into + bytes..]);
                assert!(rest.into_iter().all(|byte| *byte == 0xa5), "{bytes} to {into}: no more than that");
            }
        }
    }
}
