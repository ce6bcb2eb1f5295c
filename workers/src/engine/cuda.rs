//! The engine on a GPU: the same graph, run by ONNX Runtime's provider for CUDA over KV in the GPU's memory.
//!
//! A decode step is one captured CUDA graph for each of a few batch sizes, then a kernel that draws; only token ids cross the
//! bus. Prompts run chunk by chunk without a graph. KV lies in an [`Arena`]; the region that other workers read mirrors it, slot
//! for slot, and `CudaKv` copies between the two on streams of their own.

mod mover;
pub mod peak;

pub use super::binding::Provider;
use super::{
    Draw, Engine, EngineCard, EngineError, KvMover, KvType, RawLogprobs, Row, Sampled,
    binding::{CudaTensor, CudaTensorError, KvView, Program, RunOptions, Step, Tensor, with_cuda},
    checkpoint::{Checkpoint, Dtype, ModelConfig},
    graph::{self, Form, Norms, Precision},
    kv_type::{Kv, KvFactors},
    library,
    onnx::{OpenError, card},
};
use forebay_kernels::{
    Region,
    cuda::{
        Arena, Device, DeviceError, Drawn, GrowError, HostBuffer, Kernels, LoadError, NoDevice, PinBudget,
        PinnedRegion, RowDraws, Stream,
    },
};
use forebay_schemas::kv::{KvDtype, KvGeometry, KvLayout};
use mover::CudaKv;
use ort::{
    environment::Environment,
    session::{
        Session,
        builder::{GraphOptimizationLevel, SessionBuilder},
    },
};
use std::{path::PathBuf, sync::Arc};

/// How to open a [`CudaEngine`].
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// Which GPU.
    pub device: usize,
    /// Precision of the weights. Activations are bf16, or fp16 where the weights are.
    pub precision: Precision,
    /// How keys and values are held: as activations, or in half the memory, and less exact.
    pub kv: KvType,
    /// Where the ranges of keys and values are that int8 needs, if not in the checkpoint's folder.
    pub kv_ranges: Option<PathBuf>,
    /// Sequences held at once.
    pub slots: u32,
    /// Positions of each slot; the usable context is one less. Addresses only: memory is there where sequences are.
    pub positions: u32,
    /// Tokens of the largest chunk of a prompt.
    pub chunk_tokens: u32,
    /// How much of the memory that is free once the model is loaded may hold KV, from 0 to 1.
    pub memory: f64,
    /// Bytes of the host's memory that are pinned at most, for KV on its way to and from other workers.
    pub pinned_bytes: usize,
    /// Whether decode steps are captured as graphs.
    pub graphs: bool,
    /// Threads that read and quantize weights.
    pub threads: usize,
    /// `libonnxruntime.so` with its provider for CUDA beside it, if not in the places that are searched.
    pub library: Option<PathBuf>,
    /// Folder for compiled kernels.
    pub kernel_cache: Option<PathBuf>,
    /// Who runs the graph.
    pub provider: Provider,
}

impl Default for CudaOptions {
    fn default() -> Self {
        CudaOptions {
            device: 0,
            precision: Precision::Bf16,
            kv: KvType::Auto,
            kv_ranges: None,
            slots: 64,
            positions: 4097,
            chunk_tokens: 2048,
            memory: 0.9,
            pinned_bytes: 16 << 30,
            graphs: true,
            threads: std::thread::available_parallelism().map_or(1, |threads| threads.get()),
            library: None,
            kernel_cache: None,
            provider: Provider::Cuda,
        }
    }
}

/// Why there is no engine on a GPU. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum CudaOpenError {
    /// There is no GPU to use.
    #[error("{0}; --device cpu runs without one")]
    Device(NoDevice),
    /// Our kernels can't be loaded.
    #[error(transparent)]
    Kernels(#[from] LoadError),
    /// The weights do not fit.
    #[error(
        "{name} has {free:.1} GiB of memory free, and the weights take {weights:.1} GiB in {precision}{}",
        int4.map_or(String::new(), |int4| format!(": --weights int4 takes {int4:.1} GiB"))
    )]
    WeightsTooLarge {
        /// The GPU.
        name: String,
        /// GiB that nobody uses.
        free: f64,
        /// GiB that the weights take.
        weights: f64,
        /// As they were asked for.
        precision: Precision,
        /// GiB in int4, if those fit.
        int4: Option<f64>,
    },
    /// Not even one sequence fits beside the weights.
    #[error(
        "beside the weights, {name} has {room:.2} GiB for KV, and a context of {context} tokens takes {needed:.2} GiB{}",
        fits.map_or(String::new(), |fits| format!(": --context {fits} fits"))
    )]
    KvTooLarge {
        /// The GPU.
        name: String,
        /// GiB for KV.
        room: f64,
        /// Tokens of a whole slot.
        context: u32,
        /// GiB that they take.
        needed: f64,
        /// Tokens that fit, if any do.
        fits: Option<u32>,
    },
}

