//! The engine on a GPU. Without one, all of it but ONNX Runtime's provider: memory, streams, copies and kernels are those of the
//! stand-in of `kernels/tests/cuda/driver.c`, and the graph, in the form that a GPU gets, runs on the processor.

mod parity_support;
#[path = "../../kernels/tests/cuda/stand_in.rs"]
mod stand_in;

use forebay_kernels::{Adjustments, Region};
use forebay_schemas::{
    card::WorkerLease,
    ids::{ModelKey, WorkerId},
    kv::{KvHandle, KvLayout, TokenRange},
    sampling::Sampling,
    task::Role,
};
use forebay_workers::{
    engine::{
        Draw, Engine, EngineCard, EngineError, KvType, PeerSlot, Row, Sampled,
        calibrate::measure,
        checkpoint::{Checkpoint, KvRanges},
        cuda::{CudaEngine, CudaOptions, Provider},
        graph::Precision,
        onnx::{OnnxEngine, OnnxOptions, OpenError},
    },
    kv::{
        Choice, FROM_GPU, KvOptions, KvPeers, KvRead, Leases, ReadError, Sealed, Transport,
        shm::{ShmOwner, host_id},
        sums,
    },
    logits::LogitsProcessors,
    runner::{Output, Runner},
    scheduler::{Budget, Sequence},
};
use parity_support::{CASES, Reference, alone, continued, dir, greedy, logits_apart, open};
use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tempfile::TempDir;

fn options() -> CudaOptions {
    let device = stand_in::device();
    let real = stand_in::is_real(&device);
    CudaOptions {
        slots: 4,
        positions: 200,
        chunk_tokens: 16,
        threads: 2,
        precision: if real { Precision::Bf16 } else { Precision::F32 },
        provider: if real { Provider::Cuda } else { Provider::Cpu },
        ..CudaOptions::default()
    }
}

fn with_options(case: &str, options: &CudaOptions) -> Result<CudaEngine, OpenError> {
    let mut engine = CudaEngine::with_checkpoint(&Checkpoint::open(&dir(case)).unwrap(), options)?;
    engine.warm_up()?;
    Ok(engine)
}

fn on_gpu(case: &str) -> CudaEngine {
    with_options(case, &options()).unwrap()
}

/// On a GPU, tokens that bf16 rounds to others are no fault.
fn is_exact() -> bool {
    !stand_in::is_real(&stand_in::device())
}

#[test]
fn it_agrees_with_transformers() {
    for case in CASES {
        let reference = Reference::read(case);
        let mut engine = on_gpu(case);
        let bound = if is_exact() { 1e-4 } else { 0.1 };
        for (number, prompt) in reference.prompts.iter().enumerate() {
            if is_exact() {
                assert_eq!(alone(&mut engine, 1, &prompt.ids, 64), prompt.greedy, "{case}: prompt {number}");
            }
            engine.prefill(0, 0, &prompt.ids, Some(greedy(0))).unwrap();
            let expected = reference.logits(&format!("last_logits.{number}"));
            let apart = logits_apart(engine.row_logits(0).unwrap(), &expected);
            assert!(apart < bound, "{case}: logits of prompt {number} are {apart} apart");
        }
    }
}

