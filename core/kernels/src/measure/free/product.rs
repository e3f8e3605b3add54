//! Products of few rows by VDPBF16PS: a lane a column, two of k at a time, no padding of rows and no order over k.

use super::check;
use crate::Threads;
use crate::gemm::{Group, PackedMatrix};
use crate::simd::LANES;
use crate::threads::SharedMut;
use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_storeu_ps,
};
use std::ops::Range;

/// Rows that are computed together.
const MOST_ROWS: usize = 8;
/// Parts for each thread.
const PARTS_PER_THREAD: usize = 4;
/// Bytes that are asked for ahead of their use.
const AHEAD: usize = 2048;

/// Row s of a product is added, times `weights[s]`, to row `rows[s]` of the output.
#[derive(Clone, Copy)]
pub(in crate::measure) struct Add<'a> {
    pub rows: &'a [u32],
    pub weights: &'a [f32],
}

/// Products, with the room that they need.
#[derive(Default)]
pub(in crate::measure) struct Products {
    /// x in bf16, rows padded to multiples of 32.
    x: Vec<u16>,
    /// Sums over parts of k.
    partial: Vec<f32>,
}

impl Products {
    /// `out = x·Wᵀ` for each group's rows; threads take columns.
    pub(in crate::measure) fn columns(
        &mut self,
        threads: &Threads,
        x: &[f32],
        groups: &[Group],
        out: &mut [f32],
    ) {
        let (n, k) = self.round(x, groups);
        let runs = runs(n, (PARTS_PER_THREAD * threads.count()).div_ceil(groups.len()));
        let base = SharedMut::new(out);
        threads.for_each(groups.len() * runs.len(), &|task| {
            let group = &groups[task / runs.len()];
            let panels = runs[task % runs.len()].clone();
            product(&self.x, k, group, panels, 0..k.div_ceil(32) * 16, &mut |row, column, values| {
                // SAFETY: a task has its rows and columns to itself.
                unsafe { base.slice(row * n + column, values.len()) }.copy_from_slice(values);
            });
        });
    }

    /// `out += weight · x·Wᵀ` for each group's rows, as they are done; threads take columns.
    pub(in crate::measure) fn columns_added(
        &mut self,
        threads: &Threads,
        x: &[f32],
        groups: &[Group],
        add: Add,
        out: &mut [f32],
    ) {
        let (n, k) = self.round(x, groups);
        let runs = runs(n, PARTS_PER_THREAD * threads.count());
        let base = SharedMut::new(out);
        threads.for_each(runs.len(), &|run| {
            for group in groups {
                let panels = runs[run].clone();
                product(&self.x, k, group, panels, 0..k.div_ceil(32) * 16, &mut |row, column, values| {
                    // SAFETY: a task has its columns to itself.
                    let out = unsafe { base.slice(add.rows[row] as usize * n + column, values.len()) };
                    let weight = add.weights[row];
                    out.iter_mut().zip(values).for_each(|(out, value)| *out += weight * value);
                });
            }
        });
    }

    /// `out = x·Wᵀ`; threads take parts of k, whose sums are added at the end.
    pub(in crate::measure) fn parts_of_k(
        &mut self,
        threads: &Threads,
        x: &[f32],
        w: &PackedMatrix,
        out: &mut [f32],
    ) {
        let group = Group { rows: 0..x.len() / w.inner(), w };
        let (n, k) = self.round(x, std::slice::from_ref(&group));
        let (tiles, parts) = (k.div_ceil(32), threads.count());
        self.partial.resize((parts - 1) * out.len(), 0.0);
        let (first, others) = (SharedMut::new(out), SharedMut::new(&mut self.partial));
        let (values, x) = (out.len(), &self.x);
        threads.for_each(parts, &|part| {
            let lines = tiles * part / parts * 16..tiles * (part + 1) / parts * 16;
            product(x, k, &group, 0..n.div_ceil(LANES), lines, &mut |row, column, sums| {
                let to = match part.checked_sub(1) {
                    // SAFETY: a part has a matrix of sums to itself.
                    None => unsafe { first.slice(row * n + column, sums.len()) },
                    // SAFETY: as above.
                    Some(other) => unsafe { others.slice(other * values + row * n + column, sums.len()) },
                };
                to.copy_from_slice(sums);
            });
        });
        for sums in self.partial.chunks_exact(values) {
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        }
    }

