//! Rows by themselves: rounding, norms, log-sum-exp, the router's choice.

use super::{check, exp};
use crate::Threads;
use crate::simd::LANES;
use crate::softmax::RowStats;
use crate::threads::SharedMut;
use std::arch::x86_64::{
    __m256bh, __m256i, __m512, _mm256_loadu_si256, _mm256_storeu_si256, _mm512_add_ps, _mm512_castsi512_ps,
    _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_blend_ps,
    _mm512_maskz_loadu_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_reduce_max_ps,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_sub_ps,
};

/// Sums under way at once.
const SUMS: usize = 4;

/// `x` rounded to bf16, zeros after its end.
pub(in crate::measure) fn to_bf16(x: &[f32], out: &mut [u16]) {
    check();
    assert!(out.len() >= x.len());
    // SAFETY: `check` found the instructions.
    unsafe { round(x, out) };
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn round(x: &[f32], out: &mut [u16]) {
    let (whole, rest) = x.as_chunks::<LANES>();
    let (out, tail) = out.split_at_mut(whole.len() * LANES);
    for (x, out) in whole.iter().zip(out.as_chunks_mut::<LANES>().0) {
        // SAFETY: sixteen values.
        store_bf16(unsafe { _mm512_loadu_ps(x.as_ptr()) }, out);
    }
    tail.fill(0);
    for (x, out) in rest.iter().zip(tail) {
        *out = crate::convert::bf16_bits(*x);
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn store_bf16(x: __m512, out: &mut [u16; LANES]) {
    // SAFETY: both types are 256 bits.
    let bits = unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)) };
    // SAFETY: sixteen values of 16 bits.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), bits) };
}

#[target_feature(enable = "avx512f")]
fn load_bf16(x: &[u16; LANES]) -> __m512 {
    // SAFETY: sixteen values of 16 bits.
    let bits = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
}

#[target_feature(enable = "avx512f")]
fn load(x: &[f32; LANES]) -> __m512 {
    // SAFETY: sixteen values.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

#[target_feature(enable = "avx512f")]
fn total(sums: [__m512; SUMS]) -> __m512 {
    _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]))
}

/// RMS norm with four sums.
///
/// # Panics
/// When the width, `weight.len()`, is no multiple of sixteen or lengths do not fit.
pub(in crate::measure) fn norm_f32(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    check();
    let width = weight.len();
    assert!(width.is_multiple_of(LANES) && x.len().is_multiple_of(width) && x.len() == out.len());
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        // SAFETY: `check` found the instructions.
        unsafe { norm_row_f32(x.as_chunks().0, weight.as_chunks().0, eps, out.as_chunks_mut().0) };
    }
}

#[target_feature(enable = "avx512f")]
fn norm_row_f32(x: &[[f32; LANES]], weight: &[[f32; LANES]], eps: f32, out: &mut [[f32; LANES]]) {
    let mut sums = [_mm512_setzero_ps(); SUMS];
    for x in x.chunks(SUMS) {
        for (sum, x) in sums.iter_mut().zip(x) {
            let x = load(x);
            *sum = _mm512_fmadd_ps(x, x, *sum);
        }
    }
    let mean = _mm512_reduce_add_ps(total(sums)) / (x.len() * LANES) as f32;
    let factor = _mm512_set1_ps(1.0 / (mean + eps).sqrt());
    for ((x, weight), out) in x.iter().zip(weight).zip(out) {
        let value = _mm512_mul_ps(_mm512_mul_ps(load(x), factor), load(weight));
        // SAFETY: sixteen values.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), value) };
    }
}

