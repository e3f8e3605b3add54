//! The forward pass over pages of bf16 on tiles: by AMX, or by AVX512-BF16's dot products of pairs.
//!
//! ```text
//!   unit   up to 16 queries of a sequence and key-value head (rows × heads of the group): a decoded token has `group`, a prompt 16
//!   batch  units of at most 16 queries together: a query a lane
//!
//!   for each chunk of keys:
//!     scores   each unit's Q tiles · its pages' K tiles → 4 C tiles [queries][16 keys]
//!     softmax  a query's 64 scores in lanes; the batch's maxima and sums in one register each; weights → P tiles
//!     output   each unit's P tiles · its pages' V tiles → C tiles [queries][16 dimensions]; added to the output so far
//! ```
//!
//! Units of a batch wait together for tiles and stores instead of one after the other; that is what decoding gains by.

use super::forward::{Input, Kept, Output};
use super::pages::TINY;
use super::rounded::weight;
use super::{AttentionSeq, AttentionShape, CHUNK_PAGES, KV_BLOCK};
use crate::Threads;
use crate::amx::{self as matrix, TileConfig};
use crate::isa;
use crate::math::{exp, ln};
use crate::simd::{Avx512, LANES, Lanes};
use kernel::{Kernels, MOST_TILES, Outputs, Scores};
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

mod amx;
mod dots;
mod kernel;

/// Queries of a batch.
const BATCH: usize = LANES;
/// Dimensions of a Q or K tile, and of an output tile.
const K_DIMS: usize = 32;
const V_DIMS: usize = 16;
/// Parts that units are cut into for each thread, and pages that a part should have: configuring tiles takes as long as one.
const PARTS_PER_THREAD: usize = 16;
const MIN_PAGES: usize = 16;

/// Whether tiles compute this shape here: whole ones, on a processor that has them.
pub(super) fn take(shape: &AttentionShape) -> bool {
    #[cfg(test)]
    if LEFT_OUT.get() {
        return false;
    }
    isa::current().has_tiles()
        && shape.head_dim.is_multiple_of(K_DIMS)
        && shape.value_dim.is_multiple_of(V_DIMS)
}

#[cfg(test)]
thread_local! {
    /// Whether tests compare with what `rounded` gives.
    pub(super) static LEFT_OUT: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Queries of a sequence, counted by row, then head of the group, and a key-value head.
#[derive(Clone, Copy)]
struct Unit<'a> {
    seq: &'a AttentionSeq<'a>,
    kv_head: usize,
    first: usize,
    count: usize,
    /// Pages that some of them see.
    first_page: usize,
    end_page: usize,
}

impl Unit<'_> {
    /// Pages of the unit's chunk number `step`, its first being 0; empty past the last.
    fn pages(&self, step: usize) -> Range<usize> {
        let start = (self.first_page / CHUNK_PAGES + step) * CHUNK_PAGES;
        self.first_page.max(start)..self.end_page.min(start + CHUNK_PAGES).max(self.first_page.max(start))
    }

    fn chunks(&self) -> usize {
        self.end_page.div_ceil(CHUNK_PAGES) - self.first_page / CHUNK_PAGES
    }
}

/// Computes all rows of `seqs`.
pub(super) fn run(threads: &Threads, input: &Input, kept: Kept<u32>, seqs: &[AttentionSeq], output: &Output) {
    let units = units(&input.shape, seqs);
    let total: usize = units.iter().map(|unit| unit.end_page - unit.first_page).sum();
    let parts = if threads.count() > 1 { PARTS_PER_THREAD * threads.count() } else { 1 };
    let least = total.div_ceil(parts).max(MIN_PAGES);
    // Batches of units, and parts of batches of about the same work.
    let (mut parts, mut start, mut work) = (Vec::new(), 0, 0);
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut first = 0;
    while first < units.len() {
        let (mut end, mut queries) = (first, 0);
        while end < units.len() && queries + units[end].count <= BATCH {
            queries += units[end].count;
            work += units[end].end_page - units[end].first_page;
            end += 1;
        }
        batches.push(first..end);
        first = end;
        if work >= least {
            parts.push(start..batches.len());
            (start, work) = (batches.len(), 0);
        }
    }
    if start < batches.len() {
        parts.push(start..batches.len());
    }
    let kernels = Kernels::here();
    threads.for_each(parts.len(), &|part| {
        let batches = &batches[parts[part].clone()];
        SCRATCH.with_borrow_mut(|scratch| {
            // SAFETY: `take` found AVX512-BF16, with which come the extensions named there.
            unsafe { run_part(input, kept, &units, batches, kernels, output, scratch) }
        });
    });
}

