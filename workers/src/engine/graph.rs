//! Builds the ONNX graph of a Qwen3 model in memory, over the checkpoint's weights.
//!
//! Inputs: `input_ids` `[batch, tokens]` i64; `seqlens_k` `[batch]` i32, tokens in each slot after the step less
//! one; `total_len` `[1]` i32, the largest of them plus one; `last` `[rows, 2]` i64, (batch, token) of the rows
//! whose logits are wanted; `past.<layer>.<k|v>` `[batch, kv_heads, positions, head_dim]`.
//! Outputs: `logits` `[rows, vocab]` fp32; `present.<layer>.<k|v>`, to be bound to the memory of the past.
//!
//! A layer is nine nodes: norm → QKV → `fused` head norms → attention (RoPE inside) → output projection, norm →
//! gate and up → `fused` SwiGLU → down. The norms add the residual. In the last layer only the wanted rows go
//! past the attention.

use super::{
    binding::{self, MappedType},
    checkpoint::{Checkpoint, Dtype, ModelConfig, WeightTensor},
    fused::{self, QkNorm},
    quantize::{Scheme, quantize},
};
use ort::{
    editor::{Graph, Model, Node, ONNX_DOMAIN, Opset},
    operator::Attribute,
    session::builder::SessionBuilder,
    value::{Outlet, Shape, SymbolicDimensions, TensorElementType, ValueType},
};
use std::fmt;

/// How weights are held and multiplied. Activations and KV are fp32.
///
/// A decoded batch equals each of its rows alone bit for bit in fp32 and in blocks of 16 and 32; in longer blocks one
/// row and several are summed in unlike orders (logits differ by some 1e-6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 4 bits, with one scale for `block` elements: 32 is more accurate, 128 faster.
    Int4 {
        /// 16, 32, 64, 128 or 256.
        block: usize,
    },
    /// 8 bits.
    Int8 {
        /// 16, 32, 64, 128 or 256.
        block: usize,
    },
    /// As in the checkpoint, in fp32.
    F32,
}

impl Default for Precision {
    fn default() -> Self {
        Precision::Int4 { block: 32 }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Precision::Int4 { block } => write!(f, "int4 in blocks of {block}"),
            Precision::Int8 { block } => write!(f, "int8 in blocks of {block}"),
            Precision::F32 => f.write_str("fp32"),
        }
    }
}

impl Precision {
    fn scheme(self) -> Option<Scheme> {
        match self {
            Precision::Int4 { block } => Some(Scheme { bits: 4, block }),
            Precision::Int8 { block } => Some(Scheme { bits: 8, block }),
            Precision::F32 => None,
        }
    }
}

const MICROSOFT: &str = "com.microsoft";

/// An ONNX model without a node, as protobuf: IR version 10, a graph named "f", and the opsets of [`build`].
pub(super) const EMPTY_MODEL: &[u8] =
    b"\x08\x0a\x3a\x03\x12\x01f\x42\x02\x10\x16\x42\x11\x0a\x0dcom.microsoft\x10\x01\x42\x0b\x0a\x07forebay\x10\x01";

/// Gives a session the operators that the graph of this model needs.
pub(super) fn with_operators(options: SessionBuilder, config: &ModelConfig) -> ort::Result<SessionBuilder> {
    let ModelConfig { heads, kv_heads, head_dim, norm_epsilon: epsilon, .. } = *config;
    Ok(options.with_operators(fused::domain(QkNorm { heads, kv_heads, head_dim, epsilon })?)?)
}

/// The model of a checkpoint, for slots of `positions` positions. Quantizes on `threads` threads.
pub(super) fn build(
    checkpoint: &Checkpoint,
    precision: Precision,
    positions: usize,
    threads: usize,
) -> ort::Result<Model> {
    let mut builder = Builder { graph: Graph::new()?, checkpoint, precision, threads, nodes: 0 };
    builder.declare()?;
    builder.rope_tables(positions)?;
    builder.embedding()?;
    for layer in 0..checkpoint.config().layers {
        builder.layer(layer)?;
    }
    builder.head()?;
    let opsets = [Opset::new(ONNX_DOMAIN, 22)?, Opset::new(MICROSOFT, 1)?, Opset::new(fused::DOMAIN, 1)?];
    let mut model = Model::new(opsets)?;
    model.set_graph(builder.graph)?;
    Ok(model)
}