/// RMS norm of bf16 rows with a bf16 weight, to bf16.
///
/// # Panics
/// As [`norm_f32`].
pub(in crate::measure) fn norm_bf16(x: &[u16], weight: &[u16], eps: f32, out: &mut [u16]) {
    check();
    let width = weight.len();
    assert!(width.is_multiple_of(LANES) && x.len().is_multiple_of(width) && x.len() == out.len());
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        // SAFETY: `check` found the instructions.
        unsafe { norm_row_bf16(x.as_chunks().0, weight.as_chunks().0, eps, out.as_chunks_mut().0) };
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn norm_row_bf16(x: &[[u16; LANES]], weight: &[[u16; LANES]], eps: f32, out: &mut [[u16; LANES]]) {
    let mut sums = [_mm512_setzero_ps(); SUMS];
    for x in x.chunks(SUMS) {
        for (sum, x) in sums.iter_mut().zip(x) {
            let x = load_bf16(x);
            *sum = _mm512_fmadd_ps(x, x, *sum);
        }
    }
    let mean = _mm512_reduce_add_ps(total(sums)) / (x.len() * LANES) as f32;
    let factor = _mm512_set1_ps(1.0 / (mean + eps).sqrt());
    for ((x, weight), out) in x.iter().zip(weight).zip(out) {
        store_bf16(_mm512_mul_ps(_mm512_mul_ps(load_bf16(x), factor), load_bf16(weight)), out);
    }
}

/// Maximum and log-sum-exp of each row of `vocabulary` logits; threads take rows, or as many parts of them.
pub(in crate::measure) fn row_stats(
    threads: &Threads,
    logits: &[f32],
    vocabulary: usize,
    parts: usize,
) -> Vec<RowStats> {
    check();
    let rows = logits.len() / vocabulary;
    let mut found = vec![(0.0, 0.0); rows * parts];
    let shared = SharedMut::new(&mut found);
    threads.for_each(rows * parts, &|task| {
        let row = &logits[task / parts * vocabulary..][..vocabulary];
        let bound = |part: usize| row.len() * part / parts;
        let part = &row[bound(task % parts)..bound(task % parts + 1)];
        // SAFETY: a task has its value to itself; `check` found the instructions.
        unsafe { shared.slice(task, 1)[0] = max_and_sum(part) };
    });
    let joined = found.chunks_exact(parts).map(|parts| {
        let max = parts.iter().fold(f32::NEG_INFINITY, |max, part| max.max(part.0));
        let sum: f32 = parts.iter().map(|part| part.1 * (part.0 - max).exp()).sum();
        RowStats { max, log_sum: sum.ln(), log_sum_exp: max + sum.ln() }
    });
    joined.collect()
}

#[target_feature(enable = "avx512f")]
fn max_and_sum(x: &[f32]) -> (f32, f32) {
    let (whole, rest) = x.as_chunks::<LANES>();
    let mask = (1u16 << rest.len()).wrapping_sub(1);
    let least = _mm512_set1_ps(f32::NEG_INFINITY);
    // SAFETY: the mask leaves out what is not there.
    let last = unsafe { _mm512_mask_blend_ps(mask, least, _mm512_maskz_loadu_ps(mask, rest.as_ptr())) };
    let mut max = [last; 2 * SUMS];
    for x in whole.chunks(2 * SUMS) {
        for (max, x) in max.iter_mut().zip(x) {
            *max = _mm512_max_ps(*max, load(x));
        }
    }
    let max = max.into_iter().reduce(|a, b| _mm512_max_ps(a, b)).expect("there are some");
    let max = _mm512_reduce_max_ps(max);
    let shift = _mm512_set1_ps(max);
    let mut sums = [_mm512_setzero_ps(); SUMS];
    for x in whole.chunks(SUMS) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum = _mm512_add_ps(*sum, exp(_mm512_sub_ps(load(x), shift)));
        }
    }
    let mut sum = _mm512_reduce_add_ps(total(sums));
    sum += rest.iter().map(|x| (x - max).exp()).sum::<f32>();
    (max, sum)
}