fn units<'a>(shape: &AttentionShape, seqs: &'a [AttentionSeq<'a>]) -> Vec<Unit<'a>> {
    let (group, mask) = (shape.group(), shape.mask);
    let mut units = Vec::with_capacity(seqs.len() * shape.kv_heads);
    for seq in seqs {
        let queries = seq.rows * group;
        for kv_head in 0..shape.kv_heads {
            for first in (0..queries).step_by(BATCH) {
                let count = BATCH.min(queries - first);
                let position = |query: usize| seq.position + query / group;
                let end = mask.end_visible(position(first + count - 1), seq.position + seq.rows);
                let (first_page, end_page) =
                    (mask.first_visible(position(first)) / KV_BLOCK, end.div_ceil(KV_BLOCK));
                units.push(Unit { seq, kv_head, first, count, first_page, end_page });
            }
        }
    }
    units
}

/// Bytes of a row of P: two lines.
const P_ROW_BYTES: usize = 128;

/// Sixty-four bytes: a row of a tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([u32; LANES]);

/// What a unit's queries are worked on in, a part after the other, as `Layout` says.
#[derive(Default)]
struct Scratch {
    lines: Vec<Line>,
}

thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());

/// Where the parts of a unit's scratch start, in lines.
#[derive(Clone, Copy)]
struct Layout {
    /// What works on them.
    kernels: Kernels,
    /// Rows of Q, P and C tiles.
    rows: usize,
    /// Dimensions of K and V in tiles.
    k_tiles: usize,
    v_tiles: usize,
    /// P `[rows][64 keys]`, two lines a row, after Q `[k_tiles][rows]`, which is at 0.
    p: usize,
    /// Scores `[4][rows]`, of two chunks in turn
    scores: usize,
    /// Output of a chunk `[v_tiles][rows]`
    c: usize,
    /// Output so far `[v_tiles][rows]`
    out: usize,
    /// Lines of a unit.
    len: usize,
}

impl Layout {
    fn new(shape: &AttentionShape, kernels: Kernels, rows: usize) -> Self {
        let (k_tiles, v_tiles) = (shape.head_dim / K_DIMS, shape.value_dim / V_DIMS);
        let p = k_tiles * rows;
        let scores = p + 2 * rows;
        let c = scores + 2 * CHUNK_PAGES * rows;
        let out = c + v_tiles * rows;
        Self { kernels, rows, k_tiles, v_tiles, p, scores, c, out, len: out + v_tiles * rows }
    }

    /// Where the scores of chunk number `step` start.
    fn scores_of(&self, step: usize) -> usize {
        self.scores + step % 2 * CHUNK_PAGES * self.rows
    }
}

