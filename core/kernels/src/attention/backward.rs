//! The backward pass: probabilities are computed again from the saved log-sum-exp (Dao 2023, FlashAttention-2).
//!
//! One task a (family, key-value head), a family being a sequence from position 0 and the branches that continue its
//! first rows: key blocks of the trunk ascending, then each branch's own; and for each block the queries that see it, by
//! sequence, row, then head. dk and dv thus add queries in ascending order, dq adds key blocks in ascending order.

use super::forward::{accumulate, hide, scores};
use super::pages;
use super::{AttentionMask, AttentionSeq, AttentionShape, KV_BLOCK, KvPages};
use crate::Threads;
use crate::math::exp;
use crate::simd::{LANES, Lanes, simd};
use crate::threads::SharedMut;
use std::cell::RefCell;

/// Computes the gradients of [`super::attention`]: `dq [T, heads·head_dim]`, `dk [T, kv_heads·head_dim]` and
/// `dv [T, kv_heads·value_dim]`, all overwritten in the rows of `seqs`. `out` and `lse` are what the forward pass gave;
/// the pages hold its keys and values.
///
/// A sequence at position p > 0 is a *branch*: it continues the first p rows of the last sequence before it that starts
/// at 0, its *trunk*. Its whole pages of those rows are the trunk's own, a partial one is a copy.
///
/// # Panics
/// When a length does not fit the shapes, or a branch has no trunk of at least p rows.
#[expect(clippy::too_many_arguments, reason = "the operands of one op")]
pub fn attention_backward(
    threads: &Threads,
    shape: &AttentionShape,
    q: &[f32],
    pages: KvPages,
    seqs: &[AttentionSeq],
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let width = shape.heads * shape.head_dim;
    assert!(q.len().is_multiple_of(width), "attention_backward: q is [T, heads*head_dim]");
    let rows = q.len() / width;
    shape.check(seqs, rows, &pages);
    let out_len = rows * shape.heads * shape.value_dim;
    assert!(
        out.len() == out_len && dout.len() == out_len && dq.len() == q.len(),
        "attention_backward: out and dout are [T, heads*value_dim], dq is as q"
    );
    let kv_rows = rows * shape.kv_heads;
    assert!(
        dk.len() == kv_rows * shape.head_dim && dv.len() == kv_rows * shape.value_dim,
        "attention_backward: dk is [T, kv_heads*head_dim], dv is [T, kv_heads*value_dim]"
    );
    assert_eq!(lse.len(), rows * shape.heads, "attention_backward: lse is [T, heads]");
    let families = families(seqs);
    let mut rounded = ROUNDED.take();
    let q = if let KvPages::Bf16 { .. } = pages {
        // What the forward pass attended with; the gradient passes through the rounding, as that of keys and values does.
        rounded.resize(q.len(), 0.0);
        threads.for_each_row_chunk(&mut rounded, width, MIN_ROUNDED / width + 1, |first, rows| {
            round_to(&q[first * width..][..rows.len()], rows);
        });
        &rounded
    } else {
        q
    };
    let input = Input { shape: *shape, q, pages, out, lse, dout };
    let output = Output { dq: SharedMut::new(dq), dk: SharedMut::new(dk), dv: SharedMut::new(dv) };
    threads.for_each(families.len() * shape.kv_heads, &|task| {
        let mut scratch = SCRATCH.take();
        run_task(&input, families[task / shape.kv_heads], task % shape.kv_heads, &output, &mut scratch);
        SCRATCH.set(scratch);
    });
    ROUNDED.set(rounded);
}

simd! {
    fn round_to<S>(x: &[f32], out: &mut [f32]) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out = pages::round(x);
        }
    }
}

/// Every trunk with the branches that follow it.
fn families<'a, 'b>(seqs: &'b [AttentionSeq<'a>]) -> Vec<&'b [AttentionSeq<'a>]> {
    let families: Vec<_> = seqs.chunk_by(|_, next| next.position > 0).collect();
    for family in &families {
        let (trunk, branches) = (&family[0], &family[1..]);
        let fits = trunk.position == 0 && branches.iter().all(|branch| branch.position <= trunk.rows);
        assert!(fits, "attention_backward: a branch continues rows that its trunk does not have");
    }
    families
}