/// In int8 a GPU's form of the graph and a CPU's have the same keys and values, but for rounding, and each goes on with the other's.
#[test]
fn kv_in_int8_is_that_of_a_cpu() {
    for case in CASES {
        let checkpoint = Checkpoint::open(&dir(case)).unwrap();
        let prompts = Reference::read(case).prompts;
        let text: Vec<u32> =
            prompts.iter().flat_map(|prompt| [&prompt.ids[..], &prompt.greedy].concat()).collect();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(KvRanges::FILE);
        let ranges = measure(&mut open(case, Precision::F32), &text, 64, |_| {}).unwrap();
        ranges.write(&checkpoint, &file).unwrap();
        let of_cpu = OnnxOptions {
            kv: KvType::Int8,
            kv_ranges: Some(file.clone()),
            ..parity_support::options(Precision::F32)
        };
        let mut cpu = OnnxEngine::with_checkpoint(&checkpoint, &of_cpu).unwrap();
        let of_gpu = CudaOptions { kv: KvType::Int8, kv_ranges: Some(file), ..options() };
        let mut gpu = with_options(case, &of_gpu).unwrap();
        if is_exact() {
            assert_eq!(gpu.card().layout_hash, cpu.card().layout_hash);
        }
        let (mut error, mut size) = (0.0, 0.0);
        let mut add = |found: &[f32], expected: &[f32]| {
            error += found.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
            size += expected.iter().map(|b| b.powi(2)).sum::<f32>();
        };
        for prompt in &prompts {
            gpu.prefill(0, 0, &prompt.ids, Some(greedy(0))).unwrap();
            cpu.prefill(0, 0, &prompt.ids, Some(greedy(0))).unwrap();
            add(gpu.row_logits(0).unwrap(), cpu.logits());
            // The CPU's KV, and a token more.
            let tokens = TokenRange { start: 0, count: prompt.ids.len() as u32 };
            let (from, into) = (cpu.card().layout, gpu.card().layout);
            let planes = 0..2 * from.geometry.layers;
            for ((from, bytes), (into, _)) in
                from.pieces(0, tokens, planes.clone()).zip(into.pieces(1, tokens, planes))
            {
                let mut piece = vec![0; bytes];
                cpu.kv().read(from, &mut piece);
                gpu.kv().write(into, &piece);
            }
            gpu.reserve(1, tokens.count).unwrap();
            gpu.mover().unwrap().load(1, tokens).unwrap();
            let row = |slot| Row { slot, position: tokens.count, token: prompt.greedy[0], draw: greedy(1) };
            let mut out = Vec::new();
            gpu.decode(&[row(1)], &[0], &mut out).unwrap();
            cpu.decode(&[row(0)], &[], &mut out).unwrap();
            add(gpu.row_logits(0).unwrap(), cpu.logits());
        }
        let apart = (error / size).sqrt();
        eprintln!("{case}: logits are {apart:.5} of their size apart");
        let bound = if is_exact() { 0.01 } else { 0.05 };
        assert!(apart < bound, "{case}: {apart}");
    }
}

