//! Helpers of the tests: data, comparison of bits, finite differences.

use crate::isa::forced::under_each;

/// A small generator for test data: xorshift, the same everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// In −1 .. 1.
    pub(crate) fn f32(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.f32()).collect()
    }

    /// Finite values with biased exponents in `low..=high`, one in sixteen a zero.
    pub(crate) fn wide_vec(&mut self, len: usize, low: u32, high: u32) -> Vec<f32> {
        let mut wide = || {
            let bits = self.next();
            let exponent = low + (bits >> 32) as u32 % (high - low + 1);
            let value = f32::from_bits((bits as u32 & 0x807f_ffff) | exponent << 23);
            if bits >> 60 == 0 { 0.0f32.copysign(value) } else { value }
        };
        (0..len).map(|_| wide()).collect()
    }
}

/// Values that kernels get wrong.
pub(crate) const AWKWARD: [f32; 20] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-45,
    -1e-45,
    1.0e-39,
    f32::MIN_POSITIVE,
    -f32::MIN_POSITIVE,
    f32::MAX,
    f32::MIN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    88.72,
    88.73,
    -87.4,
    -103.97,
    -104.5,
    1e-8,
];

/// `len` values, the awkward ones in turn among ordinary ones.
pub(crate) fn awkward_vec(random: &mut Random, len: usize) -> Vec<f32> {
    (0..len).map(|i| if i % 3 == 1 { AWKWARD[i / 3 % AWKWARD.len()] } else { 4.0 * random.f32() }).collect()
}

/// Fails where bits differ; every NaN is alike, −0 is not +0.
#[track_caller]
pub(crate) fn assert_same_bits(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let same = g.to_bits() == w.to_bits() || (g.is_nan() && w.is_nan());
        assert!(
            same,
            "{what}: element {i} is {g:e} ({:#010x}), not {w:e} ({:#010x})",
            g.to_bits(),
            w.to_bits()
        );
    }
}

/// Fails where an implementation of this machine differs from the portable one by a bit; returns the result.
#[track_caller]
pub(crate) fn assert_all_agree(what: &str, f: impl FnMut() -> Vec<f32>) -> Vec<f32> {
    let mut results = under_each(f);
    for (isa, got) in &results[1..] {
        assert_same_bits(got, &results[0].1, &format!("{what}, {}", isa.name()));
    }
    results.swap_remove(0).1
}

/// Fails where |got − want| > tolerance · (1 + |want|), or where either is NaN.
#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(g) - w).abs();
        assert!(error <= tolerance * (1.0 + w.abs()), "{what}: element {i} is {g}, not {w}");
    }
}

/// Central differences of `f` at `x`.
pub(crate) fn gradient(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let before = x[i];
            x[i] = before + STEP;
            let above = f(&x);
            x[i] = before - STEP;
            let below = f(&x);
            x[i] = before;
            (above - below) / (2.0 * STEP)
        })
        .collect()
}

/// Widens.
pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}