struct Input<'a> {
    shape: AttentionShape,
    q: &'a [f32],
    pages: KvPages<'a>,
    out: &'a [f32],
    lse: &'a [f32],
    dout: &'a [f32],
}

struct Output {
    dq: SharedMut<f32>,
    dk: SharedMut<f32>,
    dv: SharedMut<f32>,
}

/// One key block's keys by dimension and by row, values by dimension, and gradients by dimension; and Σ dout·out of every
/// query.
#[derive(Default)]
struct Scratch {
    /// `[head_dim][16]`, as the page has them
    page: Vec<f32>,
    /// `[16][head_dim]`
    keys: Vec<f32>,
    /// `[value_dim][16]`
    values: Vec<f32>,
    /// `[head_dim][16]`
    dk: Vec<f32>,
    /// `[value_dim][16]`
    dv: Vec<f32>,
    /// `[rows][group]`
    delta: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    /// Queries as they were attended with.
    static ROUNDED: RefCell<Vec<f32>> = RefCell::default();
}

/// Values to round that are worth waking a thread for.
const MIN_ROUNDED: usize = 1 << 15;

simd! {
    fn run_task<S>(
        input: &Input,
        family: &[AttentionSeq],
        kv_head: usize,
        output: &Output,
        scratch: &mut Scratch,
    ) {
        let AttentionShape { heads, head_dim, value_dim, .. } = input.shape;
        let group = input.shape.group();
        scratch.delta.clear();
        for seq in family {
            for i in 0..seq.rows * group {
                let index = (seq.first_row + i / group) * heads + kv_head * group + i % group;
                let range = index * value_dim..(index + 1) * value_dim;
                scratch.delta.push(dot::<S>(&input.dout[range.clone()], &input.out[range]));
                // SAFETY: each (row, head) belongs to this task alone.
                unsafe { output.dq.slice(index * head_dim, head_dim) }.fill(0.0);
            }
        }
        let trunk = &family[0];
        for block in 0..trunk.rows.div_ceil(KV_BLOCK) {
            load_block::<S>(input, trunk.pages[block], kv_head, scratch);
            let mut delta = 0;
            for seq in family {
                // A branch that starts within the block sees its own copy of it instead.
                if seq.position == 0 || block < seq.position / KV_BLOCK {
                    block_queries::<S>(input, seq, kv_head, block, delta, output, scratch);
                }
                delta += seq.rows * group;
            }
            for row in block * KV_BLOCK..trunk.rows.min((block + 1) * KV_BLOCK) {
                store_key(input, trunk.first_row + row, kv_head, row % KV_BLOCK, false, output, scratch);
            }
        }
        let mut delta = trunk.rows * group;
        for branch in &family[1..] {
            let end = branch.position + branch.rows;
            for block in branch.position / KV_BLOCK..end.div_ceil(KV_BLOCK) {
                load_block::<S>(input, branch.pages[block], kv_head, scratch);
                block_queries::<S>(input, branch, kv_head, block, delta, output, scratch);
                for position in block * KV_BLOCK..end.min((block + 1) * KV_BLOCK) {
                    let shared = position < branch.position;
                    let row =
                        if shared { trunk.first_row + position } else { branch.first_row + position - branch.position };
                    store_key(input, row, kv_head, position % KV_BLOCK, shared, output, scratch);
                }
            }
            delta += branch.rows * group;
        }
    }
}

/// Widens and turns one page's keys and values and forgets the last one's gradients.
#[inline(always)]
fn load_block<S: Lanes>(input: &Input, page: u32, kv_head: usize, scratch: &mut Scratch) {
    let shape = &input.shape;
    match input.pages {
        KvPages::F32 { k, v } => {
            turn(shape.value_page(v, page, kv_head), KV_BLOCK, shape.value_dim, &mut scratch.values);
            scratch.page.clear();
            scratch.page.extend_from_slice(shape.key_page(k, page, kv_head));
        }
        KvPages::Bf16 { k, v } => {
            widen_values(shape.value_page(v, page, kv_head), shape.value_dim, &mut scratch.values);
            widen_keys::<S>(shape.key_page(k, page, kv_head), shape.head_dim, &mut scratch.page);
        }
    }
    turn(&scratch.page, shape.head_dim, KV_BLOCK, &mut scratch.keys);
    for (gradient, width) in
        [(&mut scratch.dk, input.shape.head_dim), (&mut scratch.dv, input.shape.value_dim)]
    {
        gradient.clear();
        gradient.resize(width * KV_BLOCK, 0.0);
    }
}

