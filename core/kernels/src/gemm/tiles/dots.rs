//! The kernels by dot products of pairs (VDPBF16PS of AVX512-BF16), on the same tiles: a line of B is sixteen columns' pairs, a pair of a
//! row of A goes to all lanes.
//!
//! ```text
//!   C lines += pair of A · line of B, k ascending: up to 8 rows × 2 panels in registers, or 6 × 4
//! ```

use super::super::pack::Line;
use super::kernel::Operands;
use super::{TILE, TILE_LINES};
use crate::simd::LANES;
use std::arch::x86_64::*;

/// Rows that registers have room for, with two panels and with four.
const MOST_ROWS: usize = 8;
const MOST_ROWS_OF_FOUR: usize = 6;
/// Lines of each panel that are asked for ahead of their use, where it passes by once.
const AHEAD: usize = 2 * TILE_LINES;

/// The kernel for so many panels.
///
/// # Safety
/// AVX512-BF16 was detected, and as [`super::kernel::Kernel`] says.
pub(super) unsafe fn kernel<const PANELS: usize>(o: &Operands) {
    // SAFETY: the caller's promise.
    unsafe { kernel_bf16::<PANELS>(o) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn kernel_bf16<const PANELS: usize>(o: &Operands) {
    for (tile_row, first) in (0..o.rows).step_by(TILE).enumerate() {
        let rows = TILE.min(o.rows - first);
        // SAFETY: the caller's promise: A, B and C have these tiles.
        unsafe {
            let (a, c) = (o.a.add(tile_row * o.a_lines), o.c.add(tile_row * PANELS * TILE_LINES));
            match PANELS {
                1 => rows_of::<1>(o, a, [o.b[0]], rows, c),
                2 => rows_of::<2>(o, a, [o.b[0], o.b[1]], rows, c),
                _ if rows <= MOST_ROWS_OF_FOUR => rows_of::<4>(o, a, o.b, rows, c),
                _ => {
                    rows_of::<2>(o, a, [o.b[0], o.b[1]], rows, c);
                    rows_of::<2>(o, a, [o.b[2], o.b[3]], rows, c.add(2 * TILE_LINES));
                }
            }
        }
    }
}

/// The first `rows` of a row of tiles, in blocks of about the same size.
///
/// # Safety
/// As [`kernel`].
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
unsafe fn rows_of<const PANELS: usize>(
    o: &Operands,
    a: *const Line,
    b: [*const Line; PANELS],
    rows: usize,
    c: *mut Line,
) {
    let of_block = rows.div_ceil(rows.div_ceil(MOST_ROWS));
    for first in (0..rows).step_by(of_block) {
        // SAFETY: the caller's promise.
        unsafe {
            let (a, c) = (a.add(first), c.add(first));
            match of_block.min(rows - first) {
                1 => block::<1, PANELS>(o, a, b, c),
                2 => block::<2, PANELS>(o, a, b, c),
                3 => block::<3, PANELS>(o, a, b, c),
                4 => block::<4, PANELS>(o, a, b, c),
                5 => block::<5, PANELS>(o, a, b, c),
                6 => block::<6, PANELS>(o, a, b, c),
                7 => block::<7, PANELS>(o, a, b, c),
                _ => block::<8, PANELS>(o, a, b, c),
            }
        }
    }
}

/// `ROWS` rows of a row of tiles, from the one on whose first line of A is `a` and of C `c`.
///
/// # Safety
/// As [`kernel`].
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn block<const ROWS: usize, const PANELS: usize>(
    o: &Operands,
    a: *const Line,
    b: [*const Line; PANELS],
    c: *mut Line,
) {
    // SAFETY: the caller's promise; a prefetch is a hint, which no address makes fault.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); PANELS]; ROWS];
        if o.go_on {
            for r in 0..ROWS {
                for p in 0..PANELS {
                    sums[r][p] = _mm512_load_ps(c.add(p * TILE_LINES + r).cast());
                }
            }
        }
        for tile in 0..o.k_tiles {
            let a: *const i32 = a.add(tile * TILE_LINES).cast();
            for pair in 0..LANES {
                let line = tile * TILE_LINES + pair;
                let mut w = [_mm512_setzero_ps(); PANELS];
                for p in 0..PANELS {
                    _mm_prefetch::<_MM_HINT_T0>(b[p].wrapping_add(line + AHEAD).cast());
                    w[p] = _mm512_load_ps(b[p].add(line).cast());
                }
                for r in 0..ROWS {
                    let x = bf16s(_mm512_castsi512_ps(_mm512_set1_epi32(*a.add(r * LANES + pair))));
                    for p in 0..PANELS {
                        sums[r][p] = _mm512_dpbf16_ps(sums[r][p], x, bf16s(w[p]));
                    }
                }
            }
        }
        for r in 0..ROWS {
            for p in 0..PANELS {
                _mm512_store_ps(c.add(p * TILE_LINES + r).cast(), sums[r][p]);
            }
        }
    }
}

/// The same bits as pairs of bf16.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn bf16s(x: __m512) -> __m512bh {
    // SAFETY: both types are 512 bits of plain data.
    unsafe { std::mem::transmute(x) }
}
