//! Sixteen lanes in one 512-bit register.

use super::{LANES, Lanes};
use std::arch::x86_64::*;

/// One zmm register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(pub(crate) __m512);

// SAFETY of every block below: values of this type are made only in functions that `simd!` compiles for, and enters
// only on, processors with AVX-512 F and DQ; loads and stores go through references to sixteen f32 or u32.
#[expect(clippy::undocumented_unsafe_blocks, reason = "one comment above holds for all")]
impl Lanes for Avx512 {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Avx512(unsafe { _mm512_set1_ps(x) })
    }

    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self {
        Avx512(unsafe { _mm512_loadu_ps(x.as_ptr()) })
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        Avx512(unsafe { _mm512_add_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        Avx512(unsafe { _mm512_sub_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        Avx512(unsafe { _mm512_mul_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn div(self, b: Self) -> Self {
        Avx512(unsafe { _mm512_div_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        Avx512(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        Avx512(unsafe { _mm512_max_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        Avx512(unsafe { _mm512_min_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        Avx512(unsafe { _mm512_sqrt_ps(self.0) })
    }

    #[inline(always)]
    fn ldexp(self, n: Self) -> Self {
        Avx512(unsafe { _mm512_scalef_ps(self.0, n.0) })
    }

    #[inline(always)]
    fn select_lt(self, limit: Self, yes: Self, no: Self) -> Self {
        Avx512(unsafe {
            let less = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, limit.0);
            _mm512_mask_blend_ps(less, no.0, yes.0)
        })
    }

    #[inline(always)]
    fn flush(self) -> Self {
        Avx512(unsafe {
            const SUBNORMAL: i32 = 0x20;
            let subnormal = _mm512_fpclass_ps_mask::<SUBNORMAL>(self.0);
            _mm512_mask_and_ps(self.0, subnormal, self.0, _mm512_set1_ps(-0.0))
        })
    }

    #[inline(always)]
    fn bf16_even(pairs: &[u32; LANES]) -> Self {
        Avx512(unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(pairs.as_ptr().cast())))
        })
    }

    #[inline(always)]
    fn bf16_odd(pairs: &[u32; LANES]) -> Self {
        Avx512(unsafe {
            let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(pairs.as_ptr().cast()), high))
        })
    }

    #[inline(always)]
    fn from_bf16(bits: &[u16; LANES]) -> Self {
        Avx512(unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bits.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        })
    }

    #[inline(always)]
    fn from_i8(codes: &[u8; LANES]) -> Self {
        Avx512(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes.as_ptr().cast()))) })
    }

    #[inline(always)]
    fn from_i4(codes: &[u8; LANES]) -> (Self, Self) {
        unsafe {
            let wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            let low = _mm512_srai_epi32::<28>(_mm512_slli_epi32::<28>(wide));
            (Avx512(_mm512_cvtepi32_ps(low)), Avx512(_mm512_cvtepi32_ps(_mm512_srai_epi32::<4>(wide))))
        }
    }

    #[inline(always)]
    fn store_bf16_pairs(even: Self, odd: Self, out: &mut [u32; LANES]) {
        unsafe {
            let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(even.0));
            let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
            let high = _mm512_and_si512(_mm512_castps_si512(odd.0), high);
            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_or_si512(low, high));
        }
    }

    #[inline(always)]
    fn stream(self, out: &mut [f32; LANES]) {
        debug_assert!(out.as_ptr().addr().is_multiple_of(64));
        unsafe { _mm512_stream_ps(out.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn fence() {
        unsafe { _mm_sfence() }
    }

    #[inline(always)]
    fn prefetch<T>(x: &[T], at: usize) {
        // A hint, which no address makes fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(x.as_ptr().wrapping_add(at).cast()) }
    }

    #[inline(always)]
    fn read(x: &[f32], fill: f32) -> Self {
        if let Some(full) = x.first_chunk::<LANES>() {
            return Self::load(full);
        }
        let mask = (1u16 << x.len()) - 1;
        // Lanes that the mask leaves out are not read.
        Avx512(unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, x.as_ptr()) })
    }

    #[inline(always)]
    fn write(self, out: &mut [f32]) {
        if let Some(full) = out.first_chunk_mut::<LANES>() {
            return self.store(full);
        }
        let mask = (1u16 << out.len()) - 1;
        // Lanes that the mask leaves out are not written.
        unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, self.0) }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0));
            super::avx2::sum_of_eight(eight)
        }
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        unsafe {
            let eight = _mm256_max_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0));
            super::avx2::max_of_eight(eight)
        }
    }

    #[inline(always)]
    fn transpose(a: &[[u32; LANES]; LANES], out: &mut [[u32; LANES]; LANES]) {
        unsafe {
            let mut r = [_mm512_setzero_si512(); LANES];
            for i in 0..LANES {
                r[i] = _mm512_loadu_si512(a[i].as_ptr().cast());
            }
            // Pairs of 32 bits, then of 64, within each 128-bit quarter; then the quarters themselves.
            let mut t = [_mm512_setzero_si512(); LANES];
            for i in 0..LANES / 2 {
                t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..LANES / 4 {
                r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
                r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
                r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
                r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
            }
            // r[4g + c], quarter q, holds column 4q + c of rows 4g .. 4g + 4.
            for c in 0..4 {
                let low_even = _mm512_shuffle_i32x4::<0x88>(r[c], r[4 + c]);
                let low_odd = _mm512_shuffle_i32x4::<0xdd>(r[c], r[4 + c]);
                let high_even = _mm512_shuffle_i32x4::<0x88>(r[8 + c], r[12 + c]);
                let high_odd = _mm512_shuffle_i32x4::<0xdd>(r[8 + c], r[12 + c]);
                let columns = [
                    _mm512_shuffle_i32x4::<0x88>(low_even, high_even),
                    _mm512_shuffle_i32x4::<0x88>(low_odd, high_odd),
                    _mm512_shuffle_i32x4::<0xdd>(low_even, high_even),
                    _mm512_shuffle_i32x4::<0xdd>(low_odd, high_odd),
                ];
                for (q, column) in columns.into_iter().enumerate() {
                    _mm512_storeu_si512(out[4 * q + c].as_mut_ptr().cast(), column);
                }
            }
        }
    }
}
