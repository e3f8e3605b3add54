//! Decoding over pages: parts of a sequence's pages are shared out to threads and joined at the end, and within a part four
//! pages at a time have one maximum, one vector of sums, and one rescaling.

use super::{check, exp};
use crate::Threads;
use crate::attention::{AttentionMask, AttentionSeq, AttentionShape, KV_BLOCK};
use crate::simd::LANES;
use crate::threads::SharedMut;
use half::bf16;
use std::arch::x86_64::{
    __m512, _MM_HINT_T0, _mm_prefetch, _mm256_loadu_si256, _mm512_add_ps, _mm512_castsi512_ps,
    _mm512_cvtepu16_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_blend_ps, _mm512_max_ps,
    _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_reduce_max_ps, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_slli_epi32, _mm512_storeu_ps, _mm512_sub_ps,
};
use std::ops::Range;

/// Pages that are computed together.
const PAGES: usize = 4;
/// Queries of a key-value head that are computed together.
const MOST_QUERIES: usize = 4;
/// Widest value head.
const MOST_DIMS: usize = 256;
/// Tasks for each thread.
const TASKS_PER_THREAD: usize = 4;

/// Decoding of one row for each of some sequences.
pub(in crate::measure) struct Decode<'a, C> {
    pub shape: AttentionShape,
    pub q: &'a [f32],
    pub k_pages: &'a [C],
    pub v_pages: &'a [C],
    pub seqs: &'a [AttentionSeq<'a>],
}

/// A number that pages hold.
pub(in crate::measure) trait Cell: Copy + Sync {
    /// Sixteen of them.
    ///
    /// # Safety
    /// AVX-512 is there, and `at` is to sixteen numbers.
    unsafe fn load(at: *const Self) -> __m512;
}

impl Cell for f32 {
    #[inline(always)]
    unsafe fn load(at: *const Self) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(at) }
    }
}

impl Cell for bf16 {
    #[inline(always)]
    unsafe fn load(at: *const Self) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()))))
        }
    }
}

/// Whether it can be computed here: causal, and value heads of a multiple of sixteen up to 256.
pub(in crate::measure) fn can_decode(shape: &AttentionShape) -> bool {
    shape.mask == AttentionMask::Causal
        && shape.value_dim.is_multiple_of(LANES)
        && shape.value_dim <= MOST_DIMS
}

/// What a part of the pages gives a query.
#[derive(Clone, Copy)]
struct Partial {
    max: f32,
    sum: f32,
    out: [f32; MOST_DIMS],
}

const NOTHING: Partial = Partial { max: f32::NEG_INFINITY, sum: 0.0, out: [0.0; MOST_DIMS] };

