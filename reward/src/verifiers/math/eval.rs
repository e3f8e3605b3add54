//! The value of an expression: exact where it fits, else complex floating point.

use freewheel_types::{CounterRng, Digest};

use super::expr::{Expr, Function};
use crate::verifiers::ratio::Ratio;

/// Seed of the points at which formulas with variables are compared; fixed, so that verdicts never change.
const POINT_SEED: u64 = 0x6d61_7468;

/// A complex number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Complex {
    pub(crate) re: f64,
    pub(crate) im: f64,
}

impl Complex {
    pub(crate) fn real(re: f64) -> Self {
        Self { re, im: 0.0 }
    }

    pub(crate) fn abs(self) -> f64 {
        self.re.hypot(self.im)
    }

    pub(crate) fn sub(self, o: Self) -> Self {
        Self { re: self.re - o.re, im: self.im - o.im }
    }

    pub(crate) fn is_finite(self) -> bool {
        self.re.is_finite() && self.im.is_finite()
    }

    fn add(self, o: Self) -> Self {
        Self { re: self.re + o.re, im: self.im + o.im }
    }

    fn mul(self, o: Self) -> Self {
        if self.im == 0.0 && o.im == 0.0 {
            return Self::real(self.re * o.re); // keeps infinities from becoming NaN
        }
        Self { re: self.re * o.re - self.im * o.im, im: self.re * o.im + self.im * o.re }
    }

    pub(crate) fn div(self, o: Self) -> Option<Self> {
        let norm = o.re * o.re + o.im * o.im;
        if norm == 0.0 {
            return None;
        }
        if self.im == 0.0 && o.im == 0.0 {
            return Some(Self::real(self.re / o.re));
        }
        Some(Self {
            re: (self.re * o.re + self.im * o.im) / norm,
            im: (self.im * o.re - self.re * o.im) / norm,
        })
    }

    fn exp(self) -> Self {
        if self.im == 0.0 {
            return Self::real(self.re.exp());
        }
        let size = self.re.exp();
        Self { re: size * self.im.cos(), im: size * self.im.sin() }
    }

    /// Principal value; `None` at 0.
    fn ln(self) -> Option<Self> {
        (self.abs() > 0.0).then(|| Self { re: self.abs().ln(), im: self.im.atan2(self.re) })
    }

    fn sqrt(self) -> Self {
        if self.im == 0.0 {
            let root = self.re.abs().sqrt();
            return if self.re >= 0.0 { Self::real(root) } else { Self { re: 0.0, im: root } };
        }
        let (size, half) = (self.abs().sqrt(), self.im.atan2(self.re) / 2.0);
        Self { re: size * half.cos(), im: size * half.sin() }
    }

    fn pow(self, e: Self) -> Option<Self> {
        if self.abs() == 0.0 {
            // 0^0 is 1 as everywhere in combinatorics; 0 to a negative power is nothing.
            return match (e.re, e.im) {
                (0.0, 0.0) => Some(Self::real(1.0)),
                (re, 0.0) if re > 0.0 => Some(Self::real(0.0)),
                _ => None,
            };
        }
        if e.im == 0.0 {
            if self.im == 0.0 && (self.re > 0.0 || e.re.fract() == 0.0) {
                return Some(Self::real(self.re.powf(e.re)));
            }
            if e.re.fract() == 0.0 && e.re.abs() <= 64.0 {
                let mut power = Self::real(1.0);
                for _ in 0..e.re.abs() as u32 {
                    power = power.mul(self);
                }
                return if e.re < 0.0 { Self::real(1.0).div(power) } else { Some(power) };
            }
            // The real root of a negative number, as schools write it: (-8)^{1/3} = -2.
            let root = 1.0 / e.re;
            if self.im == 0.0
                && self.re < 0.0
                && (root - root.round()).abs() < 1e-12
                && root.round() % 2.0 != 0.0
            {
                return Some(Self::real(-(-self.re).powf(e.re)));
            }
        }
        Some(e.mul(self.ln()?).exp())
    }
}

/// Exact rational value of an expression without variables, roots or constants; `None` otherwise.
pub(crate) fn exact(expr: &Expr) -> Option<Ratio> {
    match expr {
        Expr::Number(numeral) => numeral.exact,
        Expr::Neg(inner) => exact(inner)?.neg(),
        Expr::Sum(terms) => terms.iter().try_fold(Ratio::ZERO, |sum, term| sum.add(exact(term)?)),
        Expr::Product(factors) => {
            factors.iter().try_fold(Ratio::integer(1), |product, f| product.mul(exact(f)?))
        }
        Expr::Quotient(num, den) => exact(num)?.div(exact(den)?),
        Expr::Power(base, exponent) => exact(base)?.pow(exact(exponent)?),
        Expr::Percent(inner) => exact(inner)?.div(Ratio::integer(100)),
        Expr::Factorial(inner) => {
            let n = exact(inner)?.as_integer().filter(|n| (0..=33).contains(n))?;
            (1..=n).try_fold(Ratio::integer(1), |product, k| product.mul(Ratio::integer(k)))
        }
        _ => None,
    }
}

