//! Builds the ONNX graph of a Qwen3 model in memory, over the checkpoint's weights.
//!
//! Inputs: `input_ids` `[batch, tokens]` i64; `seqlens_k` `[batch]` i32, tokens in each slot after the step less
//! one; `total_len` `[1]` i32, the largest of them plus one, or any larger number of positions; `last` `[rows]` i64, which of
//! the batch's tokens, counted through, have their logits wanted; `past.<layer>.<k|v>`
//! `[batch, kv_heads, positions, head_dim]`.
//! Outputs: `logits` `[rows, vocab]` fp32; `present.<layer>.<k|v>`, to be bound to the memory of the past.
//!
//! A layer on the CPU is nine nodes: norm → QKV → `fused` head norms → attention (RoPE inside) → output projection, norm →
//! gate and up → `fused` SwiGLU → down. The norms add the residual. In the last layer only the wanted rows go
//! past the attention. A GPU has no operators of ours: `Form` says what takes their place.

use super::{
    binding::{self, MappedType},
    checkpoint::{
        Checkpoint, Dtype, Elements, Factors, Matrix, ModelConfig, WeightTensor, stack, tensors_of,
    },
    fused::{self, QkNorm},
    kv_type::Kv,
    quantize::{Scheme, quantize},
};
use forebay_schemas::kv::KvDtype;
use ort::{
    editor::{Graph, Model, Node, ONNX_DOMAIN, Opset},
    operator::Attribute,
    session::builder::SessionBuilder,
    value::{Outlet, Shape, SymbolicDimensions, TensorElementType, ValueType},
};
use std::fmt;

/// How weights are held and multiplied.
///
/// On a CPU, a decoded batch equals each of its rows alone bit for bit in fp32 and in blocks of 16 and 32; in longer blocks one
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
    /// As in the checkpoint, in fp16: on a GPU.
    F16,
    /// As in the checkpoint, in bf16: on a GPU.
    Bf16,
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
            Precision::F16 => f.write_str("fp16"),
            Precision::Bf16 => f.write_str("bf16"),
        }
    }
}

impl Precision {
    fn scheme(self) -> Option<Scheme> {
        match self {
            Precision::Int4 { block } => Some(Scheme { bits: 4, block }),
            Precision::Int8 { block } => Some(Scheme { bits: 8, block }),
            Precision::F32 | Precision::F16 | Precision::Bf16 => None,
        }
    }
}

/// What a graph is made for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form<'a> {
    /// Weights.
    pub(super) precision: Precision,
    /// What is computed with.
    pub(super) activations: Dtype,
    /// Keys and values.
    pub(super) kv: Kv<'a>,
    /// Where the query and key heads are normalized, and whose operators there are.
    pub(super) norms: Norms,
}

/// Where the query and key heads are normalized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Norms {
    /// By our operator, on a CPU; SwiGLU is ours too.
    Ours,
    /// Within the attention, on a GPU.
    Attention,
    /// By nodes of their own: attention over quantized KV is faster so.
    Nodes,
}

