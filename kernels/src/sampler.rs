//! Drawing a token: a pure function of (logits, parameters, seed, index).
//!
//! Randomness is Philox4x32-10 keyed by the request's seed and counted by the token's index, the only transcendental
//! function is our own polynomial, and probabilities are added as whole numbers, in whatever order. So a request that is
//! continued on another machine, or on a GPU (`kernels/cuda/sampler.cu`), draws the same token from the same logits.

use crate::with_wide_vectors;
use forebay_schemas::sampling::Sampling;

/// The logits hold a NaN or no finite largest value: there is no distribution to draw from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the logits are not finite")]
pub struct NotFinite;

/// Draws the token with number `index` of an output.
///
/// Temperature, then the `top_k` most probable, then the nucleus `top_p` of those, then those that have at least `min_p` of the
/// largest probability; among equally probable tokens the lower id comes first. Overwrites `logits` (one for each token of the vocabulary).
pub fn sample(logits: &mut [f32], sampling: &Sampling, index: u32) -> Result<u32, NotFinite> {
    let max = largest(logits)?;
    if sampling.temperature <= 0.0 {
        return Ok(logits.iter().position(|logit| *logit == max).expect("the largest is one of them") as u32);
    }
    let weights = logits;
    with_wide_vectors(|| {
        weights.iter_mut().for_each(|weight| *weight = exp((*weight - max) / sampling.temperature));
    });
    let last = least_kept(weights, sampling);
    for (id, weight) in weights.iter_mut().enumerate() {
        let kept = *weight > last.weight || (*weight == last.weight && id as u32 <= last.id);
        // The largest weight is 1.
        *weight = if kept && *weight >= sampling.min_p { *weight } else { 0.0 };
    }
    Ok(draw(weights, random(sampling.seed, index)))
}

/// The token at `at` / 2^64 of the cumulated weights, in order of ids.
fn draw(weights: &[f32], at: u64) -> u32 {
    let sums: Vec<u64> = with_wide_vectors(|| weights.chunks(CHUNK).map(sum).collect());
    let mut left = part(sums.iter().sum(), at, 64);
    for (chunk, sum) in sums.iter().enumerate() {
        if left >= *sum {
            left -= sum;
            continue;
        }
        for (id, weight) in (chunk * CHUNK..).zip(&weights[chunk * CHUNK..]) {
            let mass = mass(*weight);
            if left < mass {
                return id as u32;
            }
            left -= mass;
        }
    }
    unreachable!("it is less than the sum of all")
}

/// Weights that are summed or skipped together.
const CHUNK: usize = 64;

/// A weight from 0 to 1 as a whole number of parts in 2^40, to the nearest, so that a sum of them is the same in any order.
pub(crate) fn mass(weight: f32) -> u64 {
    // Of a number from 2^12 to 2^13, the last bit is worth 2^-40.
    const FROM: f64 = 4096.0;
    (f64::from(weight) + FROM).to_bits() - FROM.to_bits()
}

fn sum(weights: &[f32]) -> u64 {
    weights.iter().map(|weight| mass(*weight)).sum()
}

/// `fraction` / 2^`bits` of a mass, rounded down.
fn part(mass: u64, fraction: u64, bits: u32) -> u64 {
    ((u128::from(mass) * u128::from(fraction)) >> bits) as u64
}

/// All of a mass, as a fraction of 32 bits.
const WHOLE: f64 = 4_294_967_296.0;

/// A probability as a fraction of 32 bits.
pub(crate) fn nucleus_part(top_p: f32) -> u64 {
    (f64::from(top_p) * WHOLE) as u64
}

/// The mass that a nucleus must reach, of a whole.
fn nucleus(mass: u64, top_p: f32) -> u64 {
    part(mass, nucleus_part(top_p), 32).max(1)
}

/// The largest logit, if all are numbers and it is finite.
fn largest(logits: &[f32]) -> Result<f32, NotFinite> {
    const LANES: usize = 16;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut nan = [false; LANES];
    let mut chunks = logits.chunks_exact(LANES);
    for chunk in &mut chunks {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
            nan[lane] |= chunk[lane].is_nan();
        }
    }
    let rest = chunks.remainder();
    let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, logit| max.max(*logit));
    let nan = nan.contains(&true) || rest.iter().any(|logit| logit.is_nan());
    if nan || !max.is_finite() { Err(NotFinite) } else { Ok(max) }
}

/// e^x for x ≤ 0, within 2 ulp; 0 below −87. Written out (Cephes' polynomial over ±ln 2 / 2) so that it gives
/// the same bits on every machine and vectorizes: a vocabulary of 150,000 takes 0.1 ms.
pub fn exp(x: f32) -> f32 {
    // 1.5 · 2^23: in a sum with it the last bit of the mantissa is worth 1, so n = round(x / ln 2) stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4_f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + c;
    }
    let two_to_the_n = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    let value = (p * r * r + r + 1.0) * two_to_the_n;
    if x > -87.0 { value } else { 0.0 }
}