impl From<CudaTensorError> for OpenError {
    fn from(error: CudaTensorError) -> OpenError {
        match error {
            CudaTensorError::Device(error) => error.into(),
            CudaTensorError::Runtime(error) => error.into(),
        }
    }
}

impl From<DeviceError> for OpenError {
    fn from(error: DeviceError) -> OpenError {
        NoDevice::from(error).into()
    }
}

impl From<NoDevice> for OpenError {
    fn from(error: NoDevice) -> OpenError {
        CudaOpenError::Device(error).into()
    }
}

impl From<DeviceError> for EngineError {
    fn from(error: DeviceError) -> EngineError {
        EngineError::Runtime(error.to_string())
    }
}

/// See the [module](self).
pub struct CudaEngine {
    /// Dropped before what it computes on.
    program: Program,
    card: EngineCard,
    device: Device,
    stream: Stream,
    kernels: Kernels,
    kv: Arc<CudaKv>,
    provider: Provider,
    slot_views: Vec<Option<KvView>>,
    buckets: Vec<Bucket>,
    eager: Option<RunOptions>,
    inputs: Inputs,
    /// Positions of a slot: what `total_len` is where a graph would keep the value of its capture.
    capacity: Tensor<i32>,
    total_len: Tensor<i32>,
    logits: CudaTensor<f32>,
    draws: RowDraws,
    /// The row of the logits of each row of the last step.
    logit_rows: Vec<u32>,
    logits_copy: Option<HostBuffer<f32>>,
    memory: f64,
    /// Bytes of weights that every step reads.
    weight_bytes: u64,
}

/// A batch size that decode steps have.
struct Bucket {
    rows: u32,
    view: KvView,
    options: Option<RunOptions>,
}

/// What a step reads: the host's side, and the GPU's.
struct Inputs {
    ids: CudaTensor<i64>,
    lens: CudaTensor<i32>,
    last: CudaTensor<i64>,
    host_ids: HostBuffer<i64>,
    host_lens: HostBuffer<i32>,
    host_last: HostBuffer<i64>,
}

