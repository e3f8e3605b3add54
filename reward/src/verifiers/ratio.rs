//! Exact rational numbers of 128 bits; every operation says when it does not fit.

/// `num / den` in lowest terms, `den > 0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ratio {
    num: i128,
    den: i128,
}

impl Ratio {
    pub(crate) const ZERO: Self = Self { num: 0, den: 1 };

    /// `None` if `den` is 0 or the result does not fit.
    pub(crate) fn new(num: i128, den: i128) -> Option<Self> {
        if den == 0 {
            return None;
        }
        let divisor = i128::try_from(gcd(num.unsigned_abs(), den.unsigned_abs())).ok()?;
        let (num, den) = (num / divisor, den / divisor);
        if den < 0 {
            Some(Self { num: num.checked_neg()?, den: den.checked_neg()? })
        } else {
            Some(Self { num, den })
        }
    }

    pub(crate) fn integer(value: i128) -> Self {
        Self { num: value, den: 1 }
    }

    /// Digits with at most one point, no sign.
    pub(crate) fn decimal(text: &str) -> Option<Self> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let digits = format!("{whole}{fraction}");
        if !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let den = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
        Self::new(digits.parse().ok()?, den)
    }

    pub(crate) fn add(self, other: Self) -> Option<Self> {
        let a = self.num.checked_mul(other.den)?;
        let b = other.num.checked_mul(self.den)?;
        Self::new(a.checked_add(b)?, self.den.checked_mul(other.den)?)
    }

    pub(crate) fn neg(self) -> Option<Self> {
        Some(Self { num: self.num.checked_neg()?, den: self.den })
    }

    pub(crate) fn mul(self, other: Self) -> Option<Self> {
        Self::new(self.num.checked_mul(other.num)?, self.den.checked_mul(other.den)?)
    }

    pub(crate) fn div(self, other: Self) -> Option<Self> {
        Self::new(self.num.checked_mul(other.den)?, self.den.checked_mul(other.num)?)
    }

    /// Whole powers only.
    pub(crate) fn pow(self, exponent: Self) -> Option<Self> {
        let n = u32::try_from(exponent.as_integer()?.unsigned_abs()).ok()?;
        let (num, den) = (self.num.checked_pow(n)?, self.den.checked_pow(n)?);
        if exponent.num < 0 { Self::new(den, num) } else { Self::new(num, den) }
    }

    pub(crate) fn as_integer(self) -> Option<i128> {
        (self.den == 1).then_some(self.num)
    }

    pub(crate) fn to_f64(self) -> f64 {
        self.num as f64 / self.den as f64
    }
}

fn gcd(mut a: u128, mut b: u128) -> u128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lowest_terms_signs_and_overflow() {
        assert_eq!(Ratio::new(2, -4), Ratio::new(-1, 2));
        assert_eq!(Ratio::new(1, 0), None);
        assert_eq!(Ratio::decimal("12.50"), Ratio::new(25, 2));
        assert_eq!(Ratio::decimal(".5"), Ratio::new(1, 2));
        assert_eq!(Ratio::decimal("1.2.3"), None);
        let two = Ratio::integer(2);
        assert_eq!(two.pow(Ratio::integer(-3)), Ratio::new(1, 8));
        assert_eq!(two.pow(Ratio::integer(500)), None);
        assert_eq!(Ratio::ZERO.pow(Ratio::integer(-1)), None);
    }
}