/// Rows in any slots, of unlike lengths, beside slots that nobody uses; drawn with a temperature, penalties, bias and a mask, and
/// told of, as the CPU's engine does.
#[test]
fn a_batch_is_its_rows() {
    let case = CASES[2];
    let prompts: Vec<Vec<u32>> = Reference::read(case).prompts.into_iter().map(|prompt| prompt.ids).collect();
    let plain =
        |seed| Sampling { temperature: 0.9, top_p: 0.9, top_k: 40, seed, min_p: 0.01, ..Sampling::GREEDY };
    let samplings = [
        Sampling { repetition_penalty: 1.3, presence_penalty: 0.5, logprobs: Some(3), ..plain(0) },
        Sampling { frequency_penalty: 0.7, logit_bias: vec![(7, 4.0), (11, -100.0)], ..plain(1) },
    ];
    // Every second token.
    let allowed = vec![0x5555_5555; open(case, Precision::F32).card().vocab.div_ceil(32) as usize];
    let (samplings, allowed) = (&samplings, &allowed[..]);
    fn draw<'a>(
        (samplings, allowed): (&'a [Sampling; 2], &'a [u32]),
        which: usize,
        index: u32,
        adjustments: &'a Adjustments,
    ) -> Draw<'a> {
        let allowed = (which == 1).then_some(allowed);
        Draw { adjustments: Some(adjustments), allowed, ..Draw::new(&samplings[which], index) }
    }
    let how = (samplings, allowed);
    let adjustments = |which: usize| Adjustments::new(&samplings[which], &prompts[which], &[]).unwrap();
    let mut expected: Vec<Vec<Sampled>> = Vec::new();
    let mut cpu = open(case, Precision::F32);
    for (which, prompt) in prompts.iter().take(2).enumerate() {
        let mut adjustments = adjustments(which);
        let first = cpu.prefill(0, 0, prompt, Some(draw(how, which, 0, &adjustments))).unwrap().unwrap();
        let (mut drawn, mut out) = (vec![first], Vec::new());
        for index in 1..20 {
            let (position, token) = (prompt.len() as u32 + index - 1, drawn[drawn.len() - 1].token);
            adjustments.push(token);
            let row = Row { slot: 0, position, token, draw: draw(how, which, index, &adjustments) };
            cpu.decode(&[row], &[], &mut out).unwrap();
            drawn.append(&mut out);
        }
        expected.push(drawn);
    }
    assert!(expected[0].iter().all(|drawn| drawn.logprobs.as_ref().is_some_and(|told| told.top.len() == 3)));
    assert!(expected[1].iter().all(|drawn| drawn.token % 2 == 0 && drawn.logprobs.is_none()));
    let mut engine = on_gpu(case);
    let slots = [3, 1];
    let mut adjustments = [adjustments(0), adjustments(1)];
    let mut drawn: Vec<Vec<Sampled>> = Vec::new();
    for (which, (slot, prompt)) in slots.iter().zip(&prompts).enumerate() {
        let draw = draw(how, which, 0, &adjustments[which]);
        drawn.push(vec![engine.prefill(*slot, 0, prompt, Some(draw)).unwrap().unwrap()]);
    }
    let mut out = Vec::new();
    for index in 1..20 {
        for (adjustments, drawn) in adjustments.iter_mut().zip(&drawn) {
            adjustments.push(drawn[index as usize - 1].token);
        }
        let row = |which: usize| Row {
            slot: slots[which],
            position: prompts[which].len() as u32 + index - 1,
            token: drawn[which][index as usize - 1].token,
            draw: draw(how, which, index, &adjustments[which]),
        };
        let rows = [row(1), row(0)];
        engine.decode(&rows, &[0, 0, 0, 0], &mut out).unwrap();
        assert_eq!(out.len(), 2);
        drawn[0].push(out.remove(1));
        drawn[1].push(out.remove(0));
    }
    if !is_exact() {
        return;
    }
    for (drawn, expected) in drawn.iter().flatten().zip(expected.iter().flatten()) {
        assert_eq!(drawn.token, expected.token);
        // The sums of a batch are those of one row but for their last bits.
        let apart = |of: &Sampled| of.logprobs.as_ref().map_or(0.0, |told| told.drawn);
        assert!((apart(drawn) - apart(expected)).abs() < 1e-3, "{drawn:?} and not {expected:?}");
    }
}

/// What one engine saves, another one loads into another slot, and goes on.
#[test]
fn kv_is_moved_through_the_regions() {
    let case = CASES[1];
    let reference = Reference::read(case);
    let prompt = &reference.prompts[1].ids;
    assert!(prompt.len() > 3);
    let (mut first, mut second) = (on_gpu(case), on_gpu(case));
    let expected = alone(&mut first, 2, prompt, 30);
    let token = first.prefill(2, 0, prompt, Some(greedy(0))).unwrap().unwrap().token;
    let tokens = TokenRange { start: 0, count: prompt.len() as u32 };
    // In two parts, as chunks of a prompt come.
    let parts = [TokenRange { start: 0, count: 3 }, TokenRange { start: 3, count: tokens.count - 3 }];
    parts.iter().for_each(|part| first.mover().unwrap().save(2, *part).unwrap());
    let (from, into) = (first.card().layout, second.card().layout);
    let planes = 0..2 * from.geometry.layers;
    for ((from, bytes), (into, _)) in
        from.pieces(2, tokens, planes.clone()).zip(into.pieces(0, tokens, planes))
    {
        let mut piece = vec![0; bytes];
        first.kv().read(from, &mut piece);
        second.kv().write(into, &piece);
    }
    second.reserve(0, tokens.count).unwrap();
    second.mover().unwrap().load(0, tokens).unwrap();
    assert_eq!(continued(&mut second, 0, prompt.len(), token, 30), expected);

    // And without the way over its own region: from the first one's, as another process maps it.
    let region = first.kv().fd().try_clone_to_owned().unwrap();
    let region = Arc::new(Region::open(region, first.kv().len(), false).unwrap());
    drop(first);
    second.reserve(3, tokens.count).unwrap();
    let mut beside = 0;
    for group in 0..KvHandle::groups(&from.geometry) {
        let planes = KvHandle::group_planes(&from.geometry, group);
        let peer = PeerSlot { region: &region, layout: &from, slot: 2 };
        second.mover().unwrap().load_from(peer, 3, tokens, planes, &mut || beside += 1).unwrap();
    }
    assert_eq!(beside, KvHandle::groups(&from.geometry));
    assert_eq!(continued(&mut second, 3, prompt.len(), token, 30), expected);
}

