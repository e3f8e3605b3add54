//! Sixteen f32 lanes, one trait, an implementation per instruction set, and the macro that picks one.
//!
//! An operation is written once over [`Lanes`]; `simd!` compiles it for every instruction set. All methods round as
//! IEEE-754 says (nearest even, subnormals kept, no contraction), so the implementations agree to the bit; NaN
//! payloads are the exception and carry no meaning. Sixteen lanes are the *definition* (element i of a row belongs to
//! lane i mod 16), whatever the register width.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;

/// Number of lanes.
pub(crate) const LANES: usize = 16;

/// Sixteen f32 values.
///
/// The values of `Avx2` and `Avx512` must exist only inside functions compiled for them, which `simd!` sees to; those of `Neon`
/// may exist anywhere on aarch64.
pub(crate) trait Lanes: Copy {
    /// All lanes `x`.
    fn splat(x: f32) -> Self;
    /// Reads sixteen values.
    fn load(x: &[f32; LANES]) -> Self;
    /// Writes sixteen values.
    fn store(self, out: &mut [f32; LANES]);
    /// `self + b`
    fn add(self, b: Self) -> Self;
    /// `self - b`
    fn sub(self, b: Self) -> Self;
    /// `self * b`
    fn mul(self, b: Self) -> Self;
    /// `self / b`
    fn div(self, b: Self) -> Self;
    /// `self * b + c`, rounded once.
    fn fma(self, b: Self, c: Self) -> Self;
    /// `if self > b { self } else { b }`: a NaN in either gives `b`.
    fn max(self, b: Self) -> Self;
    /// `if self < b { self } else { b }`: a NaN in either gives `b`.
    fn min(self, b: Self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// `self * 2^n` rounded once, for whole `n` in −252 ..= 254 and finite `self` of a size near 1.
    fn ldexp(self, n: Self) -> Self;
    /// `if self < limit { yes } else { no }`
    fn select_lt(self, limit: Self, yes: Self, no: Self) -> Self;
    /// Replaces subnormals by a zero of the same sign.
    fn flush(self) -> Self;
    /// The even (low) halves of sixteen bf16 pairs, widened.
    fn bf16_even(pairs: &[u32; LANES]) -> Self;
    /// The odd (high) halves of sixteen bf16 pairs, widened.
    fn bf16_odd(pairs: &[u32; LANES]) -> Self;

    /// Sixteen bf16, widened.
    fn from_bf16(bits: &[u16; LANES]) -> Self;
    /// Sixteen whole numbers of 8 bits, two's complement.
    fn from_i8(codes: &[u8; LANES]) -> Self;
    /// Thirty-two whole numbers of 4 bits, two's complement: those in the low halves, those in the high.
    fn from_i4(codes: &[u8; LANES]) -> (Self, Self);
    /// Writes the upper halves of `even` and `odd` as bf16 pairs, even ones low.
    fn store_bf16_pairs(even: Self, odd: Self, out: &mut [u32; LANES]);

    /// [`Lanes::store`] past the caches, where the processor can; `out` starts a line of memory. Other threads see it after
    /// [`Lanes::fence`].
    #[inline(always)]
    fn stream(self, out: &mut [f32; LANES]) {
        self.store(out);
    }

    /// Makes what was streamed visible.
    #[inline(always)]
    fn fence() {}

    /// Asks for the cache line that holds `x[at]`, if there is one; changes no result.
    #[inline(always)]
    fn prefetch<T>(_x: &[T], _at: usize) {}

    /// `out[i][j] = a[j][i]`
    #[inline(always)]
    fn transpose(a: &[[u32; LANES]; LANES], out: &mut [[u32; LANES]; LANES]) {
        for (i, out) in out.iter_mut().enumerate() {
            for (j, row) in a.iter().enumerate() {
                out[j] = row[i];
            }
        }
    }

    /// Reads the first sixteen values, or as many as there are; missing lanes get `fill`.
    #[inline(always)]
    fn read(x: &[f32], fill: f32) -> Self {
        if let Some(full) = x.first_chunk::<LANES>() {
            return Self::load(full);
        }
        let mut lanes = [fill; LANES];
        for (lane, &value) in lanes.iter_mut().zip(x) {
            *lane = value;
        }
        Self::load(&lanes)
    }

    /// Writes the lanes, or as many as fit, to the start of `out`.
    #[inline(always)]
    fn write(self, out: &mut [f32]) {
        if let Some(full) = out.first_chunk_mut::<LANES>() {
            return self.store(full);
        }
        for (value, lane) in out.iter_mut().zip(self.to_array()) {
            *value = lane;
        }
    }

    /// The lanes as an array.
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes);
        lanes
    }

    /// Sum over lanes as a fixed tree: halves 8, 4, 2, 1 apart.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut a = self.to_array();
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                a[i] += a[i + half];
            }
            half /= 2;
        }
        a[0]
    }

    /// Maximum over lanes, ignoring NaN unless the last lanes hold it.
    #[inline(always)]
    fn max_lane(self) -> f32 {
        let mut a = self.to_array();
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                a[i] = if a[i] > a[i + half] { a[i] } else { a[i + half] };
            }
            half /= 2;
        }
        a[0]
    }
}

