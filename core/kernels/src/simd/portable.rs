//! Sixteen lanes in plain Rust: the reference that the other implementations are tested against.

use super::{LANES, Lanes};

/// An array of sixteen values.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

#[inline(always)]
fn map(f: impl Fn(usize) -> f32) -> Portable {
    Portable(std::array::from_fn(f))
}

/// 2^n for n in −126 ..= 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

impl Lanes for Portable {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        Portable([x; LANES])
    }

    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self {
        Portable(*x)
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; LANES]) {
        *out = self.0;
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        map(|i| self.0[i] + b.0[i])
    }

    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        map(|i| self.0[i] - b.0[i])
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        map(|i| self.0[i] * b.0[i])
    }

    #[inline(always)]
    fn div(self, b: Self) -> Self {
        map(|i| self.0[i] / b.0[i])
    }

    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        map(|i| self.0[i].mul_add(b.0[i], c.0[i]))
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        map(|i| if self.0[i] > b.0[i] { self.0[i] } else { b.0[i] })
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        map(|i| if self.0[i] < b.0[i] { self.0[i] } else { b.0[i] })
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        map(|i| self.0[i].sqrt())
    }

    #[inline(always)]
    fn ldexp(self, n: Self) -> Self {
        // Two factors, so that each is a normal number; the first product is exact, the second rounds.
        map(|i| {
            let whole = n.0[i] as i32;
            let half = whole >> 1;
            self.0[i] * power_of_two(half) * power_of_two(whole - half)
        })
    }

    #[inline(always)]
    fn select_lt(self, limit: Self, yes: Self, no: Self) -> Self {
        map(|i| if self.0[i] < limit.0[i] { yes.0[i] } else { no.0[i] })
    }

    #[inline(always)]
    fn flush(self) -> Self {
        map(|i| if self.0[i].is_subnormal() { 0.0f32.copysign(self.0[i]) } else { self.0[i] })
    }

    #[inline(always)]
    fn bf16_even(pairs: &[u32; LANES]) -> Self {
        map(|i| f32::from_bits(pairs[i] << 16))
    }

    #[inline(always)]
    fn bf16_odd(pairs: &[u32; LANES]) -> Self {
        map(|i| f32::from_bits(pairs[i] & 0xffff_0000))
    }

    #[inline(always)]
    fn from_bf16(bits: &[u16; LANES]) -> Self {
        map(|i| f32::from_bits(u32::from(bits[i]) << 16))
    }

    #[inline(always)]
    fn from_i8(codes: &[u8; LANES]) -> Self {
        map(|i| f32::from(codes[i] as i8))
    }

    #[inline(always)]
    fn from_i4(codes: &[u8; LANES]) -> (Self, Self) {
        (map(|i| f32::from((codes[i] << 4) as i8 >> 4)), map(|i| f32::from(codes[i] as i8 >> 4)))
    }

    #[inline(always)]
    fn store_bf16_pairs(even: Self, odd: Self, out: &mut [u32; LANES]) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = even.0[i].to_bits() >> 16 | (odd.0[i].to_bits() & 0xffff_0000);
        }
    }
}
