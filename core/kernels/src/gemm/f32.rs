//! The f32 kernel: a tile of rows × panels in registers, one FMA chain over k an element.

use super::PackedMatrix;
use super::pack::Line;
use super::tile::Output;
use crate::isa::{self, Isa};
use crate::simd::{Lanes, simd};
use std::ops::Range;

/// Computes the product for `rows` and `panels`.
pub(super) fn block(x: &[f32], rows: Range<usize>, w: &PackedMatrix, panels: Range<usize>, out: &Output) {
    let wide = isa::current() >= Isa::Avx512;
    kernel(x, rows, w, panels, out, wide);
}

simd! {
    fn kernel<S>(x: &[f32], rows: Range<usize>, w: &PackedMatrix, panels: Range<usize>, out: &Output, wide: bool) {
        let mut panel = panels.start;
        while panel < panels.end {
            let two = wide && panel + 2 <= panels.end;
            let mut row = rows.start;
            while row < rows.end {
                let left = rows.end - row;
                row += match (two, left) {
                    (true, 12..) => tile::<S, 12, 2>(x, row, w, panel, out),
                    (true, 6..) => tile::<S, 6, 2>(x, row, w, panel, out),
                    (true, 3..) => tile::<S, 3, 2>(x, row, w, panel, out),
                    (true, _) => tile::<S, 1, 2>(x, row, w, panel, out),
                    (false, 6..) => tile::<S, 6, 1>(x, row, w, panel, out),
                    (false, 3..) => tile::<S, 3, 1>(x, row, w, panel, out),
                    (false, _) => tile::<S, 1, 1>(x, row, w, panel, out),
                };
            }
            panel += if two { 2 } else { 1 };
        }
        S::fence();
    }
}

/// `ROWS` rows from `row` on × `PANELS` panels from `panel` on; returns `ROWS`.
#[inline(always)]
fn tile<S: Lanes, const ROWS: usize, const PANELS: usize>(
    x: &[f32],
    row: usize,
    w: &PackedMatrix,
    panel: usize,
    out: &Output,
) -> usize {
    let k = w.inner();
    let x = &x[row * k..(row + ROWS) * k];
    let lines: [&[Line]; PANELS] = std::array::from_fn(|p| &w.panel(panel + p)[..k]);
    let mut sums = [[S::splat(0.0); PANELS]; ROWS];
    for i in 0..k {
        // SAFETY: `i < k`, and `lines` holds k lines a panel and `x` k values a row, by the slices above.
        unsafe {
            let values: [S; PANELS] =
                std::array::from_fn(|p| S::load(bytemuck::cast_ref(&lines[p].get_unchecked(i).0)));
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = S::splat(*x.get_unchecked(r * k + i));
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = a.fma(value, *sum);
                }
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (p, sum) in sums.into_iter().enumerate() {
            // SAFETY: `split` gives each (row, panel) to one thread only.
            unsafe { out.put(row + r, panel + p, sum) };
        }
    }
    ROWS
}
