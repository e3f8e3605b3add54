//! The forward pass: tasks of (sequence, key-value head, a run of rows), each query by the order in `mod.rs`; here that of
//! pages of f32.

use super::pages::Cell;
#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{AttentionSeq, AttentionShape, KV_BLOCK, KvPages, rounded};
use crate::Threads;
use crate::isa;
use crate::math::{exp, ln};
use crate::simd::{LANES, Lanes, simd};
use crate::threads::SharedMut;
use std::ops::Range;

/// Rows of one task.
const ROWS_PER_TASK: usize = 32;

/// Parts that tasks are cut into for each thread, and the most tasks of a part.
const PARTS_PER_THREAD: usize = 16;
const MAX_RUN: usize = 8;

/// Bytes of a line of memory.
const LINE_BYTES: usize = 64;

/// Multiply-adds below which other threads are not woken.
const MIN_WORK: usize = 1 << 17;

/// Computes attention of `q [T, heads·head_dim]` over the pages, to `out [T, heads·value_dim]`; `lse [T, heads]`, where
/// given, gets each query's log-sum-exp of scores, which [`super::attention_backward`] needs. Rows of no sequence are
/// left as they are. The keys and values of these rows must be in the pages ([`super::kv_write`]).
///
/// # Panics
/// When a length does not fit the shapes, or a page id is past the pages.
pub fn attention(
    threads: &Threads,
    shape: &AttentionShape,
    q: &[f32],
    pages: KvPages,
    seqs: &[AttentionSeq],
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    let width = shape.heads * shape.head_dim;
    let rows = q.len() / width;
    assert!(
        q.len() == rows * width && out.len() == rows * shape.heads * shape.value_dim,
        "attention: q is [T, heads*head_dim], out is [T, heads*value_dim]"
    );
    shape.check(seqs, rows, &pages);
    assert!(lse.as_ref().is_none_or(|lse| lse.len() == rows * shape.heads), "attention: lse is [T, heads]");
    let work = seqs.iter().map(|seq| seq.rows * (seq.position + seq.rows) * width).sum::<usize>();
    let output = Output { out: SharedMut::new(out), lse: lse.map(SharedMut::new) };
    let input = Input { shape: *shape, q, pages, by_pairs: isa::current().adds_pairs() };
    // Little work is not worth waking other threads for.
    let single = Threads::single();
    let threads = if work < MIN_WORK { &single } else { threads };
    #[cfg(target_arch = "x86_64")]
    if let KvPages::Bf16 { k, v } = pages
        && tiles::take(shape)
    {
        return tiles::run(threads, &input, Kept { k, v }, seqs, &output);
    }
    let mut tasks = Vec::with_capacity(seqs.len() * shape.kv_heads);
    for (s, seq) in seqs.iter().enumerate() {
        for first in (0..seq.rows).step_by(ROWS_PER_TASK) {
            let rows = first..seq.rows.min(first + ROWS_PER_TASK);
            tasks.extend((0..shape.kv_heads).map(|kv_head| (s, kv_head, rows.clone())));
        }
    }
    let run = |range: Range<usize>| {
        for task in range.clone() {
            if let Some((s, kv_head, _)) = tasks[..range.end].get(task + 1) {
                ask_for_first_page(&input, &seqs[*s], *kv_head);
            }
            let (s, kv_head, rows) = tasks[task].clone();
            run_task(&input, &seqs[s], kv_head, rows, &output);
        }
    };
    // Tasks of a token each are short: a thread takes a few at a time.
    let run_len = (tasks.len() / (PARTS_PER_THREAD * threads.count())).clamp(1, MAX_RUN);
    threads.for_each(tasks.len().div_ceil(run_len), &|part| {
        run(part * run_len..tasks.len().min((part + 1) * run_len));
    });
}

pub(super) struct Input<'a> {
    pub shape: AttentionShape,
    pub q: &'a [f32],
    pub pages: KvPages<'a>,
    /// The order of products over pages of bf16: said once, by the thread that asks.
    pub by_pairs: bool,
}

/// The pages that a task reads, of one kind of number.
#[derive(Clone, Copy)]
pub(super) struct Kept<'a, C> {
    pub k: &'a [C],
    pub v: &'a [C],
}

pub(super) struct Output {
    pub out: SharedMut<f32>,
    pub lse: Option<SharedMut<f32>>,
}

simd! {
    fn run_task<S>(input: &Input, seq: &AttentionSeq, kv_head: usize, rows: Range<usize>, output: &Output) {
        match input.pages {
            KvPages::F32 { k, v } => rows_of::<S>(input, Kept { k, v }, seq, kv_head, rows, output),
            KvPages::Bf16 { k, v } if input.by_pairs => {
                rounded::rows_of::<S, true>(input, Kept { k, v }, seq, kv_head, rows, output)
            }
            KvPages::Bf16 { k, v } => {
                rounded::rows_of::<S, false>(input, Kept { k, v }, seq, kv_head, rows, output)
            }
        }
    }
}