    /// Takes x in; n and k of the weights.
    fn round(&mut self, x: &[f32], groups: &[Group]) -> (usize, usize) {
        check();
        let w = groups[0].w;
        let (k, padded) = (w.inner(), w.inner().next_multiple_of(32));
        self.x.resize(x.len() / k * padded, 0);
        for (x, out) in x.chunks_exact(k).zip(self.x.chunks_exact_mut(padded)) {
            super::to_bf16(x, out);
        }
        (w.rows(), k)
    }
}

/// Panels of `n` columns in about `parts` runs, each a multiple of four panels.
fn runs(n: usize, parts: usize) -> Vec<Range<usize>> {
    let panels = n.div_ceil(LANES);
    let run = panels.div_ceil(parts.max(1)).next_multiple_of(4).min(panels);
    (0..panels).step_by(run).map(|first| first..panels.min(first + run)).collect()
}

/// Hands `put` the sums over `lines` of a group's rows, panel by panel: (row, column, values).
fn product(
    x: &[u16],
    k: usize,
    group: &Group,
    panels: Range<usize>,
    lines: Range<usize>,
    put: &mut dyn FnMut(usize, usize, &[f32]),
) {
    let (n, words) = (group.w.rows(), group.w.words());
    let per_panel = k.div_ceil(32) * 16;
    assert!(words.len() == n.div_ceil(LANES) * per_panel && lines.end <= per_panel, "bf16 panels");
    assert!(panels.end <= n.div_ceil(LANES) && lines.len().is_multiple_of(16));
    let x: &[u32] =
        bytemuck::cast_slice(&x[group.rows.start * 2 * per_panel..group.rows.end * 2 * per_panel]);
    let mut panel = panels.start;
    // Panels are taken alike by all blocks of rows.
    let most = if group.rows.len() <= 4 { 4 } else { 2 };
    while panel < panels.end {
        let taken = if panels.end - panel >= most { most } else { 1 };
        let mut row = 0;
        while row < group.rows.len() {
            let rows = (group.rows.len() - row).min(MOST_ROWS);
            let mut sums = [[0.0; LANES]; 32];
            let o = Strip {
                x: &x[row * per_panel..],
                words: &words[panel * per_panel..(panel + taken) * per_panel],
                per_panel,
                lines: lines.clone(),
                sums: &mut sums,
            };
            // SAFETY: `check` found the instructions.
            unsafe { o.run(rows, taken) };
            for (at, sums) in sums[..rows * taken].iter().enumerate() {
                let column = (panel + at % taken) * LANES;
                put(group.rows.start + row + at / taken, column, &sums[..LANES.min(n - column)]);
            }
            row += rows;
        }
        panel += taken;
    }
}

/// Some rows and panels.
struct Strip<'a> {
    /// Pairs of k, `[rows, per_panel]` and more.
    x: &'a [u32],
    /// `[panels][per_panel]`
    words: &'a [[u32; LANES]],
    per_panel: usize,
    lines: Range<usize>,
    /// `[rows][panels]`
    sums: &'a mut [[f32; LANES]; 32],
}

