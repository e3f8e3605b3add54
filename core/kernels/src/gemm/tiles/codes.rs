//! Codes of 8 bits, a line of four k, become two lines of pairs in registers: a code's bf16 is looked up byte by byte (AVX512-VBMI), and
//! the scale, a power of two, moves its exponent.

use super::super::pack::Line;
use super::super::quant::CodeBits;
use super::dots::Held;
use super::kernel::MOST_PANELS;
use super::{TILE_K, TILE_LINES};
use crate::gemm::PackedMatrix;
use crate::simd::LANES;
use std::arch::x86_64::*;

/// The codes of some panels.
#[derive(Clone, Copy)]
pub(super) struct Codes {
    scales: [*const [u16; LANES]; MOST_PANELS],
    tiles_per_group: usize,
}

impl Codes {
    /// Whether codes of `w` can be met as they are: scales, powers of two or zero, leave every product a normal number or zero.
    pub(super) fn can_be_met(w: &PackedMatrix) -> bool {
        let eight = w.quantisation().is_some_and(|quantisation| quantisation.bits() == CodeBits::Eight);
        eight && w.is_plain()
    }

    /// Those of `panels` of `w`, and where their lines begin.
    pub(super) fn of<const PANELS: usize>(
        w: &PackedMatrix,
        panels: [usize; PANELS],
    ) -> (Self, [*const Line; MOST_PANELS]) {
        let group = w.quantisation().expect("only a quantised matrix has codes").group();
        let mut codes = Self { scales: [std::ptr::null(); MOST_PANELS], tiles_per_group: group / TILE_K };
        let mut lines = [std::ptr::null(); MOST_PANELS];
        for (p, panel) in panels.into_iter().enumerate() {
            let (scales, of_panel) = w.scales_and_lines(panel);
            (codes.scales[p], lines[p]) = (scales.as_ptr(), of_panel.as_ptr());
        }
        (codes, lines)
    }
}

/// What scales add to exponents, and which of them are not zero.
#[derive(Clone, Copy)]
pub(super) struct Exponents {
    added: __m512i,
    not_zero: __mmask32,
}

/// The bf16 of 0 to 127: their lower and upper bytes.
const BYTES: [[u8; 128]; 2] = {
    let (mut bytes, mut i) = ([[0; 128]; 2], 0);
    while i < 128 {
        let bits = (i as f32).to_bits();
        (bytes[0][i], bytes[1][i]) = ((bits >> 16) as u8, (bits >> 24) as u8);
        i += 1;
    }
    bytes
};

/// Where the bytes of a line of pairs are in lower bytes `[4 k][16]`, followed by as many upper ones: of the first two k, and of the
/// others.
const PAIRS: [[u8; 64]; 2] = {
    let (mut at, mut i) = ([[0; 64]; 2], 0);
    while i < 128 {
        let (line, column, k, upper) = (i / 64, i % 64 / 4, i % 4 / 2, i % 2);
        at[line][i % 64] = (64 * upper + 16 * (2 * line + k) + column) as u8;
        i += 1;
    }
    at
};

impl Held for Codes {
    const LINES: usize = TILE_LINES / 2;
    type Scale = Exponents;

    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    unsafe fn scale(&self, p: usize, tile: usize) -> Exponents {
        // SAFETY: the caller's promise: sixteen scales are 32 bytes.
        let scale = unsafe {
            _mm256_loadu_si256(self.scales[p].add(tile / self.tiles_per_group).cast())
        };
        let scale = _mm512_cvtepu16_epi32(scale);
        let both = _mm512_or_si512(scale, _mm512_slli_epi32::<16>(scale));
        let one = _mm512_set1_epi16(0x3f80);
        Exponents { added: _mm512_sub_epi16(both, one), not_zero: _mm512_test_epi16_mask(both, both) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    #[inline]
    unsafe fn lines(&self, tile: *const Line, half: usize, scale: Exponents) -> [__m512i; 2] {
        /// a | (b & c)
        const A_OR_B_AND_C: i32 = 0xf8;
        // SAFETY: the caller's promise; tables are of 128 and of 64 bytes.
        let (codes, [lower, upper], pairs) = unsafe {
            let load = |bytes: *const u8| _mm512_loadu_si512(bytes.cast());
            let tables = BYTES.each_ref().map(|table| (load(table.as_ptr()), load(table[64..].as_ptr())));
            (load(tile.add(half).cast()), tables, PAIRS.each_ref().map(|at| load(at.as_ptr())))
        };
        let size = _mm512_abs_epi8(codes);
        let look_up = |(first, second)| _mm512_permutex2var_epi8(first, size, second);
        let (lower, upper) = (look_up(lower), look_up(upper));
        let upper = _mm512_ternarylogic_epi32::<A_OR_B_AND_C>(upper, codes, _mm512_set1_epi8(i8::MIN));
        pairs.map(|pairs| {
            let bits = _mm512_permutex2var_epi8(lower, pairs, upper);
            let not_zero = _mm512_mask_test_epi16_mask(scale.not_zero, bits, bits);
            _mm512_maskz_add_epi16(not_zero, bits, scale.added)
        })
    }
}