impl CudaEngine {
    /// Makes an engine of an opened checkpoint, which need not outlive this call.
    pub fn with_checkpoint(checkpoint: &Checkpoint, options: &CudaOptions) -> Result<CudaEngine, OpenError> {
        let config = checkpoint.config();
        checkpoint.check_context(options.positions.saturating_sub(1) as usize)?;
        let factors = KvFactors::wanted(options.kv, checkpoint, options.kv_ranges.as_deref())?;
        if options.kv != KvType::Auto && !has_fast_decode(config) {
            tracing::warn!(
                "decode steps over quantized KV are slow for {} query heads on {} KV heads of {}: ONNX Runtime expands it first",
                config.heads,
                config.kv_heads,
                config.head_dim
            );
        }
        let device = Device::open(options.device)?;
        tracing::info!("{}", device.facts());
        fits(&device, checkpoint, options.precision)?;
        let environment = match options.provider {
            Provider::Cuda => library::load_cuda(options.library.as_deref())?,
            Provider::Cpu => library::load(options.library.as_deref())?,
        };
        let kernels =
            Kernels::load(&device, library::cuda_folder().as_deref(), options.kernel_cache.as_deref())
                .map_err(CudaOpenError::from)?;
        let stream = device.stream()?;
        let form = form(options, factors.as_ref());
        let geometry = KvGeometry {
            layers: config.layers as u32,
            kv_heads: config.kv_heads as u32,
            head_dim: config.head_dim as u32,
            dtype: form.kv.dtype(),
        };
        let layout =
            KvLayout { geometry, slots: options.slots, positions: whole_pages(&geometry, options.positions) };
        let card = card(checkpoint, form, layout, options.positions);
        let model = graph::build(checkpoint, form, layout.positions as usize, options.threads)?;
        let program = {
            let _one_at_a_time = super::onnx::opening();
            let builder = session_options(&environment, checkpoint, options, &stream)?;
            Program::new(&environment, builder, graph::EMPTY_MODEL, &model, config.layers)?
        };
        let region = Arc::new(Region::create("forebay-kv", layout.region_bytes())?);
        let arena = Arc::new(Arena::new(&device, layout, 0)?);
        let budget = PinBudget::new(options.pinned_bytes);
        let pinned = PinnedRegion::new(&device, region, budget.clone());
        let kv = CudaKv::new(arena.clone(), pinned, budget, &kernels)?;
        let on_gpu = options.provider == Provider::Cuda;
        let run_options = |graph: i32| {
            let graph = graph.to_string();
            let entries = [("gpu_graph_id", &graph[..]), ("disable_synchronize_execution_providers", "1")];
            on_gpu.then(|| RunOptions::new(&entries)).transpose()
        };
        let bucket = |(number, rows): (i32, u32)| {
            let graph = if options.graphs { number } else { EAGER };
            let view = KvView::of_arena(options.provider, &device, &arena, 0..rows)?;
            Ok(Bucket { rows, view, options: run_options(graph)? })
        };
        // Graph 0 is ONNX Runtime's own.
        let buckets = (1..).zip(buckets(options.slots)).map(bucket).collect::<ort::Result<_>>()?;
        let (slots, ids) = (options.slots as usize, options.chunk_tokens.max(options.slots) as usize);
        let mut capacity = Tensor::with_capacity(1)?;
        capacity.data_mut()[0] = layout.positions as i32;
        Ok(CudaEngine {
            slot_views: (0..slots).map(|_| None).collect(),
            buckets,
            eager: run_options(EAGER)?,
            inputs: Inputs {
                ids: CudaTensor::with_capacity(options.provider, &device, ids)?,
                lens: CudaTensor::with_capacity(options.provider, &device, slots)?,
                last: CudaTensor::with_capacity(options.provider, &device, slots)?,
                host_ids: HostBuffer::new(&device, ids)?,
                host_lens: HostBuffer::new(&device, slots)?,
                host_last: HostBuffer::new(&device, slots)?,
            },
            capacity,
            total_len: Tensor::with_capacity(1)?,
            logits: CudaTensor::with_capacity(options.provider, &device, slots * config.vocab)?,
            draws: RowDraws::new(&device, slots, config.vocab)?,
            logit_rows: vec![0],
            logits_copy: None,
            provider: options.provider,
            memory: options.memory,
            weight_bytes: graph::step_bytes(checkpoint, options.precision),
            kv: Arc::new(kv),
            card,
            kernels,
            program,
            stream,
            device,
        })
    }

    /// The GPU that it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes of KV that have memory.
    pub fn kv_bytes(&self) -> usize {
        self.kv.arena.backed_bytes()
    }

    /// Bytes that a decode step of one row reads, at least: the weights, and the KV of `context` tokens.
    pub fn step_bytes(&self, context: u32) -> u64 {
        let kv = self.card.layout.geometry.bytes_per_token() as u64;
        self.weight_bytes + kv * u64::from(context)
    }

    /// Waits for what a step that failed has queued: nothing is under way when its slots are used for something else.
    fn settle(&self) {
        let _ = self.stream.synchronize();
    }

    /// How a row of the step is drawn.
    fn set_draw(&mut self, row: usize, draw: Draw<'_>) -> Result<(), DeviceError> {
        let Draw { sampling, index, adjustments, allowed } = draw;
        self.draws.set(row, (sampling, index), adjustments, allowed)
    }

    /// Queues the draws of all rows of the step.
    fn draw(&mut self) -> Result<(), DeviceError> {
        self.draws.queue(&self.stream, &self.kernels, self.logits.buffer())
    }

    /// Waits for what was drawn from a row, whose slot has so many positions filled now.
    fn drawn(&mut self, row: usize, slot: u32, filled: u32) -> Result<Sampled, EngineError> {
        let drawn = self.draws.drawn(row)?;
        self.kv.fill(slot, filled);
        let Drawn { token, told } = drawn.ok_or(EngineError::NotFinite { slot, position: filled - 1 })?;
        let logprobs = told.map(|told| {
            let top = told.top.iter().map(|of| (of.token, of.logit));
            RawLogprobs::of(&told.normalizer, told.drawn, top)
        });
        Ok(Sampled { token, logprobs })
    }
}