/// Defines a function whose body is compiled once per instruction set, with `$S` the [`Lanes`] type in it, and which
/// calls the version for [`crate::isa::current`]. The body must hold no closure handed to another function (it would
/// be compiled without the instruction set); threads are split outside.
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$S:ident>($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments, clippy::extra_unused_type_parameters)]
            fn body<$S: $crate::simd::Lanes>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::simd::Avx512>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::simd::Avx2>($($arg),*)
            }

            match $crate::isa::current() {
                // SAFETY: `isa::current` is at least AVX-512 only where F, BW, VL, DQ, AVX2 and FMA were detected.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Isa::Amx | $crate::isa::Isa::Avx512Bf16 | $crate::isa::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: `isa::current` is AVX2 only where AVX2 and FMA were detected.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
                // All of this crate is compiled for NEON there.
                #[cfg(target_arch = "aarch64")]
                $crate::isa::Isa::Neon => body::<$crate::simd::Neon>($($arg),*),
                _ => body::<$crate::simd::Portable>($($arg),*),
            }
        }
    };
}
pub(crate) use simd;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{AWKWARD, assert_all_agree};

    /// The first bytes of sixteen values, as sixteen smaller numbers.
    fn bytes_of<T: bytemuck::AnyBitPattern>(a: &[f32; LANES]) -> &[T; LANES] {
        bytemuck::cast_slice::<f32, T>(a).first_chunk().expect("the numbers are no larger than f32")
    }

    simd! {
        /// Every operation on a few triples of registers, end to end.
        fn every_operation<S>(a: &[f32; LANES], b: &[f32; LANES], c: &[f32; LANES], out: &mut Vec<f32>) {
            let (x, y, z) = (S::load(a), S::load(b), S::load(c));
            let n = S::splat(-130.0);
            for value in [
                x.add(y), x.sub(y), x.mul(y), x.div(y), x.fma(y, z), x.max(y), x.min(y), x.sqrt(),
                S::splat(1.37).ldexp(n), S::splat(-0.71).ldexp(S::splat(128.0)), x.select_lt(y, z, x),
                x.flush(), S::bf16_even(bytemuck::cast_ref(a)), S::bf16_odd(bytemuck::cast_ref(a)),
                S::read(&a[..7], 2.0), S::splat(a[0]), S::from_bf16(bytes_of(a)), S::from_bf16(bytes_of(b)),
                S::from_i8(bytes_of(a)), S::from_i8(bytes_of(c)), S::from_i4(bytes_of(b)).0, S::from_i4(bytes_of(c)).1,
            ] {
                out.extend(value.to_array());
            }
            out.push(y.sum());
            out.push(y.max_lane());
            let mut pairs = [0; LANES];
            S::store_bf16_pairs(x, y, &mut pairs);
            out.extend(pairs.map(|pair| (pair >> 16) as f32));
            out.extend(pairs.map(|pair| (pair & 0xffff) as f32));
            let mut part = [0.0; 11];
            x.write(&mut part);
            out.extend(part);
        }
    }

    #[test]
    fn implementations_agree_on_every_operation() {
        let rotated =
            |by: usize| -> [f32; LANES] { std::array::from_fn(|i| AWKWARD[(i * 7 + by) % AWKWARD.len()]) };
        for by in 0..AWKWARD.len() {
            for other in 0..AWKWARD.len() {
                assert_all_agree("lanes", || {
                    let mut out = Vec::new();
                    every_operation(&rotated(by), &rotated(by + other), &rotated(3 * other), &mut out);
                    out
                });
            }
        }
    }

    simd! {
        fn scaled<S>(x: &[f32; LANES], n: f32) -> [f32; LANES] {
            S::load(x).ldexp(S::splat(n)).to_array()
        }
    }

    #[test]
    fn every_power_of_two_scales_and_rounds_once() {
        let x: [f32; LANES] = std::array::from_fn(|i| (0.7 + 0.043_21 * i as f32) * [1.0, -1.0][i % 2]);
        for n in -252..=254i32 {
            // Exact in f64, so that the way back to f32 is the one rounding.
            let want = x.map(|x| (f64::from(x) * 2f64.powi(n)) as f32);
            for (isa, out) in crate::isa::forced::under_each(|| scaled(&x, n as f32)) {
                assert_eq!(out.map(f32::to_bits), want.map(f32::to_bits), "{} {n}", isa.name());
            }
        }
    }

    simd! {
        fn transposed<S>(a: &[[u32; LANES]; LANES]) -> [[u32; LANES]; LANES] {
            let mut out = [[0; LANES]; LANES];
            S::transpose(a, &mut out);
            out
        }
    }

    #[test]
    fn transposing_exchanges_rows_and_columns() {
        let a: [[u32; LANES]; LANES] = std::array::from_fn(|i| std::array::from_fn(|j| (100 * i + j) as u32));
        for (isa, out) in crate::isa::forced::under_each(|| transposed(&a)) {
            for i in 0..LANES {
                for j in 0..LANES {
                    assert_eq!(out[i][j], a[j][i], "{} {i} {j}", isa.name());
                }
            }
        }
    }
}