/// A token with its unnormalized probability.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    weight: f32,
    id: u32,
}

impl Candidate {
    /// Most probable first, then lowest id.
    fn order(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
        b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
    }
}

/// The last token, most probable first, that `top_k` and `top_p` leave.
fn least_kept(weights: &[f32], sampling: &Sampling) -> Candidate {
    let all = Candidate { weight: 0.0, id: u32::MAX };
    let limited = sampling.top_k > 0 && (sampling.top_k as usize) < weights.len();
    let is_nucleus = sampling.top_p < 1.0;
    if limited {
        let mut kept = most_probable(weights, sampling.top_k as usize);
        let target = nucleus(mass_of(&kept), sampling.top_p);
        let count = if is_nucleus { smallest_prefix(&mut kept, target) } else { kept.len() };
        return last_of(&mut kept, count);
    }
    if !is_nucleus {
        return all;
    }
    let target = nucleus(with_wide_vectors(|| sum(weights)), sampling.top_p);
    // Most distributions have their nucleus well above these floors, and then few candidates to select from.
    for floor in [2.0e-3, 1.0e-5, -1.0] {
        let mut kept: Vec<Candidate> = above(weights, floor).collect();
        if mass_of(&kept) >= target {
            let count = smallest_prefix(&mut kept, target);
            return last_of(&mut kept, count);
        }
    }
    all
}

fn mass_of(kept: &[Candidate]) -> u64 {
    kept.iter().map(|kept| mass(kept.weight)).sum()
}

fn above(weights: &[f32], floor: f32) -> impl Iterator<Item = Candidate> + '_ {
    weights
        .chunks(CHUNK)
        .enumerate()
        .filter(move |(_, chunk)| chunk.iter().fold(false, |any, weight| any | (*weight > floor)))
        .flat_map(|(chunk, weights)| {
            weights.iter().enumerate().map(move |(i, weight)| (chunk * CHUNK + i, *weight))
        })
        .filter(move |(_, weight)| *weight > floor)
        .map(|(id, weight)| Candidate { weight, id: id as u32 })
}

/// The `k` most probable tokens, in no order. One pass that skips chunks with nothing above the k-th so far.
fn most_probable(weights: &[f32], k: usize) -> Vec<Candidate> {
    let full = (2 * k).max(256);
    let mut kept: Vec<Candidate> = Vec::with_capacity(full.min(weights.len()) + CHUNK);
    let mut floor = -1.0;
    for (chunk, slice) in weights.chunks(CHUNK).enumerate() {
        if !slice.iter().fold(false, |any, weight| any | (*weight > floor)) {
            continue;
        }
        let first = (chunk * CHUNK) as u32;
        let candidates = slice.iter().zip(first..).map(|(weight, id)| Candidate { weight: *weight, id });
        kept.extend(candidates.filter(|candidate| candidate.weight > floor));
        if kept.len() >= full {
            cut(&mut kept, k);
            floor = kept[k - 1].weight;
        }
    }
    cut(&mut kept, k);
    kept
}

/// Cuts to the `k` most probable; the least of them ends up last.
fn cut(kept: &mut Vec<Candidate>, k: usize) {
    if kept.len() > k {
        kept.select_nth_unstable_by(k - 1, Candidate::order);
        kept.truncate(k);
    }
}

/// How many of the most probable candidates it takes to reach `target` mass: at least one. Partitions by
/// halves, in linear time.
fn smallest_prefix(kept: &mut [Candidate], mut target: u64) -> usize {
    let (mut low, mut high) = (0, kept.len());
    while high - low > 1 {
        let half = (high - low) / 2;
        kept[low..high].select_nth_unstable_by(half, Candidate::order);
        let mass = mass_of(&kept[low..low + half]);
        if mass >= target {
            high = low + half;
        } else {
            target -= mass;
            low += half;
        }
    }
    low + 1
}

fn last_of(kept: &mut [Candidate], count: usize) -> Candidate {
    *kept.select_nth_unstable_by(count - 1, Candidate::order).1
}