impl Strip<'_> {
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn run(self, rows: usize, panels: usize) {
        match (rows, panels) {
            (1, 4) => self.sum::<1, 4, 4>(),
            (2, 4) => self.sum::<2, 4, 2>(),
            (3, 4) => self.sum::<3, 4, 2>(),
            (4, 4) => self.sum::<4, 4, 1>(),
            (1, 2) => self.sum::<1, 2, 8>(),
            (2, 2) => self.sum::<2, 2, 4>(),
            (3, 2) => self.sum::<3, 2, 4>(),
            (4, 2) => self.sum::<4, 2, 2>(),
            (5, 2) => self.sum::<5, 2, 2>(),
            (6, 2) => self.sum::<6, 2, 2>(),
            (7, 2) => self.sum::<7, 2, 1>(),
            (8, 2) => self.sum::<8, 2, 1>(),
            (1, _) => self.sum::<1, 1, 8>(),
            (2, _) => self.sum::<2, 1, 8>(),
            (3, _) => self.sum::<3, 1, 4>(),
            (4, _) => self.sum::<4, 1, 4>(),
            (5, _) => self.sum::<5, 1, 4>(),
            (6, _) => self.sum::<6, 1, 4>(),
            (7, _) => self.sum::<7, 1, 2>(),
            _ => self.sum::<8, 1, 2>(),
        }
    }

    /// `SUMS` sums for each row and panel: line i goes to sum i mod `SUMS`.
    #[expect(
        clippy::needless_range_loop,
        reason = "plain loops over registers: closures might be compiled apart"
    )]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn sum<const ROWS: usize, const PANELS: usize, const SUMS: usize>(self) {
        assert!(self.words.len() == PANELS * self.per_panel && self.lines.end <= self.per_panel);
        assert!(self.x.len() >= ROWS * self.per_panel && ROWS * PANELS <= self.sums.len());
        assert!(self.lines.len().is_multiple_of(SUMS));
        let (x, words) = (self.x.as_ptr(), self.words.as_ptr());
        let mut sums = [[[_mm512_setzero_ps(); SUMS]; PANELS]; ROWS];
        for line in self.lines.step_by(SUMS) {
            // At the end of these panels, of those that come after them.
            let after = if line + AHEAD / 64 < self.per_panel { 0 } else { (PANELS - 1) * self.per_panel };
            let ahead = AHEAD + after * size_of::<[u32; LANES]>();
            for s in 0..SUMS {
                let mut w = [zero(); PANELS];
                for p in 0..PANELS {
                    // SAFETY: line < per_panel and p < PANELS, so this is one of the words, by the assertions; what is
                    // asked for ahead may lie anywhere.
                    unsafe {
                        let at = words.add(p * self.per_panel + line + s);
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_byte_add(ahead).cast());
                        w[p] = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(at.cast()));
                    }
                }
                for r in 0..ROWS {
                    // SAFETY: r < ROWS and line < per_panel, so this is one of the pairs, by the assertions.
                    let pair = unsafe { *x.add(r * self.per_panel + line + s) };
                    // SAFETY: both are 512 bits of bf16 pairs.
                    let pair =
                        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair as i32)) };
                    for p in 0..PANELS {
                        sums[r][p][s] = _mm512_dpbf16_ps(sums[r][p][s], w[p], pair);
                    }
                }
            }
        }
        for r in 0..ROWS {
            for p in 0..PANELS {
                let sum = sums[r][p].into_iter().reduce(|a, b| _mm512_add_ps(a, b)).expect("there is a sum");
                // SAFETY: the array has sixteen values.
                unsafe { _mm512_storeu_ps(self.sums[r * PANELS + p].as_mut_ptr(), sum) };
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
fn zero() -> __m512bh {
    // SAFETY: all bits zero are a value of either type.
    unsafe { std::mem::transmute::<__m512, __m512bh>(_mm512_setzero_ps()) }
}

/// `out = x·Wᵀ` in f32, with four sums over k; one thread (a router's product is small).
pub(in crate::measure) fn product_f32(x: &[f32], w: &PackedMatrix, out: &mut [f32]) {
    check();
    let (n, k, words) = (w.rows(), w.inner(), w.words());
    assert!(words.len() == n.div_ceil(LANES) * k, "f32 panels");
    for (panel, words) in words.chunks_exact(k).enumerate() {
        let column = panel * LANES;
        let mut row = 0;
        while row * k < x.len() {
            let rows = (x.len() / k - row).min(4);
            let mut sums = [[0.0; LANES]; 4];
            let x = &x[row * k..];
            // SAFETY: `check` found the instructions.
            unsafe {
                match rows {
                    4 => panel_f32::<4>(x, words, &mut sums),
                    3 => panel_f32::<3>(x, words, &mut sums),
                    2 => panel_f32::<2>(x, words, &mut sums),
                    _ => panel_f32::<1>(x, words, &mut sums),
                }
            }
            for (r, sums) in sums[..rows].iter().enumerate() {
                let width = LANES.min(n - column);
                out[(row + r) * n + column..][..width].copy_from_slice(&sums[..width]);
            }
            row += rows;
        }
    }
}

#[target_feature(enable = "avx512f")]
fn panel_f32<const ROWS: usize>(x: &[f32], words: &[[u32; LANES]], out: &mut [[f32; LANES]; 4]) {
    const SUMS: usize = 4;
    let k = words.len();
    assert!(x.len() >= ROWS * k && ROWS <= out.len());
    let mut sums = [[_mm512_setzero_ps(); SUMS]; ROWS];
    let mut add = |at: usize, s: usize| {
        // SAFETY: at < k, so the line is there.
        let w = unsafe { _mm512_loadu_ps(words[at].as_ptr().cast()) };
        for (r, sums) in sums.iter_mut().enumerate() {
            sums[s] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * k + at]), w, sums[s]);
        }
    };
    let whole = k / SUMS * SUMS;
    for at in (0..whole).step_by(SUMS) {
        for s in 0..SUMS {
            add(at + s, s);
        }
    }
    (whole..k).for_each(|at| add(at, 0));
    for (sums, out) in sums.into_iter().zip(out) {
        let sum = sums.into_iter().reduce(|a, b| _mm512_add_ps(a, b)).expect("there is a sum");
        // SAFETY: the array has sixteen values.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::{Precision, matmul};
    use crate::measure::free::available;
    use crate::testing::{Random, assert_close, wide};

    #[test]
    fn products_are_those_of_the_exact_kernels() {
        if !available() {
            return eprintln!("skipped: no AVX-512 with BF16");
        }
        let mut random = Random(5);
        for threads in [Threads::single(), Threads::new(3)] {
            for (n, k) in [(16, 32), (40, 64), (96, 70), (130, 96), (33, 1)] {
                let w = PackedMatrix::from_f32(Precision::Bf16, &random.vec(n * k), n, k);
                let w_f32 = PackedMatrix::from_f32(Precision::F32, &random.vec(n * k), n, k);
                for m in [1, 2, 3, 4, 5, 6, 7, 8, 9, 21] {
                    let x = random.vec(m * k);
                    let (mut want, mut got) = (vec![0.0; m * n], vec![7.0; m * n]);
                    matmul(&threads, &x, m, &w, &mut want);
                    let what = format!("{m} rows of {k} to {n}");
                    let mut products = Products::default();
                    products.columns(&threads, &x, &[Group { rows: 0..m, w: &w }], &mut got);
                    assert_close(&got, &wide(&want), 1e-4, &what);
                    got.fill(7.0);
                    products.parts_of_k(&threads, &x, &w, &mut got);
                    assert_close(&got, &wide(&want), 1e-4, &format!("{what}, parts of k"));
                    matmul(&threads, &x, m, &w_f32, &mut want);
                    product_f32(&x, &w_f32, &mut got);
                    assert_close(&got, &wide(&want), 1e-4, &format!("{what}, f32"));
                }
            }
        }
    }

    #[test]
    fn experts_are_added_to_their_tokens() {
        if !available() {
            return eprintln!("skipped: no AVX-512 with BF16");
        }
        let (n, k, tokens) = (48, 64, 5);
        let mut random = Random(6);
        let w: Vec<PackedMatrix> =
            (0..3).map(|_| PackedMatrix::from_f32(Precision::Bf16, &random.vec(n * k), n, k)).collect();
        let (rows, x, weights) = ([3u32, 0, 4, 1, 3, 2, 3], random.vec(7 * k), random.vec(7));
        let groups: Vec<Group> =
            [0..2, 2..3, 3..7].into_iter().zip(&w).map(|(rows, w)| Group { rows, w }).collect();
        let mut each = vec![0.0; 7 * n];
        let mut out = random.vec(tokens * n);
        let mut want = wide(&out);
        let threads = Threads::new(2);
        let mut products = Products::default();
        products.columns(&threads, &x, &groups, &mut each);
        for (s, &row) in rows.iter().enumerate() {
            for (want, value) in want[row as usize * n..][..n].iter_mut().zip(&each[s * n..]) {
                *want += f64::from(weights[s]) * f64::from(*value);
            }
        }
        products.columns_added(&threads, &x, &groups, Add { rows: &rows, weights: &weights }, &mut out);
        assert_close(&out, &want, 1e-5, "experts");
    }
}
