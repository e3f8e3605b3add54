//! Products by AVX512-BF16: a line of sixteen columns' pairs of bf16 meets a pair of a row in all lanes (VDPBF16PS).
//!
//! ```text
//!   sums [rows][panels] += pair of a row · line of a panel: up to 8 × 3 in registers, or 6 × 4
//! ```
//!
//! Products and attention walk over their operands each in their own way, so that is theirs ([`Block`]); how rows and panels are cut
//! into blocks is here.

use std::arch::x86_64::*;

/// Rows of a block at most.
pub(crate) const MOST_ROWS: usize = 8;

/// A product of whatever operands, of which registers hold a block at a time.
pub(crate) trait Block {
    /// Computes `ROWS` rows from `row` on of `PANELS` panels from `panel` on.
    ///
    /// # Safety
    /// AVX512-BF16 was detected; there are as many rows and panels.
    unsafe fn compute<const ROWS: usize, const PANELS: usize>(&self, row: usize, panel: usize);
}

/// Computes all of `rows` and up to four `panels`, each line of a panel read as few times as registers allow.
///
/// # Safety
/// AVX512-BF16 was detected; the block has as many rows and panels.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) unsafe fn in_blocks<B: Block>(block: &B, rows: usize, panels: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match panels {
            1 => of_panels::<B, 1>(block, rows, 0),
            2 => of_panels::<B, 2>(block, rows, 0),
            3 => of_panels::<B, 3>(block, rows, 0),
            _ if rows <= 6 => of_panels::<B, 4>(block, rows, 0),
            _ => {
                of_panels::<B, 2>(block, rows, 0);
                of_panels::<B, 2>(block, rows, 2);
            }
        }
    }
}

/// Rows in blocks of about the same size, for few chains at a time leave the units waiting.
///
/// # Safety
/// As [`in_blocks`].
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
unsafe fn of_panels<B: Block, const PANELS: usize>(block: &B, rows: usize, panel: usize) {
    let of_block = rows.div_ceil(rows.div_ceil(MOST_ROWS).max(1)).max(1);
    for row in (0..rows).step_by(of_block) {
        // SAFETY: the caller's promise.
        unsafe {
            match of_block.min(rows - row) {
                1 => block.compute::<1, PANELS>(row, panel),
                2 => block.compute::<2, PANELS>(row, panel),
                3 => block.compute::<3, PANELS>(row, panel),
                4 => block.compute::<4, PANELS>(row, panel),
                5 => block.compute::<5, PANELS>(row, panel),
                6 => block.compute::<6, PANELS>(row, panel),
                7 => block.compute::<7, PANELS>(row, panel),
                _ => block.compute::<8, PANELS>(row, panel),
            }
        }
    }
}

/// Adds the products of pairs of bf16: of each the odd, then the even (`gemm` has the order).
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
pub(crate) fn dot(sums: __m512, x: __m512i, w: __m512i) -> __m512 {
    // SAFETY: both types are 512 bits of plain data.
    unsafe { _mm512_dpbf16_ps(sums, std::mem::transmute(x), std::mem::transmute(w)) }
}