fn session_options(
    environment: &Environment,
    checkpoint: &Checkpoint,
    options: &CudaOptions,
    stream: &Stream,
) -> ort::Result<SessionBuilder> {
    let builder = Session::builder(environment)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_intra_threads(1)?
        .with_memory_pattern(false)?;
    let builder = graph::with_operators(builder, checkpoint.config())?;
    if options.provider == Provider::Cpu {
        return Ok(builder);
    }
    let builder = builder
        // Weights that were packed into another layout are then given back.
        .with_config_entry("session.use_device_allocator_for_initializers", "1")?
        .with_config_entry("ep.cuda.fpa_intb_gemm", "1")?
        // It would put the norms of `Norms::Nodes` back into the attention, which then has no fast kernel for quantized KV.
        .with_config_entry("optimization.disable_specified_optimizers", "GroupQueryAttentionPreNormFusion")?;
    let device = options.device.to_string();
    let entries = [
        ("device_id", &device[..]),
        ("enable_cuda_graph", if options.graphs { "1" } else { "0" }),
        ("arena_extend_strategy", "kSameAsRequested"),
        // Flash attention for prompts, whatever cuDNN there is: its plans would be built anew for every length.
        ("sdpa_kernel", "1"),
    ];
    with_cuda(builder, stream, &entries)
}

/// Not a graph.
const EAGER: i32 = -1;

/// How a graph on a GPU is made.
fn form<'a>(options: &CudaOptions, factors: Option<&'a KvFactors>) -> Form<'a> {
    // A stand-in for a GPU computes as a CPU does.
    let activations = match (options.provider, options.precision) {
        (Provider::Cpu, _) => Dtype::F32,
        (_, Precision::F16) => Dtype::F16,
        _ => Dtype::Bf16,
    };
    let kv = match (factors, options.kv, activations) {
        (Some(factors), ..) => Kv::Int8(factors),
        (_, KvType::Fp8, _) => Kv::Fp8,
        (.., Dtype::F32) => Kv::Plain(KvDtype::F32),
        (.., Dtype::F16) => Kv::Plain(KvDtype::F16),
        (.., Dtype::Bf16) => Kv::Plain(KvDtype::Bf16),
    };
    let within = options.provider == Provider::Cuda && matches!(kv, Kv::Plain(_));
    let norms = if within { Norms::Attention } else { Norms::Nodes };
    Form { precision: options.precision, activations, kv, norms }
}

/// Whether ONNX Runtime has its fast kernel for decode steps over quantized KV in this shape.
fn has_fast_decode(config: &ModelConfig) -> bool {
    [64, 128, 256].contains(&config.head_dim) && [4, 8, 16, 32].contains(&(config.heads / config.kv_heads))
}

/// Positions of a slot of which each plane is whole pages, so that it can be pinned by itself.
fn whole_pages(geometry: &KvGeometry, positions: u32) -> u32 {
    const PAGE: u32 = 4096;
    let bytes = geometry.kv_heads * geometry.head_bytes() as u32;
    let step = PAGE / (1 << bytes.trailing_zeros().min(PAGE.trailing_zeros()));
    positions.next_multiple_of(step)
}

/// Batch sizes of decode steps: powers of two, and all slots.
fn buckets(slots: u32) -> Vec<u32> {
    let mut buckets: Vec<u32> = (0..).map(|power| 1 << power).take_while(|rows| *rows < slots).collect();
    buckets.push(slots);
    buckets
}

const GIB: f64 = (1u64 << 30) as f64;

/// Whether the weights fit, or an error that says what would.
fn fits(device: &Device, checkpoint: &Checkpoint, precision: Precision) -> Result<(), OpenError> {
    let free = device.free_bytes()? as f64 / GIB;
    let weights = graph::weight_bytes(checkpoint, precision) as f64 / GIB;
    if weights < free {
        return Ok(());
    }
    let int4 = graph::weight_bytes(checkpoint, Precision::Int4 { block: 32 }) as f64 / GIB;
    let name = device.facts().name.clone();
    let int4 = (int4 < free && int4 < weights).then_some(int4);
    Err(CudaOpenError::WeightsTooLarge { name, free, weights, precision, int4 }.into())
}

impl Engine for CudaEngine {
    fn card(&self) -> &EngineCard {
        &self.card
    }

    fn kv(&self) -> &Arc<Region> {
        self.kv.region.region()
    }

    fn mover(&self) -> Option<Arc<dyn KvMover>> {
        Some(self.kv.clone())
    }