/// A page of keys `[head_dim / 2][16][2]` as `[head_dim][16]`.
#[inline(always)]
fn widen_keys<S: Lanes>(page: &[u32], head_dim: usize, out: &mut Vec<f32>) {
    out.resize(head_dim * KV_BLOCK, 0.0);
    let mut lines = page.chunks(KV_BLOCK);
    let mut dims = out.chunks_mut(2 * KV_BLOCK);
    for (dims, line) in dims.by_ref().zip(lines.by_ref()) {
        if dims.len() == 2 * KV_BLOCK {
            let (even, odd) = pages::pairs::<S>(line);
            even.write(dims);
            odd.write(&mut dims[KV_BLOCK..]);
        } else {
            pages::last_keys::<S>(line).write(dims);
        }
    }
}

/// A page of values `[8][value_dim][2]` as `[value_dim][16]`.
#[inline(always)]
fn widen_values(page: &[u32], value_dim: usize, out: &mut Vec<f32>) {
    out.resize(value_dim * KV_BLOCK, 0.0);
    for (d, keys) in out.chunks_exact_mut(KV_BLOCK).enumerate() {
        for (pair, keys) in keys.chunks_exact_mut(2).enumerate() {
            let word = page[pair * value_dim + d];
            keys[0] = f32::from_bits(word << 16);
            keys[1] = f32::from_bits(word & 0xffff_0000);
        }
    }
}

/// All queries of `seq` that see `block`; `delta` is where the sequence's part of `scratch.delta` starts.
#[inline(always)]
fn block_queries<S: Lanes>(
    input: &Input,
    seq: &AttentionSeq,
    kv_head: usize,
    block: usize,
    delta: usize,
    output: &Output,
    scratch: &mut Scratch,
) {
    let group = input.shape.group();
    let past = seq.position + seq.rows;
    let (first, last) = ((block * KV_BLOCK).max(seq.position), past.min((block + 1) * KV_BLOCK) - 1);
    // First visible keys never fall as positions rise, so the queries that see a block are one run.
    let sees = |position: usize| input.shape.mask.first_visible(position) <= last;
    let mut end = first;
    while end < past && sees(end) {
        end += 1;
    }
    let first = if input.shape.mask == AttentionMask::Bidirectional { 0 } else { first };
    let (mut i, end) = ((first - seq.position) * group, (end - seq.position) * group);
    while i < end {
        i += match end - i {
            8.. => queries::<S, 8>(input, seq, kv_head, block, i, delta, output, scratch),
            4.. => queries::<S, 4>(input, seq, kv_head, block, i, delta, output, scratch),
            2.. => queries::<S, 2>(input, seq, kv_head, block, i, delta, output, scratch),
            _ => queries::<S, 1>(input, seq, kv_head, block, i, delta, output, scratch),
        };
    }
}

/// Writes the gradients of one key and its value to `row`, or adds them to what the trunk's own block gave.
#[inline(always)]
fn store_key(
    input: &Input,
    row: usize,
    kv_head: usize,
    lane: usize,
    add: bool,
    output: &Output,
    scratch: &Scratch,
) {
    let AttentionShape { kv_heads, head_dim, value_dim, .. } = input.shape;
    let at = row * kv_heads + kv_head;
    for (total, part, width) in [(&output.dk, &scratch.dk, head_dim), (&output.dv, &scratch.dv, value_dim)] {
        // SAFETY: each (row, key-value head) belongs to one task alone.
        let total = unsafe { total.slice(at * width, width) };
        for (total, lanes) in total.iter_mut().zip(part.chunks_exact(KV_BLOCK)) {
            *total = if add { *total + lanes[lane] } else { lanes[lane] };
        }
    }
}

