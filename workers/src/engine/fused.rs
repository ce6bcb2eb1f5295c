//! Two operators of our own, each in the place of several of ONNX Runtime's.
//!
//! A node costs some 10 µs however little it does, and a decode step has the same nodes in every layer. `QkNorm`
//! takes the place of Split, four Reshapes and two norms between the QKV product and the attention, and hands the
//! attention one packed tensor; `SwiGlu` that of Split, activation and product in the MLP. Both are memory-bound.

use forebay_kernels::{exp, with_wide_vectors};
use ort::{
    operator::{
        ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
    },
    value::TensorElementType::Float32,
};
use std::{ops::RangeInclusive, sync::Mutex};

/// The domain of both operators; its version is 1.
pub(super) const DOMAIN: &str = "forebay";

/// The operators for a model whose heads have this shape.
pub(super) fn domain(norm: QkNorm) -> ort::Result<OperatorDomain> {
    OperatorDomain::new(DOMAIN)?.add(norm)?.add(SwiGlu)
}

/// RMS norm of every query head and every key head of a packed `[batch, tokens, (heads + 2 · kv_heads) · head_dim]`;
/// values pass through. Inputs: packed QKV, query norm weights `[head_dim]`, key norm weights `[head_dim]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct QkNorm {
    /// Query heads.
    pub(super) heads: usize,
    /// Key heads, and as many value heads.
    pub(super) kv_heads: usize,
    /// Elements of a head.
    pub(super) head_dim: usize,
    /// Added to the mean square.
    pub(super) epsilon: f32,
}

/// silu(gate) · up of a packed `[…, gate | up]`.
#[derive(Clone, Copy, Debug)]
struct SwiGlu;

impl Operator for QkNorm {
    type Kernel<'attr> = QkNorm;

    fn name(&self) -> &str {
        "QkNorm"
    }

    fn versions(&self) -> RangeInclusive<u32> {
        1..=1
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [(); 3].map(|()| OperatorInput::required(Float32))
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(Float32)]
    }

    fn create_kernel<'attr>(&self, _: &KernelContext<'attr>) -> ort::Result<QkNorm> {
        Ok(*self)
    }
}

impl Kernel for QkNorm {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let (packed, query, key) = (input(context, 0)?, input(context, 1)?, input(context, 2)?);
        let (shape, packed) = packed.try_extract_tensor::<f32>()?;
        let (_, query) = query.try_extract_tensor::<f32>()?;
        let (_, key) = key.try_extract_tensor::<f32>()?;
        let mut output = context.output(0, shape.clone())?.ok_or_else(missing)?;
        let (_, output) = output.try_extract_tensor_mut::<f32>()?;
        let width = (self.heads + 2 * self.kv_heads) * self.head_dim;
        let norm = *self;
        for_rows(context, (packed, width), (output, width), |packed, output| {
            norm.row(packed, query, key, output);
        })
    }
}

impl QkNorm {
    fn row(&self, packed: &[f32], query: &[f32], key: &[f32], output: &mut [f32]) {
        let (normed, values) = packed.split_at((self.heads + self.kv_heads) * self.head_dim);
        let heads = normed.chunks_exact(self.head_dim).zip(output.chunks_exact_mut(self.head_dim));
        for (head, (x, out)) in heads.enumerate() {
            let weights = if head < self.heads { query } else { key };
            let scale = 1.0 / (square_sum(x) / self.head_dim as f32 + self.epsilon).sqrt();
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weights) {
                *out = x * scale * weight;
            }
        }
        output[normed.len()..].copy_from_slice(values);
    }
}

/// Σx², in lanes that vectorize. `x` has a multiple of 16 elements.
fn square_sum(x: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    for chunk in x.chunks_exact(16) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * x;
        }
    }
    lanes.iter().sum()
}

impl Operator for SwiGlu {
    type Kernel<'attr> = SwiGlu;

    fn name(&self) -> &str {
        "SwiGlu"
    }