/// A query of a batch: its unit, its row there, the keys that it sees, and its number among (row, head).
#[derive(Clone, Copy, Default)]
struct Query {
    unit: usize,
    row: usize,
    first_key: usize,
    end_key: usize,
    index: usize,
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
fn run_part(
    input: &Input,
    kept: Kept<u32>,
    units: &[Unit],
    batches: &[Range<usize>],
    kernels: Kernels,
    output: &Output,
    scratch: &mut Scratch,
) {
    let of_part = &units[batches[0].start..batches[batches.len() - 1].end];
    let rows = of_part.iter().map(|unit| unit.count).max().unwrap_or(1);
    let layout = Layout::new(&input.shape, kernels, rows);
    let most = batches.iter().map(Range::len).max().unwrap_or(1);
    scratch.lines.resize(scratch.lines.len().max(most * layout.len), Line([0; LANES]));
    if kernels == Kernels::Amx {
        let rows = rows as u8;
        let c = (rows, 64);
        let tiles = TileConfig::new([c, c, c, c, (rows, 64), (rows, 32), (16, 64), (8, 64)]);
        // SAFETY: AMX was found.
        unsafe { matrix::configure(&tiles) };
    }
    for (i, batch) in batches.iter().enumerate() {
        let next = batches.get(i + 1).map_or(&[][..], |next| &units[next.clone()]);
        run_batch(input, kept, &units[batch.clone()], next, &layout, output, &mut scratch.lines);
    }
    if kernels == Kernels::Amx {
        // SAFETY: as above.
        unsafe { matrix::release() };
    }
}

/// Running maximum and sum of a batch's queries, a lane each.
struct State {
    max: Avx512,
    sum: Avx512,
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
fn run_batch(
    input: &Input,
    kept: Kept<u32>,
    units: &[Unit],
    next: &[Unit],
    layout: &Layout,
    output: &Output,
    lines: &mut [Line],
) {
    let mut all = [Query::default(); BATCH];
    let mut count = 0;
    for (u, unit) in units.iter().enumerate() {
        for row in 0..unit.count {
            all[count] = query(&input.shape, unit, u, row);
            let at = all[count].index * input.shape.head_dim;
            let q = &input.q[at..at + input.shape.head_dim];
            round_query(q, &mut lines[u * layout.len + row..], layout.rows);
            count += 1;
        }
    }
    let queries = &all[..count];
    let mut state = State { max: Avx512::splat(f32::MIN), sum: Avx512::splat(0.0) };
    let mut steps = 0;
    for unit in units {
        steps = steps.max(unit.chunks());
    }
    for (unit, lines) in units.iter().zip(lines.chunks_exact_mut(layout.len)) {
        score(&input.shape, kept, unit, 0, layout, lines);
    }
    for step in 0..steps {
        if step + 1 == steps {
            for unit in next {
                ask(&input.shape, kept, unit, unit.pages(0));
            }
        } else {
            // Tiles are busy with the next chunk's scores while lanes are with this one's.
            for (unit, lines) in units.iter().zip(lines.chunks_exact_mut(layout.len)) {
                score(&input.shape, kept, unit, step + 1, layout, lines);
            }
        }
        let rescale = softmax(input.shape.scale, units, queries, step, layout, lines, &mut state);
        for (unit, lines) in units.iter().zip(lines.chunks_exact_mut(layout.len)) {
            weigh(&input.shape, kept, unit, step, layout, lines);
        }
        if step > 0 {
            add(units, queries, step, layout, &rescale, lines);
        }
    }
    finish(input, queries, layout, output, lines, &state);
}

/// Row `row` of a unit.
fn query(shape: &AttentionShape, unit: &Unit, at: usize, row: usize) -> Query {
    let group = shape.group();
    let (in_seq, head) = ((unit.first + row) / group, (unit.first + row) % group);
    let position = unit.seq.position + in_seq;
    Query {
        unit: at,
        row,
        first_key: shape.mask.first_visible(position),
        end_key: shape.mask.end_visible(position, unit.seq.position + unit.seq.rows),
        index: (unit.seq.first_row + in_seq) * shape.heads + unit.kv_head * group + head,
    }
}

/// Rounds a query into its row of the Q tiles, which are `rows` lines apart.
#[target_feature(enable = "avx512f,avx512bf16")]
fn round_query(q: &[f32], lines: &mut [Line], rows: usize) {
    for (q, line) in q.as_chunks::<K_DIMS>().0.iter().zip(lines.iter_mut().step_by(rows)) {
        // SAFETY: thirty-two values are read, a line is written.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(q.as_ptr()), _mm512_loadu_ps(q.as_ptr().add(LANES)));
            let bits: __m512i =
                std::mem::transmute(_mm512_cvtne2ps_pbh(without_tiny(high), without_tiny(low)));
            _mm512_store_si512(line.0.as_mut_ptr().cast(), bits);
        }
    }
}

#[target_feature(enable = "avx512f,avx512dq")]
fn without_tiny(x: __m512) -> __m512 {
    // Not less: a NaN stays.
    let kept = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(_mm512_abs_ps(x), _mm512_set1_ps(TINY));
    _mm512_maskz_mov_ps(kept, x)
}

/// Asks for pages of a unit.
#[target_feature(enable = "avx512f")]
fn ask(shape: &AttentionShape, kept: Kept<u32>, unit: &Unit, pages: Range<usize>) {
    for &page in &unit.seq.pages[pages] {
        let keys = shape.key_page(kept.k, page, unit.kv_head);
        let values = shape.value_page(kept.v, page, unit.kv_head);
        for part in [keys, values] {
            for at in (0..part.len()).step_by(LANES) {
                // SAFETY: a hint, which no address makes fault.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(part.as_ptr().add(at).cast()) };
            }
        }
    }
}

/// Scores of a unit against a chunk's pages, into C tiles.
fn score(
    shape: &AttentionShape,
    kept: Kept<u32>,
    unit: &Unit,
    step: usize,
    layout: &Layout,
    lines: &mut [Line],
) {
    let pages = unit.pages(step);
    if pages.is_empty() {
        return;
    }
    let mut keys = [std::ptr::null(); CHUNK_PAGES];
    for (keys, &page) in keys.iter_mut().zip(&unit.seq.pages[pages.clone()]) {
        *keys = shape.key_page(kept.k, page, unit.kv_head).as_ptr();
    }
    let (q, rest) = lines.split_at_mut(layout.p);
    let c = &mut rest[layout.scores_of(step) - layout.p..][..CHUNK_PAGES * layout.rows];
    assert!(q.len() == layout.k_tiles * layout.rows && c.len() >= pages.len() * layout.rows);
    let operands = Scores {
        q: q.as_ptr(),
        tile_bytes: layout.rows * size_of::<Line>(),
        keys,
        k_tiles: layout.k_tiles,
        c: c.as_mut_ptr(),
    };
    // SAFETY: tiles are configured where there are any; Q has that many tiles, C room for one a page, and pages are K tiles one after the other.
    unsafe { layout.kernels.scores(&operands, unit.count, pages.len()) };
}

/// Output of a chunk, into C tiles, or, of the first, to where the output is kept.
fn weigh(
    shape: &AttentionShape,
    kept: Kept<u32>,
    unit: &Unit,
    step: usize,
    layout: &Layout,
    lines: &mut [Line],
) {
    let pages = unit.pages(step);
    if pages.is_empty() {
        return;
    }
    let mut values = [std::ptr::null(); CHUNK_PAGES];
    for (values, &page) in values.iter_mut().zip(&unit.seq.pages[pages.clone()]) {
        *values = shape.value_page(kept.v, page, unit.kv_head).as_ptr();
    }
    let (p, rest) = lines[layout.p..].split_at_mut(2 * layout.rows);
    let at = if step == 0 { layout.out } else { layout.c } - layout.scores;
    let c = &mut rest[at..][..layout.v_tiles * layout.rows];
    let skipped = pages.start % CHUNK_PAGES;
    for tile in (0..layout.v_tiles).step_by(MOST_TILES) {
        let tiles = MOST_TILES.min(layout.v_tiles - tile);
        let operands = Outputs {
            p: p.as_ptr().cast::<u8>().wrapping_add(skipped * KV_BLOCK * 2),
            values: values.as_ptr(),
            pages: pages.len(),
            offset: tile * size_of::<Line>(),
            stride: shape.value_dim * 4,
            c: c[tile * layout.rows..][..tiles * layout.rows].as_mut_ptr(),
            tile_bytes: layout.rows * size_of::<Line>(),
        };
        // SAFETY: tiles are configured where there are any; P has a tile a page, pages are V tiles beside each other, C has room for `tiles`.
        unsafe { layout.kernels.outputs(&operands, unit.count, tiles) };
    }
}

/// A query's scores of a chunk: the first, how many pages of sixteen, and which of all these it sees, from the lowest bit.
#[derive(Clone, Copy)]
struct Chunk {
    scores: *const f32,
    pages: usize,
    visible: u64,
}

/// Turns the scores of a chunk into weights; returns e^(old − new maximum) of each query.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
fn softmax(
    scale: f32,
    units: &[Unit],
    queries: &[Query],
    step: usize,
    layout: &Layout,
    lines: &mut [Line],
    state: &mut State,
) -> [f32; BATCH] {
    assert!(units.len() * layout.len <= lines.len() && queries.iter().all(|query| query.row < layout.rows));
    let (base, stride, scale) = (lines.as_mut_ptr(), layout.rows * LANES, _mm512_set1_ps(scale));
    let mut best = [_mm512_set1_ps(f32::NEG_INFINITY); BATCH];
    let mut chunks = [Chunk { scores: std::ptr::null(), pages: 0, visible: 0 }; BATCH];
    for ((query, best), chunk) in queries.iter().zip(&mut best).zip(&mut chunks) {
        let pages = units[query.unit].pages(step);
        let visible = visible(query, pages.start * KV_BLOCK);
        // SAFETY: a unit's part of `lines` has a line of scores for each row of up to four pages, `stride` values apart.
        *best = unsafe {
            let scores = base.add(query.unit * layout.len + layout.scores_of(step) + query.row).cast();
            *chunk = Chunk { scores, pages: pages.len(), visible };
            match chunk.pages {
                4 => largest::<4>(chunk, stride, scale),
                3 => largest::<3>(chunk, stride, scale),
                2 => largest::<2>(chunk, stride, scale),
                1 => largest::<1>(chunk, stride, scale),
                _ => *best,
            }
        };
    }
    let best = Avx512(reduce(&best, |a, b| _mm512_max_ps(a, b)));
    let max = best.max(state.max);
    let rescale = exp(state.max.sub(max));
    state.max = max;
    let maxima = max.to_array();
    let mut sums = [_mm512_setzero_ps(); BATCH];
    for (((query, sum), &max), chunk) in queries.iter().zip(&mut sums).zip(&maxima).zip(&chunks) {
        let skipped = units[query.unit].pages(step).start % CHUNK_PAGES;
        assert!(skipped + chunk.pages <= CHUNK_PAGES);
        // SAFETY: as above; it has two lines for each row's weights, room for those of four pages.
        *sum = unsafe {
            let p = base.add(query.unit * layout.len + layout.p + 2 * query.row);
            let p = p.cast::<__m256i>().add(skipped);
            match chunk.pages {
                4 => weights::<4>(chunk, stride, scale, max, p),
                3 => weights::<3>(chunk, stride, scale, max, p),
                2 => weights::<2>(chunk, stride, scale, max, p),
                1 => weights::<1>(chunk, stride, scale, max, p),
                _ => *sum,
            }
        };
    }
    state.sum = state.sum.fma(rescale, Avx512(reduce(&sums, |a, b| _mm512_add_ps(a, b))));
    rescale.to_array()
}

/// Which of the next 64 keys from `key` on a query sees, the first lowest.
fn visible(query: &Query, key: usize) -> u64 {
    const KEYS: usize = CHUNK_PAGES * KV_BLOCK;
    let below = |end: usize| {
        let count = end.saturating_sub(key).min(KEYS);
        u64::MAX.checked_shr((KEYS - count) as u32).unwrap_or(0)
    };
    below(query.end_key) & !below(query.first_key)
}

/// Scores of page `page` of a chunk, −∞ where the query does not see.
///
/// # Safety
/// The chunk has as many pages, `stride` values apart.
#[target_feature(enable = "avx512f")]
unsafe fn scores_of(chunk: &Chunk, page: usize, stride: usize, scale: __m512) -> __m512 {
    let visible = (chunk.visible >> (page * KV_BLOCK)) as u16;
    // SAFETY: the caller's promise.
    let scores = unsafe { _mm512_load_ps(chunk.scores.add(page * stride)) };
    _mm512_mask_mul_ps(_mm512_set1_ps(f32::NEG_INFINITY), visible, scores, scale)
}

/// The largest score of each lane.
///
/// # Safety
/// As of [`scores_of`].
#[target_feature(enable = "avx512f")]
unsafe fn largest<const PAGES: usize>(chunk: &Chunk, stride: usize, scale: __m512) -> __m512 {
    let mut best = _mm512_set1_ps(f32::NEG_INFINITY);
    for page in 0..PAGES {
        // SAFETY: the caller's promise.
        best = _mm512_max_ps(best, unsafe { scores_of(chunk, page, stride, scale) });
    }
    best
}

/// Writes the weights of a chunk to `p` and returns their sums by lane.
///
/// # Safety
/// As of [`scores_of`]; `p` has room for as many pages.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
unsafe fn weights<const PAGES: usize>(
    chunk: &Chunk,
    stride: usize,
    scale: __m512,
    max: f32,
    p: *mut __m256i,
) -> __m512 {
    let mut total = Avx512(_mm512_setzero_ps());
    for page in 0..PAGES {
        // SAFETY: the caller's promise.
        unsafe {
            let score = Avx512(scores_of(chunk, page, stride, scale));
            let weights = weight(score.sub(Avx512::splat(max)));
            total = total.add(weights);
            let bits: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(weights.0));
            _mm256_store_si256(p.add(page), bits);
        }
    }
    total.0
}

