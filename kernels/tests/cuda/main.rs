//! The CUDA kernels against their references, with their threads on a CPU: what they compute is the same on a GPU, how fast is
//! not. Their sources are C, so the C compiler that links Rust programs compiles them.

#![allow(unsafe_code)]

use forebay_kernels::{
    cuda::{NOT_FINITE, Pieces, RowDraw},
    exp, sample,
};
use forebay_schemas::{
    kv::{KvDtype, KvGeometry, KvLayout, TokenRange},
    sampling::Sampling,
};
use libloading::{Library, Symbol};
use proptest::prelude::*;
use std::{path::Path, process::Command, sync::Mutex, sync::OnceLock};

type RunKv = unsafe extern "C" fn(*const u8, *mut u8, *const Pieces, u32, u32);
type RunSample = unsafe extern "C" fn(*mut f32, u32, u32, *const RowDraw, *mut u32, u32, u32);

/// What blocks share is shared by all blocks here: one launch at a time.
static LAUNCH: Mutex<()> = Mutex::new(());

/// The kernels as a library.
fn kernels() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("libkernels.so");
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda");
        let status = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".to_owned()))
            .args([
                "-x",
                "c",
                "-std=gnu11",
                "-O2",
                "-ffp-contract=off",
                "-Wall",
                "-Werror",
                "-fPIC",
                "-shared",
                "-pthread",
            ])
            .args(["-fvisibility=hidden", "-I"])
            .arg(&here)
            .arg(here.join("kernels.c"))
            .arg("-o")
            .arg(&library)
            .status()
            .expect("there is a C compiler: Rust links with it");
        assert!(status.success(), "the kernels compile as C");
        // SAFETY: it was just made of the sources beside this test, and runs nothing when it is loaded.
        unsafe { Library::new(library) }.unwrap()
    })
}

fn run_kv(name: &str, from: &[u8], into: &mut [u8], of: &Pieces, pieces: u32, threads: u32) {
    let _one = LAUNCH.lock();
    // SAFETY: the kernel moves the pieces that the layout of both buffers has, and no more.
    unsafe {
        let run: Symbol<'_, RunKv> = kernels().get(name.as_bytes()).unwrap();
        run(from.as_ptr(), into.as_mut_ptr(), of, pieces, threads);
    }
}

fn run_sample(logits: &mut [f32], vocab: usize, stride: usize, draws: &[RowDraw], threads: u32) -> Vec<u32> {
    assert!(logits.len() >= stride * (draws.len() - 1) + vocab);
    let mut tokens = vec![12_345_678; draws.len()];
    let _one = LAUNCH.lock();
    // SAFETY: the rows were just checked to lie in the logits, and there is a token for each.
    unsafe {
        let run: Symbol<'_, RunSample> = kernels().get(b"run_sample").unwrap();
        let (vocab, stride, rows) = (vocab as u32, stride as u32, draws.len() as u32);
        run(logits.as_mut_ptr(), vocab, stride, draws.as_ptr(), tokens.as_mut_ptr(), rows, threads);
    }
    tokens
}

fn expected(logits: &[f32], sampling: &Sampling, index: u32) -> u32 {
    sample(&mut logits.to_vec(), sampling, index).unwrap_or(NOT_FINITE)
}

fn sampling() -> impl Strategy<Value = Sampling> {
    let temperature = prop_oneof![Just(0.0f32), 0.1f32..3.0];
    let top_p = prop_oneof![Just(1.0f32), Just(0.5), 0.01f32..1.0];
    let top_k = prop_oneof![Just(0u32), 1u32..40, 1u32..900];
    (temperature, top_p, top_k, any::<u64>()).prop_map(|(temperature, top_p, top_k, seed)| Sampling {
        temperature,
        top_p,
        top_k,
        seed,
    })
}