impl<C: Cell> Decode<'_, C> {
    /// Computes `out [T, heads·value_dim]`. `split` shares out parts of a sequence where there are fewer heads than tasks wanted.
    ///
    /// # Panics
    /// When it is not possible, a sequence has several rows, or a length does not fit.
    pub(in crate::measure) fn run(&self, threads: &Threads, split: bool, out: &mut [f32]) {
        check();
        let shape = &self.shape;
        assert!(can_decode(shape) && self.seqs.iter().all(|seq| seq.rows == 1));
        assert_eq!(self.q.len(), self.seqs.len() * shape.heads * shape.head_dim);
        assert_eq!(out.len(), self.seqs.len() * shape.heads * shape.value_dim);
        let group = shape.heads / shape.kv_heads;
        let heads = self.seqs.len() * shape.kv_heads;
        let blocks = self.seqs.iter().map(|seq| seq.position / KV_BLOCK + 1).max().unwrap_or(1);
        let wanted = if split { (TASKS_PER_THREAD * threads.count()).div_ceil(heads) } else { 1 };
        let parts = wanted.min(blocks.div_ceil(PAGES)).max(1);
        let out = SharedMut::new(out);
        let at = |head: usize, query: usize| {
            let (seq, kv_head) = (head / shape.kv_heads, head % shape.kv_heads);
            (self.seqs[seq].first_row * shape.heads + kv_head * group + query) * shape.value_dim
        };
        // All queries of a head, over a part of the blocks.
        let compute = |head: usize, part: usize, take: &mut dyn FnMut(usize, &[Partial])| {
            let (seq, kv_head) = (head / shape.kv_heads, head % shape.kv_heads);
            let blocks = self.seqs[seq].position / KV_BLOCK + 1;
            let blocks = blocks * part / parts..blocks * (part + 1) / parts;
            for first in (0..group).step_by(MOST_QUERIES) {
                let mut found = [NOTHING; MOST_QUERIES];
                let found = &mut found[..MOST_QUERIES.min(group - first)];
                // SAFETY: `check` found the instructions.
                unsafe { self.queries(seq, kv_head, first, blocks.clone(), found) };
                take(first, found);
            }
        };
        if parts == 1 {
            return threads.for_each_chunk(heads, 1, &|heads| {
                for head in heads {
                    compute(head, 0, &mut |first, found| {
                        for (query, found) in found.iter().enumerate() {
                            // SAFETY: a head has its rows to itself.
                            let out = unsafe { out.slice(at(head, first + query), shape.value_dim) };
                            join(std::iter::once(found), out);
                        }
                    });
                }
            });
        }
        let mut all = vec![NOTHING; heads * parts * group];
        let shared = SharedMut::new(&mut all);
        threads.for_each(heads * parts, &|task| {
            compute(task / parts, task % parts, &mut |first, found| {
                // SAFETY: a task has its results to itself.
                unsafe { shared.slice(task * group + first, found.len()) }.copy_from_slice(found);
            });
        });
        for (head, found) in all.chunks_exact(parts * group).enumerate() {
            for query in 0..group {
                // SAFETY: rows are written one after the other, here alone.
                let out = unsafe { out.slice(at(head, query), shape.value_dim) };
                join(found.iter().skip(query).step_by(group), out);
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    fn queries(&self, seq: usize, kv_head: usize, first: usize, blocks: Range<usize>, found: &mut [Partial]) {
        match found.len() {
            1 => self.part::<1>(seq, kv_head, first, blocks, found),
            2 => self.part::<2>(seq, kv_head, first, blocks, found),
            3 => self.part::<3>(seq, kv_head, first, blocks, found),
            _ => self.part::<4>(seq, kv_head, first, blocks, found),
        }
    }

    #[expect(
        clippy::needless_range_loop,
        reason = "plain loops over registers: closures might be compiled apart"
    )]
    #[target_feature(enable = "avx512f")]
    fn part<const N: usize>(
        &self,
        seq: usize,
        kv_head: usize,
        first: usize,
        blocks: Range<usize>,
        found: &mut [Partial],
    ) {
        let AttentionShape { heads, kv_heads, head_dim, value_dim, scale, .. } = self.shape;
        let seq = &self.seqs[seq];
        let (k_len, v_len) = (head_dim * KV_BLOCK, value_dim * KV_BLOCK);
        let key =
            |block: usize| &self.k_pages[(seq.pages[block] as usize * kv_heads + kv_head) * k_len..][..k_len];
        let value =
            |block: usize| &self.v_pages[(seq.pages[block] as usize * kv_heads + kv_head) * v_len..][..v_len];
        let query = seq.first_row * heads + kv_head * (heads / kv_heads) + first;
        let q = &self.q[query * head_dim..][..N * head_dim];
        let mut sums = [_mm512_setzero_ps(); N];
        let scale = _mm512_set1_ps(scale);
        for start in blocks.clone().step_by(PAGES) {
            let count = PAGES.min(blocks.end - start);
            let mut keys: [&[C]; PAGES] = [&[]; PAGES];
            let mut values: [&[C]; PAGES] = [&[]; PAGES];
            for j in 0..PAGES {
                (keys[j], values[j]) = (key(start + j.min(count - 1)), value(start + j.min(count - 1)));
            }
            let mut scores = dots::<C, N>(q, &keys, &values);
            let last = (seq.position + 1).saturating_sub((start + count - 1) * KV_BLOCK).min(LANES);
            let mut p = [[0.0f32; PAGES * LANES]; N];
            for i in 0..N {
                for j in 0..PAGES {
                    let lanes = if j + 1 < count {
                        LANES
                    } else if j < count {
                        last
                    } else {
                        0
                    };
                    let mask = ((1u32 << lanes) - 1) as u16;
                    let score = _mm512_mul_ps(scores[i][j], scale);
                    scores[i][j] = _mm512_mask_blend_ps(mask, _mm512_set1_ps(f32::NEG_INFINITY), score);
                }
                let best = scores[i].into_iter().reduce(|a, b| _mm512_max_ps(a, b)).expect("there are some");
                let max = found[i].max.max(_mm512_reduce_max_ps(best));
                let rescale = (found[i].max - max).exp();
                found[i].max = max;
                sums[i] = _mm512_mul_ps(sums[i], _mm512_set1_ps(rescale));
                for j in 0..count {
                    let e = exp(_mm512_sub_ps(scores[i][j], _mm512_set1_ps(max)));
                    sums[i] = _mm512_add_ps(sums[i], e);
                    // SAFETY: j < PAGES, and a row of `p` has sixteen values for each page.
                    unsafe { _mm512_storeu_ps(p[i].as_mut_ptr().add(j * LANES), e) };
                }
                if rescale != 1.0 {
                    let out = found[i].out[..value_dim].as_chunks_mut::<LANES>().0;
                    for out in out {
                        // SAFETY: sixteen values.
                        unsafe {
                            let x = _mm512_mul_ps(_mm512_loadu_ps(out.as_ptr()), _mm512_set1_ps(rescale));
                            _mm512_storeu_ps(out.as_mut_ptr(), x);
                        }
                    }
                }
            }
            let rows = (count - 1) * KV_BLOCK + last;
            let mut at = 0;
            while at < value_dim {
                at += match value_dim - at {
                    64.. => weigh::<C, N, 4>(&p, &values, rows, value_dim, at, found),
                    32.. => weigh::<C, N, 2>(&p, &values, rows, value_dim, at, found),
                    _ => weigh::<C, N, 1>(&p, &values, rows, value_dim, at, found),
                };
            }
        }
        for i in 0..N {
            found[i].sum = _mm512_reduce_add_ps(sums[i]);
        }
    }
}