/// Computes `rows` of a sequence for the queries of a key-value head.
#[inline(always)]
fn rows_of<S: Lanes>(
    input: &Input,
    kept: Kept<f32>,
    seq: &AttentionSeq,
    kv_head: usize,
    rows: Range<usize>,
    output: &Output,
) {
    let group = input.shape.group();
    let (mut i, end) = (rows.start * group, rows.end * group);
    while i < end {
        // As many as a decoded token has heads to a key-value head, if it can be: each key is then read once.
        i += match end - i {
            8.. => queries::<S, 8, 1>(input, kept, seq, kv_head, i, output),
            7 => queries::<S, 7, 1>(input, kept, seq, kv_head, i, output),
            5.. => queries::<S, 5, 2>(input, kept, seq, kv_head, i, output),
            4 => queries::<S, 4, 2>(input, kept, seq, kv_head, i, output),
            3 => queries::<S, 3, 3>(input, kept, seq, kv_head, i, output),
            2 => queries::<S, 2, 4>(input, kept, seq, kv_head, i, output),
            _ => queries::<S, 1, 6>(input, kept, seq, kv_head, i, output),
        };
    }
}

simd! {
    /// Asks for what a task of `seq` reads first.
    fn ask_for_first_page<S>(input: &Input, seq: &AttentionSeq, kv_head: usize) {
        let first = input.shape.mask.first_visible(seq.position) / KV_BLOCK;
        if let Some(&page) = seq.pages.get(first) {
            match input.pages {
                KvPages::F32 { k, v } => ask_for::<S, f32>(&input.shape, Kept { k, v }, page, kv_head),
                KvPages::Bf16 { k, v } => ask_for::<S, u32>(&input.shape, Kept { k, v }, page, kv_head),
            }
        }
    }
}

/// Asks for a page's keys and values.
#[inline(always)]
pub(super) fn ask_for<S: Lanes, C: Cell>(shape: &AttentionShape, kept: Kept<C>, page: u32, kv_head: usize) {
    let line = LINE_BYTES / size_of::<C>();
    let keys = shape.key_page(kept.k, page, kv_head);
    (0..keys.len()).step_by(line).for_each(|at| S::prefetch(keys, at));
    let values = shape.value_page(kept.v, page, kv_head);
    (0..values.len()).step_by(line).for_each(|at| S::prefetch(values, at));
}

