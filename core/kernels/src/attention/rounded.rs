//! The forward pass over pages of bf16 in f32 lanes: for processors without tiles, and for widths that are no whole tiles. Bit for
//! bit what `tiles.rs` computes, in the order of matrix tiles and in that of pairs.

use super::forward::{Input, Kept, Output, ask_for, hide};
use super::pages::{last_keys, pairs, round};
use super::{AttentionSeq, AttentionShape, CHUNK_PAGES, KV_BLOCK};
use crate::convert::bf16_bits;
use crate::math::{exp, exp_within, ln};
use crate::simd::{LANES, Lanes};
use crate::threads::SharedMut;
use std::cell::RefCell;
use std::ops::Range;

/// Dimensions of a block of a score.
const DIMS: usize = 2 * LANES;

/// Below e to this a weight is taken as zero: no product with a value is subnormal then (`TINY`, in `pages.rs`).
const LEAST: f32 = -38.0;

thread_local!(static QUERIES: RefCell<Vec<f32>> = RefCell::default());

/// A weight of the softmax, from a score less the maximum, which is not positive.
#[inline(always)]
pub(super) fn weight<S: Lanes>(x: S) -> S {
    // A NaN passes through both.
    x.select_lt(S::splat(LEAST), S::splat(0.0), exp_within(S::splat(LEAST).max(x)))
}

/// Computes `rows` of a sequence for the queries of a key-value head.
#[inline(always)]
pub(super) fn rows_of<S: Lanes, const BY_PAIRS: bool>(
    input: &Input,
    kept: Kept<u32>,
    seq: &AttentionSeq,
    kv_head: usize,
    rows: Range<usize>,
    output: &Output,
) {
    let group = input.shape.group();
    let (mut i, end) = (rows.start * group, rows.end * group);
    let mut q = QUERIES.take();
    while i < end {
        i += match end - i {
            8.. => queries::<S, BY_PAIRS, 8>(input, kept, seq, kv_head, i, &mut q, output),
            4.. => queries::<S, BY_PAIRS, 4>(input, kept, seq, kv_head, i, &mut q, output),
            3 => queries::<S, BY_PAIRS, 3>(input, kept, seq, kv_head, i, &mut q, output),
            2 => queries::<S, BY_PAIRS, 2>(input, kept, seq, kv_head, i, &mut q, output),
            _ => queries::<S, BY_PAIRS, 1>(input, kept, seq, kv_head, i, &mut q, output),
        };
    }
    QUERIES.set(q);
}

/// Weights of a chunk's keys.
type Weights = [f32; CHUNK_PAGES * LANES];