/// Whether a variable other than `i` occurs.
pub(crate) fn has_variables(expr: &Expr) -> bool {
    match expr {
        Expr::Symbol(name) => name != "i",
        Expr::Number(_) | Expr::Pi | Expr::E | Expr::Infinity | Expr::Reals | Expr::Text(_) => false,
        Expr::Neg(a) | Expr::Call(_, a) | Expr::Factorial(a) | Expr::Percent(a) | Expr::Degrees(a) => {
            has_variables(a)
        }
        Expr::Quotient(a, b)
        | Expr::Power(a, b)
        | Expr::Binomial(a, b)
        | Expr::LogBase(a, b)
        | Expr::PlusMinus(a, b, _)
        | Expr::Without(a, b) => has_variables(a) || has_variables(b),
        Expr::Sum(list)
        | Expr::Product(list)
        | Expr::Set(list)
        | Expr::List(list)
        | Expr::Union(list)
        | Expr::Bracket(_, list, _)
        | Expr::Relation(list, _) => list.iter().any(has_variables),
        Expr::Matrix(rows) => rows.iter().flatten().any(has_variables),
    }
}

/// Floating-point value; variables get the values of sample point `point`. `None` where it has none.
pub(crate) fn value(expr: &Expr, point: u64) -> Option<Complex> {
    let at = |e: &Expr| value(e, point);
    let result = match expr {
        Expr::Number(numeral) => Complex::real(numeral.to_f64()),
        Expr::Symbol(name) if name == "i" => Complex { re: 0.0, im: 1.0 },
        Expr::Symbol(name) => Complex::real(sample(name, point)),
        Expr::Pi => Complex::real(std::f64::consts::PI),
        Expr::E => Complex::real(std::f64::consts::E),
        Expr::Neg(inner) => Complex::real(0.0).sub(at(inner)?),
        Expr::Sum(terms) => {
            terms.iter().try_fold(Complex::real(0.0), |sum, term| Some(sum.add(at(term)?)))?
        }
        Expr::Product(list) => {
            list.iter().try_fold(Complex::real(1.0), |product, f| Some(product.mul(at(f)?)))?
        }
        Expr::Quotient(num, den) => at(num)?.div(at(den)?)?,
        Expr::Power(base, exponent) => at(base)?.pow(at(exponent)?)?,
        Expr::Percent(inner) => at(inner)?.div(Complex::real(100.0))?,
        Expr::Degrees(inner) => at(inner)?,
        Expr::Factorial(inner) => factorial(at(inner)?)?,
        Expr::Binomial(n, k) => {
            let (n, k) = (at(n)?, at(k)?);
            factorial(n)?.div(factorial(k)?.mul(factorial(n.sub(k))?))?
        }
        Expr::LogBase(base, argument) => at(argument)?.ln()?.div(at(base)?.ln()?)?,
        Expr::Call(function, argument) => call(*function, argument, point)?,
        _ => return None,
    };
    result.is_finite().then_some(result)
}

/// A value away from 0 and 1, of either sign, fixed for each name and point.
fn sample(name: &str, point: u64) -> f64 {
    let digest = Digest::of(name.as_bytes()).0;
    let stream = u64::from_le_bytes([
        digest[0], digest[1], digest[2], digest[3], digest[4], digest[5], digest[6], digest[7],
    ]);
    let rng = CounterRng::new(POINT_SEED, stream);
    let size = 0.3 + 2.4 * rng.uniform(point);
    // The first points are positive: formulas with roots and logarithms have real values there.
    if point >= 4 && rng.uniform(point + 1000) < 0.5 { -size } else { size }
}

fn factorial(n: Complex) -> Option<Complex> {
    let whole = n.im == 0.0 && n.re >= 0.0 && n.re <= 170.0 && n.re.fract() == 0.0;
    whole.then(|| Complex::real((1..=n.re as u32).map(f64::from).product()))
}

fn call(function: Function, argument: &Expr, point: u64) -> Option<Complex> {
    let mut z = value(argument, point)?;
    let degrees = matches!(argument, Expr::Degrees(_));
    if degrees {
        z = Complex::real(z.re.to_radians());
    }
    let sin = |z: Complex| Complex { re: z.re.sin() * z.im.cosh(), im: z.re.cos() * z.im.sinh() };
    let cos = |z: Complex| Complex { re: z.re.cos() * z.im.cosh(), im: -z.re.sin() * z.im.sinh() };
    let one = Complex::real(1.0);
    let half = |a: Complex| a.mul(Complex::real(0.5));
    let minus = Complex::real(0.0).sub(z);
    let real = |f: fn(f64) -> f64| (z.im == 0.0).then(|| Complex::real(f(z.re)));
    match function {
        Function::Sqrt => Some(z.sqrt()),
        Function::Abs => Some(Complex::real(z.abs())),
        Function::Floor => real(f64::floor),
        Function::Ceil => real(f64::ceil),
        Function::Exp => Some(z.exp()),
        Function::Ln => z.ln(),
        Function::Log10 => z.ln()?.div(Complex::real(std::f64::consts::LN_10)),
        Function::Sin => Some(sin(z)),
        Function::Cos => Some(cos(z)),
        Function::Tan => sin(z).div(cos(z)).filter(|_| cos(z).abs() > 1e-12),
        Function::Cot => cos(z).div(sin(z)).filter(|_| sin(z).abs() > 1e-12),
        Function::Sec => one.div(cos(z)).filter(|_| cos(z).abs() > 1e-12),
        Function::Csc => one.div(sin(z)).filter(|_| sin(z).abs() > 1e-12),
        Function::Asin => real(f64::asin),
        Function::Acos => real(f64::acos),
        Function::Atan => real(f64::atan),
        Function::Sinh => Some(half(z.exp().sub(minus.exp()))),
        Function::Cosh => Some(half(z.exp().add(minus.exp()))),
        Function::Tanh => real(f64::tanh),
    }
}