const LEASE: Duration = Duration::from_secs(10);

/// An engine whose KV others on this host read.
struct Owner {
    engine: CudaEngine,
    leases: Leases,
    lease: WorkerLease,
    shm: Option<ShmOwner>,
    folder: TempDir,
}

impl Owner {
    fn new(engine: CudaEngine) -> Owner {
        let EngineCard { layout, layout_hash, .. } = *engine.card();
        let (folder, leases) = (tempfile::tempdir().unwrap(), Leases::create(layout.slots).unwrap());
        let lease = WorkerLease::of(WorkerId::new("prefill-test").unwrap(), Role::Prefill, ModelKey::of("m"));
        let lease =
            WorkerLease { incarnation: 7, layout_hash, slots: layout.slots, host: host_id(), ..lease };
        let mut owner = Owner { engine, leases, lease, shm: None, folder };
        let shm = owner.listen();
        owner.lease.kv_socket = shm.path().display().to_string();
        owner.shm = Some(shm);
        owner
    }

    fn listen(&self) -> ShmOwner {
        let EngineCard { layout, layout_hash, .. } = *self.engine.card();
        let (kv, mover) = ((self.engine.kv().clone(), layout, layout_hash), self.engine.mover().unwrap());
        let (leases, arena) = (self.leases.clone(), Some(mover.arena()));
        ShmOwner::listen(self.folder.path(), &self.lease.worker, 7, kv, leases, arena).unwrap()
    }

    /// What an event would say of a slot's positions.
    fn handle(&self, sealed: &Sealed, slot: u32, tokens: TokenRange) -> KvHandle {
        let EngineCard { layout, layout_hash, .. } = *self.engine.card();
        self.engine.mover().unwrap().save(slot, tokens).unwrap();
        KvHandle {
            agent: self.lease.worker.clone(),
            incarnation: self.lease.incarnation,
            layout,
            layout_hash,
            slot,
            generation: sealed.generation(),
            tokens,
            checksums: sums(self.engine.kv(), &layout, slot, tokens),
            lease_remaining_ms: 10_000,
            capability: sealed.capability(),
        }
    }
}

fn peers(engine: &CudaEngine, choice: Choice) -> KvPeers {
    let options = KvOptions { choice, ..KvOptions::default() };
    KvPeers::new(engine.card().layout_hash, &options).on_gpu(engine.device())
}