/// Computes queries `first..first + N` of a sequence (counted by row, then head of the group) together, so that each
/// key and value is read once for all; returns `N`. Plain loops, not closures: those might be compiled apart, without
/// the instruction set.
#[inline(always)]
fn queries<S: Lanes, const BY_PAIRS: bool, const N: usize>(
    input: &Input,
    kept: Kept<u32>,
    seq: &AttentionSeq,
    kv_head: usize,
    first: usize,
    q: &mut Vec<f32>,
    output: &Output,
) -> usize {
    let AttentionShape { heads, head_dim, value_dim, scale, mask, .. } = input.shape;
    let group = input.shape.group();
    let mut positions = [0; N];
    let mut index = [0; N];
    q.resize(N * head_dim, 0.0);
    for i in 0..N {
        let (row, head) = ((first + i) / group, (first + i) % group);
        positions[i] = seq.position + row;
        index[i] = (seq.first_row + row) * heads + kv_head * group + head;
        for (out, &q) in q[i * head_dim..].iter_mut().zip(&input.q[index[i] * head_dim..][..head_dim]) {
            *out = round(q);
        }
        // SAFETY: each (row, head) belongs to one task, and within it to one call of this function.
        unsafe { output.out.slice(index[i] * value_dim, value_dim) }.fill(0.0);
    }
    let (mut max, mut sum) = ([f32::MIN; N], [0.0f32; N]);
    let end = seq.position + seq.rows;
    let last = (mask.end_visible(positions[N - 1], end) - 1) / KV_BLOCK;
    let first_block = mask.first_visible(positions[0]) / KV_BLOCK;
    for chunk in first_block / CHUNK_PAGES..=last / CHUNK_PAGES {
        let start = chunk * CHUNK_PAGES;
        let blocks = first_block.max(start)..(last + 1).min(start + CHUNK_PAGES);
        let mut all = [[S::splat(f32::NEG_INFINITY); N]; CHUNK_PAGES];
        let mut values: [&[u32]; CHUNK_PAGES] = [&[]; CHUNK_PAGES];
        for block in blocks.clone() {
            if block < last {
                // Each page starts a stream that the processor's own prefetcher does not foresee.
                ask_for::<S, u32>(&input.shape, kept, seq.pages[block + 1], kv_head);
            }
            values[block - start] = input.shape.value_page(kept.v, seq.pages[block], kv_head);
            let keys = input.shape.key_page(kept.k, seq.pages[block], kv_head);
            let scores = scores::<S, BY_PAIRS, N>(q, keys, head_dim);
            for i in 0..N {
                let visible = mask.visible_lanes(positions[i], block, end);
                let score = scores[i].mul(S::splat(scale));
                all[block - start][i] = hide(score, (visible.start, visible.end), f32::NEG_INFINITY);
            }
        }
        let mut weights = [[0.0; CHUNK_PAGES * LANES]; N];
        let (mut rescale, mut sums) = ([0.0f32; LANES], [0.0f32; N]);
        for i in 0..N {
            let mut best = all[0][i];
            for scores in &all[1..] {
                best = best.max(scores[i]);
            }
            let best = best.max_lane();
            let new_max = if best > max[i] { best } else { max[i] };
            rescale[i] = max[i] - new_max;
            max[i] = new_max;
            let mut total = S::splat(0.0);
            for (scores, weights) in all.iter().zip(weights[i].as_chunks_mut::<LANES>().0) {
                let p = weight(scores[i].sub(S::splat(new_max)));
                total = total.add(p);
                p.store(weights);
            }
            sums[i] = total.sum();
            for p in &mut weights[i] {
                *p = f32::from_bits(u32::from(bf16_bits(*p)) << 16);
            }
        }
        let rescale = exp(S::load(&rescale)).to_array();
        for i in 0..N {
            sum[i] = sum[i].mul_add(rescale[i], sums[i]);
        }
        let values = &values[blocks.start - start..blocks.end - start];
        accumulate::<S, BY_PAIRS, N>(&output.out, &index, &rescale, &weights, blocks.start - start, values, value_dim);
    }
    for i in 0..N {
        let inverse = S::splat(1.0 / sum[i]);
        // SAFETY: as above.
        let out = unsafe { output.out.slice(index[i] * value_dim, value_dim) };
        for out in out.chunks_mut(LANES) {
            S::read(out, 0.0).mul(inverse).write(out);
        }
        if let Some(lse) = &output.lse {
            // SAFETY: as above.
            unsafe { lse.slice(index[i], 1)[0] = max[i] + ln(sum[i]) };
        }
    }
    N
}

