//! Packed weights: layout, packing from either orientation, transposing.

use crate::Pages;
use crate::Threads;
use crate::convert::bf16_bits;
use crate::isa;
use crate::simd::{LANES, Lanes, simd};
use half::bf16;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::few::Sizes;
use super::quant::{Quantisation, Weight};

/// In which numbers a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32 operands, f32 accumulation.
    F32,
    /// bf16 operands, f32 accumulation.
    Bf16,
}

/// One cache line: a step of k for sixteen columns. f32: one value of k a column; bf16: two (low half first).
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u32; LANES]);

const _: () = assert!(size_of::<Line>() == 64);

#[cfg(target_endian = "big")]
compile_error!("bf16 pairs are packed for little-endian machines");

/// A logical weight `W [n,k]`, laid out for the kernels.
///
/// Column panels of sixteen output features, each a run of lines over k: `[n/16][k]` lines of f32, or `[n/16][k/2]`
/// lines of bf16 pairs, k padded with zeros to a multiple of 32 (so sixteen lines are one AMX tile). n is padded with
/// zeros to a multiple of 16. A quantised matrix holds scales and codes instead (`quant`).
#[derive(Clone)]
pub struct PackedMatrix {
    precision: Precision,
    pub(super) quantisation: Option<Quantisation>,
    /// See [`PackedMatrix::is_plain`].
    pub(super) plain: bool,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) lines: Pages<Line>,
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let quantisation = self.quantisation.map_or(String::new(), |q| format!(" {q:?}"));
        write!(f, "PackedMatrix({:?}{quantisation} [{}, {}])", self.precision, self.n, self.k)
    }
}

impl PackedMatrix {
    /// Packs `w [n,k]`.
    pub fn from_f32(precision: Precision, w: &[f32], n: usize, k: usize) -> Self {
        let mut packed = Self::zeros(precision, n, k);
        packed.repack_from_f32(&Threads::single(), w);
        packed
    }

    /// Packs `w [n,k]`.
    pub fn from_bf16(precision: Precision, w: &[bf16], n: usize, k: usize) -> Self {
        let mut packed = Self::zeros(precision, n, k);
        packed.repack_from_bf16(&Threads::single(), w);
        packed
    }

    /// Packs W from its transpose, `w_kn [k,n]`.
    pub fn from_f32_transposed(precision: Precision, w_kn: &[f32], n: usize, k: usize) -> Self {
        let mut packed = Self::zeros(precision, n, k);
        packed.repack_from_f32_transposed(&Threads::single(), w_kn);
        packed
    }

    /// Packs W from its transpose, `w_kn [k,n]`.
    pub fn from_bf16_transposed(precision: Precision, w_kn: &[bf16], n: usize, k: usize) -> Self {
        let mut packed = Self::zeros(precision, n, k);
        packed.repack_from_bf16_transposed(&Threads::single(), w_kn);
        packed
    }

    /// A matrix to be filled by one of the `repack_from` methods; zeros until then.
    pub fn zeros(precision: Precision, n: usize, k: usize) -> Self {
        Self::empty(precision).lasting(n, k)
    }

    /// Zeros in the shape `[n,k]`, in memory that lasts.
    pub(super) fn lasting(mut self, n: usize, k: usize) -> Self {
        (self.n, self.k) = (n, k);
        self.lines = Pages::lasting(n.div_ceil(LANES) * self.lines_per_panel());
        self
    }

    pub(super) fn empty(precision: Precision) -> Self {
        PackedMatrix { precision, quantisation: None, plain: true, n: 0, k: 0, lines: Pages::new() }
    }

    /// Changes the shape, keeping the allocation where it is large enough; every value must then be filled in.
    pub(super) fn reshape(&mut self, precision: Precision, n: usize, k: usize) {
        (self.precision, self.n, self.k) = (precision, n, k);
        self.lines.reset(n.div_ceil(LANES) * self.lines_per_panel());
    }

    /// Replaces the values by `w [n,k]` in the same allocation.
    ///
    /// # Panics
    /// When `w` is not n·k long.
    pub fn repack_from_f32(&mut self, threads: &Threads, w: &[f32]) {
        self.fill(threads, w);
    }

    /// Replaces the values by `w [n,k]` in the same allocation.
    ///
    /// # Panics
    /// When `w` is not n·k long.
    pub fn repack_from_bf16(&mut self, threads: &Threads, w: &[bf16]) {
        self.fill(threads, w);
    }

    /// Replaces the values by those of the transpose `w_kn [k,n]`, in the same allocation.
    ///
    /// # Panics
    /// When `w_kn` is not n·k long.
    pub fn repack_from_f32_transposed(&mut self, threads: &Threads, w_kn: &[f32]) {
        self.fill_transposed(threads, w_kn);
    }

