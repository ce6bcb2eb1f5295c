//! The engine that serves: a checkpoint's graph in ONNX Runtime, over slots of a shared region.

use super::{
    Draw, Engine, EngineCard, EngineError, KvType, Row, Sampled,
    binding::{KvView, Program, Step, Tensor},
    checkpoint::{Checkpoint, CheckpointError},
    cuda::CudaOpenError,
    graph::{self, Form, Precision},
    kv_type::{Kv, KvFactors},
    library::{self, LibraryError},
};
use forebay_kernels::{NotFinite, Region, RegionError};
use forebay_schemas::{
    ids::fnv1a,
    kv::{KvDtype, KvGeometry, KvLayout, LayoutHash},
};
use ort::{
    environment::Environment,
    session::{Session, builder::GraphOptimizationLevel},
};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Held while a session is made: ONNX Runtime's table of operator domains is one for the process and not safe to fill from two
/// threads.
pub(super) fn opening() -> MutexGuard<'static, ()> {
    static OPENING: Mutex<()> = Mutex::new(());
    OPENING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How to open an [`OnnxEngine`].
#[derive(Clone, Debug)]
pub struct OnnxOptions {
    /// Precision of the weights.
    pub precision: Precision,
    /// How keys and values are held; not in fp8.
    pub kv: KvType,
    /// Where the ranges of keys and values are that int8 needs, if not in the checkpoint's folder.
    pub kv_ranges: Option<PathBuf>,
    /// Sequences held at once.
    pub slots: u32,
    /// Positions of each slot; the usable context is one less. Address space only: memory is committed as
    /// positions are written.
    pub positions: u32,
    /// Threads that compute, the caller's among them.
    pub threads: usize,
    /// Whether idle threads spin for a moment: faster steps, and a busy processor between them.
    pub spin: bool,
    /// Where `libonnxruntime` is, if not in the places that are searched.
    pub library: Option<PathBuf>,
}

impl Default for OnnxOptions {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
        OnnxOptions {
            precision: Precision::default(),
            kv: KvType::Auto,
            kv_ranges: None,
            slots: 8,
            positions: 2049,
            threads,
            spin: true,
            library: None,
        }
    }
}