/// The `k` experts of the largest logits and their shares among each other, for rows of `experts`.
pub(in crate::measure) fn softmax_top_k(
    logits: &[f32],
    experts: usize,
    k: usize,
    ids: &mut [u16],
    weights: &mut [f32],
) {
    for ((logits, ids), weights) in
        logits.chunks_exact(experts).zip(ids.chunks_exact_mut(k)).zip(weights.chunks_exact_mut(k))
    {
        // Insertion into the best so far.
        let mut kept = 0;
        for (id, &logit) in logits.iter().enumerate() {
            if kept == k && logit <= weights[k - 1] {
                continue;
            }
            let mut at = if kept < k { kept } else { k - 1 };
            kept = (kept + 1).min(k);
            while at > 0 && weights[at - 1] < logit {
                (ids[at], weights[at]) = (ids[at - 1], weights[at - 1]);
                at -= 1;
            }
            (ids[at], weights[at]) = (id as u16, logit);
        }
        let (best, mut sum) = (weights[0], 0.0);
        for weight in weights.iter_mut() {
            *weight = (*weight - best).exp();
            sum += *weight;
        }
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::free::available;
    use crate::norm::{NormScale, rms_norm};
    use crate::testing::{Random, assert_close, wide};
    use crate::{router, softmax};

    #[test]
    fn norms_are_those_of_the_exact_kernels() {
        if !available() {
            return eprintln!("skipped: no AVX-512 with BF16");
        }
        let mut random = Random(7);
        for width in [16, 48, 64, 576, 1040] {
            let (mut x, mut weight) = (random.vec(3 * width), random.vec(width));
            crate::convert::round_to_bf16(&mut x);
            crate::convert::round_to_bf16(&mut weight);
            let (mut want, mut got) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            rms_norm(&Threads::single(), &x, width, NormScale::Weight(&weight), 1e-5, &mut want);
            norm_f32(&x, &weight, 1e-5, &mut got);
            assert_close(&got, &wide(&want), 1e-6, "f32");
            let bits = |x: &[f32]| x.iter().map(|x| (x.to_bits() >> 16) as u16).collect::<Vec<_>>();
            let mut rounded = vec![0; x.len()];
            norm_bf16(&bits(&x), &bits(&weight), 1e-5, &mut rounded);
            got = rounded.iter().map(|bits| f32::from_bits(u32::from(*bits) << 16)).collect();
            assert_close(&got, &wide(&want), 4e-3, "bf16");
        }
    }

    #[test]
    fn log_sums_are_those_of_the_exact_kernels() {
        if !available() {
            return eprintln!("skipped: no AVX-512 with BF16");
        }
        let mut random = Random(8);
        for threads in [Threads::single(), Threads::new(3)] {
            for (rows, vocabulary) in [(1, 5), (1, 49_152), (3, 8195), (9, 130)] {
                let logits: Vec<f32> = random.vec(rows * vocabulary).iter().map(|x| 12.0 * x).collect();
                for parts in [1, 4] {
                    let got = row_stats(&threads, &logits, vocabulary, parts);
                    assert_eq!(got.len(), rows);
                    for (got, row) in got.iter().zip(logits.chunks_exact(vocabulary)) {
                        let want = softmax::row_stats(row, 1.0);
                        assert_eq!(got.max, want.max);
                        assert_close(&[got.log_sum_exp], &[f64::from(want.log_sum_exp)], 1e-5, "log-sum-exp");
                    }
                }
            }
        }
    }

    #[test]
    fn the_router_chooses_as_the_exact_one() {
        let mut random = Random(9);
        for (experts, k) in [(4, 1), (16, 2), (64, 8), (5, 5)] {
            let logits = random.vec(20 * experts);
            let (mut ids, mut weights) = (vec![0; 20 * k], vec![0.0; 20 * k]);
            let (mut want_ids, mut want) = (ids.clone(), weights.clone());
            softmax_top_k(&logits, experts, k, &mut ids, &mut weights);
            router::softmax_top_k(&logits, experts, k, true, &mut want_ids, &mut want);
            assert_eq!(ids, want_ids);
            assert_close(&weights, &wide(&want), 1e-5, "weights");
        }
    }
}
