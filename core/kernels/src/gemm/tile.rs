//! Where a kernel puts a tile of results.

use super::Store;
#[cfg(target_arch = "x86_64")]
use super::pack::Line;
use crate::simd::{LANES, Lanes};
use crate::threads::SharedMut;

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

/// Rows of which each thread writes parts of its own, rounded to bf16 and in tiles, as the next product takes them.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct TileRows {
    base: SharedMut<u16>,
    /// Values of sixteen rows.
    per_tile_row: usize,
    /// Row of tiles that a kernel's row 0 begins.
    first: usize,
}

#[cfg(target_arch = "x86_64")]
impl TileRows {
    /// The whole of `tiles`, rows of tiles of so many values.
    pub(super) fn new(tiles: &mut [Line], per_tile_row: usize) -> Self {
        Self { base: SharedMut::new(bytemuck::cast_slice_mut(tiles)), per_tile_row, first: 0 }
    }

    /// Stores lines of sixteen values, one row below the other within sixteen rows.
    ///
    /// # Safety
    /// No other thread works on these, and the tiles are still borrowed.
    unsafe fn set(&self, row: usize, panel: usize, lines: &[[f32; LANES]]) {
        const WIDTH: usize = 2 * LANES;
        let at = (self.first + row / LANES) * self.per_tile_row + panel / 2 * WIDTH * LANES;
        let at = at + row % LANES * WIDTH + panel % 2 * LANES;
        let to = self.base.block(at, lines.len(), WIDTH, LANES);
        // SAFETY: these lines' halves lie in the tiles, and the caller promises that they are this thread's.
        unsafe { super::tiles::put_rounded(lines, to, WIDTH) };
    }
}

#[derive(Clone, Copy)]
enum Place {
    Matrix(Matrix),
    #[cfg(target_arch = "x86_64")]
    Tiles(TileRows),
}

/// Where a product goes.
#[derive(Clone, Copy)]
pub(super) struct Output {
    place: Place,
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
        let place = Place::Matrix(Matrix::new(out, n));
        Self { place, store, gate: None, first_panel: 0, first_row: 0 }
    }

    /// `tiles`, for a product that is gated and, as it is, goes to `kept`.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn gated(gate: Gate, kept: Option<Matrix>, tiles: TileRows) -> Self {
        let place = Place::Tiles(tiles);
        Self { place, store: Store::Set, gate: Some((gate, kept)), first_panel: 0, first_row: 0 }
    }

    /// The same matrix for a kernel whose panel 0 is `first_panel`.
    pub(super) fn starting_at(self, first_panel: usize) -> Self {
        Self { first_panel, ..self }
    }

    /// The same for a kernel whose row 0 is `first_row` and begins the row of tiles `first_tile_row`.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn below(self, first_row: usize, first_tile_row: usize) -> Self {
        let place = match self.place {
            Place::Tiles(tiles) => Place::Tiles(TileRows { first: first_tile_row, ..tiles }),
            matrix => matrix,
        };
        Self { place, first_row: self.first_row + first_row, ..self }
    }

    /// Where row `row` of panel `panel` starts and the bytes from row to row, in a matrix whose lines are not written past the
    /// caches.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn cached(&self, row: usize, panel: usize) -> Option<(*const f32, usize)> {
        let Place::Matrix(Matrix { base, n, streams }) = &self.place else { return None };
        let at = (self.first_row + row) * n + self.column(panel);
        (!streams || self.store == Store::Add).then(|| (base.address(at), n * size_of::<f32>()))
    }

    /// Columns before panel `panel` of the kernel.
    #[inline(always)]
    pub(super) fn column(&self, panel: usize) -> usize {
        (self.first_panel + panel) * LANES
    }

    /// Stores the sixteen values of one row and panel. Before other threads read them, [`Lanes::fence`] must be passed.
    ///
    /// # Safety
    /// No other thread works on this panel of this row, and what the output was made of is still borrowed.
    #[inline(always)]
    pub(super) unsafe fn put<S: Lanes>(&self, row: usize, panel: usize, value: S) {
        // SAFETY: the caller's promise.
        unsafe {
            match &self.place {
                Place::Matrix(matrix) if self.store == Store::Add => {
                    let part = matrix.part(self.first_row + row, self.column(panel));
                    S::read(part, 0.0).add(value).write(part);
                }
                Place::Matrix(matrix) => matrix.set(self.first_row + row, self.column(panel), value),
                #[cfg(target_arch = "x86_64")]
                Place::Tiles(tiles) => {
                    let mut line = [0.0; LANES];
                    value.store(&mut line);
                    tiles.set(row, panel, &[line]);
                }
            }
        }
    }

    /// Stores such values of up to sixteen rows, all of a row of tiles.
    ///
    /// # Safety
    /// As [`Output::put`].
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) unsafe fn put_lines<S: Lanes>(&self, row: usize, panel: usize, lines: &[[f32; LANES]]) {
        // SAFETY: the caller's promise.
        unsafe {
            if let Place::Tiles(tiles) = &self.place {
                return tiles.set(row, panel, lines);
            }
            for (i, line) in lines.iter().enumerate() {
                self.put(row + i, panel, S::load(line));
            }
        }
    }

    /// Keeps sixteen values of a gated product, of one row and one of its own panels, in `kept`.
    ///
    /// # Safety
    /// As [`Output::put`].
    #[inline(always)]
    pub(super) unsafe fn keep<S: Lanes>(&self, kept: &Matrix, row: usize, panel: usize, value: S) {
        // SAFETY: the caller's promise.
        unsafe { kept.set(self.first_row + row, panel * LANES, value) }
    }
}
