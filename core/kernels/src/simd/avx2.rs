//! Sixteen lanes in two 256-bit registers.

use super::{LANES, Lanes};
use std::arch::x86_64::*;

/// Two ymm registers: lanes 0–7, lanes 8–15.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256, __m256);

/// 2^n for whole lanes n in −126 ..= 127.
///
/// # Safety
/// The processor must have AVX2.
#[inline(always)]
unsafe fn power_of_two(n: __m256i) -> __m256 {
    // SAFETY: the caller promises AVX2.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127)))) }
}

/// `x · 2^n` in two exact-then-rounded factors, as the portable version.
///
/// # Safety
/// The processor must have AVX2.
#[inline(always)]
unsafe fn ldexp(x: __m256, n: __m256) -> __m256 {
    // SAFETY: the caller promises AVX2.
    unsafe {
        let whole = _mm256_cvttps_epi32(n);
        let half = _mm256_srai_epi32::<1>(whole);
        let rest = _mm256_sub_epi32(whole, half);
        _mm256_mul_ps(_mm256_mul_ps(x, power_of_two(half)), power_of_two(rest))
    }
}

/// Subnormals of `x` replaced by a zero of the same sign.
///
/// # Safety
/// The processor must have AVX2.
#[inline(always)]
unsafe fn flush(x: __m256) -> __m256 {
    // SAFETY: the caller promises AVX2.
    unsafe {
        let sign = _mm256_set1_ps(-0.0);
        let tiny = _mm256_cmp_ps::<_CMP_LT_OQ>(_mm256_andnot_ps(sign, x), _mm256_set1_ps(f32::MIN_POSITIVE));
        _mm256_blendv_ps(x, _mm256_and_ps(x, sign), tiny)
    }
}

/// Sixteen signed bytes as 32-bit numbers.
///
/// # Safety
/// The processor must have AVX2.
#[inline(always)]
unsafe fn widen_i8(codes: &[u8; LANES]) -> (__m256i, __m256i) {
    // SAFETY: the caller promises AVX2; sixteen bytes are there to be read.
    unsafe {
        let bytes = _mm_loadu_si128(codes.as_ptr().cast());
        (_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes)))
    }
}