/// Lane i of the result is `x[i]` reduced by the tree of [`Lanes::sum`]: halves 8, 4, 2, 1 apart.
#[target_feature(enable = "avx512f")]
fn reduce(x: &[__m512; BATCH], both: impl Fn(__m512, __m512) -> __m512) -> __m512 {
    // Each level joins registers i and i + half, so that lanes of the result are in the order of `x`.
    let mut a = [_mm512_setzero_ps(); 8];
    for i in 0..8 {
        // Quarters 0, 1 and 2, 3 of each: x[i] in the lower half, x[i + 8] in the upper.
        let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(x[i], x[i + 8]);
        let high = _mm512_shuffle_f32x4::<0b11_10_11_10>(x[i], x[i + 8]);
        a[i] = both(low, high);
    }
    let mut b = [_mm512_setzero_ps(); 4];
    for i in 0..4 {
        let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(a[i], a[i + 4]);
        let high = _mm512_shuffle_f32x4::<0b11_01_11_01>(a[i], a[i + 4]);
        // Quarters: x[i], x[i + 8], x[i + 4], x[i + 12].
        b[i] = both(low, high);
    }
    let mut c = [_mm512_setzero_ps(); 2];
    for i in 0..2 {
        // Two lanes of b[i], then two of b[i + 2], in each quarter.
        c[i] = both(
            _mm512_shuffle_ps::<0b01_00_01_00>(b[i], b[i + 2]),
            _mm512_shuffle_ps::<0b11_10_11_10>(b[i], b[i + 2]),
        );
    }
    // In each quarter: c[0] of rows i, i + 2, then c[1].
    let d =
        both(_mm512_shuffle_ps::<0b10_00_10_00>(c[0], c[1]), _mm512_shuffle_ps::<0b11_01_11_01>(c[0], c[1]));
    // Quarter q, lane l holds row of quarter [0, 8, 4, 12][q] + [0, 2, 1, 3][l].
    let order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    _mm512_permutexvar_ps(order, d)
}