/// Scores of `N` queries against the keys of four pages; asks for their values on the way.
#[expect(
    clippy::needless_range_loop,
    reason = "plain loops over registers: closures might be compiled apart"
)]
#[target_feature(enable = "avx512f")]
fn dots<C: Cell, const N: usize>(
    q: &[f32],
    keys: &[&[C]; PAGES],
    values: &[&[C]; PAGES],
) -> [[__m512; PAGES]; N] {
    let dims = keys[0].len() / KV_BLOCK;
    assert!(keys.iter().all(|keys| keys.len() == dims * KV_BLOCK) && q.len() == N * dims);
    let mut sums = [[_mm512_setzero_ps(); PAGES]; N];
    for d in 0..dims {
        for j in 0..PAGES {
            // SAFETY: d < dims; what is asked for may lie anywhere.
            let key = unsafe {
                _mm_prefetch::<_MM_HINT_T0>(values[j].as_ptr().wrapping_add(d * LANES).cast());
                C::load(keys[j].as_ptr().add(d * KV_BLOCK))
            };
            for i in 0..N {
                // SAFETY: i < N and d < dims.
                let q = _mm512_set1_ps(unsafe { *q.get_unchecked(i * dims + d) });
                sums[i][j] = _mm512_fmadd_ps(q, key, sums[i][j]);
            }
        }
    }
    sums
}

