//! Elementary functions made of fused multiply-adds only, so that every instruction set gives the same bits.

use crate::simd::Lanes;

/// e^x within 1.5 units in the last place; subnormal results are kept, exp(−∞) = 0, exp(NaN) = NaN, exp(0) = 1.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2 in two pieces (Cody and Waite), then the Taylor polynomial of degree 7 in r.
#[inline(always)]
pub(crate) fn exp<S: Lanes>(x: S) -> S {
    // Bounds first in `min` and `max`, so that a NaN passes through.
    exp_within(S::splat(-104.0).max(S::splat(89.0).min(x)))
}

/// [`exp`] of what is in −104 ..= 89 or NaN.
#[inline(always)]
pub(crate) fn exp_within<S: Lanes>(x: S) -> S {
    const SHIFT: f32 = 12_582_912.0; // 1.5 · 2^23: adding it rounds to a whole number.
    const LN2_HIGH: f32 = 0.693_359_4; // 355/512, few bits, so that n times it is exact.
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x.fma(S::splat(std::f32::consts::LOG2_E), S::splat(SHIFT));
    let n = shifted.sub(S::splat(SHIFT));
    let r = n.fma(S::splat(-LN2_HIGH), x);
    let r = n.fma(S::splat(-LN2_LOW), r);
    let mut p = S::splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p.fma(r, S::splat(c));
    }
    p.ldexp(n)
}

/// 1 / (1 + e^−x).
#[inline(always)]
pub(crate) fn sigmoid<S: Lanes>(x: S) -> S {
    let e = exp(S::splat(0.0).sub(x));
    S::splat(1.0).div(S::splat(1.0).add(e))
}

/// The error function within 1.5 units in the last place; erf(±∞) = ±1, erf(NaN) = NaN.
///
/// An odd polynomial up to 475/512, above it 1 − e^p(|x|) with a polynomial of degree 7 (minimax fits by N. Juffa).
#[inline(always)]
pub(crate) fn erf<S: Lanes>(x: S) -> S {
    const SPLIT: f32 = 475.0 / 512.0;
    let zero = S::splat(0.0);
    let size = x.select_lt(zero, zero.sub(x), x);
    let square = x.mul(x);
    let mut small = S::splat(-5.967_617e-4);
    for c in [4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_25e-1, -3.761_253_4e-1, 1.283_791_7e-1] {
        small = small.fma(square, S::splat(c));
    }
    let small = small.fma(x, x);
    // Beyond 4 the result is 1; the bound keeps ∞ · 0 out. `min` with the bound first lets a NaN through.
    let size = S::splat(8.0).min(size);
    let mut large = S::splat(-1.728_534_7e-5);
    for c in
        [3.831_971_3e-4, -3.883_964_4e-3, 2.425_462_2e-2, -1.067_778_8e-1, -6.348_467e-1, -1.287_175_1e-1]
    {
        large = large.fma(size, S::splat(c));
    }
    let large = S::splat(1.0).sub(exp(large.fma(size, zero.sub(size))));
    let large = x.select_lt(zero, zero.sub(large), large);
    size.select_lt(S::splat(SPLIT), small, large)
}

/// Natural logarithm of a positive f32, correctly rounded but for rare ties; ln(0) = −∞, negative and NaN give NaN.
///
/// Plain f64 products and sums (never contracted), so the same bits on every machine: x = 2^n·(1+f) with 1+f in
/// [√½, √2), and 2·atanh(f / (2 + f)) as a series.
pub(crate) fn ln(x: f32) -> f32 {
    if x.is_nan() || x <= 0.0 || x == f32::INFINITY {
        return if x == 0.0 {
            f32::NEG_INFINITY
        } else if x > 0.0 {
            x
        } else {
            f32::NAN
        };
    }
    let bits = f64::from(x).to_bits();
    // Every positive f32 is a normal f64.
    let mut n = (bits >> 52) as i64 - 1023;
    let mut m = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | 0x3ff0_0000_0000_0000);
    if m > std::f64::consts::SQRT_2 {
        m *= 0.5;
        n += 1;
    }
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    // |s| ≤ 0.172, so the term of s^21 is below 1e-17.
    let mut series = 0.0;
    for k in (0..10).rev() {
        series = series * z + 1.0 / (2 * k + 1) as f64;
    }
    (n as f64 * std::f64::consts::LN_2 + 2.0 * s * series) as f32
}