/// Why an engine could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The checkpoint cannot be served.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// ONNX Runtime cannot be loaded.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// No memory for the KV.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The first steps failed.
    #[error("warming up: {0}")]
    WarmUp(#[from] EngineError),
    /// A type of KV that a CPU does not have.
    #[error("KV in fp8 is for GPUs: a CPU has fp32 (auto) and int8")]
    Fp8OnCpu,
    /// There is no GPU, or it is too small.
    #[error(transparent)]
    Cuda(#[from] CudaOpenError),
    /// ONNX Runtime refused the graph.
    #[error("ONNX Runtime could not load the model: {0}")]
    Runtime(#[from] ort::Error),
}

impl From<ort::Error> for EngineError {
    fn from(error: ort::Error) -> EngineError {
        EngineError::Runtime(error.to_string())
    }
}

/// See the [module](self).
pub struct OnnxEngine {
    card: EngineCard,
    kv: Arc<Region>,
    program: Program,
    /// Views of one slot each, for prefill, and of the first n slots, for decode; made when first needed.
    slot_views: Vec<Option<KvView>>,
    batch_views: Vec<Option<KvView>>,
    input_ids: Tensor<i64>,
    seqlens_k: Tensor<i32>,
    total_len: Tensor<i32>,
    last: Tensor<i64>,
    logits: Tensor<f32>,
}

impl OnnxEngine {
    /// Opens a checkpoint directory.
    pub fn open(dir: &Path, options: &OnnxOptions) -> Result<OnnxEngine, OpenError> {
        let checkpoint = Checkpoint::open(dir)?;
        OnnxEngine::with_checkpoint(&checkpoint, options)
    }

    /// Makes an engine of an opened checkpoint, which need not outlive this call.
    pub fn with_checkpoint(checkpoint: &Checkpoint, options: &OnnxOptions) -> Result<OnnxEngine, OpenError> {
        let config = checkpoint.config();
        let context_limit = options.positions.saturating_sub(1);
        checkpoint.check_context(context_limit as usize)?;
        let environment = library::load(options.library.as_deref())?;
        let factors = KvFactors::wanted(options.kv, checkpoint, options.kv_ranges.as_deref())?;
        let kv = match (options.kv, &factors) {
            (KvType::Fp8, _) => return Err(OpenError::Fp8OnCpu),
            (_, Some(factors)) => Kv::Int8(factors),
            (_, None) => Kv::Plain(KvDtype::F32),
        };
        let form = Form::cpu(options.precision, kv);
        let _one_at_a_time = opening();
        let geometry = KvGeometry {
            layers: config.layers as u32,
            kv_heads: config.kv_heads as u32,
            head_dim: config.head_dim as u32,
            dtype: kv.dtype(),
        };
        let layout = KvLayout { geometry, slots: options.slots, positions: options.positions };
        let card = card(checkpoint, form, layout, options.positions);
        let program = program(&environment, checkpoint, form, options)?;
        let kv = Arc::new(Region::create("forebay-kv", card.layout.region_bytes())?);
        let (slots, positions) = (options.slots as usize, options.positions as usize);
        Ok(OnnxEngine {
            kv,
            program,
            slot_views: (0..slots).map(|_| None).collect(),
            batch_views: (0..slots).map(|_| None).collect(),
            input_ids: Tensor::with_capacity(positions.max(slots))?,
            seqlens_k: Tensor::with_capacity(slots)?,
            total_len: Tensor::with_capacity(1)?,
            last: Tensor::with_capacity(slots)?,
            logits: Tensor::with_capacity(slots * config.vocab)?,
            card,
        })
    }

    /// Logits of the last step, `[rows, vocab]`: of the last token of a prefill, or of each row of a decode, as
    /// [`Engine::row_logits`] says.
    pub fn logits(&self) -> &[f32] {
        self.logits.data()
    }

    /// Draws row number `row` of the last step.
    fn draw(
        &mut self,
        row: usize,
        (slot, position): (u32, u32),
        draw: Draw<'_>,
    ) -> Result<Sampled, EngineError> {
        let vocab = self.card.vocab as usize;
        let logits = &mut self.logits.data_mut()[row * vocab..][..vocab];
        super::draw(logits, draw).map_err(|NotFinite| EngineError::NotFinite { slot, position })
    }
}

impl Engine for OnnxEngine {
    fn card(&self) -> &EngineCard {
        &self.card
    }

    fn kv(&self) -> &Arc<Region> {
        &self.kv
    }

    fn prefill(
        &mut self,
        slot: u32,
        start: u32,
        tokens: &[u32],
        draw: Option<Draw<'_>>,
    ) -> Result<Option<Sampled>, EngineError> {
        self.card.check(slot, start, tokens)?;
        let last = start as usize + tokens.len() - 1;
        self.input_ids.set_shape(&[1, tokens.len() as i64])?;
        self.input_ids.data_mut().iter_mut().zip(tokens).for_each(|(id, token)| *id = i64::from(*token));
        self.seqlens_k.set_shape(&[1])?;
        self.seqlens_k.data_mut()[0] = last as i32;
        self.total_len.data_mut()[0] = last as i32 + 1;
        self.last.set_shape(&[1])?;
        self.last.data_mut()[0] = tokens.len() as i64 - 1;
        self.logits.set_shape(&[1, i64::from(self.card.vocab)])?;
        let view = &mut self.slot_views[slot as usize];
        let view = match view {
            Some(view) => view,
            None => view.insert(KvView::new(&self.kv, &self.card.layout, slot..slot + 1)?),
        };
        let mut step = Step {
            input_ids: &self.input_ids,
            seqlens_k: &self.seqlens_k,
            total_len: &self.total_len,
            last: &self.last,
            kv: view,
            logits: &mut self.logits,
        };
        self.program.run(&mut step, None)?;
        draw.map(|draw| self.draw(0, (slot, last as u32), draw)).transpose()
    }

    fn decode(
        &mut self,
        rows: &[Row<'_>],
        parked: &[u32],
        out: &mut Vec<Sampled>,
    ) -> Result<(), EngineError> {
        out.clear();
        self.card.check_rows(rows, parked)?;
        let Some(highest) = rows.last().map(|row| row.slot as usize) else { return Ok(()) };
        let batch = highest + 1;
        self.input_ids.set_shape(&[batch as i64, 1])?;
        self.seqlens_k.set_shape(&[batch as i64])?;
        self.last.set_shape(&[rows.len() as i64])?;
        self.logits.set_shape(&[rows.len() as i64, i64::from(self.card.vocab)])?;
        let (ids, lens, last) = (self.input_ids.data_mut(), self.seqlens_k.data_mut(), self.last.data_mut());
        ids.fill(0);
        // The row of `rows`'s highest slot is written below, so `parked` may be one short of the batch.
        lens.iter_mut().zip(parked).for_each(|(len, at)| *len = *at as i32);
        for (row, last) in rows.iter().zip(last) {
            ids[row.slot as usize] = i64::from(row.token);
            lens[row.slot as usize] = row.position as i32;
            *last = i64::from(row.slot);
        }
        self.total_len.data_mut()[0] = lens.iter().copied().max().unwrap_or(0) + 1;
        let view = &mut self.batch_views[highest];
        let view = match view {
            Some(view) => view,
            None => view.insert(KvView::new(&self.kv, &self.card.layout, 0..batch as u32)?),
        };
        let mut step = Step {
            input_ids: &self.input_ids,
            seqlens_k: &self.seqlens_k,
            total_len: &self.total_len,
            last: &self.last,
            kv: view,
            logits: &mut self.logits,
        };
        self.program.run(&mut step, None)?;
        for (index, row) in rows.iter().enumerate() {
            out.push(self.draw(index, (row.slot, row.position), row.draw)?);
        }
        Ok(())
    }

    fn row_logits(&mut self, row: usize) -> Option<&[f32]> {
        self.logits().chunks_exact(self.card.vocab as usize).nth(row)
    }
}

/// The card of an engine whose slots have `positions` usable positions, of which the last takes scratch writes.
pub(super) fn card(checkpoint: &Checkpoint, form: Form<'_>, layout: KvLayout, positions: u32) -> EngineCard {
    let (config, geometry) = (checkpoint.config(), layout.geometry);
    let stored = checkpoint.tensor("model.embed_tokens.weight").dtype();
    // Everything that decides what a key or value is: two engines that agree on this text compute the same KV, up
    // to rounding. The 1 is the version of the text and of the graph.
    let precision = form.precision;
    let mut meaning = format!(
        "forebay kv 1; {config:?}; weights {:016x} as {precision}; {geometry:?}",
        checkpoint.weights_hash()
    );
    let mut weights = format!("Qwen3ForCausalLM, {} layers, {precision} from {stored}", config.layers);
    match form.kv {
        Kv::Plain(_) => {}
        Kv::Fp8 => weights.push_str(", KV in fp8"),
        Kv::Int8(factors) => {
            meaning.push_str(&format!("; factors {:016x}", factors.hash()));
            weights.push_str(", KV in int8");
        }
    }
    EngineCard {
        vocab: config.vocab as u32,
        context_limit: positions.saturating_sub(1),
        eos: checkpoint.eos().to_vec(),
        layout,
        layout_hash: LayoutHash(fnv1a(meaning.as_bytes())),
        weights,
    }
}

fn program(
    environment: &Environment,
    checkpoint: &Checkpoint,
    form: Form<'_>,
    options: &OnnxOptions,
) -> ort::Result<Program> {
    let builder = Session::builder(environment)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_intra_threads(options.threads)?
        .with_intra_op_spinning(options.spin)?
        // Plans for shapes seen before: of no use where lengths never repeat, and it keeps their memory.
        .with_memory_pattern(false)?;
    let builder = graph::with_operators(builder, checkpoint.config())?;
    let model = graph::build(checkpoint, form, options.positions as usize, options.threads)?;
    Program::new(environment, builder, graph::EMPTY_MODEL, &model, checkpoint.config().layers)
}