/// Adds the first `rows` values, weighed, to dimensions `at..at + 16·WIDTH`; returns their number.
#[expect(
    clippy::needless_range_loop,
    reason = "plain loops over registers: closures might be compiled apart"
)]
#[target_feature(enable = "avx512f")]
fn weigh<C: Cell, const N: usize, const WIDTH: usize>(
    p: &[[f32; PAGES * LANES]; N],
    values: &[&[C]; PAGES],
    rows: usize,
    value_dim: usize,
    at: usize,
    found: &mut [Partial],
) -> usize {
    assert!(at + WIDTH * LANES <= value_dim && value_dim <= MOST_DIMS && rows <= PAGES * KV_BLOCK);
    assert!(values.iter().all(|values| values.len() == KV_BLOCK * value_dim) && found.len() == N);
    let mut sums = [[_mm512_setzero_ps(); WIDTH]; N];
    for i in 0..N {
        for c in 0..WIDTH {
            // SAFETY: inside `out`, by the assertions.
            sums[i][c] = unsafe { _mm512_loadu_ps(found[i].out.as_ptr().add(at + c * LANES)) };
        }
    }
    for row in 0..rows {
        let mut value = [_mm512_setzero_ps(); WIDTH];
        for c in 0..WIDTH {
            let from = values[row / KV_BLOCK].as_ptr();
            // SAFETY: inside the page, by the assertions.
            value[c] = unsafe { C::load(from.add(row % KV_BLOCK * value_dim + at + c * LANES)) };
        }
        for i in 0..N {
            let p = _mm512_set1_ps(p[i][row]);
            for c in 0..WIDTH {
                sums[i][c] = _mm512_fmadd_ps(p, value[c], sums[i][c]);
            }
        }
    }
    for i in 0..N {
        for c in 0..WIDTH {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(found[i].out.as_mut_ptr().add(at + c * LANES), sums[i][c]) };
        }
    }
    WIDTH * LANES
}

/// The output of a query from those of its parts.
fn join<'a>(parts: impl Iterator<Item = &'a Partial> + Clone, out: &mut [f32]) {
    let max = parts.clone().fold(f32::NEG_INFINITY, |max, part| max.max(part.max));
    let (mut sum, dims) = (0.0, out.len());
    out.fill(0.0);
    for part in parts {
        let weight = (part.max - max).exp();
        sum += weight * part.sum;
        out.iter_mut().zip(&part.out[..dims]).for_each(|(out, value)| *out += weight * value);
    }
    out.iter_mut().for_each(|out| *out /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{KvPages, attention};
    use crate::measure::free::available;
    use crate::testing::{Random, assert_close, wide};

    #[test]
    fn outputs_are_those_of_the_exact_kernel() {
        if !available() {
            return eprintln!("skipped: no AVX-512 with BF16");
        }
        let mut random = Random(10);
        for (heads, kv_heads, head_dim, value_dim) in
            [(3, 3, 32, 32), (9, 3, 64, 64), (8, 4, 64, 48), (6, 1, 40, 112)]
        {
            let mask = AttentionMask::Causal;
            let shape = AttentionShape { heads, kv_heads, head_dim, value_dim, scale: 0.3, mask };
            let pages: Vec<u32> = (0..40).map(|i| (i * 7) % 40).collect();
            let k_pages = random.vec(40 * shape.k_page_len());
            let v_pages = random.vec(40 * shape.v_page_len());
            let seq = |first_row, position, pages| AttentionSeq { first_row, rows: 1, position, pages };
            let seqs = [
                seq(0, 0, &pages[..]),
                seq(1, 15, &pages[3..]),
                seq(2, 16, &pages[5..]),
                seq(3, 413, &pages[7..]),
            ];
            let q = random.vec(4 * heads * head_dim);
            let mut want = vec![0.0; 4 * heads * value_dim];
            let mut got = want.clone();
            for threads in [Threads::single(), Threads::new(3)] {
                let decode = Decode { shape, q: &q, k_pages: &k_pages, v_pages: &v_pages, seqs: &seqs };
                let pages = KvPages::F32 { k: &k_pages, v: &v_pages };
                attention(&threads, &shape, &q, pages, &seqs, &mut want, None);
                for split in [false, true] {
                    decode.run(&threads, split, &mut got);
                    assert_close(&got, &wide(&want), 1e-5, &format!("{shape:?}, split: {split}"));
                }
                let round = |x: &[f32]| x.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>();
                let (k, v) = (round(&k_pages), round(&v_pages));
                let widen = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
                let (k_wide, v_wide) = (widen(&k), widen(&v));
                let pages = KvPages::F32 { k: &k_wide, v: &v_wide };
                attention(&threads, &shape, &q, pages, &seqs, &mut want, None);
                Decode { shape, q: &q, k_pages: &k, v_pages: &v, seqs: &seqs }.run(&threads, true, &mut got);
                assert_close(&got, &wide(&want), 1e-5, &format!("{shape:?}, bf16"));
            }
        }
    }
}