    fn versions(&self) -> RangeInclusive<u32> {
        1..=1
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(Float32)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(Float32)]
    }

    fn create_kernel<'attr>(&self, _: &KernelContext<'attr>) -> ort::Result<SwiGlu> {
        Ok(SwiGlu)
    }
}

impl Kernel for SwiGlu {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let packed = input(context, 0)?;
        let (shape, packed) = packed.try_extract_tensor::<f32>()?;
        let mut shape = shape.to_vec();
        let width = shape.last_mut().map_or(0, |last| {
            *last /= 2;
            *last as usize
        });
        let mut output = context.output(0, shape)?.ok_or_else(missing)?;
        let (_, output) = output.try_extract_tensor_mut::<f32>()?;
        for_rows(context, (packed, 2 * width), (output, width), |packed, output| {
            let (gate, up) = packed.split_at(output.len());
            for ((out, gate), up) in output.iter_mut().zip(gate).zip(up) {
                *out = silu(*gate) * up;
            }
        })
    }
}

/// x · sigmoid(x).
fn silu(x: f32) -> f32 {
    // e^−|x| never overflows, and serves both sides.
    let small = exp(-x.abs());
    let numerator = if x >= 0.0 { 1.0 } else { small };
    x * numerator / (1.0 + small)
}

fn missing() -> ort::Error {
    ort::Error::new("an operator of the engine lacks an input or output")
}

fn input(context: &ComputeContext, index: usize) -> ort::Result<ort::value::ValueRef<'_>> {
    context.input(index)?.ok_or_else(missing)
}

/// Runs `row` over rows of input and output: on the calling thread if there are few, otherwise on the pool.
fn for_rows(
    context: &ComputeContext,
    (input, input_width): (&[f32], usize),
    (output, output_width): (&mut [f32], usize),
    row: impl Fn(&[f32], &mut [f32]) + Send + Sync,
) -> ort::Result<()> {
    /// Waking the pool costs a few microseconds, which is what this many elements take.
    const SERIAL: usize = 32 << 10;
    let run = |input: &[f32], output: &mut [f32]| {
        let rows = input.chunks_exact(input_width).zip(output.chunks_exact_mut(output_width));
        with_wide_vectors(|| rows.for_each(|(input, output)| row(input, output)));
    };
    if input.len() <= SERIAL {
        run(input, output);
        return Ok(());
    }
    let rows = (SERIAL / 4).div_ceil(input_width);
    let parts = input.chunks(rows * input_width).zip(output.chunks_mut(rows * output_width));
    // Each part is locked once, by the one thread that runs it: what is uncontended costs nothing that shows.
    let parts: Vec<_> = parts.map(Mutex::new).collect();
    context.par_for(parts.len(), 0, |part| {
        if let Ok(mut part) = parts[part].lock() {
            let (input, output) = &mut *part;
            run(input, output);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silu_is_close_to_exact() {
        for i in -3000..3000 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x) / (1.0 + (-f64::from(x)).exp());
            assert!((f64::from(silu(x)) - exact).abs() <= exact.abs() * 1e-6 + 1e-12, "silu({x})");
        }
        assert!(silu(f32::NAN).is_nan());
    }

    #[test]
    fn heads_are_normalized_and_values_pass() {
        let norm = QkNorm { heads: 2, kv_heads: 1, head_dim: 16, epsilon: 1e-6 };
        let packed: Vec<f32> = (0..64).map(|i| (i % 7) as f32 - 3.0).collect();
        let mut output = vec![0.0; 64];
        norm.row(&packed, &[2.0; 16], &[3.0; 16], &mut output);
        for (head, expected) in [(0, 2.0f32), (1, 2.0), (2, 3.0)] {
            let rms = (square_sum(&output[head * 16..][..16]) / 16.0).sqrt();
            assert!((rms - expected).abs() < 1e-4, "head {head} has a root mean square of {rms}");
        }
        assert_eq!(output[48..], packed[48..]);
    }
}
