//! Where a kernel puts a tile of results.

use crate::simd::{LANES, Lanes};
use crate::threads::SharedMut;

/// What is done with a finished product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Store {
    /// `out = product`
    Set,
    /// `out += product`
    Add,
}

/// What becomes of the two halves of a product's columns on their way out: `act(first) · second`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    /// By [`crate::activation::Activation::Silu`].
    Silu,
    /// By [`crate::activation::Activation::GeluTanh`].
    GeluTanh,
}

/// A matrix of which each thread writes parts of its own.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
    base: SharedMut<f32>,
    n: usize,
    /// Whether whole lines are written past the caches: what a second-level cache cannot keep anyway, on memory lines.
    streams: bool,
}

/// Bytes of output from which it is written past the caches: half a second-level cache.
const STREAM_BYTES: usize = 1 << 20;

impl Matrix {
    /// The whole of `out`, rows of `n`.
    pub(super) fn new(out: &mut [f32], n: usize) -> Self {
        let on_lines =
            n.is_multiple_of(LANES) && out.as_ptr().addr().is_multiple_of(size_of::<[f32; LANES]>());
        let streams = on_lines && size_of_val(out) >= STREAM_BYTES;
        Self { base: SharedMut::new(out), n, streams }
    }

    /// Row `row` from `column` on: sixteen values, fewer at the end of the row.
    ///
    /// # Safety
    /// No other thread works on these, and the matrix is still borrowed.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "each part belongs to one thread, as the caller promises")]
    unsafe fn part(&self, row: usize, column: usize) -> &mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { self.base.slice(row * self.n + column, LANES.min(self.n - column)) }
    }

    /// Stores sixteen values. Before other threads read them, [`Lanes::fence`] must be passed.
    ///
    /// # Safety
    /// As [`Matrix::part`].
    #[inline(always)]
    unsafe fn set<S: Lanes>(&self, row: usize, column: usize, value: S) {
        // SAFETY: the caller's promise.
        let part = unsafe { self.part(row, column) };
        match part.first_chunk_mut() {
            Some(line) if self.streams => value.stream(line),
            _ => value.write(part),
        }
    }
}

/// Where a product goes.
#[derive(Clone, Copy)]
pub(super) struct Output {
    matrix: Matrix,
    pub(super) store: Store,
    /// Whether the columns of the product, twice those of the matrix, are gates and what goes through them; and where these
    /// are kept besides.
    pub(super) gate: Option<(Gate, Option<Matrix>)>,
    /// Panel of the matrix that a kernel's panel 0 is.
    first_panel: usize,
    /// Row of the matrix that a kernel's row 0 is.
    first_row: usize,
}

impl Output {
    /// The whole of `out`, rows of `n`.
    pub(super) fn new(out: &mut [f32], n: usize, store: Store) -> Self {
        Self { matrix: Matrix::new(out, n), store, gate: None, first_panel: 0, first_row: 0 }
    }

    /// The same matrix for a product that is gated and, as it is, goes to `kept`.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn gated(self, gate: Gate, kept: Option<Matrix>) -> Self {
        Self { gate: Some((gate, kept)), ..self }
    }

    /// The same matrix for a kernel whose panel 0 is `first_panel`.
    pub(super) fn starting_at(self, first_panel: usize) -> Self {
        Self { first_panel, ..self }
    }

    /// The same matrix for a kernel whose row 0 is `first_row`.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn below(self, first_row: usize) -> Self {
        Self { first_row: self.first_row + first_row, ..self }
    }

    /// Where row `row` of panel `panel` starts and the bytes from row to row, unless lines are written past the caches.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn cached(&self, row: usize, panel: usize) -> Option<(*const f32, usize)> {
        let Matrix { base, n, streams } = &self.matrix;
        let at = (self.first_row + row) * n + self.column(panel);
        (!streams || self.store == Store::Add).then(|| (base.address(at), n * size_of::<f32>()))
    }

    /// Columns before panel `panel` of the kernel.
    #[inline(always)]
    pub(super) fn column(&self, panel: usize) -> usize {
        (self.first_panel + panel) * LANES
    }

    /// The part of row `row` that belongs to panel `panel`: sixteen values, fewer in the last panel.
    ///
    /// # Safety
    /// No other thread works on this panel of this row, and the matrix is still borrowed.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "each part belongs to one thread, as the caller promises")]
    pub(super) unsafe fn part(&self, row: usize, panel: usize) -> &mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { self.matrix.part(self.first_row + row, self.column(panel)) }
    }

    /// Stores the sixteen values of one row and panel. Before other threads read them, [`Lanes::fence`] must be passed.
    ///
    /// # Safety
    /// As [`Output::part`].
    #[inline(always)]
    pub(super) unsafe fn put<S: Lanes>(&self, row: usize, panel: usize, value: S) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.store == Store::Add {
                let part = self.part(row, panel);
                return S::read(part, 0.0).add(value).write(part);
            }
            self.matrix.set(self.first_row + row, self.column(panel), value);
        }
    }

    /// Keeps sixteen values of a gated product, of one row and one of its own panels, in `kept`.
    ///
    /// # Safety
    /// As [`Output::part`].
    #[inline(always)]
    pub(super) unsafe fn keep<S: Lanes>(&self, kept: &Matrix, row: usize, panel: usize, value: S) {
        // SAFETY: the caller's promise.
        unsafe { kept.set(self.first_row + row, panel * LANES, value) }
    }
}
