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

/// The output matrix `[m,n]`, of which each thread writes parts of its own.
pub(super) struct Output {
    pub(super) base: SharedMut<f32>,
    pub(super) n: usize,
    pub(super) store: Store,
}

impl Output {
    /// The part of row `row` that belongs to panel `panel`: sixteen values, fewer in the last panel.
    ///
    /// # Safety
    /// No other thread works on this panel of this row, and the matrix is still borrowed.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "each part belongs to one thread, as the caller promises")]
    pub(super) unsafe fn part(&self, row: usize, panel: usize) -> &mut [f32] {
        let column = panel * LANES;
        // SAFETY: the caller's promise.
        unsafe { self.base.slice(row * self.n + column, LANES.min(self.n - column)) }
    }

    /// Stores the sixteen values of one row and panel.
    ///
    /// # Safety
    /// As [`Output::part`].
    #[inline(always)]
    pub(super) unsafe fn put<S: Lanes>(&self, row: usize, panel: usize, value: S) {
        // SAFETY: the caller's promise.
        let part = unsafe { self.part(row, panel) };
        let value = if self.store == Store::Add { S::read(part, 0.0).add(value) } else { value };
        value.write(part);
    }
}