/// (sin x, cos x) of a finite f32 of size up to 2^20, rounded from f64: correct but for rare ties.
///
/// Plain f64 arithmetic, so the same bits on every machine. x = q·π/2 + r with π/2 in three pieces, the first two of
/// 33 bits, so that q times them is exact; then the series to r^17 (|r| ≤ π/4: the next term is below 1e-19).
pub(crate) fn sin_cos(x: f32) -> (f32, f32) {
    const PIO2_1: f64 = f64::from_bits(0x3ff9_21fb_5440_0000);
    const PIO2_2: f64 = f64::from_bits(0x3dd0_b461_1a60_0000);
    const PIO2_3: f64 = f64::from_bits(0x3ba3_198a_2e03_7073);
    let x = f64::from(x);
    let q = (x * std::f64::consts::FRAC_2_PI).round();
    let r = ((x - q * PIO2_1) - q * PIO2_2) - q * PIO2_3;
    let z = r * r;
    let (mut sin, mut cos) = (1.0, 1.0);
    for k in (1..=8).rev() {
        let k = f64::from(k);
        sin = 1.0 - z / (2.0 * k * (2.0 * k + 1.0)) * sin;
        cos = 1.0 - z / (2.0 * k * (2.0 * k - 1.0)) * cos;
    }
    let sin = r * sin;
    let (sin, cos) = match (q as i64).rem_euclid(4) {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    };
    (sin as f32, cos as f32)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::simd::{LANES, simd};
    use crate::softmax::exp_slice;
    use crate::testing::{AWKWARD, assert_all_agree};

    /// Distance of `got` from `want` in units of the last place of f32.
    fn ulps(got: f32, want: f64) -> f64 {
        let size = (want.abs() as f32).max(f32::MIN_POSITIVE);
        let unit = f64::from(f32::from_bits(size.to_bits() + 1)) - f64::from(size);
        (f64::from(got) - want).abs() / unit
    }

    #[test]
    fn exp_is_close_and_the_same_everywhere() {
        let mut x: Vec<f32> = (-110_000..=90_000).step_by(7).map(|i| i as f32 * 1e-3 + 1e-5).collect();
        x.extend(AWKWARD);
        let e = assert_all_agree("exp", || {
            let mut out = vec![0.0; x.len()];
            exp_slice(&x, &mut out);
            out
        });
        for (&x, &e) in x.iter().zip(&e) {
            let want = f64::from(x).exp();
            if x.is_nan() {
                assert!(e.is_nan());
            } else if want > f64::from(f32::MAX) {
                assert_eq!(e, f32::INFINITY, "exp({x})");
            } else {
                assert!(ulps(e, want) <= 1.5, "exp({x}) = {e}, not {want}");
            }
        }
        let mut exact = [0.0; 3];
        exp_slice(&[0.0, f32::NEG_INFINITY, -0.0], &mut exact);
        assert_eq!(exact, [1.0, 0.0, 1.0]);
    }

    /// The error function by Kummer's series, whose terms are all positive.
    pub(crate) fn erf_f64(x: f64) -> f64 {
        if x.abs() > 6.0 {
            return x.signum();
        }
        let (mut term, mut sum) = (x, 0.0);
        for n in 1..400 {
            sum += term;
            term *= 2.0 * x * x / f64::from(2 * n + 1);
        }
        sum * (-x * x).exp() * std::f64::consts::FRAC_2_SQRT_PI
    }

    simd! {
        fn erf_slice<S>(x: &[f32], out: &mut [f32]) {
            for (x, out) in x.chunks(LANES).zip(out.chunks_mut(LANES)) {
                erf(S::read(x, 0.0)).write(out);
            }
        }
    }

    #[test]
    fn erf_is_close_and_the_same_everywhere() {
        let mut x: Vec<f32> = (-60_000..=60_000).step_by(7).map(|i| i as f32 * 1e-4 + 1e-6).collect();
        x.extend(AWKWARD);
        let y = assert_all_agree("erf", || {
            let mut out = vec![0.0; x.len()];
            erf_slice(&x, &mut out);
            out
        });
        for (&x, &y) in x.iter().zip(&y) {
            if x.is_nan() {
                assert!(y.is_nan());
            } else {
                let want = erf_f64(f64::from(x));
                assert!(ulps(y, want) <= 1.5, "erf({x}) = {y}, not {want}");
            }
        }
    }

    #[test]
    fn ln_is_rounded_right() {
        for i in 0..200_000u32 {
            let x = f32::from_bits(i * 10_683 + 1);
            let want = f64::from(x).ln();
            assert!(ulps(ln(x), want) <= 0.501, "ln({x}) = {}, not {want}", ln(x));
        }
        assert_eq!(ln(1.0).to_bits(), 0);
        assert_eq!(ln(0.0), f32::NEG_INFINITY);
        assert_eq!(ln(f32::INFINITY), f32::INFINITY);
        assert!(ln(-1.0).is_nan() && ln(f32::NAN).is_nan() && ln(f32::NEG_INFINITY).is_nan());
    }

    #[test]
    fn sine_and_cosine_are_rounded_right() {
        for i in 0..200_000u32 {
            let x = (i as f32 * 5.24).min(1_048_576.0) * if i % 2 == 0 { 1.0 } else { 1e-4 };
            let (sin, cos) = sin_cos(x);
            let (want_sin, want_cos) = f64::from(x).sin_cos();
            assert!(ulps(sin, want_sin) <= 0.501, "sin({x}) = {sin}, not {want_sin}");
            assert!(ulps(cos, want_cos) <= 0.501, "cos({x}) = {cos}, not {want_cos}");
        }
    }
}