impl<'a> Form<'a> {
    /// For a CPU.
    pub(super) fn cpu(precision: Precision, kv: Kv<'a>) -> Form<'a> {
        Form { precision, activations: Dtype::F32, kv, norms: Norms::Ours }
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
    form: Form<'_>,
    positions: usize,
    threads: usize,
) -> ort::Result<Model> {
    let mut builder = Builder { graph: Graph::new()?, checkpoint, form, threads, nodes: 0 };
    builder.declare()?;
    if let Some(scale) = form.kv.scale() {
        binding::add_owned(&mut builder.graph, "kv.scale", vec![scale], &[1])?;
    }
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

/// Bytes that a checkpoint's weights take in memory.
pub(super) fn weight_bytes(checkpoint: &Checkpoint, precision: Precision) -> u64 {
    let (table, stored) = table(checkpoint);
    let as_stored = match precision {
        Precision::F16 => Dtype::F16,
        Precision::F32 => Dtype::F32,
        _ => Dtype::Bf16,
    } == checkpoint.tensor("model.embed_tokens.weight").dtype();
    let shared = checkpoint.config().tied && precision.scheme().is_none() && as_stored;
    // A tied head that is quantized, or of another type, has a copy of the table.
    step_bytes(checkpoint, precision) + if shared { 0 } else { (table * stored) as u64 }
}

/// Bytes of weights that every step reads: of a table that tokens are looked up in, next to nothing.
pub(super) fn step_bytes(checkpoint: &Checkpoint, precision: Precision) -> u64 {
    let elements = |shape: &Vec<usize>| shape.iter().product::<usize>();
    let tensors = tensors_of(checkpoint.config());
    let all: usize = tensors.iter().map(|(_, shape)| elements(shape)).sum();
    // A tied table is the head's matrix.
    let read = if checkpoint.config().tied { all } else { all - table(checkpoint).0 };
    let bytes = match (precision.scheme(), precision) {
        // Codes, and a scale of two bytes for each block.
        (Some(scheme), _) => read * scheme.bits / 8 + read / scheme.block * 2,
        (None, Precision::F32) => 4 * read,
        (None, _) => 2 * read,
    };
    bytes as u64
}

/// Elements of the table that tokens are looked up in, and bytes of each.
fn table(checkpoint: &Checkpoint) -> (usize, usize) {
    let table = checkpoint.tensor("model.embed_tokens.weight");
    (table.rows() * table.columns(), table.dtype().bytes())
}

struct Builder<'a> {
    graph: Graph,
    checkpoint: &'a Checkpoint,
    form: Form<'a>,
    threads: usize,
    nodes: usize,
}

impl<'a> Builder<'a> {
    fn declare(&mut self) -> ort::Result<()> {
        use TensorElementType::{Float32, Int32, Int64};
        let config = self.checkpoint.config();
        let kv_shape = [-1, config.kv_heads as i64, -1, config.head_dim as i64];
        let element = match self.form.kv.dtype() {
            KvDtype::F32 => Float32,
            KvDtype::F16 => TensorElementType::Float16,
            KvDtype::Bf16 => TensorElementType::Bfloat16,
            KvDtype::F8 => TensorElementType::Float8E4M3FN,
            KvDtype::Int8 => TensorElementType::Int8,
        };
        let kv = |what: &str| -> Vec<Outlet> {
            let names =
                (0..config.layers).flat_map(|layer| ["k", "v"].map(|kv| format!("{what}.{layer}.{kv}")));
            names.map(|name| outlet(&name, element, &kv_shape)).collect()
        };
        let mut inputs = vec![
            outlet("input_ids", Int64, &[-1, -1]),
            outlet("seqlens_k", Int32, &[-1]),
            outlet("total_len", Int32, &[1]),
            outlet("last", Int64, &[-1]),
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
        self.constant("rope.cos", angles(f32::cos), &shape)?;
        self.constant("rope.sin", angles(f32::sin), &shape)
    }

    /// Looks tokens up in the checkpoint's own table, mapped and not quantized: of a large vocabulary a server
    /// touches few rows, and pages of a file can be dropped.
    fn embedding(&mut self) -> ort::Result<()> {
        let table = self.checkpoint.tensor("model.embed_tokens.weight");
        self.mapped("embed", table)?;
        if table.dtype() == self.form.activations {
            return self.node(ONNX_DOMAIN, "Gather", &["embed", "input_ids"], &["x"], vec![]);
        }
        self.node(ONNX_DOMAIN, "Gather", &["embed", "input_ids"], &["x.stored"], vec![])?;
        self.cast("x.stored", self.form.activations, "x")
    }

    fn cast(&mut self, x: &str, to: Dtype, y: &str) -> ort::Result<()> {
        // The numbers of ONNX's TensorProto.DataType.
        let number = match to {
            Dtype::F32 => 1,
            Dtype::F16 => 10,
            Dtype::Bf16 => 16,
        };
        self.node(ONNX_DOMAIN, "Cast", &[x], &[y], vec![int("to", number)?])
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
        let [q, k, mut v, mut o] = ["q_proj", "k_proj", "v_proj", "o_proj"]
            .map(|what| self.matrix(&weights(&format!("self_attn.{what}"))));
        if let Some(factors) = self.form.kv.factors(layer) {
            v.factors = Factors::Rows(&factors.value);
            o.factors = Factors::Columns(&factors.output);
        }
        self.linear(&at("normed"), &[q, k, v], &at("qkv"))?;
        self.attention(layer)?;

        let (mut attended, mut residual) = (at("attended"), residual);
        if is_last {
            for name in [&mut attended, &mut residual] {
                *name = self.wanted(name)?;
            }
        }
        self.linear(&attended, &[o], &at("projected"))?;
        let norm = weights("post_attention_layernorm");
        self.add_norm(&norm, [&residual, &at("projected")], [&at("residual"), &at("normed2")])?;
        let [gate, up, down] =
            ["gate_proj", "up_proj", "down_proj"].map(|what| self.matrix(&weights(&format!("mlp.{what}"))));
        self.linear(&at("normed2"), &[gate, up], &at("gate_up"))?;
        self.swiglu(&at("gate_up"), &at("activated"))?;
        self.linear(&at("activated"), &[down], &at("mlp"))
    }

    /// A matrix of the checkpoint.
    fn matrix(&self, name: &str) -> Matrix<'a> {
        Matrix::plain(self.checkpoint.tensor(name))
    }

    /// The rows of `[batch, tokens, width]` whose logits are wanted: `[rows, width]`.
    fn wanted(&mut self, x: &str) -> ort::Result<String> {
        let (rows, wanted) = (format!("{x}.rows"), format!("{x}.wanted"));
        let width = if x.ends_with("attended") {
            self.checkpoint.config().q_width()
        } else {
            self.checkpoint.config().hidden
        };
        self.reshape(x, &[-1, width as i64], &rows)?;
        self.node(ONNX_DOMAIN, "Gather", &[&rows, "last"], &[&wanted], vec![])?;
        Ok(wanted)
    }

    /// silu(gate) · up.
    fn swiglu(&mut self, gate_up: &str, y: &str) -> ort::Result<()> {
        if self.form.norms == Norms::Ours {
            return self.node(fused::DOMAIN, "SwiGlu", &[gate_up], &[y], vec![]);
        }
        let [gate, up, activated] = ["gate", "up", "gate.silu"].map(|what| format!("{gate_up}.{what}"));
        let halves = vec![int("axis", -1)?, int("num_outputs", 2)?];
        self.node(ONNX_DOMAIN, "Split", &[gate_up], &[&gate, &up], halves)?;
        // x · sigmoid(alpha · x).
        let alpha = vec![Attribute::new("alpha", 1.0f32)?];
        self.node(MICROSOFT, "QuickGelu", &[&gate], &[&activated], alpha)?;
        self.node(ONNX_DOMAIN, "Mul", &[&activated, &up], &[y], vec![])
    }

    fn attention(&mut self, layer: usize) -> ort::Result<()> {
        let config = self.checkpoint.config();
        let at = |what: &str| format!("{layer}.{what}");
        let weights = |what: &str| format!("model.layers.{layer}.self_attn.{what}.weight");
        let factors = self.form.kv.factors(layer);
        let q_norm = self.scaled_vector(&weights("q_norm"), factors.map(|factors| &factors.query[..]))?;
        let k_norm = self.scaled_vector(&weights("k_norm"), factors.map(|factors| &factors.key[..]))?;
        let mut attributes = vec![
            int("num_heads", config.heads)?,
            int("kv_num_heads", config.kv_heads)?,
            int("do_rotary", 1)?,
            Attribute::new("scale", 1.0 / (config.head_dim as f32).sqrt())?,
        ];
        // An empty second and third input say that the first is packed.
        let packed = |name: String| [name, String::new(), String::new()];
        let qkv = match self.form.norms {
            Norms::Ours => {
                self.node(
                    fused::DOMAIN,
                    "QkNorm",
                    &[&at("qkv"), &q_norm, &k_norm],
                    &[&at("qkv_normed")],
                    vec![],
                )?;
                packed(at("qkv_normed"))
            }
            Norms::Attention => packed(at("qkv")),
            Norms::Nodes => self.split_and_normalize(layer, [&q_norm, &k_norm])?,
        };
        let [past_k, past_v] = ["k", "v"].map(|kv| format!("past.{layer}.{kv}"));
        let [present_k, present_v] = ["k", "v"].map(|kv| format!("present.{layer}.{kv}"));
        let mut inputs: Vec<&str> = qkv.iter().map(String::as_str).collect();
        inputs.extend([&past_k[..], &past_v, "seqlens_k", "total_len", "rope.cos", "rope.sin"]);
        // Positions, bias and sink: none.
        inputs.extend(["", "", ""]);
        if self.form.kv.scale().is_some() {
            // One tensor for both, and one number: what the fastest kernels on a GPU ask for.
            inputs.extend(["kv.scale", "kv.scale"]);
            attributes.push(int("kv_cache_bit_width", 8)?);
            attributes.push(Attribute::new("k_quant_type", "PER_TENSOR".to_owned())?);
            attributes.push(Attribute::new("v_quant_type", "PER_TENSOR".to_owned())?);
        }
        if self.form.norms == Norms::Attention {
            inputs.extend(["", "", &q_norm, &k_norm]);
            attributes.push(Attribute::new("qk_norm_epsilon", config.norm_epsilon)?);
        }
        while inputs.last() == Some(&"") {
            inputs.pop();
        }
        let outputs = [&at("attended")[..], &present_k, &present_v];
        self.node(MICROSOFT, "GroupQueryAttention", &inputs, &outputs, attributes)
    }

    /// Queries and keys, each head normalized, and values: three tensors `[batch, tokens, heads · head_dim]`.
    fn split_and_normalize(&mut self, layer: usize, norms: [&str; 2]) -> ort::Result<[String; 3]> {
        let config = self.checkpoint.config();
        let at = |what: &str| format!("{layer}.{what}");
        let widths = [config.q_width(), config.kv_width(), config.kv_width()];
        let sizes = "qkv.widths".to_owned();
        if layer == 0 {
            let widths = widths.map(|width| width as i64).to_vec();
            binding::add_owned(&mut self.graph, &sizes, widths, &[3])?;
        }
        let parts = ["q", "k", "v"].map(at);
        let outputs = parts.each_ref().map(|name| &name[..]);
        self.node(ONNX_DOMAIN, "Split", &[&at("qkv"), &sizes], &outputs, vec![int("axis", -1)?])?;
        let [q, k, v] = &parts;
        let mut normalized = Vec::new();
        for ((part, width), norm) in [q, k].into_iter().zip(widths).zip(norms) {
            let [heads, normed, whole] = ["heads", "normed", "whole"].map(|what| format!("{part}.{what}"));
            let count = (width / config.head_dim) as i64;
            self.reshape(part, &[0, 0, count, config.head_dim as i64], &heads)?;
            let attributes = vec![self.epsilon()?, int("axis", -1i64)?, int("stash_type", 1)?];
            self.node(ONNX_DOMAIN, "SimplifiedLayerNormalization", &[&heads, norm], &[&normed], attributes)?;
            self.reshape(&normed, &[0, 0, width as i64], &whole)?;
            normalized.push(whole);
        }
        let [q, k] = normalized.try_into().expect("two of them");
        Ok([q, k, v.clone()])
    }

    /// A tensor of other dimensions; 0 keeps one, −1 is what is left.
    fn reshape(&mut self, x: &str, shape: &[i64], y: &str) -> ort::Result<()> {
        let name = format!("{y}.shape");
        binding::add_owned(&mut self.graph, &name, shape.to_vec(), &[shape.len() as i64])?;
        self.node(ONNX_DOMAIN, "Reshape", &[x, &name], &[y], vec![])
    }

    fn head(&mut self) -> ort::Result<()> {
        let last = self.checkpoint.config().layers - 1;
        let (residual, update) = (format!("{last}.residual"), format!("{last}.mlp"));
        self.add_norm("model.norm.weight", [&residual, &update], ["", "final"])?;
        let tied = self.checkpoint.config().tied;
        let weight = self.matrix(if tied { "model.embed_tokens.weight" } else { "lm_head.weight" });
        if self.form.activations == Dtype::F32 {
            return self.linear("final", &[weight], "logits");
        }
        self.linear("final", &[weight], "logits.computed")?;
        self.cast("logits.computed", Dtype::F32, "logits")
    }

    /// y = x · Wᵀ, for weights `[out, in]` stacked along out.
    fn linear(&mut self, x: &str, matrices: &[Matrix<'_>], y: &str) -> ort::Result<()> {
        let k = matrices[0].tensor.columns();
        let n: usize = matrices.iter().map(|matrix| matrix.tensor.rows()).sum();
        let release = || matrices.iter().for_each(|matrix| matrix.tensor.release());
        let name = format!("{y}.weight");
        let Some(scheme) = self.form.precision.scheme() else {
            let stored = |tensor: &WeightTensor| tensor.dtype() == self.form.activations;
            let table = self.checkpoint.tensor("model.embed_tokens.weight");
            let weight = match *matrices {
                // A tied head multiplies with the table that tokens are looked up in.
                [Matrix { tensor, .. }] if stored(tensor) && std::ptr::eq(tensor, table) => "embed",
                [Matrix { tensor, factors: Factors::One }] if stored(tensor) => {
                    self.mapped(&name, tensor)?;
                    &name
                }
                _ => {
                    let stacked = stack(matrices, self.form.activations, self.threads);
                    release();
                    self.add(&name, stacked, &[n as i64, k as i64])?;
                    &name
                }
            };
            return self.node(MICROSOFT, "FusedMatMul", &[x, weight], &[y], vec![int("transB", 1)?]);
        };
        let quantized = quantize(matrices, scheme, self.threads);
        release();
        let (blocks, scales) = (scheme.blocks(k), format!("{name}.scales"));
        let shape = [n, blocks, scheme.block_bytes()].map(|size| size as i64);
        binding::add_owned(&mut self.graph, &name, quantized.codes, &shape)?;
        self.constant(&scales, quantized.scales, &shape[..2])?;
        let mut attributes =
            vec![int("K", k)?, int("N", n)?, int("bits", scheme.bits)?, int("block_size", scheme.block)?];
        if self.form.norms == Norms::Ours {
            // On a CPU. 4: activations are rounded to int8 for the product, which is what makes it fast.
            attributes.push(int("accuracy_level", 4)?);
        }
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

    /// A vector of the checkpoint as a constant; returns its name.
    fn vector(&mut self, name: &str) -> ort::Result<String> {
        self.scaled_vector(name, None)
    }

    /// The same, multiplied by a number for each element.
    fn scaled_vector(&mut self, name: &str, factors: Option<&[f32]>) -> ort::Result<String> {
        let mut values = self.checkpoint.tensor(name).to_f32();
        if let Some(factors) = factors {
            values.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
        }
        let shape = [values.len() as i64];
        self.constant(name, values, &shape)?;
        Ok(name.to_owned())
    }

    /// A constant in the type of the activations.
    fn constant(&mut self, name: &str, values: Vec<f32>, shape: &[i64]) -> ort::Result<()> {
        self.add(name, Elements::from_f32(values, self.form.activations), shape)
    }

    fn add(&mut self, name: &str, elements: Elements, shape: &[i64]) -> ort::Result<()> {
        match elements {
            Elements::F32(data) => binding::add_owned(&mut self.graph, name, data, shape),
            Elements::F16(data) => binding::add_owned(&mut self.graph, name, data, shape),
            Elements::Bf16(data) => binding::add_owned(&mut self.graph, name, data, shape),
        }
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