/// Adds a chunk's output to what came before.
#[target_feature(enable = "avx512f,fma")]
fn add(
    units: &[Unit],
    queries: &[Query],
    step: usize,
    layout: &Layout,
    rescale: &[f32; BATCH],
    lines: &mut [Line],
) {
    for (query, &rescale) in queries.iter().zip(rescale) {
        if units[query.unit].pages(step).is_empty() {
            continue;
        }
        let (c, out) = lines[query.unit * layout.len + layout.c..].split_at_mut(layout.out - layout.c);
        let rescale = Avx512::splat(rescale);
        for tile in 0..layout.v_tiles {
            let at = tile * layout.rows + query.row;
            let before: &mut [f32; LANES] = bytemuck::cast_mut(&mut out[at].0);
            Avx512::load(before).fma(rescale, Avx512::load(bytemuck::cast_ref(&c[at].0))).store(before);
        }
    }
}

/// Divides by the sums and writes the results.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
fn finish(input: &Input, queries: &[Query], layout: &Layout, output: &Output, lines: &[Line], state: &State) {
    let inverse = Avx512::splat(1.0).div(state.sum).to_array();
    for (query, &inverse) in queries.iter().zip(&inverse) {
        let width = input.shape.value_dim;
        // SAFETY: each (row, head) belongs to one unit, and each unit to one task.
        let out = unsafe { output.out.slice(query.index * width, width) };
        let from = &lines[query.unit * layout.len + layout.out..][..layout.v_tiles * layout.rows];
        for (tile, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let line = bytemuck::cast_ref(&from[tile * layout.rows + query.row].0);
            Avx512::load(line).mul(Avx512::splat(inverse)).store(out);
        }
    }
    if let Some(lse) = &output.lse {
        let (max, sum) = (state.max.to_array(), state.sum.to_array());
        for (i, query) in queries.iter().enumerate() {
            // SAFETY: as above.
            unsafe { lse.slice(query.index, 1)[0] = max[i] + ln(sum[i]) };
        }
    }
}