/// The last three steps of the tree of [`Lanes::sum`].
///
/// # Safety
/// The processor must have AVX.
#[inline(always)]
pub(super) unsafe fn sum_of_eight(x: __m256) -> f32 {
    // SAFETY: the caller promises AVX.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

/// The last three steps of the tree of [`Lanes::max_lane`].
///
/// # Safety
/// The processor must have AVX.
#[inline(always)]
pub(super) unsafe fn max_of_eight(x: __m256) -> f32 {
    // SAFETY: the caller promises AVX.
    unsafe {
        let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }
}

// SAFETY of every block below: values of this type are made only in functions that `simd!` compiles for, and enters
// only on, processors with AVX2 and FMA; loads and stores go through references to sixteen f32 or u32.
#[expect(clippy::undocumented_unsafe_blocks, reason = "one comment above holds for all")]
impl Lanes for Avx2 {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        let v = unsafe { _mm256_set1_ps(x) };
        Avx2(v, v)
    }

    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self {
        unsafe { Avx2(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x[8..].as_ptr())) }
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), self.0);
            _mm256_storeu_ps(out[8..].as_mut_ptr(), self.1);
        }
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        unsafe { Avx2(_mm256_add_ps(self.0, b.0), _mm256_add_ps(self.1, b.1)) }
    }

    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        unsafe { Avx2(_mm256_sub_ps(self.0, b.0), _mm256_sub_ps(self.1, b.1)) }
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        unsafe { Avx2(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
    }

    #[inline(always)]
    fn div(self, b: Self) -> Self {
        unsafe { Avx2(_mm256_div_ps(self.0, b.0), _mm256_div_ps(self.1, b.1)) }
    }

    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        unsafe { Avx2(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        unsafe { Avx2(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1)) }
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        unsafe { Avx2(_mm256_min_ps(self.0, b.0), _mm256_min_ps(self.1, b.1)) }
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        unsafe { Avx2(_mm256_sqrt_ps(self.0), _mm256_sqrt_ps(self.1)) }
    }

    #[inline(always)]
    fn ldexp(self, n: Self) -> Self {
        unsafe { Avx2(ldexp(self.0, n.0), ldexp(self.1, n.1)) }
    }

    #[inline(always)]
    fn select_lt(self, limit: Self, yes: Self, no: Self) -> Self {
        unsafe {
            let low = _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, limit.0);
            let high = _mm256_cmp_ps::<_CMP_LT_OQ>(self.1, limit.1);
            Avx2(_mm256_blendv_ps(no.0, yes.0, low), _mm256_blendv_ps(no.1, yes.1, high))
        }
    }

    #[inline(always)]
    fn flush(self) -> Self {
        unsafe { Avx2(flush(self.0), flush(self.1)) }
    }

    #[inline(always)]
    fn bf16_even(pairs: &[u32; LANES]) -> Self {
        unsafe {
            let low = _mm256_loadu_si256(pairs.as_ptr().cast());
            let high = _mm256_loadu_si256(pairs[8..].as_ptr().cast());
            Avx2(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }

    #[inline(always)]
    fn bf16_odd(pairs: &[u32; LANES]) -> Self {
        unsafe {
            let mask = _mm256_set1_epi32(0xffff_0000u32 as i32);
            let low = _mm256_loadu_si256(pairs.as_ptr().cast());
            let high = _mm256_loadu_si256(pairs[8..].as_ptr().cast());
            Avx2(
                _mm256_castsi256_ps(_mm256_and_si256(low, mask)),
                _mm256_castsi256_ps(_mm256_and_si256(high, mask)),
            )
        }
    }

    #[inline(always)]
    fn from_bf16(bits: &[u16; LANES]) -> Self {
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(bits.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(bits[8..].as_ptr().cast()));
            let (low, high) = (_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high));
            Avx2(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
        }
    }

    #[inline(always)]
    fn from_i8(codes: &[u8; LANES]) -> Self {
        unsafe {
            let (low, high) = widen_i8(codes);
            Avx2(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }

    #[inline(always)]
    fn from_i4(codes: &[u8; LANES]) -> (Self, Self) {
        unsafe {
            let (a, b) = widen_i8(codes);
            let low_a = _mm256_srai_epi32::<28>(_mm256_slli_epi32::<28>(a));
            let low_b = _mm256_srai_epi32::<28>(_mm256_slli_epi32::<28>(b));
            let (high_a, high_b) = (_mm256_srai_epi32::<4>(a), _mm256_srai_epi32::<4>(b));
            (
                Avx2(_mm256_cvtepi32_ps(low_a), _mm256_cvtepi32_ps(low_b)),
                Avx2(_mm256_cvtepi32_ps(high_a), _mm256_cvtepi32_ps(high_b)),
            )
        }
    }

    #[inline(always)]
    fn store_bf16_pairs(even: Self, odd: Self, out: &mut [u32; LANES]) {
        unsafe {
            let mask = _mm256_set1_epi32(0xffff_0000u32 as i32);
            let low_0 = _mm256_srli_epi32::<16>(_mm256_castps_si256(even.0));
            let low_1 = _mm256_srli_epi32::<16>(_mm256_castps_si256(even.1));
            let high_0 = _mm256_and_si256(_mm256_castps_si256(odd.0), mask);
            let high_1 = _mm256_and_si256(_mm256_castps_si256(odd.1), mask);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_or_si256(low_0, high_0));
            _mm256_storeu_si256(out[8..].as_mut_ptr().cast(), _mm256_or_si256(low_1, high_1));
        }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe { sum_of_eight(_mm256_add_ps(self.0, self.1)) }
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        unsafe { max_of_eight(_mm256_max_ps(self.0, self.1)) }
    }
}