    /// Replaces the values by those of the transpose `w_kn [k,n]`, in the same allocation.
    ///
    /// # Panics
    /// When `w_kn` is not n·k long.
    pub fn repack_from_bf16_transposed(&mut self, threads: &Threads, w_kn: &[bf16]) {
        self.fill_transposed(threads, w_kn);
    }

    /// Output features n.
    pub fn rows(&self) -> usize {
        self.n
    }

    /// Input features k.
    pub fn inner(&self) -> usize {
        self.k
    }

    /// The numbers it is stored in.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Bytes that one product reads of it.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.lines)
    }

    /// Whether all that is stored in bf16, its weights or the scales of its codes, is zero or from 2^−56 to 2^56 in size: with
    /// values of such sizes nothing in a product is subnormal (`few`).
    pub(super) fn is_plain(&self) -> bool {
        self.plain
    }

    /// Lines of one panel of sixteen columns.
    pub(super) fn lines_per_panel(&self) -> usize {
        match (self.quantisation, self.precision) {
            (Some(quantisation), _) => quantisation.lines_per_panel(self.k),
            (None, Precision::F32) => self.k,
            (None, Precision::Bf16) => self.k.next_multiple_of(32) / 2,
        }
    }

    /// All lines, panel after panel, as they lie in memory.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn words(&self) -> &[[u32; LANES]] {
        bytemuck::cast_slice(&self.lines)
    }

    /// The lines of panel `panel`.
    pub(super) fn panel(&self, panel: usize) -> &[Line] {
        self.panels(panel, 1)
    }

    /// The lines of `count` panels from `first` on.
    pub(super) fn panels(&self, first: usize, count: usize) -> &[Line] {
        let lines = self.lines_per_panel();
        &self.lines[first * lines..(first + count) * lines]
    }

    fn fill<E: Element>(&mut self, threads: &Threads, w: &[E]) {
        if let Some(quantisation) = self.quantisation {
            return self.fill_codes(threads, quantisation, w, false);
        }
        let (n, k, precision, lines) = (self.n, self.k, self.precision, self.lines_per_panel());
        assert_eq!(w.len(), n * k, "packing: w is [n,k] = [{n},{k}]");
        let plain = AtomicBool::new(precision == Precision::Bf16);
        threads.for_each_row_chunk(&mut self.lines, lines.max(1), min_panels(lines), |first, block| {
            let mut sizes = Sizes::NONE;
            for (i, panel) in block.chunks_exact_mut(lines).enumerate() {
                let row = (first + i) * LANES;
                let rows = &w[row * k..n.min(row + LANES) * k];
                E::pack_panel(precision, rows, k, panel, &mut sizes);
            }
            plain.fetch_and(sizes.are_plain(), Relaxed);
        });
        self.plain = plain.into_inner();
    }

    pub(super) fn fill_transposed<E: Element>(&mut self, threads: &Threads, w_kn: &[E]) {
        if let Some(quantisation) = self.quantisation {
            return self.fill_codes(threads, quantisation, w_kn, true);
        }
        let (n, k, precision, lines) = (self.n, self.k, self.precision, self.lines_per_panel());
        assert_eq!(w_kn.len(), n * k, "packing: the transpose of w is [k,n] = [{k},{n}]");
        let per_line = if precision == Precision::Bf16 { 2 } else { 1 };
        let plain = AtomicBool::new(precision == Precision::Bf16);
        threads.for_each_row_chunk(&mut self.lines, lines.max(1), min_panels(lines), |first, block| {
            let mut sizes = Sizes::NONE;
            // A few rows of the source at a time, across all panels, so that it is read in long runs.
            for start in (0..lines).step_by(LINES_AT_ONCE) {
                let end = lines.min(start + LINES_AT_ONCE);
                let rows = &w_kn[k.min(start * per_line) * n..k.min(end * per_line) * n];
                for (i, panel) in block.chunks_exact_mut(lines).enumerate() {
                    let part = &mut panel[start..end];
                    E::pack_panel_transposed(precision, rows, n, (first + i) * LANES, part);
                    if precision == Precision::Bf16 {
                        see_lines(part, &mut sizes);
                    }
                }
            }
            plain.fetch_and(sizes.are_plain(), Relaxed);
        });
        self.plain = plain.into_inner();
    }
}

simd! {
    fn see_lines<S>(lines: &[Line], sizes: &mut Sizes) {
        sizes.see(bytemuck::cast_slice(lines));
    }
}

/// Lines that a transposed source is packed for before it moves on to the next panel.
pub(super) const LINES_AT_ONCE: usize = 32;

/// Bytes of each row that are asked for ahead of their packing.
const AHEAD: usize = 512;

