//! f32 to bf16 by the processor's own conversion (AVX512_BF16, which every processor with tiles has): to the nearest even,
//! subnormals taken as zeros, as `pack::round` says.

use super::super::pack::Line;
use super::{TILE, TILE_K, TILE_LINES};
use crate::simd::LANES;
use std::arch::x86_64::*;

/// Rounds up to sixteen rows of `x [rows, k]` into their A tiles.
pub(super) fn rows_to_tiles(x: &[f32], k: usize, tiles: &mut [Line]) {
    // SAFETY: `isa` found AMX only where it found AVX512_BF16 too.
    unsafe { rows_to_tiles_bf16(x, k, tiles) }
}

/// Pairs the rows of the transpose `w_kn [k,n]` in the lines of sixteen columns from `column` on: the even of two rows low.
pub(in super::super) fn columns_to_lines(w_kn: &[f32], n: usize, column: usize, lines: &mut [Line]) {
    // SAFETY: as above.
    unsafe { columns_to_lines_bf16(w_kn, n, column, lines) }
}

/// Rounds lines into sixteen values each, the first at `to`, each `stride` after the one before.
///
/// # Safety
/// They lie in one allocation and no one else reads or writes them.
pub(in super::super) unsafe fn put_rounded(lines: &[[f32; LANES]], to: *mut u16, stride: usize) {
    // SAFETY: as above, and the caller's promise.
    unsafe { put_rounded_bf16(lines, to, stride) }
}

#[target_feature(enable = "avx512f,avx512vl,avx512bf16")]
unsafe fn put_rounded_bf16(lines: &[[f32; LANES]], to: *mut u16, stride: usize) {
    for (i, line) in lines.iter().enumerate() {
        // SAFETY: a line is sixteen values, and sixteen may be written there by the caller's promise.
        unsafe {
            let bits =
                std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(line.as_ptr())));
            _mm256_storeu_si256(to.add(i * stride).cast(), bits);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn rows_to_tiles_bf16(x: &[f32], k: usize, tiles: &mut [Line]) {
    debug_assert!(x.len() <= TILE * k && tiles.len() == k.div_ceil(TILE_K) * TILE_LINES);
    for (r, row) in x.chunks_exact(k).enumerate() {
        let (whole, last) = row.as_chunks::<TILE_K>();
        for (tile, values) in whole.iter().enumerate() {
            let (low, high) = values.split_at(LANES);
            // SAFETY: both halves are sixteen values.
            let pair = unsafe { (_mm512_loadu_ps(low.as_ptr()), _mm512_loadu_ps(high.as_ptr())) };
            put(&mut tiles[tile * TILE_LINES + r], concat(pair.0, pair.1));
        }
        if !last.is_empty() {
            let (low, high) = last.split_at(last.len().min(LANES));
            let pair = (read(low), read(high));
            put(&mut tiles[whole.len() * TILE_LINES + r], concat(pair.0, pair.1));
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn columns_to_lines_bf16(w_kn: &[f32], n: usize, column: usize, lines: &mut [Line]) {
    let mut pairs = w_kn.chunks(2 * n);
    for line in lines {
        let (low, high) = pairs.next().map_or((&[][..], &[][..]), |pair| pair.split_at(n));
        let (low, high) = (&low[column.min(low.len())..], &high[column.min(high.len())..]);
        let interleave = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
            18, 2, 17, 1, 16, 0,
        );
        put(line, _mm512_permutexvar_epi16(interleave, concat(read(low), read(high))));
    }
}

/// Up to sixteen values, then zeros.
#[target_feature(enable = "avx512f")]
fn read(x: &[f32]) -> __m512 {
    let mask = if x.len() >= LANES { u16::MAX } else { (1 << x.len()) - 1 };
    // SAFETY: lanes that the mask leaves out are not read.
    unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr()) }
}

/// Thirty-two bf16, those of `low` first.
#[target_feature(enable = "avx512f,avx512bf16")]
fn concat(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both types are 512 bits of plain data.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

#[target_feature(enable = "avx512f")]
fn put(line: &mut Line, bits: __m512i) {
    // SAFETY: a line is 64 bytes.
    unsafe { _mm512_storeu_si512(line.0.as_mut_ptr().cast(), bits) }
}
