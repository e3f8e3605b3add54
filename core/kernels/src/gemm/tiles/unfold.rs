//! Tiles of codes to tiles of bf16: as `quant` defines it, a tile at a time.

use super::super::pack::Line;
use super::super::quant::CodeBits;
use super::{TILE_K, TILE_LINES};
use crate::gemm::PackedMatrix;
use crate::simd::LANES;
use std::arch::x86_64::*;

/// Bytes of codes that are asked for ahead of their use: the processor's own foresight ends with a page.
const AHEAD: usize = 2048;

/// The tiles of `panel` from tile `first` of k on, as many as `out` holds.
pub(super) fn unfold(w: &PackedMatrix, panel: usize, first: usize, out: &mut [Line]) {
    let quantisation = w.quantisation().expect("only a quantised matrix is unfolded");
    let (scales, codes) = w.scales_and_lines(panel);
    let tiles_per_group = quantisation.group() / TILE_K;
    let (out, _) = out.as_chunks_mut::<TILE_LINES>();
    for (tile, out) in (first..).zip(out) {
        let scale = &scales[tile / tiles_per_group];
        // SAFETY: this module is reached only where `isa` found AVX-512 too.
        unsafe {
            match quantisation.bits() {
                CodeBits::Eight => unfold_8(scale, &codes.as_chunks::<{ TILE_LINES / 2 }>().0[tile], out),
                CodeBits::Four => unfold_4(scale, &codes.as_chunks::<{ TILE_LINES / 4 }>().0[tile], out),
            }
        }
    }
}

/// Each code times its scale is a bf16 exactly: what is cut off is zero.
#[target_feature(enable = "avx512f")]
fn put(even: __m512i, odd: __m512i, scale: __m512, line: &mut Line) {
    /// a | (b & c)
    const A_OR_B_AND_C: i32 = 0xf8;
    let product = |codes| _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtepi32_ps(codes), scale));
    let (low, high) = (_mm512_srli_epi32::<16>(product(even)), product(odd));
    let pairs =
        _mm512_ternarylogic_epi32::<A_OR_B_AND_C>(low, high, _mm512_set1_epi32(0xffff_0000u32 as i32));
    // SAFETY: a line is 64 bytes.
    unsafe { _mm512_store_si512(line.0.as_mut_ptr().cast(), pairs) }
}

#[target_feature(enable = "avx512f")]
fn factor(scale: &[u16; LANES]) -> __m512 {
    // SAFETY: sixteen scales are 32 bytes.
    let bits = unsafe { _mm256_loadu_si256(scale.as_ptr().cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
}

#[target_feature(enable = "avx512f")]
fn unfold_8(scale: &[u16; LANES], codes: &[Line; TILE_LINES / 2], out: &mut [Line; TILE_LINES]) {
    let scale = factor(scale);
    let codes: &[[u8; LANES]; 2 * TILE_LINES] = bytemuck::cast_ref(codes);
    for (i, line) in out.iter_mut().enumerate() {
        // SAFETY: each element is sixteen bytes.
        let (even, odd) = unsafe {
            (_mm_loadu_si128(codes[2 * i].as_ptr().cast()), _mm_loadu_si128(codes[2 * i + 1].as_ptr().cast()))
        };
        if i % 2 == 0 {
            // A hint, which no address makes fault.
            _mm_prefetch::<_MM_HINT_T0>(codes[2 * i].as_ptr().wrapping_add(AHEAD).cast());
        }
        put(_mm512_cvtepi8_epi32(even), _mm512_cvtepi8_epi32(odd), scale, line);
    }
}

#[target_feature(enable = "avx512f")]
fn unfold_4(scale: &[u16; LANES], codes: &[Line; TILE_LINES / 4], out: &mut [Line; TILE_LINES]) {
    let scale = factor(scale);
    let codes: &[[u8; LANES]; TILE_LINES] = bytemuck::cast_ref(codes);
    for (codes, line) in codes.iter().zip(out) {
        // SAFETY: sixteen bytes.
        let both = _mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
        let even = _mm512_srai_epi32::<28>(_mm512_slli_epi32::<28>(both));
        put(even, _mm512_srai_epi32::<4>(both), scale, line);
    }
}