/// Panels worth a thread of their own.
fn min_panels(lines: usize) -> usize {
    (2048 / lines.max(1)).max(1)
}

/// A number that weights may be stored in.
pub(super) trait Element: Weight {
    /// Packs up to sixteen rows of W (`rows.len() / k` of them) into the lines of a panel; `sizes` sees those in bf16.
    fn pack_panel(precision: Precision, rows: &[Self], k: usize, panel: &mut [Line], sizes: &mut Sizes);
    /// Packs sixteen columns of the transpose `[k,n]`, from `column` on, into the lines of a panel.
    fn pack_panel_transposed(
        precision: Precision,
        w_kn: &[Self],
        n: usize,
        column: usize,
        panel: &mut [Line],
    );
}

/// Implements [`Element`] given the conversions of one value; the bodies are compiled per instruction set.
///
/// A pair of bf16 is one u32, low half first, which on a little-endian machine is the pair as it lies in memory.
macro_rules! element {
    ($t:ty, $bits_f32:expr, $bits_bf16:expr, $columns_by_instruction:expr) => {
        impl Element for $t {
            fn pack_panel(precision: Precision, rows: &[Self], k: usize, panel: &mut [Line], sizes: &mut Sizes) {
                match precision {
                    Precision::F32 => pack_rows_f32(rows, k, panel),
                    Precision::Bf16 => pack_rows_bf16(rows, k, panel, sizes),
                }
                simd! {
                    fn pack_rows_f32<S>(rows: &[$t], k: usize, panel: &mut [Line]) {
                        for (block, lines) in panel.chunks_mut(LANES).enumerate() {
                            let mut a = [[0u32; LANES]; LANES];
                            for (a, row) in a.iter_mut().zip(rows.chunks_exact(k)) {
                                let row = &row[block * LANES..];
                                if let Some(full) = row.first_chunk::<LANES>() {
                                    for j in 0..LANES {
                                        a[j] = $bits_f32(full[j]);
                                    }
                                } else {
                                    for (a, &w) in a.iter_mut().zip(row) {
                                        *a = $bits_f32(w);
                                    }
                                }
                            }
                            transpose_lines::<S>(&a, lines);
                        }
                    }
                }
                simd! {
                    fn pack_rows_bf16<S>(rows: &[$t], k: usize, panel: &mut [Line], sizes: &mut Sizes) {
                        const BLOCK: usize = 2 * LANES;
                        for (block, lines) in panel.chunks_mut(LANES).enumerate() {
                            let mut a = [[0u32; LANES]; LANES];
                            for (a, row) in a.iter_mut().zip(rows.chunks_exact(k)) {
                                let row = &row[block * BLOCK..];
                                for line in (0..size_of::<$t>() * BLOCK).step_by(size_of::<Line>()) {
                                    S::prefetch(row, (AHEAD + line) / size_of::<$t>());
                                }
                                if let Some(full) = row.first_chunk::<BLOCK>() {
                                    let a: &mut [u16; BLOCK] = bytemuck::cast_mut(a);
                                    for j in 0..BLOCK {
                                        a[j] = $bits_bf16(full[j]);
                                    }
                                    continue;
                                }
                                let (pairs, odd) = row.as_chunks::<2>();
                                for (a, pair) in a.iter_mut().zip(pairs) {
                                    *a = u32::from($bits_bf16(pair[0])) | u32::from($bits_bf16(pair[1])) << 16;
                                }
                                if let [last] = odd {
                                    a[pairs.len()] = u32::from($bits_bf16(*last));
                                }
                            }
                            sizes.see(&a);
                            transpose_lines::<S>(&a, lines);
                        }
                    }
                }
            }

            fn pack_panel_transposed(
                precision: Precision,
                w_kn: &[Self],
                n: usize,
                column: usize,
                panel: &mut [Line],
            ) {
                let by_instruction: Option<ColumnsToLines<$t>> = $columns_by_instruction;
                match precision {
                    Precision::Bf16 if by_instruction.is_some() && isa::current().has_tiles() => {
                        by_instruction.expect("looked at above")(w_kn, n, column, panel);
                    }
                    Precision::F32 => pack_columns_f32(w_kn, n, column, panel),
                    Precision::Bf16 => pack_columns_bf16(w_kn, n, column, panel),
                }
                simd! {
                    fn pack_columns_f32<S>(w_kn: &[$t], n: usize, column: usize, panel: &mut [Line]) {
                        for (line, row) in panel.iter_mut().zip(w_kn.chunks_exact(n)) {
                            // Whole lines apart: their length is known when this is compiled.
                            if let Some(full) = row[column..].first_chunk::<LANES>() {
                                for j in 0..LANES {
                                    line.0[j] = $bits_f32(full[j]);
                                }
                            } else {
                                line.0 = [0; LANES];
                                for (a, &w) in line.0.iter_mut().zip(&row[column..]) {
                                    *a = $bits_f32(w);
                                }
                            }
                        }
                    }
                }
                simd! {
                    fn pack_columns_bf16<S>(w_kn: &[$t], n: usize, column: usize, panel: &mut [Line]) {
                        let mut pairs = w_kn.chunks(2 * n);
                        for line in panel {
                            let (low, high) = pairs.next().map_or((&[][..], &[][..]), |pair| pair.split_at(n));
                            let low = &low[column.min(low.len())..];
                            let high = &high[column.min(high.len())..];
                            if let (Some(low), Some(high)) = (low.first_chunk::<LANES>(), high.first_chunk::<LANES>()) {
                                for j in 0..LANES {
                                    line.0[j] = u32::from($bits_bf16(low[j])) | u32::from($bits_bf16(high[j])) << 16;
                                }
                            } else {
                                line.0 = [0; LANES];
                                for (a, &w) in line.0.iter_mut().zip(low) {
                                    *a = u32::from($bits_bf16(w));
                                }
                                for (a, &w) in line.0.iter_mut().zip(high) {
                                    *a |= u32::from($bits_bf16(w)) << 16;
                                }
                            }
                        }
                    }
                }
            }
        }
    };
}

