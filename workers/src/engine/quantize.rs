//! Round-to-nearest quantization of weights into the layout of ONNX Runtime's `MatMulNBits`.
//!
//! A matrix `[n, k]` (out, in: as in Hugging Face checkpoints) is cut along k into blocks; the last block of a row
//! may be short and is filled with zeros. A block has one fp32 scale and unsigned codes with an implied zero point
//! in the middle: x ≈ (code − 2^(bits−1)) · scale. The element of largest magnitude fixes the scale, with its sign,
//! so that it maps to the lowest code exactly: as onnxruntime-genai and llama.cpp's Q4_0 do.
//!
//! <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits>

use super::checkpoint::Matrix;

/// Bits and block length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// 4 or 8.
    pub bits: usize,
    /// Elements along k that share a scale.
    pub block: usize,
}

impl Scheme {
    /// Blocks of a row of `k` elements.
    pub fn blocks(&self, k: usize) -> usize {
        k.div_ceil(self.block)
    }

    /// Bytes of the codes of one block.
    pub fn block_bytes(&self) -> usize {
        self.block * self.bits / 8
    }
}

/// A quantized matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// Codes, `[n, blocks, block_bytes]`; of two codes in a byte, the low nibble is the earlier element.
    pub codes: Vec<u8>,
    /// Scales, `[n, blocks]`.
    pub scales: Vec<f32>,
    /// Rows.
    pub n: usize,
    /// Columns, without the filling of the last block.
    pub k: usize,
}

/// Quantizes matrices of one width, stacked along n, on `threads` threads.
pub fn quantize(matrices: &[Matrix<'_>], scheme: Scheme, threads: usize) -> Quantized {
    let k = matrices[0].tensor.columns();
    let n: usize = matrices.iter().map(|matrix| matrix.tensor.rows()).sum();
    let (row_bytes, blocks) = (scheme.blocks(k) * scheme.block_bytes(), scheme.blocks(k));
    let (mut codes, mut scales) = (vec![0u8; n * row_bytes], vec![0f32; n * blocks]);
    let rows: Vec<(Matrix<'_>, usize)> =
        matrices.iter().flat_map(|matrix| (0..matrix.tensor.rows()).map(move |row| (*matrix, row))).collect();
    let share = n.div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        let outputs = codes.chunks_mut(share * row_bytes).zip(scales.chunks_mut(share * blocks));
        for (rows, (codes, scales)) in rows.chunks(share).zip(outputs) {
            scope.spawn(move || {
                let mut row_values = vec![0.0; blocks * scheme.block];
                let outputs = codes.chunks_exact_mut(row_bytes).zip(scales.chunks_exact_mut(blocks));
                for ((matrix, row), (codes, scales)) in rows.iter().zip(outputs) {
                    matrix.row(*row, &mut row_values[..k]);
                    quantize_row(&row_values, scheme, codes, scales);
                }
            });
        }
    });
    Quantized { codes, scales, n, k }
}

/// Quantizes one row, already filled up to whole blocks.
fn quantize_row(values: &[f32], scheme: Scheme, codes: &mut [u8], scales: &mut [f32]) {
    let blocks = values.chunks_exact(scheme.block).zip(codes.chunks_exact_mut(scheme.block_bytes()));
    for ((block, codes), scale) in blocks.zip(scales) {
        let zero_point = (1u32 << (scheme.bits - 1)) as f32;
        let (low, high) = block.iter().fold((0f32, 0f32), |(low, high), x| (low.min(*x), high.max(*x)));
        let extreme = if high > -low { high } else { low };
        *scale = extreme / -zero_point;
        let inverse = if *scale == 0.0 { 0.0 } else { 1.0 / *scale };
        // Rounds half away from zero, as `f32::round`, which is a slow call on plain x86-64.
        let code = |x: &f32| {
            let scaled = (x * inverse + zero_point).clamp(0.0, 2.0 * zero_point - 1.0);
            let whole = scaled as i32;
            (whole + i32::from(scaled - whole as f32 >= 0.5)) as u8
        };
        match scheme.bits {
            4 => {
                for (byte, two) in codes.iter_mut().zip(block.chunks_exact(2)) {
                    *byte = code(&two[0]) | code(&two[1]) << 4;
                }
            }
            _ => {
                for (byte, x) in codes.iter_mut().zip(block) {
                    *byte = code(x);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantized(values: &[f32], scheme: Scheme) -> (Vec<u8>, Vec<f32>) {
        let blocks = scheme.blocks(values.len());
        let mut filled = values.to_vec();
        filled.resize(blocks * scheme.block, 0.0);
        let (mut codes, mut scales) = (vec![0; blocks * scheme.block_bytes()], vec![0.0; blocks]);
        quantize_row(&filled, scheme, &mut codes, &mut scales);
        (codes, scales)
    }

    #[test]
    fn int4_has_the_known_bytes() {
        // The extreme is −8, so the scale is 1 and codes are x + 8, the first of a pair in the low nibble.
        let mut values: Vec<f32> = (0..16).flat_map(|i| [i as f32 - 8.0, 7.0 - i as f32]).collect();
        let (codes, scales) = quantized(&values, Scheme { bits: 4, block: 32 });
        assert_eq!(scales, [1.0]);
        let expected: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
        assert_eq!(codes, expected);
        // With a positive extreme the scale is negative.
        values.iter_mut().for_each(|x| *x = -*x);
        let (codes, scales) = quantized(&values, Scheme { bits: 4, block: 32 });
        assert_eq!((codes, scales), (expected, vec![-1.0]));
    }

    #[test]
    fn halves_round_up_in_codes() {
        let values = [-8.0, 0.5, -0.5, 1.49];
        let (codes, _) = quantized(&values, Scheme { bits: 4, block: 32 });
        assert_eq!(codes[..2], [0x90, 0x98]);
    }

    #[test]
    fn int8_uses_all_codes_and_short_blocks_are_filled_with_the_zero_point() {
        let (codes, scales) = quantized(&[-64.0, 63.5, 0.25, 0.0], Scheme { bits: 8, block: 32 });
        assert_eq!(scales, [0.5]);
        assert_eq!(codes[..4], [0, 255, 129, 128]);
        assert!(codes[4..].iter().all(|code| *code == 128));
        let (codes, scales) = quantized(&[0.0; 40], Scheme { bits: 4, block: 32 });
        assert_eq!((codes, scales), (vec![0x88; 32], vec![0.0; 2]));
    }
}
