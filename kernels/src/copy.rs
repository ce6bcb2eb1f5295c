//! Copies that sum what they copy. KV moves once, and its checksum is taken while the bytes are in cache.

#![allow(unsafe_code)]

use crate::Region;
use crc_fast::{CrcAlgorithm, Digest};

/// Bytes summed before they are copied: small enough to stay in the first-level cache.
const STRIDE: usize = 16 << 10;

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
/// Each stride is summed where it lies and then copied: the sum brings it into the cache, and the copy finds it there, which
/// is a sixth faster than to sum what was copied. If the source's owner, another process perhaps, writes between the two, what
/// was summed is not what was stored. So whoever copies must know by other means that the source was left alone, as readers of
/// KV do by the slot's generation: its owner raises it before it writes, and they look at it after they have read
/// ([`Words`](crate::Words) keep these in order).
pub fn copy_summed(from: (&Region, usize), into: (&Region, usize), bytes: usize, sum: Option<&mut Checksum>) {
    let source = from.0.at(from.1, bytes, false);
    let target = into.0.at(into.1, bytes, true);
    let Some(sum) = sum else {
        // SAFETY: both ranges were checked; two regions are two mappings and do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(source, target, bytes) };
        return;
    };
    let mut done = 0;
    while done < bytes {
        let step = STRIDE.min(bytes - done);
        // SAFETY: `done + step` stays within the checked ranges, and two regions do not overlap. The source is bytes of a
        // mapping that is not written while it is summed, or whose sum is then thrown away: see above.
        unsafe {
            sum.update(std::slice::from_raw_parts(source.add(done), step));
            std::ptr::copy_nonoverlapping(source.add(done), target.add(done), step);
        }
        done += step;
    }
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
}
