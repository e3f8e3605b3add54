//! Conversions between f32 and the 16-bit formats, rounding to nearest even.

use crate::simd::simd;
use half::{bf16, f16};

/// The bf16 nearest to `x` (ties to even); a NaN stays a NaN.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        // The quiet bit is set, so that cutting the low half off cannot make an infinity of it.
        return (bits >> 16) as u16 | 0x0040;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

simd! {
    /// `out = x` rounded to bf16.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn f32_to_bf16<S>(x: &[f32], out: &mut [bf16]) {
        assert_eq!(x.len(), out.len(), "f32_to_bf16: lengths");
        for (out, &x) in out.iter_mut().zip(x) {
            *out = bf16::from_bits(bf16_bits(x));
        }
    }
}

simd! {
    /// `out = x`, exactly.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn bf16_to_f32<S>(x: &[bf16], out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "bf16_to_f32: lengths");
        for (out, &x) in out.iter_mut().zip(x) {
            *out = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
    }
}

simd! {
    /// Rounds each value of `x` to the nearest bf16, kept as f32.
    pub fn round_to_bf16<S>(x: &mut [f32]) {
        for x in x {
            *x = f32::from_bits(u32::from(bf16_bits(*x)) << 16);
        }
    }
}

/// `out = x` rounded to f16.
///
/// # Panics
/// When the lengths differ.
pub fn f32_to_f16(x: &[f32], out: &mut [f16]) {
    assert_eq!(x.len(), out.len(), "f32_to_f16: lengths");
    for (out, &x) in out.iter_mut().zip(x) {
        *out = f16::from_f32(x);
    }
}

/// `out = x`, exactly.
///
/// # Panics
/// When the lengths differ.
pub fn f16_to_f32(x: &[f16], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "f16_to_f32: lengths");
    for (out, &x) in out.iter_mut().zip(x) {
        *out = x.to_f32();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::forced::under_each;

    #[test]
    fn rounding_agrees_with_half_for_every_kind_of_value() {
        // Every sign, exponent and high mantissa, with low halves around the ties.
        let low = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        let x: Vec<f32> = (0..=0xffffu32)
            .step_by(13)
            .chain([0x7f7f, 0x7f80, 0x7fff, 0xff7f, 0xff80, 0xffff, 0x0000, 0x007f, 0x8000])
            .flat_map(|high| low.map(|low| f32::from_bits(high << 16 | low)))
            .collect();
        for (isa, got) in under_each(|| {
            let mut out = vec![bf16::ZERO; x.len()];
            f32_to_bf16(&x, &mut out);
            out
        }) {
            for (&x, &got) in x.iter().zip(&got) {
                let want = bf16::from_f32(x);
                let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
                assert!(same, "{x:e} becomes {got:?}, not {want:?} under {}", isa.name());
            }
            let mut back = vec![0.0; got.len()];
            bf16_to_f32(&got, &mut back);
            let mut rounded = x.clone();
            round_to_bf16(&mut rounded);
            crate::testing::assert_same_bits(&rounded, &back, isa.name());
            assert!(back.iter().zip(&got).all(|(b, g)| g.is_nan() || *b == g.to_f32()));
        }
    }

    #[test]
    fn f16_round_trips() {
        let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|x| !x.is_nan()).collect();
        let (mut wide, mut back) = (vec![0.0; all.len()], vec![f16::ONE; all.len()]);
        f16_to_f32(&all, &mut wide);
        f32_to_f16(&wide, &mut back);
        assert!(all.iter().zip(&back).all(|(a, b)| a.to_bits() == b.to_bits()));
        f32_to_f16(&[1.0 + 1.0 / 2048.0, 65520.0], &mut back[..2]);
        assert_eq!(back[..2], [f16::ONE, f16::INFINITY]);
    }
}
