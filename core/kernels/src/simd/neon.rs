//! Sixteen lanes in four 128-bit registers.

use super::{LANES, Lanes};
use std::arch::aarch64::*;

// Every function of this crate is compiled for NEON on aarch64, which is what the safety comments below rest on.
const _: () = assert!(cfg!(target_feature = "neon"));

/// Four vector registers: lanes 0–3, 4–7, 8–11, 12–15.
#[derive(Clone, Copy)]
pub(crate) struct Neon([float32x4_t; 4]);

/// The same for each register.
#[inline(always)]
fn map(f: impl Fn(usize) -> float32x4_t) -> Neon {
    Neon([f(0), f(1), f(2), f(3)])
}

/// `if a > b { a } else { b }`; FMAX would give a NaN of either.
#[inline(always)]
fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: NEON is there.
    unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
}

/// 2^n for whole lanes n in −126 ..= 127.
#[inline(always)]
fn power_of_two(n: int32x4_t) -> float32x4_t {
    // SAFETY: NEON is there.
    unsafe { vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127)))) }
}

/// Sixteen signed bytes as f32.
#[inline(always)]
fn widen_i8(codes: int8x16_t) -> Neon {
    // SAFETY: NEON is there.
    unsafe {
        let (low, high) = (vmovl_s8(vget_low_s8(codes)), vmovl_high_s8(codes));
        Neon([
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
            vcvtq_f32_s32(vmovl_high_s16(low)),
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
            vcvtq_f32_s32(vmovl_high_s16(high)),
        ])
    }
}