/// From one engine's memory to another's, chunk by chunk: the same tokens, and no byte of it in the reader's region.
#[tokio::test]
async fn kv_goes_from_gpu_to_gpu() {
    let case = CASES[1];
    let prompt = &Reference::read(case).prompts[1].ids;
    let (mut first, mut second) = (on_gpu(case), on_gpu(case));
    let expected = alone(&mut first, 2, prompt, 30);
    let token = first.prefill(2, 0, prompt, Some(greedy(0))).unwrap().unwrap().token;
    let (owner, count) = (Owner::new(first), prompt.len() as u32);
    let sealed = owner.leases.seal(2, LEASE);
    let parts = [TokenRange { start: 0, count: 3 }, TokenRange { start: 3, count: count - 3 }];
    let handles = parts.map(|tokens| owner.handle(&sealed, 2, tokens));
    let peers = peers(&second, Choice::Auto);
    let way = peers.transport(&handles[0], Some(&owner.lease)).unwrap();
    let mut read = KvRead::begin(way, &handles[0]).unwrap();
    second.reserve(3, count).unwrap();
    let (mover, layout) = (second.mover().unwrap(), second.card().layout);
    let before = sums(second.kv(), &layout, 3, TokenRange { start: 0, count });
    for handle in &handles {
        let from = read.mapped_gpu(handle).expect("both ends can");
        read.piece_on_gpu(handle, &layout, || mover.load_from_gpu(&from, 3, handle.tokens)).unwrap();
    }
    assert_eq!((read.transport(), read.report().tokens), (FROM_GPU, count));
    assert_eq!(sums(second.kv(), &layout, 3, TokenRange { start: 0, count }), before);
    assert_eq!(continued(&mut second, 3, prompt.len(), token, 30), expected);
    drop(read);
    assert_eq!(owner.leases.held(), 0, "it was given back");
}

/// What is read from GPU to GPU is what was sealed, or an error.
#[tokio::test]
async fn what_comes_from_a_gpu_is_checked() {
    let case = CASES[0];
    let prompt = &Reference::read(case).prompts[1].ids;
    let (mut first, mut second) = (on_gpu(case), on_gpu(case));
    let tokens = TokenRange { start: 0, count: prompt.len() as u32 };
    first.prefill(1, 0, prompt, Some(greedy(0))).unwrap();
    let owner = Owner::new(first);
    let sealed = Mutex::new(Some(owner.leases.seal(1, LEASE)));
    let handle = owner.handle(sealed.lock().unwrap().as_ref().unwrap(), 1, tokens);
    second.reserve(0, tokens.count).unwrap();
    let (mover, layout) = (second.mover().unwrap(), second.card().layout);
    let peers = peers(&second, Choice::Auto);
    let way = peers.transport(&handle, Some(&owner.lease)).unwrap();
    let mut read = KvRead::begin(way, &handle).unwrap();
    let from = read.mapped_gpu(&handle).unwrap();
    let mut copied = |handle: &KvHandle, meanwhile: &dyn Fn()| {
        read.piece_on_gpu(handle, &layout, || {
            let sums = mover.load_from_gpu(&from, 0, tokens);
            meanwhile();
            sums
        })
    };
    copied(&handle, &|| ()).unwrap();
    let mut other = handle.clone();
    other.checksums[0] ^= 1;
    let error = copied(&other, &|| ()).unwrap_err();
    assert!(matches!(error, ReadError::Corrupt { group: 0, .. }), "{error}");
    // The slot is used again under the reader.
    let error = copied(&handle, &|| drop(sealed.lock().unwrap().take())).unwrap_err();
    assert!(matches!(error, ReadError::LeaseOver { .. }), "{error}");
    assert_eq!(read.report().tokens, tokens.count);
}