/// Computes queries `first..first + N` of a sequence (counted by row, then head of the group) together, so that each
/// key and value is read once for all; returns `N`. Scores of `AHEAD` blocks are computed at a time: each is a chain of
/// dependent operations, and a processor has room for about eight. Plain loops, not closures: those might be compiled apart, without
/// the instruction set.
#[inline(always)]
fn queries<S: Lanes, const N: usize, const AHEAD: usize>(
    input: &Input,
    kept: Kept<f32>,
    seq: &AttentionSeq,
    kv_head: usize,
    first: usize,
    output: &Output,
) -> usize {
    let AttentionShape { heads, head_dim, value_dim, scale, mask, .. } = input.shape;
    let group = input.shape.group();
    let mut positions = [0; N];
    let mut index = [0; N];
    let mut q_rows: [&[f32]; N] = [&[]; N];
    for i in 0..N {
        let (row, head) = ((first + i) / group, (first + i) % group);
        positions[i] = seq.position + row;
        index[i] = (seq.first_row + row) * heads + kv_head * group + head;
        q_rows[i] = &input.q[index[i] * head_dim..][..head_dim];
        // SAFETY: each (row, head) belongs to one task, and within it to one call of this function.
        unsafe { output.out.slice(index[i] * value_dim, value_dim) }.fill(0.0);
    }
    let (mut max, mut sum) = ([f32::NEG_INFINITY; N], [0.0f32; N]);
    let end = seq.position + seq.rows;
    let last = (mask.end_visible(positions[N - 1], end) - 1) / KV_BLOCK;
    let first_block = mask.first_visible(positions[0]) / KV_BLOCK;
    let mut ahead = [[S::splat(0.0); N]; AHEAD];
    for block in first_block..=last {
        let page = seq.pages[block];
        if block < last {
            // Each page starts a stream that the processor's own prefetcher does not foresee.
            ask_for::<S, f32>(&input.shape, kept, seq.pages[block + 1], kv_head);
        }
        if (block - first_block).is_multiple_of(AHEAD) {
            let mut keys: [&[f32]; AHEAD] = [&[]; AHEAD];
            for (j, keys) in keys.iter_mut().enumerate() {
                *keys = input.shape.key_page(kept.k, seq.pages[last.min(block + j)], kv_head);
            }
            ahead = scores::<S, N, AHEAD>(&q_rows, &keys, scale);
        }
        let scores = ahead[(block - first_block) % AHEAD];
        let mut lanes = [(0, 0); N];
        let mut p = [[0.0f32; LANES]; N];
        let mut rescale = [0.0f32; LANES];
        for i in 0..N {
            let visible = mask.visible_lanes(positions[i], block, end);
            lanes[i] = (visible.start, visible.end);
            if !visible.is_empty() {
                let score = hide::<S>(scores[i], lanes[i], f32::NEG_INFINITY);
                let block_max = score.max_lane();
                let new_max = if block_max > max[i] { block_max } else { max[i] };
                rescale[i] = max[i] - new_max;
                max[i] = new_max;
                hide(exp(score.sub(S::splat(new_max))), lanes[i], 0.0).store(&mut p[i]);
            }
        }
        let rescale = exp(S::load(&rescale)).to_array();
        for i in 0..N {
            sum[i] = sum[i].mul_add(rescale[i], S::load(&p[i]).sum());
        }
        let values = input.shape.value_page(kept.v, page, kv_head);
        if lanes == [(0, LANES); N] {
            accumulate::<S, N>(&output.out, &index, &rescale, &p, (0, LANES), values, value_dim);
        } else if lanes == [lanes[0]; N] && lanes[0].0 < lanes[0].1 {
            accumulate::<S, N>(&output.out, &index, &rescale, &p, lanes[0], values, value_dim);
        } else {
            for i in 0..N {
                if lanes[i].0 < lanes[i].1 {
                    let (index, rescale, p) = ([index[i]], [rescale[i]; LANES], [p[i]]);
                    accumulate::<S, 1>(&output.out, &index, &rescale, &p, lanes[i], values, value_dim);
                }
            }
        }
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

/// Scores of `N` queries against the sixteen keys of each page `[head_dim][16]`.
#[inline(always)]
pub(super) fn scores<S: Lanes, const N: usize, const PAGES: usize>(
    q_rows: &[&[f32]; N],
    pages: &[&[f32]; PAGES],
    scale: f32,
) -> [[S; N]; PAGES] {
    let dims = pages[0].len() / KV_BLOCK;
    assert!(pages.iter().all(|keys| keys.len() == dims * KV_BLOCK));
    assert!(q_rows.iter().all(|q_row| q_row.len() == dims));
    let mut sums = [[S::splat(0.0); N]; PAGES];
    for d in 0..dims {
        for (keys, sums) in pages.iter().zip(&mut sums) {
            // SAFETY: `d < dims`, and pages and rows have that many keys and values, by the assertions.
            let key = S::read(unsafe { keys.get_unchecked(d * KV_BLOCK..(d + 1) * KV_BLOCK) }, 0.0);
            for i in 0..N {
                // SAFETY: as above.
                sums[i] = S::splat(unsafe { *q_rows[i].get_unchecked(d) }).fma(key, sums[i]);
            }
        }
    }
    for sum in sums.as_flattened_mut() {
        *sum = sum.mul(S::splat(scale));
    }
    sums
}

/// `value` with lanes outside `visible` (start, end) replaced by `fill`.
#[inline(always)]
pub(super) fn hide<S: Lanes>(value: S, visible: (usize, usize), fill: f32) -> S {
    const LANE: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
    if visible == (0, LANES) {
        return value;
    }
    let (lane, fill) = (S::load(&LANE), S::splat(fill));
    let value = lane.select_lt(S::splat(visible.1 as f32), value, fill);
    lane.select_lt(S::splat(visible.0 as f32), fill, value)
}

/// For `N` queries, rows `index` of `out`: `out = out·rescale`, then adds weight·row for the keys of `visible` (start, end)
/// among the sixteen `rows`, ascending.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "`key` names a row and a weight of each query alike")]
pub(super) fn accumulate<S: Lanes, const N: usize>(
    out: &SharedMut<f32>,
    index: &[usize; N],
    rescale: &[f32; LANES],
    weights: &[[f32; LANES]; N],
    visible: (usize, usize),
    rows: &[f32],
    head_dim: usize,
) {
    assert!(rows.len() == KV_BLOCK * head_dim && visible.1 <= KV_BLOCK);
    for at in (0..head_dim).step_by(LANES) {
        let width = LANES.min(head_dim - at);
        let mut sums = [S::splat(0.0); N];
        for i in 0..N {
            // SAFETY: each (row, head) belongs to one task.
            let out = unsafe { out.slice(index[i] * head_dim + at, width) };
            sums[i] = S::read(out, 0.0).mul(S::splat(rescale[i]));
        }
        for key in visible.0..visible.1 {
            // SAFETY: `key < 16` and `at + width <= head_dim`, so this is inside `rows` by the assertion.
            let row =
                S::read(unsafe { rows.get_unchecked(key * head_dim + at..key * head_dim + at + width) }, 0.0);
            for i in 0..N {
                sums[i] = S::splat(weights[i][key]).fma(row, sums[i]);
            }
        }
        for i in 0..N {
            // SAFETY: as above.
            sums[i].write(unsafe { out.slice(index[i] * head_dim + at, width) });
        }
    }
}
