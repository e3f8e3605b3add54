//! Products of a few rows with weights of 8 or 4 bits: the codes go from memory straight into the sums.
//!
//! With one row, unfolding codes into tiles takes longer than reading them. Here sixteen columns' codes become f32 lanes
//! and meet a value of x in each, in the order that the module gives for bf16. A scale of 8 bits is a power of two, which
//! moves no rounding, so the sums of a tile are taken over the codes and scaled once; 4 bits are scaled code by code.
//!
//! That gives the tile instruction's bits as long as nothing is subnormal and nothing overflows on either way. Where values
//! of x and scales are zero or from 2^−56 to 2^56 in size, neither can be: with at most 7 bits in a code and 8 in a value,
//! every product and every rounded sum, scaled or not, is a multiple of 2^−126 and below 2^127.

use super::PackedMatrix;
use super::pack::Line;
use super::quant::{CodeBits, TILE_K};
use super::tile::Output;
use crate::simd::{LANES, Lanes, simd};
use std::ops::Range;

/// The most rows that it is worth for.
pub(super) const MOST_ROWS: usize = 4;
/// Bits of 2^−56 and of 2^56.
const LEAST: u32 = (127 - 56) << 23;
const MOST: u32 = (127 + 56) << 23;

/// Bytes of codes that are asked for ahead of their use.
const AHEAD: usize = 4096;

/// Whether [`block`] may multiply `x`, some rows, by `w`.
pub(super) fn takes(x: &[f32], rows: usize, w: &PackedMatrix) -> bool {
    may_take(rows, w) && plain(x)
}

/// Whether it may, for all that the weight says.
pub(super) fn may_take(rows: usize, w: &PackedMatrix) -> bool {
    rows <= MOST_ROWS && w.quantisation().is_some() && w.has_plain_scales()
}

simd! {
    /// Whether all values are zero or from 2^−56 to 2^56 in size.
    pub(super) fn plain<S>(x: &[f32]) -> bool {
        let mut plain = true;
        for &x in x {
            let size = x.to_bits() & 0x7fff_ffff;
            plain &= (size == 0) | (size.wrapping_sub(LEAST) <= MOST - LEAST);
        }
        plain
    }
}

simd! {
    /// Computes the product of `x [rows, k]`, rounded to bf16 and each row padded with zeros to a multiple of 32, for `panels`.
    pub(super) fn block<S>(x: &[f32], rows: usize, w: &PackedMatrix, panels: Range<usize>, out: &Output) {
        match (w.quantisation().expect("only a quantised matrix has codes").bits(), rows) {
            (CodeBits::Eight, 1) => strips::<S, 1, 4, false>(x, w, panels, out),
            (CodeBits::Eight, 2) => strips::<S, 2, 4, false>(x, w, panels, out),
            (CodeBits::Eight, 3) => strips::<S, 3, 2, false>(x, w, panels, out),
            (CodeBits::Eight, _) => strips::<S, 4, 2, false>(x, w, panels, out),
            (CodeBits::Four, 1) => strips::<S, 1, 4, true>(x, w, panels, out),
            (CodeBits::Four, 2) => strips::<S, 2, 4, true>(x, w, panels, out),
            (CodeBits::Four, 3) => strips::<S, 3, 2, true>(x, w, panels, out),
            (CodeBits::Four, _) => strips::<S, 4, 2, true>(x, w, panels, out),
        }
        S::fence();
    }
}

/// All of `panels`, `PANELS` at a time and the last ones by themselves.
#[inline(always)]
fn strips<S: Lanes, const ROWS: usize, const PANELS: usize, const FOUR: bool>(
    x: &[f32],
    w: &PackedMatrix,
    panels: Range<usize>,
    out: &Output,
) {
    let mut panel = panels.start;
    while panel < panels.end {
        panel += match panels.end - panel {
            left if left >= PANELS => strip::<S, ROWS, PANELS, FOUR>(x, w, panel, out),
            _ => strip::<S, ROWS, 1, FOUR>(x, w, panel, out),
        };
    }
}

/// `PANELS` panels from `panel` on; returns `PANELS`.
#[inline(always)]
fn strip<S: Lanes, const ROWS: usize, const PANELS: usize, const FOUR: bool>(
    x: &[f32],
    w: &PackedMatrix,
    panel: usize,
    out: &Output,
) -> usize {
    let tiles = x.len() / (ROWS * TILE_K);
    let tiles_per_group = w.quantisation().map_or(1, |quantisation| quantisation.group() / TILE_K);
    let (x, _) = x.as_chunks::<TILE_K>();
    let (mut groups, mut codes) = ([&[][..]; PANELS], [&[][..]; PANELS]);
    let mut ahead = [&[][..]; PANELS];
    for p in 0..PANELS {
        let (scales, lines) = w.scales_and_codes(panel + p);
        (groups[p], codes[p]) = (scales, bytemuck::cast_slice::<Line, [u8; LANES]>(lines));
        ahead[p] = bytemuck::cast_slice::<Line, f32>(lines);
    }
    let mut sums = [[S::splat(0.0); PANELS]; ROWS];
    for tile in 0..tiles {
        let mut scales = [S::splat(0.0); PANELS];
        for p in 0..PANELS {
            scales[p] = S::from_bf16(&groups[p][tile / tiles_per_group]);
        }
        let mut even = [[S::splat(0.0); PANELS]; ROWS];
        let mut odd = even;
        for pair in 0..TILE_K / 2 {
            for p in 0..PANELS {
                // Bytes of a pair's codes, and where they are.
                let bytes = if FOUR { LANES } else { 2 * LANES };
                let at = (tile * TILE_K / 2 + pair) * bytes;
                if at.is_multiple_of(size_of::<Line>()) {
                    S::prefetch(ahead[p], (at + AHEAD) / size_of::<f32>());
                }
                let (w_even, w_odd) = if FOUR {
                    let (low, high) = S::from_i4(&codes[p][tile * TILE_K / 2 + pair]);
                    (low.mul(scales[p]), high.mul(scales[p]))
                } else {
                    let at = tile * TILE_K + 2 * pair;
                    (S::from_i8(&codes[p][at]), S::from_i8(&codes[p][at + 1]))
                };
                for r in 0..ROWS {
                    let x = &x[r * tiles + tile];
                    even[r][p] = S::splat(x[2 * pair]).fma(w_even, even[r][p]);
                    odd[r][p] = S::splat(x[2 * pair + 1]).fma(w_odd, odd[r][p]);
                }
            }
        }
        for r in 0..ROWS {
            for p in 0..PANELS {
                let both = even[r][p].add(odd[r][p]);
                sums[r][p] = if FOUR { sums[r][p].add(both) } else { scales[p].fma(both, sums[r][p]) };
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (p, sum) in sums.into_iter().enumerate() {
            // SAFETY: each (row, panel) is given to one thread only.
            unsafe { out.put(r, panel + p, sum) };
        }
    }
    PANELS
}
