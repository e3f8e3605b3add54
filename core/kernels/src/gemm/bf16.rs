//! The bf16 kernel for processors without AMX: the tile instruction's order of operations, in f32 lanes.
//!
//! The tile instruction flushes subnormal results to zero. Where neither operand has a non-zero value below 2^−56 in
//! size, every product and every rounded sum is a multiple of 2^−126 (a bf16 has 8 significant bits, so a product of
//! two is a multiple of 2^−(56+56+14)): nothing can be subnormal and the flushes are left out.

use super::PackedMatrix;
use super::pack::{Line, round};
use super::tile::Output;
use crate::Threads;
use crate::isa::{self, Isa};
use crate::simd::{LANES, Lanes, simd};
use std::cell::RefCell;
use std::ops::Range;

/// Values of k that the tile instruction takes at once.
const K_BLOCK: usize = 2 * LANES;

thread_local!(static ROUNDED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) });

/// Calls `f` with `x [m,k]` rounded to bf16 (kept as f32), each row padded with zeros to a multiple of 32.
pub(super) fn with_rounded(threads: &Threads, x: &[f32], m: usize, k: usize, f: impl FnOnce(&[f32])) {
    // Taken, not borrowed: what runs on this thread meanwhile may be a product too.
    let mut rounded = ROUNDED.take();
    let padded = k.next_multiple_of(K_BLOCK);
    rounded.resize(m * padded, 0.0);
    threads.for_each_row_chunk(&mut rounded, padded.max(1), (1 << 16) / padded.max(1) + 1, |first, block| {
        for (i, out) in block.chunks_exact_mut(padded).enumerate() {
            round_row(&x[(first + i) * k..(first + i + 1) * k], out);
        }
    });
    f(&rounded);
    ROUNDED.set(rounded);
}

simd! {
    fn round_row<S>(x: &[f32], out: &mut [f32]) {
        for (o, &x) in out.iter_mut().zip(x) {
            *o = f32::from_bits(u32::from(round(x)) << 16);
        }
        out[x.len()..].fill(0.0);
    }
}

/// Computes the product for `rows` and `panels`; `x` as from [`with_rounded`].
pub(super) fn block(x: &[f32], rows: Range<usize>, w: &PackedMatrix, panels: Range<usize>, out: &Output) {
    let wide = isa::current() >= Isa::Avx512;
    let padded = 2 * w.lines_per_panel();
    let x_has_tiny = has_tiny(&x[rows.start * padded..rows.end * padded]);
    for panel in panels {
        if x_has_tiny || (!w.is_plain() && has_tiny_pair(w.panel(panel))) {
            flushing(x, rows.clone(), w, panel, out);
        } else {
            kernel(x, rows.clone(), w, panel, out, wide);
        }
    }
}

/// Bits of 2^−56.
const TINY: u32 = (127 - 56) << 23;

simd! {
    fn has_tiny<S>(x: &[f32]) -> bool {
        let mut tiny = false;
        for &x in x {
            let size = x.to_bits() & 0x7fff_ffff;
            tiny |= size.wrapping_sub(1) < TINY - 1;
        }
        tiny
    }
}

simd! {
    fn has_tiny_pair<S>(lines: &[Line]) -> bool {
        let mut tiny = false;
        for line in lines {
            for pair in line.0 {
                let (even, odd) = ((pair << 16) & 0x7fff_ffff, pair & 0x7fff_0000);
                tiny |= (even.wrapping_sub(1) < TINY - 1) | (odd.wrapping_sub(1) < TINY - 1);
            }
        }
        tiny
    }
}

simd! {
    fn kernel<S>(x: &[f32], rows: Range<usize>, w: &PackedMatrix, panel: usize, out: &Output, wide: bool) {
        let mut row = rows.start;
        while row < rows.end {
            row += match rows.end - row {
                8.. if wide => tile::<S, 8, false>(x, row, w, panel, out),
                4.. if wide => tile::<S, 4, false>(x, row, w, panel, out),
                2.. => tile::<S, 2, false>(x, row, w, panel, out),
                _ => tile::<S, 1, false>(x, row, w, panel, out),
            };
        }
        S::fence();
    }
}

simd! {
    fn flushing<S>(x: &[f32], rows: Range<usize>, w: &PackedMatrix, panel: usize, out: &Output) {
        for row in rows {
            tile::<S, 1, true>(x, row, w, panel, out);
        }
        S::fence();
    }
}

/// `ROWS` rows from `row` on of one panel; returns `ROWS`.
#[inline(always)]
fn tile<S: Lanes, const ROWS: usize, const FLUSH: bool>(
    x: &[f32],
    row: usize,
    w: &PackedMatrix,
    panel: usize,
    out: &Output,
) -> usize {
    let lines = w.panel(panel);
    let padded = 2 * lines.len();
    let x = &x[row * padded..(row + ROWS) * padded];
    let mut sums = [S::splat(0.0); ROWS];
    for (block, lines) in lines.chunks_exact(LANES).enumerate() {
        let mut even = [S::splat(0.0); ROWS];
        let mut odd = [S::splat(0.0); ROWS];
        for (i, line) in lines.iter().enumerate() {
            let (w_even, w_odd) = (S::bf16_even(&line.0), S::bf16_odd(&line.0));
            for r in 0..ROWS {
                let at = r * padded + block * K_BLOCK + 2 * i;
                // SAFETY: `at + 1 < ROWS · padded`, the length of `x`.
                let (x_even, x_odd) = unsafe { (*x.get_unchecked(at), *x.get_unchecked(at + 1)) };
                even[r] = fma::<S, FLUSH>(S::splat(x_even), w_even, even[r]);
                odd[r] = fma::<S, FLUSH>(S::splat(x_odd), w_odd, odd[r]);
            }
        }
        for r in 0..ROWS {
            let both = even[r].add(odd[r]);
            let both = if FLUSH { both.flush() } else { both };
            sums[r] = sums[r].add(both);
            if FLUSH {
                sums[r] = sums[r].flush();
            }
        }
    }
    for (r, sum) in sums.into_iter().enumerate() {
        // SAFETY: `split` gives each (row, panel) to one thread only.
        unsafe { out.put(row + r, panel, sum) };
    }
    ROWS
}

/// Fused multiply-add that may flush a subnormal result.
///
/// The hardware calls a result tiny when it is below 2^−126 rounded to 24 bits, before it is rounded to the fewer bits
/// of a subnormal; so the size is looked at 2^60 times larger. Where that overflows, the product is so large that a sum
/// in the subnormals is exactly zero.
#[inline(always)]
fn fma<S: Lanes, const FLUSH: bool>(a: S, b: S, c: S) -> S {
    let sum = a.fma(b, c);
    if !FLUSH {
        return sum;
    }
    let up = S::splat(f32::from_bits((127 + 60) << 23));
    let scaled = a.mul(up).fma(b, c.mul(up));
    let size = scaled.max(S::splat(0.0).sub(scaled));
    let limit = S::splat(f32::from_bits((127 + 60 - 126) << 23));
    size.select_lt(limit, sum.mul(S::splat(0.0)), sum)
}