/// Packs columns of a transpose `(w_kn [k,n], n, column)` into lines of bf16 pairs.
type ColumnsToLines<T> = fn(&[T], usize, usize, &mut [Line]);

#[cfg(target_arch = "x86_64")]
const COLUMNS_BY_INSTRUCTION: Option<ColumnsToLines<f32>> = Some(super::tiles::columns_to_lines);
#[cfg(not(target_arch = "x86_64"))]
const COLUMNS_BY_INSTRUCTION: Option<ColumnsToLines<f32>> = None;

element!(f32, |w: f32| w.to_bits(), round, COLUMNS_BY_INSTRUCTION);
element!(bf16, |w: bf16| u32::from(w.to_bits()) << 16, |w: bf16| flush_bf16(w.to_bits()), None);

/// The bits of the bf16 nearest to `x` (ties to even), where a subnormal `x` counts as a zero of its sign.
#[inline(always)]
pub(super) fn round(x: f32) -> u16 {
    let sign = (x.to_bits() >> 16) as u16 & 0x8000;
    if x.to_bits() & 0x7f80_0000 == 0 { sign } else { bf16_bits(x) }
}

/// bf16 bits with subnormals replaced by a zero of the same sign, as the tile instruction reads them.
#[inline(always)]
fn flush_bf16(bits: u16) -> u16 {
    if bits & 0x7f80 == 0 { bits & 0x8000 } else { bits }
}

/// `lines[i][j] = a[j][i]`, for as many lines as there are.
#[inline(always)]
pub(super) fn transpose_lines<S: Lanes>(a: &[[u32; LANES]; LANES], lines: &mut [Line]) {
    let mut columns = [[0; LANES]; LANES];
    S::transpose(a, &mut columns);
    for (line, column) in lines.iter_mut().zip(columns) {
        line.0 = column;
    }
}

/// `out [n,t] = x [t,n]` transposed, in 16×16 blocks.
pub(super) fn transpose(threads: &Threads, x: &[f32], t: usize, n: usize, out: &mut Vec<f32>) {
    out.resize(t * n, 0.0);
    if t == 0 {
        return;
    }
    threads.for_each_row_chunk(out, t, (1 << 16) / t + 1, |first, block| {
        for (i, rows) in block.chunks_mut(LANES * t).enumerate() {
            transpose_columns(x, n, first + i * LANES, t, rows);
        }
    });
}

simd! {
    /// Up to sixteen rows of the transpose of `x [t,n]`: its columns from `column` on.
    fn transpose_columns<S>(x: &[f32], n: usize, column: usize, t: usize, rows: &mut [f32]) {
        let width = rows.len() / t;
        for start in (0..t).step_by(LANES) {
            let height = LANES.min(t - start);
            let mut a = [[0u32; LANES]; LANES];
            for (a, row) in a.iter_mut().zip(x[start * n..(start + height) * n].chunks_exact(n)) {
                if let Some(full) = row[column..].first_chunk::<LANES>() {
                    *a = full.map(f32::to_bits);
                } else {
                    for (a, x) in a.iter_mut().zip(&row[column..column + width]) {
                        *a = x.to_bits();
                    }
                }
            }
            let mut columns = [[0u32; LANES]; LANES];
            S::transpose(&a, &mut columns);
            for (row, column) in rows.chunks_exact_mut(t).zip(&columns) {
                S::load(bytemuck::cast_ref(column)).write(&mut row[start..start + height]);
            }
        }
    }
}
