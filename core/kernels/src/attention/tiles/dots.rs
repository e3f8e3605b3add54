//! The same products by AVX512-BF16's dot products of pairs.

use super::super::KV_BLOCK;
use super::kernel::{Outputs, Scores};
use crate::dots::{Block, dot, in_blocks};
use crate::simd::LANES;
use std::arch::x86_64::*;

/// Scores of `rows` queries against each of `pages`.
///
/// # Safety
/// AVX512-BF16 was detected; the pointers are to as many tiles and rows.
pub(super) unsafe fn scores(o: &Scores, rows: usize, pages: usize) {
    // SAFETY: the caller's promise.
    unsafe { in_blocks(o, rows, pages) }
}

/// So many output tiles of `rows` queries.
///
/// # Safety
/// As [`scores`].
pub(super) unsafe fn outputs(o: &Outputs, rows: usize, tiles: usize) {
    // SAFETY: the caller's promise.
    unsafe { in_blocks(o, rows, tiles) }
}

impl Block for Scores {
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn compute<const ROWS: usize, const PAGES: usize>(&self, row: usize, page: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); PAGES]; ROWS];
            for tile in 0..self.k_tiles {
                let q: *const i32 = self.q.byte_add(tile * self.tile_bytes).add(row).cast();
                for pair in 0..LANES {
                    let mut keys = [_mm512_setzero_si512(); PAGES];
                    for p in 0..PAGES {
                        let line = (tile * LANES + pair) * KV_BLOCK;
                        keys[p] = _mm512_loadu_si512(self.keys[page + p].add(line).cast());
                    }
                    for r in 0..ROWS {
                        let x = _mm512_set1_epi32(*q.add(r * LANES + pair));
                        for p in 0..PAGES {
                            sums[r][p] = dot(sums[r][p], x, keys[p]);
                        }
                    }
                }
            }
            for p in 0..PAGES {
                let c: *mut f32 = self.c.byte_add((page + p) * self.tile_bytes).add(row).cast();
                for r in 0..ROWS {
                    _mm512_store_ps(c.add(r * LANES), sums[r][p]);
                }
            }
        }
    }
}

impl Block for Outputs {
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn compute<const ROWS: usize, const TILES: usize>(&self, row: usize, tile: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); TILES]; ROWS];
            for page in 0..self.pages {
                let values = (*self.values.add(page)).byte_add(self.offset).add(tile * LANES);
                let p: *const i32 = self.p.byte_add(row * super::P_ROW_BYTES + page * KV_BLOCK * 2).cast();
                for pair in 0..KV_BLOCK / 2 {
                    let mut lines = [_mm512_setzero_si512(); TILES];
                    for t in 0..TILES {
                        let line = values.byte_add(pair * self.stride).add(t * LANES);
                        lines[t] = _mm512_loadu_si512(line.cast());
                    }
                    for r in 0..ROWS {
                        let x = _mm512_set1_epi32(*p.byte_add(r * super::P_ROW_BYTES).add(pair));
                        for t in 0..TILES {
                            sums[r][t] = dot(sums[r][t], x, lines[t]);
                        }
                    }
                }
            }
            for t in 0..TILES {
                let c: *mut f32 = self.c.byte_add((tile + t) * self.tile_bytes).add(row).cast();
                for r in 0..ROWS {
                    _mm512_store_ps(c.add(r * LANES), sums[r][t]);
                }
            }
        }
    }
}