    fn warm_up(&mut self) -> Result<(), OpenError> {
        let steps = self.buckets.len() + 1;
        let parked = vec![0; self.card.layout.slots as usize];
        tracing::info!("warming up: step 1 of {steps}, the longest chunk of a prompt");
        // All of it lies over scratch memory: what is computed counts for nothing, and what it takes stays taken.
        let chunk = self.inputs.ids.buffer().len().min(self.card.context_limit as usize);
        self.run_chunk(0, 0, &vec![0; chunk])?;
        self.stream.synchronize()?;
        for number in 0..self.buckets.len() {
            let rows = self.buckets[number].rows;
            tracing::info!("warming up: step {} of {steps}, a batch of {rows}", number + 2);
            self.run_rows(number, &[], &parked)?;
            self.stream.synchronize()?;
        }
        let room = (self.device.free_bytes()? as f64 * self.memory) as usize;
        self.kv.arena.limit(room);
        let (context, geometry) = (self.card.context_limit, self.card.layout.geometry);
        let bytes_of = |context| self.kv.arena.bytes_of(whole_pages(&geometry, context + 1));
        let needed = bytes_of(context);
        if needed > room {
            let fits = (1..=context).rev().step_by(64).find(|tokens| bytes_of(*tokens) <= room);
            return Err(CudaOpenError::KvTooLarge {
                name: self.device.facts().name.clone(),
                room: room as f64 / GIB,
                context,
                needed: needed as f64 / GIB,
                fits,
            }
            .into());
        }
        tracing::info!(
            "{:.1} GiB for KV: {} sequences of {context} tokens, and more shorter ones",
            room as f64 / GIB,
            room / needed
        );
        Ok(())
    }

    fn reserve(&mut self, slot: u32, positions: u32) -> Result<(), EngineError> {
        let (arena, positions) = (&self.kv.arena, positions.min(self.card.layout.positions));
        let mut grown = arena.grow(slot, positions);
        if matches!(&grown, Err(GrowError::Device(error)) if error.is_out_of_memory()) {
            // Somebody else has what was counted on: what there is must do from now on.
            tracing::warn!("the GPU has less memory left than there was at first");
            arena.limit(arena.backed_bytes());
            grown = arena.grow(slot, positions);
        }
        grown.map_err(|error| match error {
            GrowError::Full { .. } => EngineError::KvFull { slot },
            error => EngineError::Runtime(error.to_string()),
        })
    }

    fn release(&mut self, slot: u32) {
        self.kv.fill(slot, 0);
        self.kv.arena.release(slot);
    }

    fn is_copied(&self, slot: u32) -> bool {
        self.kv.is_copied(slot)
    }

    fn prefill(
        &mut self,
        slot: u32,
        start: u32,
        tokens: &[u32],
        draw: Option<Draw<'_>>,
    ) -> Result<Option<Sampled>, EngineError> {
        self.card.check(slot, start, tokens)?;
        self.reserve(slot, start + tokens.len() as u32)?;
        // Of a longer prompt, chunk after chunk.
        let longest = self.inputs.ids.buffer().len();
        for (start, tokens) in (start..).step_by(longest).zip(tokens.chunks(longest)) {
            let run = self.run_chunk(slot, start, tokens);
            run.inspect_err(|_| self.settle())?;
        }
        let filled = start + tokens.len() as u32;
        let Some(draw) = draw else {
            // What others are told to be filled is.
            self.stream.synchronize()?;
            self.kv.fill(slot, filled);
            return Ok(None);
        };
        self.draws.begin(1)?;
        self.set_draw(0, draw)?;
        self.logit_rows = vec![0];
        self.draw()?;
        self.drawn(0, slot, filled).map(Some)
    }