struct Builder<'a> {
    graph: Graph,
    checkpoint: &'a Checkpoint,
    precision: Precision,
    threads: usize,
    nodes: usize,
}

impl Builder<'_> {
    fn declare(&mut self) -> ort::Result<()> {
        use TensorElementType::{Float32, Int32, Int64};
        let config = self.checkpoint.config();
        let kv_shape = [-1, config.kv_heads as i64, -1, config.head_dim as i64];
        let kv = |what: &str| -> Vec<Outlet> {
            let names =
                (0..config.layers).flat_map(|layer| ["k", "v"].map(|kv| format!("{what}.{layer}.{kv}")));
            names.map(|name| outlet(&name, Float32, &kv_shape)).collect()
        };
        let mut inputs = vec![
            outlet("input_ids", Int64, &[-1, -1]),
            outlet("seqlens_k", Int32, &[-1]),
            outlet("total_len", Int32, &[1]),
            outlet("last", Int64, &[-1, 2]),
        ];
        inputs.extend(kv("past"));
        self.graph.set_inputs(inputs)?;
        let mut outputs = vec![outlet("logits", Float32, &[-1, config.vocab as i64])];
        outputs.extend(kv("present"));
        self.graph.set_outputs(outputs)
    }

    /// Cosines and sines `[positions, head_dim / 2]`, computed in fp32 as transformers does:
    /// angle = position · theta^(−2i / head_dim).
    fn rope_tables(&mut self, positions: usize) -> ort::Result<()> {
        let config = self.checkpoint.config();
        let half = config.head_dim / 2;
        let frequency =
            |i: usize| 1.0 / (config.rope_theta as f32).powf((2 * i) as f32 / config.head_dim as f32);
        let frequencies: Vec<f32> = (0..half).map(frequency).collect();
        let angles = |of: fn(f32) -> f32| -> Vec<f32> {
            (0..positions).flat_map(|p| frequencies.iter().map(move |f| of(p as f32 * f))).collect()
        };
        let shape = [positions as i64, half as i64];
        binding::add_owned(&mut self.graph, "rope.cos", angles(f32::cos), &shape)?;
        binding::add_owned(&mut self.graph, "rope.sin", angles(f32::sin), &shape)
    }

    /// Looks tokens up in the checkpoint's own table, mapped and not quantized: of a large vocabulary a server
    /// touches few rows, and pages of a file can be dropped.
    fn embedding(&mut self) -> ort::Result<()> {
        let table = self.checkpoint.tensor("model.embed_tokens.weight");
        self.mapped("embed", table)?;
        if table.dtype() == Dtype::F32 {
            return self.node(ONNX_DOMAIN, "Gather", &["embed", "input_ids"], &["x"], vec![]);
        }
        self.node(ONNX_DOMAIN, "Gather", &["embed", "input_ids"], &["x.stored"], vec![])?;
        self.node(ONNX_DOMAIN, "Cast", &["x.stored"], &["x"], vec![int("to", 1)?])
    }

    fn layer(&mut self, layer: usize) -> ort::Result<()> {
        let config = self.checkpoint.config();
        let is_last = layer + 1 == config.layers;
        let at = |what: &str| format!("{layer}.{what}");
        let weights = |what: &str| format!("model.layers.{layer}.{what}.weight");

        let residual = if layer == 0 {
            self.norm(&weights("input_layernorm"), "x", &at("normed"))?;
            "x".to_owned()
        } else {
            let before = layer - 1;
            let (residual, update) = (format!("{before}.residual"), format!("{before}.mlp"));
            self.add_norm(&weights("input_layernorm"), [&residual, &update], [&at("x"), &at("normed")])?;
            at("x")
        };
        let qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].map(weights);
        self.linear(&at("normed"), &qkv, &at("qkv"))?;
        self.attention(layer)?;

        let (mut attended, mut residual) = (at("attended"), residual);
        if is_last {
            for name in [&mut attended, &mut residual] {
                let wanted = format!("{name}.wanted");
                self.node(ONNX_DOMAIN, "GatherND", &[name, "last"], &[&wanted], vec![])?;
                *name = wanted;
            }
        }
        self.linear(&attended, &[weights("self_attn.o_proj")], &at("projected"))?;
        let norm = weights("post_attention_layernorm");
        self.add_norm(&norm, [&residual, &at("projected")], [&at("residual"), &at("normed2")])?;
        self.linear(&at("normed2"), &["mlp.gate_proj", "mlp.up_proj"].map(weights), &at("gate_up"))?;
        self.node(fused::DOMAIN, "SwiGlu", &[&at("gate_up")], &[&at("activated")], vec![])?;
        self.linear(&at("activated"), &[weights("mlp.down_proj")], &at("mlp"))
    }

    fn attention(&mut self, layer: usize) -> ort::Result<()> {
        let config = self.checkpoint.config();
        let at = |what: &str| format!("{layer}.{what}");
        let weights = |what: &str| format!("model.layers.{layer}.self_attn.{what}.weight");
        let (q_norm, k_norm) = (self.vector(&weights("q_norm"))?, self.vector(&weights("k_norm"))?);
        self.node(fused::DOMAIN, "QkNorm", &[&at("qkv"), &q_norm, &k_norm], &[&at("qkv_normed")], vec![])?;
        let [past_k, past_v] = ["k", "v"].map(|kv| format!("past.{layer}.{kv}"));
        let [present_k, present_v] = ["k", "v"].map(|kv| format!("present.{layer}.{kv}"));
        // An empty second and third input say that the first is packed.
        let inputs =
            [&at("qkv_normed"), "", "", &past_k, &past_v, "seqlens_k", "total_len", "rope.cos", "rope.sin"];
        let attributes = vec![
            int("num_heads", config.heads)?,
            int("kv_num_heads", config.kv_heads)?,
            int("do_rotary", 1)?,
            Attribute::new("scale", 1.0 / (config.head_dim as f32).sqrt())?,
        ];
        self.node(
            MICROSOFT,
            "GroupQueryAttention",
            &inputs,
            &[&at("attended"), &present_k, &present_v],
            attributes,
        )
    }

    fn head(&mut self) -> ort::Result<()> {
        let last = self.checkpoint.config().layers - 1;
        let (residual, update) = (format!("{last}.residual"), format!("{last}.mlp"));
        self.add_norm("model.norm.weight", [&residual, &update], ["", "final"])?;
        let tied = self.checkpoint.config().tied;
        let weight = if tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
        self.linear("final", &[weight.to_owned()], "logits")
    }

    /// y = x · Wᵀ, for weights `[out, in]` stacked along out.
    fn linear(&mut self, x: &str, weights: &[String], y: &str) -> ort::Result<()> {
        let matrices: Vec<&WeightTensor> = weights.iter().map(|name| self.checkpoint.tensor(name)).collect();
        let k = matrices[0].columns();
        let n: usize = matrices.iter().map(|matrix| matrix.rows()).sum();
        let name = format!("{y}.weight");
        let Some(scheme) = self.precision.scheme() else {
            match matrices[..] {
                [matrix] if matrix.dtype() == Dtype::F32 => self.mapped(&name, matrix)?,
                _ => {
                    let stacked = matrices.iter().flat_map(|matrix| matrix.to_f32()).collect();
                    matrices.iter().for_each(|matrix| matrix.release());
                    binding::add_owned::<f32>(&mut self.graph, &name, stacked, &[n as i64, k as i64])?;
                }
            }
            return self.node(MICROSOFT, "FusedMatMul", &[x, &name], &[y], vec![int("transB", 1)?]);
        };
        let quantized = quantize(&matrices, scheme, self.threads);
        matrices.iter().for_each(|matrix| matrix.release());
        let (blocks, scales) = (scheme.blocks(k), format!("{name}.scales"));
        let shape = [n, blocks, scheme.block_bytes()].map(|size| size as i64);
        binding::add_owned(&mut self.graph, &name, quantized.codes, &shape)?;
        binding::add_owned(&mut self.graph, &scales, quantized.scales, &shape[..2])?;
        let attributes = vec![
            int("K", k)?,
            int("N", n)?,
            int("bits", scheme.bits)?,
            int("block_size", scheme.block)?,
            // 4: activations are rounded to int8 for the product, which is what makes it fast.
            int("accuracy_level", 4)?,
        ];
        self.node(MICROSOFT, "MatMulNBits", &[x, &name, &scales], &[y], attributes)
    }

    /// RMS norm.
    fn norm(&mut self, weights: &str, x: &str, y: &str) -> ort::Result<()> {
        let weights = self.vector(weights)?;
        let attributes = vec![self.epsilon()?, int("axis", -1i64)?, int("stash_type", 1)?];
        self.node(ONNX_DOMAIN, "SimplifiedLayerNormalization", &[x, &weights], &[y], attributes)
    }

    /// RMS norm of a sum; outputs the sum (unless unnamed) and the norm.
    fn add_norm(&mut self, weights: &str, terms: [&str; 2], [sum, y]: [&str; 2]) -> ort::Result<()> {
        let weights = self.vector(weights)?;
        let outputs = [y, "", "", sum];
        let outputs = if sum.is_empty() { &outputs[..1] } else { &outputs[..] };
        let attributes = vec![self.epsilon()?];
        let inputs = [terms[0], terms[1], &weights];
        self.node(MICROSOFT, "SkipSimplifiedLayerNormalization", &inputs, outputs, attributes)
    }

    fn epsilon(&self) -> ort::Result<Attribute> {
        Attribute::new("epsilon", self.checkpoint.config().norm_epsilon)
    }

    /// A vector of the checkpoint as an fp32 constant; returns its name.
    fn vector(&mut self, name: &str) -> ort::Result<String> {
        let values = self.checkpoint.tensor(name).to_f32();
        let shape = [values.len() as i64];
        binding::add_owned(&mut self.graph, name, values, &shape)?;
        Ok(name.to_owned())
    }

    fn mapped(&mut self, name: &str, tensor: &WeightTensor) -> ort::Result<()> {
        let element = match tensor.dtype() {
            Dtype::Bf16 => MappedType::Bf16,
            Dtype::F16 => MappedType::F16,
            Dtype::F32 => MappedType::F32,
        };
        let shape: Vec<i64> = tensor.shape().iter().map(|size| *size as i64).collect();
        binding::add_mapped(&mut self.graph, name, tensor.file(), tensor.range(), element, &shape)
    }

    fn node(
        &mut self,
        domain: &str,
        operator: &str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: Vec<Attribute>,
    ) -> ort::Result<()> {
        self.nodes += 1;
        let name = format!("{}.{operator}", self.nodes);
        self.graph.add_node(Node::new(operator, domain, name, inputs, outputs, attributes)?)
    }
}

fn int<T: TryInto<i64>>(name: &str, value: T) -> ort::Result<Attribute> {
    let value = value.try_into().unwrap_or_else(|_| panic!("attribute {name} exceeds 63 bits"));
    Attribute::new(name, value)
}

/// A graph input or output; −1 is a dimension known at run time.
fn outlet(name: &str, element: TensorElementType, shape: &[i64]) -> Outlet {
    let symbol =
        |(axis, size): (usize, &i64)| if *size < 0 { format!("{name}.{axis}") } else { String::new() };
    let dimension_symbols = SymbolicDimensions::new(shape.iter().enumerate().map(symbol));
    let ty = ValueType::Tensor { ty: element, shape: Shape::new(shape.iter().copied()), dimension_symbols };
    Outlet::new(name, ty)
}
