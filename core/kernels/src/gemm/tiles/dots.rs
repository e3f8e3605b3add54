//! The kernels by dot products of pairs (AVX512-BF16), on the same tiles: a line of B is sixteen columns' pairs, a line of A sixteen
//! pairs of a row. Few rows meet codes of 8 bits without a tile between them: lines of B are made of them in registers.

use super::super::pack::Line;
use super::codes::Codes;
use super::kernel::Operands;
use super::{TILE, TILE_LINES};
use crate::dots::{Block, MOST_ROWS, dot, in_blocks};
use crate::simd::LANES;
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Lines of each panel that the first rows ask for ahead of their use.
const AHEAD: usize = 2 * TILE_LINES;

/// The kernel for so many panels.
///
/// # Safety
/// AVX512-BF16 was detected, and as [`super::kernel::Kernel`] says.
pub(super) unsafe fn kernel<const PANELS: usize>(o: &Operands) {
    // SAFETY: the caller's promise.
    unsafe { all_rows::<_, PANELS>(o, Full) }
}

/// The same where B is codes.
///
/// # Safety
/// As of [`kernel`]; [`Codes::can_be_met`] says that they can.
pub(super) unsafe fn kernel_of_codes<const PANELS: usize>(o: &Operands, codes: Codes) {
    // SAFETY: the caller's promise.
    unsafe { all_rows::<_, PANELS>(o, codes) }
}

#[inline(always)]
unsafe fn all_rows<H: Held, const PANELS: usize>(o: &Operands, held: H) {
    for (i, first) in (0..o.rows).step_by(TILE).enumerate() {
        // SAFETY: the caller's promise: A and C have these rows of tiles.
        unsafe {
            let (a, c) = (o.a.add(i * o.a_lines), o.c.add(i * PANELS * TILE_LINES));
            let out = o.out.wrapping_byte_add(first * o.out_stride);
            let row = TileRow { o, held, a, c, out, before: o.before + first };
            in_blocks(&row, TILE.min(o.rows - first), PANELS);
        }
    }
}

/// What the lines of a panel hold.
pub(super) trait Held: Copy {
    /// Lines of 32 k.
    const LINES: usize;
    /// What a tile's scales become.
    type Scale: Copy;

    /// The scale of tile `tile` of panel `p`.
    ///
    /// # Safety
    /// The panel has that tile; the instructions were detected.
    unsafe fn scale(&self, p: usize, tile: usize) -> Self::Scale;

    /// Lines number `2 · half` and the next of the tile that begins at `tile`.
    ///
    /// # Safety
    /// As [`Held::scale`].
    unsafe fn lines(&self, tile: *const Line, half: usize, scale: Self::Scale) -> [__m512i; 2];
}

/// Weights in bf16.
#[derive(Clone, Copy)]
struct Full;

impl Held for Full {
    const LINES: usize = TILE_LINES;
    type Scale = ();

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn scale(&self, _p: usize, _tile: usize) {}

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn lines(&self, tile: *const Line, half: usize, _scale: ()) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        [0, 1].map(|line| unsafe { _mm512_load_si512(tile.add(2 * half + line).cast()) })
    }
}

/// A row of tiles.
struct TileRow<'a, H> {
    o: &'a Operands,
    held: H,
    a: *const Line,
    c: *mut Line,
    out: *const f32,
    /// Rows that these tiles of B have met before.
    before: usize,
}

impl<H: Held> TileRow<'_, H> {
    /// The lines of each tile of the panels to come that rows from `row` on ask for: all rows but the first ask for all lines.
    fn asks(&self, row: usize) -> Range<usize> {
        let blocks = self.o.all_rows.div_ceil(MOST_ROWS).max(2) - 1;
        let each = H::LINES.div_ceil(blocks);
        let first = ((self.before + row) / MOST_ROWS).saturating_sub(1) * each;
        first.min(H::LINES)..(first + each).min(H::LINES)
    }

    /// Where the first rows ask for lines of panel `p` ahead of their use in tile `tile`.
    fn ahead(&self, p: usize, tile: usize) -> *const Line {
        let (ahead, tiles) = (tile + AHEAD / H::LINES, self.o.k_tiles);
        let (at, tile) =
            if ahead < tiles { (self.o.b[p], ahead) } else { (self.o.follow[p], ahead - tiles) };
        at.wrapping_add(tile * H::LINES)
    }
}

/// Asks for a line, to be written.
#[inline(always)]
fn ask_to_write(line: *const f32) {
    // SAFETY: a hint, which no address makes fault.
    unsafe { asm!("prefetchw [{}]", in(reg) line, options(nostack, readonly, preserves_flags)) };
}

impl<H: Held> Block for TileRow<'_, H> {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vbmi")]
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
            if self.o.out_stride > 0 {
                for r in 0..ROWS {
                    let line = self.out.wrapping_byte_add((row + r) * self.o.out_stride);
                    for p in panel..panel + PANELS {
                        ask_to_write(line.wrapping_add(p * LANES));
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
                        let follow = self.o.follow[panel + p].wrapping_add(tile * H::LINES);
                        for line in asks.clone() {
                            _mm_prefetch::<_MM_HINT_T1>(follow.wrapping_add(line).cast());
                        }
                    }
                }
                let a: *const i32 = self.a.add(tile * TILE_LINES + row).cast();
                let mut scale = [self.held.scale(panel, tile); PANELS];
                for p in 1..PANELS {
                    scale[p] = self.held.scale(panel + p, tile);
                }
                for half in 0..TILE_LINES / 2 {
                    let mut w = [[_mm512_setzero_si512(); 2]; PANELS];
                    for p in 0..PANELS {
                        if first {
                            for line in 0..2 * H::LINES / TILE_LINES {
                                let line = half * 2 * H::LINES / TILE_LINES + line;
                                _mm_prefetch::<_MM_HINT_T0>(ahead[p].wrapping_add(line).cast());
                            }
                        }
                        w[p] = self.held.lines(b[p].add(tile * H::LINES), half, scale[p]);
                    }
                    for line in 0..2 {
                        for r in 0..ROWS {
                            let x = _mm512_set1_epi32(*a.add(r * LANES + 2 * half + line));
                            for p in 0..PANELS {
                                sums[r][p] = dot(sums[r][p], x, w[p][line]);
                            }
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