// SAFETY of every block below: NEON is there, by the assertion above; loads and stores go through references to as many
// values as they touch.
#[expect(clippy::undocumented_unsafe_blocks, reason = "one comment above holds for all")]
impl Lanes for Neon {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Neon([unsafe { vdupq_n_f32(x) }; 4])
    }

    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self {
        map(|i| unsafe { vld1q_f32(x[4 * i..4 * i + 4].as_ptr()) })
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        for (i, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            unsafe { vst1q_f32(out.as_mut_ptr(), self.0[i]) }
        }
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        map(|i| unsafe { vaddq_f32(self.0[i], b.0[i]) })
    }

    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        map(|i| unsafe { vsubq_f32(self.0[i], b.0[i]) })
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        map(|i| unsafe { vmulq_f32(self.0[i], b.0[i]) })
    }

    #[inline(always)]
    fn div(self, b: Self) -> Self {
        map(|i| unsafe { vdivq_f32(self.0[i], b.0[i]) })
    }

    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        map(|i| unsafe { vfmaq_f32(c.0[i], self.0[i], b.0[i]) })
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        map(|i| max(self.0[i], b.0[i]))
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        map(|i| unsafe { vbslq_f32(vcltq_f32(self.0[i], b.0[i]), self.0[i], b.0[i]) })
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        map(|i| unsafe { vsqrtq_f32(self.0[i]) })
    }

    #[inline(always)]
    fn ldexp(self, n: Self) -> Self {
        // In two factors, the first exact and the second rounded, as the portable version.
        map(|i| unsafe {
            let whole = vcvtq_s32_f32(n.0[i]);
            let half = vshrq_n_s32::<1>(whole);
            let rest = vsubq_s32(whole, half);
            vmulq_f32(vmulq_f32(self.0[i], power_of_two(half)), power_of_two(rest))
        })
    }

    #[inline(always)]
    fn select_lt(self, limit: Self, yes: Self, no: Self) -> Self {
        map(|i| unsafe { vbslq_f32(vcltq_f32(self.0[i], limit.0[i]), yes.0[i], no.0[i]) })
    }

    #[inline(always)]
    fn flush(self) -> Self {
        map(|i| unsafe {
            // All bits but the sign, where the size is below the least normal.
            let tiny = vcaltq_f32(self.0[i], vdupq_n_f32(f32::MIN_POSITIVE));
            let cleared = vshrq_n_u32::<1>(tiny);
            vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(self.0[i]), cleared))
        })
    }

    #[inline(always)]
    fn bf16_even(pairs: &[u32; LANES]) -> Self {
        map(|i| unsafe {
            let pairs = vld1q_u32(pairs[4 * i..4 * i + 4].as_ptr());
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs))
        })
    }

    #[inline(always)]
    fn bf16_odd(pairs: &[u32; LANES]) -> Self {
        map(|i| unsafe {
            let pairs = vld1q_u32(pairs[4 * i..4 * i + 4].as_ptr());
            vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000)))
        })
    }

    #[inline(always)]
    fn from_bf16(bits: &[u16; LANES]) -> Self {
        map(|i| unsafe {
            let wide = vmovl_u16(vld1_u16(bits[4 * i..4 * i + 4].as_ptr()));
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(wide))
        })
    }

    #[inline(always)]
    fn from_i8(codes: &[u8; LANES]) -> Self {
        widen_i8(unsafe { vld1q_s8(codes.as_ptr().cast()) })
    }

    #[inline(always)]
    fn from_i4(codes: &[u8; LANES]) -> (Self, Self) {
        unsafe {
            let codes = vld1q_s8(codes.as_ptr().cast());
            (widen_i8(vshrq_n_s8::<4>(vshlq_n_s8::<4>(codes))), widen_i8(vshrq_n_s8::<4>(codes)))
        }
    }

    #[inline(always)]
    fn store_bf16_pairs(even: Self, odd: Self, out: &mut [u32; LANES]) {
        for (i, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            unsafe {
                // The upper half of `even` shifted in below that of `odd`.
                let (even, odd) = (vreinterpretq_u32_f32(even.0[i]), vreinterpretq_u32_f32(odd.0[i]));
                vst1q_u32(out.as_mut_ptr(), vsriq_n_u32::<16>(odd, even));
            }
        }
    }

    #[inline(always)]
    fn prefetch<T>(x: &[T], at: usize) {
        let address = x.as_ptr().wrapping_add(at);
        // A hint, which no address makes fault. The intrinsic for it is not stable.
        unsafe {
            std::arch::asm!("prfm pldl1keep, [{}]", in(reg) address, options(nomem, nostack, preserves_flags));
        }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe {
            let [a, b, c, d] = self.0;
            let four = vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d));
            vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
        }
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        unsafe {
            let [a, b, c, d] = self.0;
            let four = max(max(a, c), max(b, d));
            let (low, high) = (vget_low_f32(four), vget_high_f32(four));
            let two = vbsl_f32(vcgt_f32(low, high), low, high);
            let (low, high) = (vget_lane_f32::<0>(two), vget_lane_f32::<1>(two));
            if low > high { low } else { high }
        }
    }

    #[inline(always)]
    fn transpose(a: &[[u32; LANES]; LANES], out: &mut [[u32; LANES]; LANES]) {
        for row in (0..LANES).step_by(4) {
            for column in (0..LANES).step_by(4) {
                unsafe {
                    let part = |i: usize| vld1q_u32(a[row + i][column..column + 4].as_ptr());
                    let (r0, r1, r2, r3) = (part(0), part(1), part(2), part(3));
                    // Even and odd columns of two rows, in pairs; then the pairs of four rows.
                    let (even_01, odd_01) = (vtrn1q_u32(r0, r1), vtrn2q_u32(r0, r1));
                    let (even_23, odd_23) = (vtrn1q_u32(r2, r3), vtrn2q_u32(r2, r3));
                    let low = |x, y| {
                        vreinterpretq_u32_u64(vtrn1q_u64(vreinterpretq_u64_u32(x), vreinterpretq_u64_u32(y)))
                    };
                    let high = |x, y| {
                        vreinterpretq_u32_u64(vtrn2q_u64(vreinterpretq_u64_u32(x), vreinterpretq_u64_u32(y)))
                    };
                    let columns = [
                        low(even_01, even_23),
                        low(odd_01, odd_23),
                        high(even_01, even_23),
                        high(odd_01, odd_23),
                    ];
                    for (i, values) in columns.into_iter().enumerate() {
                        vst1q_u32(out[column + i][row..row + 4].as_mut_ptr(), values);
                    }
                }
            }
        }
    }
}