    fn decode(
        &mut self,
        rows: &[Row<'_>],
        parked: &[u32],
        out: &mut Vec<Sampled>,
    ) -> Result<(), EngineError> {
        out.clear();
        self.card.check_rows(rows, parked)?;
        let Some(highest) = rows.last().map(|row| row.slot) else { return Ok(()) };
        for row in rows {
            self.reserve(row.slot, row.position + 1)?;
        }
        let number = self.buckets.partition_point(|bucket| bucket.rows <= highest);
        let run = self.run_rows(number, rows, parked);
        run.inspect_err(|_| self.settle())?;
        let batch = self.buckets[number].rows as usize;
        self.draws.begin(batch)?;
        for row in rows {
            self.set_draw(row.slot as usize, row.draw)?;
        }
        self.logit_rows = rows.iter().map(|row| row.slot).collect();
        self.draw()?;
        for row in rows {
            out.push(self.drawn(row.slot as usize, row.slot, row.position + 1)?);
        }
        Ok(())
    }

    fn row_logits(&mut self, row: usize) -> Option<&[f32]> {
        let (vocab, row) = (self.card.vocab as usize, *self.logit_rows.get(row)? as usize);
        let copy = match &mut self.logits_copy {
            Some(copy) => copy,
            none => none.insert(HostBuffer::new(&self.device, self.logits.buffer().len()).ok()?),
        };
        // For people who debug: all rows cross the bus.
        self.stream.copy_out(self.logits.buffer(), (row + 1) * vocab, copy).ok()?;
        Some(&copy.data().ok()?[row * vocab..][..vocab])
    }
}

impl CudaEngine {
    /// Queues one chunk of a prompt. Its last token's logits are the first row.
    fn run_chunk(&mut self, slot: u32, start: u32, tokens: &[u32]) -> Result<(), EngineError> {
        let last = start as usize + tokens.len() - 1;
        let inputs = &mut self.inputs;
        inputs.ids.set_shape(&[1, tokens.len() as i64])?;
        inputs.lens.set_shape(&[1])?;
        inputs.last.set_shape(&[1])?;
        self.logits.set_shape(&[1, i64::from(self.card.vocab)])?;
        let ids = inputs.host_ids.data()?;
        ids.iter_mut().zip(tokens).for_each(|(id, token)| *id = i64::from(*token));
        inputs.host_lens.data()?[0] = last as i32;
        inputs.host_last.data()?[0] = tokens.len() as i64 - 1;
        self.total_len.data_mut()[0] = last as i32 + 1;
        inputs.queue(&self.stream, tokens.len(), 1)?;
        let view = &mut self.slot_views[slot as usize];
        let view = match view {
            Some(view) => view,
            None => {
                view.insert(KvView::of_arena(self.provider, &self.device, &self.kv.arena, slot..slot + 1)?)
            }
        };
        if self.provider == Provider::Cpu {
            self.stream.synchronize()?;
        }
        let mut step = Step {
            input_ids: &self.inputs.ids,
            seqlens_k: &self.inputs.lens,
            total_len: &self.total_len,
            last: &self.inputs.last,
            kv: view,
            logits: &mut self.logits,
        };
        Ok(self.program.run(&mut step, self.eager.as_ref())?)
    }

    /// Queues a token for each row of a bucket; those of slots without a row are scratch. Logits are in the order of slots.
    fn run_rows(&mut self, number: usize, rows: &[Row<'_>], parked: &[u32]) -> Result<(), EngineError> {
        let bucket = &self.buckets[number];
        let batch = bucket.rows as usize;
        let inputs = &mut self.inputs;
        inputs.ids.set_shape(&[batch as i64, 1])?;
        inputs.lens.set_shape(&[batch as i64])?;
        inputs.last.set_shape(&[batch as i64])?;
        self.logits.set_shape(&[batch as i64, i64::from(self.card.vocab)])?;
        inputs.host_ids.data()?[..batch].fill(0);
        let lens = &mut inputs.host_lens.data()?[..batch];
        // The last position of a slot is never a sequence's.
        lens.fill(self.card.layout.positions as i32 - 1);
        lens.iter_mut().zip(parked).for_each(|(len, at)| *len = *at as i32);
        inputs.host_last.data()?[..batch].iter_mut().zip(0..).for_each(|(last, row)| *last = row);
        for row in rows {
            inputs.host_ids.data()?[row.slot as usize] = i64::from(row.token);
            inputs.host_lens.data()?[row.slot as usize] = row.position as i32;
        }
        inputs.queue(&self.stream, batch, batch)?;
        if self.provider == Provider::Cpu {
            self.stream.synchronize()?;
        }
        let mut step = Step {
            input_ids: &self.inputs.ids,
            seqlens_k: &self.inputs.lens,
            total_len: &self.capacity,
            last: &self.inputs.last,
            kv: &bucket.view,
            logits: &mut self.logits,
        };
        Ok(self.program.run(&mut step, bucket.options.as_ref())?)
    }
}

impl Inputs {
    /// Queues the copies of what the host has filled in.
    fn queue(&mut self, stream: &Stream, ids: usize, rows: usize) -> Result<(), DeviceError> {
        stream.copy_in(&mut self.host_ids, ids, self.ids.buffer(), 0)?;
        stream.copy_in(&mut self.host_lens, rows, self.lens.buffer(), 0)?;
        stream.copy_in(&mut self.host_last, rows, self.last.buffer(), 0)
    }
}