/// Adds what queries `first..first + N` (counted by row, then head of the group) and one key block give to each other;
/// returns `N`. Plain loops, not closures, as in the forward pass.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the operands of one op")]
fn queries<S: Lanes, const N: usize>(
    input: &Input,
    seq: &AttentionSeq,
    kv_head: usize,
    block: usize,
    first: usize,
    delta: usize,
    output: &Output,
    scratch: &mut Scratch,
) -> usize {
    let AttentionShape { heads, head_dim, value_dim, scale, mask, .. } = input.shape;
    let group = input.shape.group();
    let mut index = [0; N];
    let mut lanes = [(0, 0); N];
    let mut q_rows: [&[f32]; N] = [&[]; N];
    let mut douts: [&[f32]; N] = [&[]; N];
    for i in 0..N {
        let (row, head) = ((first + i) / group, (first + i) % group);
        let visible = mask.visible_lanes(seq.position + row, block, seq.position + seq.rows);
        lanes[i] = (visible.start, visible.end);
        index[i] = (seq.first_row + row) * heads + kv_head * group + head;
        q_rows[i] = &input.q[index[i] * head_dim..][..head_dim];
        douts[i] = &input.dout[index[i] * value_dim..][..value_dim];
    }
    let [mut p] = scores::<S, N, 1>(&q_rows, &[&scratch.page], scale);
    let [mut ds] = scores::<S, N, 1>(&douts, &[&scratch.values], 1.0);
    let mut ds_lanes = [[0.0; LANES]; N];
    for i in 0..N {
        p[i] = hide(exp(p[i].sub(S::splat(input.lse[index[i]]))), lanes[i], 0.0);
        let centred = ds[i].sub(S::splat(scratch.delta[delta + first + i]));
        ds[i] = hide(p[i].mul(centred).mul(S::splat(scale)), lanes[i], 0.0);
        ds[i].store(&mut ds_lanes[i]);
    }
    add_outer::<S, N>(&mut scratch.dk, &q_rows, &ds);
    add_outer::<S, N>(&mut scratch.dv, &douts, &p);
    if lanes == [(0, LANES); N] {
        accumulate::<S, N>(&output.dq, &index, &[1.0; LANES], &ds_lanes, (0, LANES), &scratch.keys, head_dim);
    } else {
        for i in 0..N {
            let (index, ds) = ([index[i]], [ds_lanes[i]]);
            accumulate::<S, 1>(&output.dq, &index, &[1.0; LANES], &ds, lanes[i], &scratch.keys, head_dim);
        }
    }
    N
}

/// `total [dims][16] += Σ_i rows[i] ⊗ lanes[i]`, i ascending.
#[inline(always)]
fn add_outer<S: Lanes, const N: usize>(total: &mut [f32], rows: &[&[f32]; N], lanes: &[S; N]) {
    let (total, _) = total.as_chunks_mut::<KV_BLOCK>();
    assert!(rows.iter().all(|row| row.len() == total.len()));
    for (d, total) in total.iter_mut().enumerate() {
        let mut sum = S::load(total);
        for i in 0..N {
            // SAFETY: every row is as long as `total`, by the assertion.
            sum = S::splat(unsafe { *rows[i].get_unchecked(d) }).fma(lanes[i], sum);
        }
        sum.store(total);
    }
}

/// Σ a·b: sixteen lanes, then a fixed tree.
#[inline(always)]
pub(super) fn dot<S: Lanes>(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = S::splat(0.0);
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        sum = S::read(a, 0.0).fma(S::read(b, 0.0), sum);
    }
    sum.sum()
}

/// `out [columns][rows] = x [rows][columns]` transposed.
#[inline(always)]
fn turn(x: &[f32], rows: usize, columns: usize, out: &mut Vec<f32>) {
    out.resize(rows * columns, 0.0);
    for (c, out) in out.chunks_exact_mut(rows).enumerate() {
        for (out, row) in out.iter_mut().zip(x.chunks_exact(columns)) {
            *out = row[c];
        }
    }
}