/// 64 random bits.
pub(crate) fn random(seed: u64, index: u32) -> u64 {
    let [a, b, ..] = philox([index, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    u64::from(a) << 32 | u64::from(b)
}

/// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sampling(temperature: f32, top_p: f32, top_k: u32, seed: u64) -> Sampling {
        Sampling { temperature, top_p, top_k, seed, ..Sampling::GREEDY }
    }

    #[test]
    fn min_p_is_a_part_of_the_largest_probability() {
        // Of 8, 4, 2 and 1 sixteenths, those that have a quarter of the largest or more.
        let logits: Vec<f32> = [8.0f32, 4.0, 2.0, 1.0].iter().map(|weight| weight.ln()).collect();
        let sampling = Sampling { min_p: 0.24, ..sampling(1.0, 1.0, 0, 3) };
        let mut counts = [0; 4];
        for index in 0..7000 {
            counts[sample(&mut logits.clone(), &sampling, index).unwrap() as usize] += 1;
        }
        assert_eq!(counts[3], 0);
        assert!((800..1200).contains(&counts[2]) && (3700..4300).contains(&counts[0]), "{counts:?}");
    }

    /// Known answers of Random123 1.14 (`tests/kat_vectors`, philox4x32 10).
    #[test]
    fn philox_gives_the_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(
            philox(pi, [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn exp_is_close_to_exact() {
        for i in 0..87_000 {
            let x = -(i as f32) / 1000.0;
            let exact = f64::from(x).exp();
            assert!(
                (f64::from(exp(x)) - exact).abs() <= exact * 2.5e-7,
                "exp({x}) = {}, not {exact}",
                exp(x)
            );
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let mut logits = vec![0.0; 1000];
        (logits[700], logits[300], logits[997]) = (3.0, 3.0, 3.0);
        assert_eq!(sample(&mut logits, &Sampling::GREEDY, 5), Ok(300));
    }

    #[test]
    fn logits_that_are_no_numbers_are_refused() {
        for bad in [f32::NAN, f32::INFINITY] {
            for at in [0, 17, 39] {
                let mut logits = vec![0.5; 40];
                logits[at] = bad;
                assert_eq!(sample(&mut logits.clone(), &Sampling::GREEDY, 0), Err(NotFinite));
                assert_eq!(sample(&mut logits, &sampling(1.0, 0.9, 5, 1), 0), Err(NotFinite));
            }
        }
        assert_eq!(sample(&mut [f32::NEG_INFINITY; 3], &Sampling::GREEDY, 0), Err(NotFinite));
        assert_eq!(sample(&mut [f32::NEG_INFINITY, 1.0], &sampling(1.0, 1.0, 0, 9), 0), Ok(1));
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        let probabilities = [0.5f32, 0.25, 0.125, 0.125];
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let mut counts = [0; 4];
        for index in 0..40_000 {
            counts[sample(&mut logits.clone(), &sampling(1.0, 1.0, 0, 42), index).unwrap() as usize] += 1;
        }
        for (count, p) in counts.iter().zip(probabilities) {
            let (expected, sigma) = (40_000.0 * p, (40_000.0 * p * (1.0 - p)).sqrt());
            assert!((*count as f32 - expected).abs() < 5.0 * sigma, "{counts:?}");
        }
    }

    /// What `sample` promises, by sorting everything.
    fn sorted_reference(logits: &[f32], sampling: &Sampling) -> Vec<u32> {
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let mut all: Vec<Candidate> = logits
            .iter()
            .zip(0..)
            .map(|(logit, id)| Candidate { weight: exp((logit - max) / sampling.temperature), id })
            .collect();
        all.sort_by(Candidate::order);
        if sampling.top_k > 0 {
            all.truncate(sampling.top_k as usize);
        }
        let target = nucleus(mass_of(&all), sampling.top_p);
        let mut reached = 0;
        let count = all.iter().position(|c| {
            reached += mass(c.weight);
            reached >= target
        });
        all.truncate(count.map_or(all.len(), |count| count + 1));
        all.iter().map(|c| c.id).collect()
    }

    proptest! {
        #[test]
        fn selection_agrees_with_a_full_sort(
            // Quarters make ties common.
            logits in prop::collection::vec((-40i32..40).prop_map(|x| x as f32 / 4.0), 1..700),
            temperature in 0.2f32..3.0,
            top_p in 0.05f32..0.999,
            top_k in 0u32..800,
        ) {
            let sampling = sampling(temperature, top_p, top_k, 0);
            let max = logits.iter().copied().fold(f32::MIN, f32::max);
            let weights: Vec<f32> = logits.iter().map(|logit| exp((logit - max) / temperature)).collect();
            let expected = sorted_reference(&logits, &sampling);
            let last = least_kept(&weights, &sampling);
            let kept = (0..weights.len() as u32)
                .filter(|id| Candidate::order(&Candidate { weight: weights[*id as usize], id: *id }, &last).is_le())
                .count();
            prop_assert_eq!(kept, expected.len());
        }

        #[test]
        fn a_draw_is_repeatable_and_among_the_kept(
            logits in prop::collection::vec(-10f32..10.0, 1..500),
            temperature in 0.1f32..3.0,
            top_p in 0.05f32..1.0,
            top_k in 0u32..600,
            seed: u64,
            index: u32,
        ) {
            let sampling = sampling(temperature, top_p, top_k, seed);
            let drawn = sample(&mut logits.clone(), &sampling, index).unwrap();
            prop_assert_eq!(drawn, sample(&mut logits.clone(), &sampling, index).unwrap());
            prop_assert!(sorted_reference(&logits, &sampling).contains(&drawn));
        }

        #[test]
        fn top_k_of_one_is_greedy(logits in prop::collection::vec(-9f32..9.0, 1..300), seed: u64, index: u32) {
            let greedy = sample(&mut logits.clone(), &Sampling::GREEDY, 0);
            prop_assert_eq!(sample(&mut { logits }, &sampling(1.0, 1.0, 1, seed), index), greedy);
        }
    }
}
