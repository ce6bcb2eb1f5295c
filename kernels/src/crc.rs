//! CRC-64/NVME in parts: sums of stretches, taken in any order and by anybody, put together. On a GPU `kv_sum` in `kv.cu` takes them.
//!
//! Bytes are a polynomial over GF(2), and their CRC is what is left of it modulo another one. So it is linear: what comes before
//! `n` further bits counts as multiplied by x^n. Words are reflected: the highest bit is the coefficient of x^0.

/// CRC-64/NVME's polynomial, without its x^64. As that is equal to zero, this is also what x^64 is.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;

/// x^0.
const ONE: u64 = 1 << 63;

fn times_x(a: u64) -> u64 {
    a >> 1 ^ if a & 1 == 1 { POLYNOMIAL } else { 0 }
}

fn times(a: u64, mut b: u64) -> u64 {
    let mut product = 0;
    for power in (0..64).rev() {
        product ^= if a >> power & 1 == 1 { b } else { 0 };
        b = times_x(b);
    }
    product
}

/// x^`bits`.
pub(crate) fn power(mut bits: u64) -> u64 {
    let (mut power, mut square) = (ONE, times_x(ONE));
    while bits > 0 {
        if bits & 1 == 1 {
            power = times(power, square);
        }
        square = times(square, square);
        bits >>= 1;
    }
    power
}

/// A factor, made ready to be multiplied with many times: what it makes of each byte.
struct Factor(Box<[[u64; 256]; 8]>);

impl Factor {
    fn new(mut factor: u64) -> Factor {
        let mut tables = Box::new([[0; 256]; 8]);
        for bit in (0..64).rev() {
            let table = &mut tables[bit / 8];
            let low = 1 << (bit % 8);
            (0..256).filter(|byte| byte & low != 0).for_each(|byte| table[byte] ^= factor);
            factor = times_x(factor);
        }
        Factor(tables)
    }

    fn times(&self, a: u64) -> u64 {
        a.to_le_bytes()
            .iter()
            .zip(self.0.iter())
            .fold(0, |product, (byte, table)| product ^ table[*byte as usize])
    }
}

/// The sums of the stretches of a piece, of so many bytes each but for the last. All lengths are multiples of 8.
///
/// A stretch's sum is that of its words, each times x^64 for each word after it: a CRC before it is begun and ended.
pub fn stretch_sums(piece: &[u8], stretch: usize) -> Vec<u64> {
    let next = Factor::new(POLYNOMIAL);
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
    let sum = |bytes: &[u8]| bytes.chunks_exact(8).fold(0, |sum, bytes| next.times(sum) ^ word(bytes));
    piece.chunks(stretch).map(sum).collect()
}

/// CRC-64/NVME of pieces of `piece` bytes one after another, from the sums of their stretches: what a
/// [`Checksum`](crate::Checksum) says of their bytes.
pub fn join(sums: &[u64], piece: usize, stretch: usize) -> u64 {
    let stretches = piece.div_ceil(stretch).max(1);
    let last_bytes = piece - (stretches - 1) * stretch;
    let (whole, last) = (Factor::new(power(8 * stretch as u64)), Factor::new(power(8 * last_bytes as u64)));
    let mut joined = 0;
    for sums in sums.chunks(stretches) {
        for (number, sum) in sums.iter().enumerate() {
            let factor = if number + 1 == stretches { &last } else { &whole };
            joined = factor.times(joined) ^ sum;
        }
    }
    // A CRC begins with ones in front of all, has 64 bits behind, and ends turned over.
    let bits = 8 * (sums.len() / stretches * piece) as u64;
    !(times(joined, POLYNOMIAL) ^ times(!0, power(bits)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Checksum;
    use proptest::prelude::*;

    #[test]
    fn powers_are_products() {
        assert_eq!((power(0), power(1), power(64)), (ONE, ONE >> 1, POLYNOMIAL));
        assert_eq!(power(1000), times(power(987), power(13)));
        assert_eq!(Factor::new(power(77)).times(power(5)), power(82));
    }

    proptest! {
        #[test]
        fn stretches_join_to_the_checksum(
            (words, pieces, stretch) in (1usize..90, 0usize..9, 1usize..100),
            salt in any::<u64>(),
        ) {
            let (piece, stretch) = (8 * words, 8 * stretch);
            let byte = |at: usize| (salt.wrapping_mul(at as u64 + 1) >> 29) as u8;
            let bytes: Vec<u8> = (0..pieces * piece).map(byte).collect();
            let mut expected = Checksum::default();
            expected.update(&bytes);
            let sums: Vec<u64> = bytes.chunks(piece).flat_map(|piece| stretch_sums(piece, stretch)).collect();
            prop_assert_eq!(join(&sums, piece, stretch), expected.value());
        }
    }
}