/// A row of logits: a few with nearly all of the mass, many alike, or all of them.
fn row() -> impl Strategy<Value = Vec<f32>> {
    let row = |logit: BoxedStrategy<f32>| prop::collection::vec(logit, 1..700);
    let any = prop_oneof![9 => -20f32..20.0, 1 => Just(-60.0), 1 => Just(f32::NEG_INFINITY)];
    let ties = (-3i32..3).prop_map(|x| x as f32 / 2.0);
    prop_oneof![
        row(any.boxed()),
        row(ties.boxed()),
        (0f32..1.0, 1usize..700).prop_map(|(logit, count)| vec![logit; count])
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_sampler_draws_what_the_cpu_draws(
        logits in row(),
        draws in prop::collection::vec((sampling(), any::<u32>()), 1..4),
        shift in 0usize..30,
        threads in prop_oneof![Just(1u32), Just(8), Just(32)],
    ) {
        let vocab = logits.len();
        let stride = vocab + shift;
        let mut rows = vec![f32::NAN; stride * draws.len()];
        for (number, row) in rows.chunks_mut(stride).enumerate() {
            row[..vocab].copy_from_slice(&logits);
            row[..vocab].rotate_left(number * shift % vocab);
        }
        let expected: Vec<u32> = rows
            .chunks(stride)
            .zip(&draws)
            .map(|(row, (sampling, index))| expected(&row[..vocab], sampling, *index))
            .collect();
        let on_gpu: Vec<RowDraw> = draws.iter().map(|(sampling, index)| RowDraw::new(sampling, *index)).collect();
        let weights = |row: &[f32], temperature: f32| -> Vec<u32> {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter().map(|logit| exp((logit - max) / temperature).to_bits()).collect()
        };
        let before = rows.clone();
        prop_assert_eq!(run_sample(&mut rows, vocab, stride, &on_gpu, threads), expected);
        for ((row, before), (sampling, _)) in rows.chunks(stride).zip(before.chunks(stride)).zip(&draws) {
            if sampling.temperature > 0.0 {
                let found: Vec<u32> = row[..vocab].iter().map(|weight| weight.to_bits()).collect();
                prop_assert_eq!(found, weights(&before[..vocab], sampling.temperature), "every bit of every weight");
            }
        }
    }

    #[test]
    fn pieces_are_gathered_and_scattered_as_the_layout_says(
        (layers, kv_heads, slots, positions) in (1u32..4, 1u32..4, 1u32..4, 1u32..40),
        (slot, start, count) in (0u32..4, 0u32..40, 1u32..40),
        first_plane in 0u32..8,
        f16: bool,
    ) {
        let dtype = if f16 { KvDtype::F16 } else { KvDtype::F32 };
        let layout = KvLayout { geometry: KvGeometry { layers, kv_heads, head_dim: 8, dtype }, slots, positions };
        let (slot, start) = (slot % slots, start % positions);
        let tokens = TokenRange { start, count: count.min(positions - start) };
        let planes = first_plane % (layers * 2)..layers * 2;
        let arena: Vec<u8> = (0..layout.region_bytes()).map(|at| (at * 31 + at / 255) as u8).collect();
        let mut gathered = Vec::new();
        let mut scattered = vec![0xa5; arena.len()];
        for (offset, bytes) in layout.pieces(slot, tokens, planes.clone()) {
            gathered.extend_from_slice(&arena[offset..offset + bytes]);
            scattered[offset..offset + bytes].copy_from_slice(&arena[offset..offset + bytes]);
        }
        let (of, pieces) = Pieces::new(&layout, slot, tokens, planes).unwrap();
        let mut staging = vec![0; gathered.len()];
        run_kv("run_kv_gather", &arena, &mut staging, &of, pieces, 4);
        prop_assert_eq!(&staging, &gathered);
        let mut into = vec![0xa5; arena.len()];
        run_kv("run_kv_scatter", &staging, &mut into, &of, pieces, 4);
        prop_assert_eq!(into, scattered);
    }
}

#[test]
fn a_vocabulary_of_a_real_model_is_drawn_from_alike() {
    let vocab = 151_936;
    let logits: Vec<f32> =
        (0..vocab).map(|id| ((id * 7919 % 100_003) as f32 / 100_003.0).powi(40) * 30.0 - 15.0).collect();
    for (temperature, top_p, top_k) in
        [(0.0, 1.0, 0), (1.0, 1.0, 0), (0.7, 0.9, 0), (1.3, 0.95, 50), (2.5, 0.999, 9000)]
    {
        let of = |seed| Sampling { temperature, top_p, top_k, seed };
        let mut rows = [&logits[..], &logits[..]].concat();
        let draws = [RowDraw::new(&of(1), 3), RowDraw::new(&of(2), 4)];
        let drawn = run_sample(&mut rows, vocab, vocab, &draws, 64);
        assert_eq!(drawn, [expected(&logits, &of(1), 3), expected(&logits, &of(2), 4)], "{:?}", of(1));
    }
}

#[test]
fn logits_that_are_no_numbers_are_told() {
    let draw = RowDraw::new(&Sampling { temperature: 1.0, top_p: 0.9, top_k: 5, seed: 1 }, 0);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut rows = vec![0.5; 40];
        rows[27] = bad;
        assert_eq!(run_sample(&mut rows, 20, 20, &[draw, draw], 8)[1], NOT_FINITE);
    }
    assert_eq!(run_sample(&mut [f32::NEG_INFINITY; 20], 20, 20, &[draw], 8), [NOT_FINITE]);
}
