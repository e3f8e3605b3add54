//! The kernels by dot products of pairs (AVX512-BF16), on the same tiles: a line of B is sixteen columns' pairs, a line of A sixteen
//! pairs of a row.

use super::super::pack::Line;
use super::kernel::Operands;
use super::{TILE, TILE_LINES};
use crate::dots::{Block, dot, in_blocks};
use crate::simd::LANES;
use std::arch::x86_64::*;

/// Lines of each panel that are asked for ahead of their use.
const AHEAD: usize = 2 * TILE_LINES;

/// The kernel for so many panels.
///
/// # Safety
/// AVX512-BF16 was detected, and as [`super::kernel::Kernel`] says.
pub(super) unsafe fn kernel<const PANELS: usize>(o: &Operands) {
    for (i, first) in (0..o.rows).step_by(TILE).enumerate() {
        // SAFETY: the caller's promise: A and C have these rows of tiles.
        unsafe {
            let (a, c) = (o.a.add(i * o.a_lines), o.c.add(i * PANELS * TILE_LINES));
            in_blocks(&TileRow { o, a, c }, TILE.min(o.rows - first), PANELS);
        }
    }
}

/// A row of tiles.
struct TileRow<'a> {
    o: &'a Operands,
    a: *const Line,
    c: *mut Line,
}

impl Block for TileRow<'_> {
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn compute<const ROWS: usize, const PANELS: usize>(&self, row: usize, panel: usize) {
        // SAFETY: the caller's promise; a prefetch is a hint, which no address makes fault.
        unsafe {
            let b = &self.o.b[panel..panel + PANELS];
            let c: *mut f32 = self.c.add(panel * TILE_LINES + row).cast();
            let line_of_c = |r: usize, p: usize| c.add((p * TILE_LINES + r) * LANES);
            let mut sums = [[_mm512_setzero_ps(); PANELS]; ROWS];
            if self.o.go_on {
                for r in 0..ROWS {
                    for p in 0..PANELS {
                        sums[r][p] = _mm512_load_ps(line_of_c(r, p));
                    }
                }
            }
            for tile in 0..self.o.k_tiles {
                let a: *const i32 = self.a.add(tile * TILE_LINES + row).cast();
                for pair in 0..TILE_LINES {
                    let line = tile * TILE_LINES + pair;
                    let mut w = [_mm512_setzero_si512(); PANELS];
                    for p in 0..PANELS {
                        _mm_prefetch::<_MM_HINT_T0>(b[p].wrapping_add(line + AHEAD).cast());
                        w[p] = _mm512_load_si512(b[p].add(line).cast());
                    }
                    for r in 0..ROWS {
                        let x = _mm512_set1_epi32(*a.add(r * LANES + pair));
                        for p in 0..PANELS {
                            sums[r][p] = dot(sums[r][p], x, w[p]);
                        }
                    }
                }
            }
            for r in 0..ROWS {
                for p in 0..PANELS {
                    _mm512_store_ps(line_of_c(r, p), sums[r][p]);
                }
            }
        }
    }
}
