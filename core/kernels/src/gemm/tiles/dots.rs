//! The kernels by dot products of pairs (AVX512-BF16), on the same tiles: a line of B is sixteen columns' pairs, a line of A sixteen
//! pairs of a row.

use super::super::pack::Line;
use super::kernel::Operands;
use super::{TILE, TILE_LINES};
use crate::dots::{Block, MOST_ROWS, dot, in_blocks};
use crate::simd::LANES;
use std::arch::x86_64::*;
use std::ops::Range;

/// Tiles of each panel that the first rows ask for ahead of their use.
const AHEAD: usize = 2;

/// The kernel for so many panels.
///
/// # Safety
/// AVX512-BF16 was detected, and as [`super::kernel::Kernel`] says.
pub(super) unsafe fn kernel<const PANELS: usize>(o: &Operands) {
    for (i, first) in (0..o.rows).step_by(TILE).enumerate() {
        // SAFETY: the caller's promise: A and C have these rows of tiles.
        unsafe {
            let (a, c) = (o.a.add(i * o.a_lines), o.c.add(i * PANELS * TILE_LINES));
            in_blocks(&TileRow { o, a, c, before: o.before + first }, TILE.min(o.rows - first), PANELS);
        }
    }
}

/// A row of tiles.
struct TileRow<'a> {
    o: &'a Operands,
    a: *const Line,
    c: *mut Line,
    /// Rows that these tiles of B have met before.
    before: usize,
}

impl TileRow<'_> {
    /// The lines of each tile of the panels to come that rows from `row` on ask for: all rows but the first ask for all lines.
    fn asks(&self, row: usize) -> Range<usize> {
        let blocks = self.o.all_rows.div_ceil(MOST_ROWS).max(2) - 1;
        let each = TILE_LINES.div_ceil(blocks);
        let first = ((self.before + row) / MOST_ROWS).saturating_sub(1) * each;
        first.min(TILE_LINES)..(first + each).min(TILE_LINES)
    }

    /// Where the first rows ask for lines of panel `p` ahead of their use in tile `tile`.
    fn ahead(&self, p: usize, tile: usize) -> *const Line {
        let (ahead, tiles) = (tile + AHEAD, self.o.k_tiles);
        let (at, tile) =
            if ahead < tiles { (self.o.b[p], ahead) } else { (self.o.follow[p], ahead - tiles) };
        at.wrapping_add(tile * TILE_LINES)
    }
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
            let (asks, first) = (self.asks(row), self.before + row == 0);
            for tile in 0..self.o.k_tiles {
                let mut ahead = [std::ptr::null::<Line>(); PANELS];
                if first {
                    for p in 0..PANELS {
                        ahead[p] = self.ahead(panel + p, tile);
                    }
                } else {
                    for p in 0..PANELS {
                        let follow = self.o.follow[panel + p].wrapping_add(tile * TILE_LINES);
                        for line in asks.clone() {
                            _mm_prefetch::<_MM_HINT_T1>(follow.wrapping_add(line).cast());
                        }
                    }
                }
                let a: *const i32 = self.a.add(tile * TILE_LINES + row).cast();
                for pair in 0..TILE_LINES {
                    let line = tile * TILE_LINES + pair;
                    let mut w = [_mm512_setzero_si512(); PANELS];
                    for p in 0..PANELS {
                        if first {
                            _mm_prefetch::<_MM_HINT_T0>(ahead[p].wrapping_add(pair).cast());
                        }
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