/// Where memory is not to be had from an owner's GPU, a read says so before it copies, and the region is there.
#[tokio::test]
async fn memory_of_a_gpu_is_given_to_who_has_a_lease() {
    let case = CASES[0];
    let prompt = &Reference::read(case).prompts[1].ids;
    let (mut first, second) = (on_gpu(case), on_gpu(case));
    let tokens = TokenRange { start: 0, count: prompt.len() as u32 };
    for slot in [1, 2] {
        first.prefill(slot, 0, prompt, Some(greedy(0))).unwrap();
    }
    let mut owner = Owner::new(first);
    let sealed = owner.leases.seal(1, LEASE);
    let handle = owner.handle(&sealed, 1, tokens);
    let auto = peers(&second, Choice::Auto);
    let has = |peers: &KvPeers, handle: &KvHandle, owner: &Owner| {
        let way = peers.transport(handle, Some(&owner.lease)).unwrap();
        assert!(way.mapped(&KvHandle { slot: 1, ..handle.clone() }).is_some(), "the region is there");
        way.mapped_gpu(handle).is_some()
    };
    let forged = |change: &dyn Fn(&mut KvHandle)| {
        let mut forged = handle.clone();
        change(&mut forged);
        forged
    };
    let refused = [
        forged(&|handle| handle.generation += 1),
        forged(&|handle| handle.capability ^= 1),
        // Under no lease, and with no memory.
        forged(&|handle| handle.slot = 2),
        forged(&|handle| handle.slot = 3),
        forged(&|handle| handle.tokens.count = 0),
    ];
    for refused in &refused {
        assert!(!has(&auto, refused, &owner), "{refused:?}");
        // The connection stands.
        assert!(has(&auto, &handle, &owner));
    }
    assert!(!has(&peers(&second, Choice::Shm), &handle, &owner), "it is not asked for");
    // The owner's memory is another sequence's by now.
    owner.engine.release(1);
    assert!(!has(&auto, &handle, &owner));
    owner.engine.prefill(1, 0, prompt, Some(greedy(0))).unwrap();
    assert!(has(&auto, &handle, &owner));
    // When the owner is gone, its memory is given up.
    drop(owner.shm.take());
    let give_up = Instant::now() + Duration::from_secs(10);
    while has(&auto, &handle, &owner) {
        assert!(Instant::now() < give_up, "the reader has not noticed");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One connection that broke does not keep a reader from an owner's GPU for good.
#[tokio::test]
async fn a_connection_that_broke_is_made_anew() {
    let case = CASES[0];
    let prompt = &Reference::read(case).prompts[1].ids;
    let (mut first, second) = (on_gpu(case), on_gpu(case));
    let tokens = TokenRange { start: 0, count: prompt.len() as u32 };
    first.prefill(1, 0, prompt, Some(greedy(0))).unwrap();
    let mut owner = Owner::new(first);
    let sealed = owner.leases.seal(1, LEASE);
    let handle = owner.handle(&sealed, 1, tokens);
    let peers = peers(&second, Choice::Auto);
    let region = |way: &dyn Transport| way.mapped(&handle).unwrap().clone();
    let way = peers.transport(&handle, Some(&owner.lease)).unwrap();
    assert!(way.mapped_gpu(&handle).is_some());
    let mapped = region(&*way);
    // The owner hangs up on everybody, and listens again.
    drop(owner.shm.take());
    owner.shm = Some(owner.listen());
    assert!(way.mapped_gpu(&handle).is_none(), "it is over");
    let give_up = Instant::now() + Duration::from_secs(10);
    loop {
        // Without a lease in the registry nobody is asked.
        let way = peers.transport(&handle, None).unwrap();
        assert!(way.mapped_gpu(&handle).is_none());
        let way = peers.transport(&handle, Some(&owner.lease)).unwrap();
        assert!(Arc::ptr_eq(&region(&*way), &mapped), "the region stays as it is");
        if way.mapped_gpu(&handle).is_some() {
            return;
        }
        assert!(Instant::now() < give_up, "the connection was not made anew");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What the region has of a slot's first positions.
fn kv_of(region: &Region, layout: &KvLayout, slot: u32, count: u32) -> Vec<f32> {
    let mut all = Vec::new();
    for (at, bytes) in layout.pieces(slot, TokenRange { start: 0, count }, 0..2 * layout.geometry.layers) {
        let mut piece = vec![0; bytes];
        region.read(at, &mut piece);
        all.extend(piece.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())));
    }
    all
}

/// Memory for one sequence, or a little more, and four that run: those that came last give theirs back and run again, and all come to
/// the same tokens. What is saved meanwhile is the KV of the prompt, or is said to be gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sequences_share_too_little_memory() {
    let case = CASES[0];
    let prompt = Reference::read(case).prompts[1].ids.clone();
    let first = TokenRange { start: 0, count: prompt.len() as u32 };
    let mut whole = with_options(case, &options()).unwrap();
    let (free, layout) = (whole.device().free_bytes().unwrap(), whole.card().layout);
    let expected = alone(&mut whole, 0, &prompt, 150);
    let one = whole.kv_bytes();
    whole.mover().unwrap().save(0, first).unwrap();
    let kv = Arc::new(kv_of(whole.kv(), &layout, 0, first.count));
    drop(whole);
    let small = CudaOptions { memory: 1.6 * one as f64 / free as f64, ..options() };
    let engine = CudaEngine::with_checkpoint(&Checkpoint::open(&dir(case)).unwrap(), &small).unwrap();
    let runner = Runner::start(Box::new(engine), Budget { chunk_tokens: 16, step_tokens: 16 });
    runner.started().await.unwrap();
    let mut running = Vec::new();
    for slot in 0..4 {
        let sequence = Sequence {
            slot,
            tokens: prompt.clone(),
            filled: 0,
            sampling: Arc::new(Sampling::GREEDY),
            next_index: 0,
            remaining: 150,
            eos: Arc::default(),
            processors: LogitsProcessors::default(),
        };
        let mut outputs = runner.add(sequence).await.unwrap();
        let (runner, kv) = (runner.clone(), kv.clone());
        running.push(tokio::spawn(async move {
            let (mut tokens, mut begun, mut saved) = (Vec::new(), 0, 0);
            while let Some(output) = outputs.recv().await {
                match output {
                    Output::Token(sampled) => tokens.push(sampled.token),
                    // A prompt that is run after tokens were drawn was preempted.
                    Output::Filled(_) => begun |= u32::from(!tokens.is_empty()),
                    Output::Failed(error) => panic!("{error}"),
                }
                match runner.mover().unwrap().save(slot, first) {
                    Ok(()) if is_exact() => {
                        let apart = logits_apart(&kv_of(runner.kv(), &layout, slot, first.count), &kv);
                        assert!(
                            apart < 1e-4,
                            "slot {slot}: the KV is {apart} apart after {} tokens",
                            tokens.len()
                        );
                        saved += 1;
                    }
                    Ok(()) | Err(EngineError::KvGone { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            runner.free(slot).await;
            (tokens, begun, saved)
        }));
    }
    let mut preempted = 0;
    for running in running {
        let (tokens, begun, saved) = running.await.unwrap();
        assert!(!is_exact() || (tokens == expected && saved > 0), "{tokens:?} and not {expected:?}");
        preempted += begun;
    }
    assert!(preempted > 0, "memory for one is enough for four");
    runner.stop().await;
}

#[test]
fn what_does_not_fit_is_told() {
    let case = CASES[0];
    let error = with_options(case, &CudaOptions { memory: 1.2e-4, ..options() }).err().unwrap().to_string();
    assert!(error.contains("a context of 199 tokens takes") && error.contains("--context"), "{error}");
    let error = with_options(case, &CudaOptions { device: 99, ..options() }).err().unwrap().to_string();
    assert!(error.contains("no GPU 99") && error.contains("--device cpu"), "{error}");
}

#[test]
fn a_full_slot_and_unknown_tokens_are_errors() {
    let mut engine = on_gpu(CASES[0]);
    let (limit, vocab) = (engine.card().context_limit, engine.card().vocab);
    assert_eq!(limit, 199);
    let error = engine.prefill(0, limit - 1, &[1, 2], None).unwrap_err();
    assert!(matches!(error, EngineError::ContextFull { .. }), "{error}");
    let error = engine.prefill(0, 0, &[vocab], None).unwrap_err();
    assert!(matches!(error, EngineError::UnknownToken { .. }), "{error}");
}