/// Scores of `N` queries `q [N][dims]` against a page of sixteen keys.
#[inline(always)]
fn scores<S: Lanes, const BY_PAIRS: bool, const N: usize>(q: &[f32], keys: &[u32], dims: usize) -> [S; N] {
    assert!(q.len() == N * dims && 2 * keys.len() == dims * KV_BLOCK);
    let mut sums = [S::splat(0.0); N];
    for block in (0..dims).step_by(DIMS) {
        let end = dims.min(block + DIMS);
        let mut even = if BY_PAIRS { sums } else { [S::splat(0.0); N] };
        let mut odd = [S::splat(0.0); N];
        for d in (block..end - end % 2).step_by(2) {
            // SAFETY: `d + 1 < dims`, so this line is inside the page, by the assertion.
            let line = unsafe { keys.get_unchecked(d / 2 * KV_BLOCK..(d / 2 + 1) * KV_BLOCK) };
            let (first, second) = pairs::<S>(line);
            for i in 0..N {
                // SAFETY: as above.
                let (a, b) = unsafe { (*q.get_unchecked(i * dims + d), *q.get_unchecked(i * dims + d + 1)) };
                add_pair::<S, BY_PAIRS>((a, b), (first, second), &mut even[i], &mut odd[i]);
            }
        }
        if end % 2 == 1 {
            let last = last_keys::<S>(&keys[end / 2 * KV_BLOCK..]);
            for i in 0..N {
                even[i] = S::splat(q[i * dims + end - 1]).fma(last, even[i]);
            }
        }
        for i in 0..N {
            sums[i] = add_block::<S, BY_PAIRS>(sums[i], even[i], odd[i]);
        }
    }
    sums
}

/// Adds products of a pair to the sums of a block, `even` and `odd`; by pairs, both to `even`, which goes on from block to block.
#[inline(always)]
fn add_pair<S: Lanes, const BY_PAIRS: bool>(x: (f32, f32), w: (S, S), even: &mut S, odd: &mut S) {
    if BY_PAIRS {
        *even = S::splat(x.1).fma(w.1, *even);
    } else {
        *odd = S::splat(x.1).fma(w.1, *odd);
    }
    *even = S::splat(x.0).fma(w.0, *even);
}

/// The sum with a block's.
#[inline(always)]
fn add_block<S: Lanes, const BY_PAIRS: bool>(sum: S, even: S, odd: S) -> S {
    if BY_PAIRS { even } else { sum.add(even.add(odd)) }
}

/// For `N` queries, rows `index` of `out`: `out = out·rescale + Σ weight·value`, over the pages `values`, the first of which
/// is page `first` of the chunk.
#[inline(always)]
fn accumulate<S: Lanes, const BY_PAIRS: bool, const N: usize>(
    out: &SharedMut<f32>,
    index: &[usize; N],
    rescale: &[f32; LANES],
    weights: &[Weights; N],
    first: usize,
    values: &[&[u32]],
    value_dim: usize,
) {
    assert!(values.iter().all(|page| 2 * page.len() == value_dim * KV_BLOCK));
    assert!(first + values.len() <= CHUNK_PAGES);
    for at in (0..value_dim).step_by(LANES) {
        let width = LANES.min(value_dim - at);
        let mut sums = [S::splat(0.0); N];
        for (page, values) in (first..).zip(values) {
            let mut even = if BY_PAIRS { sums } else { [S::splat(0.0); N] };
            let mut odd = [S::splat(0.0); N];
            for pair in 0..KV_BLOCK / 2 {
                let from = pair * value_dim + at;
                // SAFETY: `at + width <= value_dim`, so this is inside the page, by the assertion.
                let line = unsafe { values.get_unchecked(from..from + width) };
                let (first, second) = pairs::<S>(line);
                let key = page * KV_BLOCK + 2 * pair;
                for i in 0..N {
                    // SAFETY: `page < CHUNK_PAGES`, by the assertion.
                    let (a, b) =
                        unsafe { (*weights[i].get_unchecked(key), *weights[i].get_unchecked(key + 1)) };
                    add_pair::<S, BY_PAIRS>((a, b), (first, second), &mut even[i], &mut odd[i]);
                }
            }
            for i in 0..N {
                sums[i] = add_block::<S, BY_PAIRS>(sums[i], even[i], odd[i]);
            }
        }
        for i in 0..N {
            // SAFETY: each (row, head) belongs to one task.
            let out = unsafe { out.slice(index[i] * value_dim + at, width) };
            S::read(out, 0.0).fma(S::splat(rescale[i]), sums[i]).write(out);
        }
    }
}
