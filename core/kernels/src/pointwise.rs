//! Activations of one argument, `out = act(x)`, forward and backward: what encoders have between two projections.
//!
//! Elementwise, hence batch-invariant. gelu is x·Φ(x) with Φ the normal distribution, by the error function; tanh is
//! 2·sigmoid(2x) − 1 (absolute error below 2e-7).

use crate::activation::{Activate, GeluTanh, Silu};
use crate::math::{erf, exp, sigmoid};
use crate::simd::{LANES, Lanes, simd};

/// An activation of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pointwise {
    /// GELU by the error function (BERT, DeBERTa).
    Gelu,
    /// The tanh form of GELU.
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// x·sigmoid(x).
    Silu,
    /// Hyperbolic tangent (BERT's pooler).
    Tanh,
}

/// Computes `out = act(x)`.
///
/// # Panics
/// When the lengths differ.
pub fn pointwise(act: Pointwise, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "pointwise: lengths");
    match act {
        Pointwise::Gelu => gelu_forward(x, out),
        Pointwise::GeluTanh => gelu_tanh_forward(x, out),
        Pointwise::Relu => relu_forward(x, out),
        Pointwise::Silu => silu_forward(x, out),
        Pointwise::Tanh => tanh_forward(x, out),
    }
}

/// Computes `dx = dy·act'(x)`.
///
/// # Panics
/// When the lengths differ.
pub fn pointwise_backward(act: Pointwise, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    assert!(x.len() == dy.len() && x.len() == dx.len(), "pointwise_backward: lengths");
    match act {
        Pointwise::Gelu => gelu_backward(x, dy, dx),
        Pointwise::GeluTanh => gelu_tanh_backward(x, dy, dx),
        Pointwise::Relu => relu_backward(x, dy, dx),
        Pointwise::Silu => silu_backward(x, dy, dx),
        Pointwise::Tanh => tanh_backward(x, dy, dx),
    }
}

/// (x·Φ(x), Φ(x) + x·φ(x))
#[inline(always)]
fn gelu<S: Lanes>(x: S) -> (S, S) {
    const INV_SQRT_2PI: f32 = 0.398_942_3;
    let erf = erf(x.mul(S::splat(std::f32::consts::FRAC_1_SQRT_2)));
    let below = erf.fma(S::splat(0.5), S::splat(0.5));
    let density = exp(x.mul(x).mul(S::splat(-0.5))).mul(S::splat(INV_SQRT_2PI));
    (x.mul(below), x.fma(density, below))
}

/// (max(x, 0), its slope, 0 at 0); a NaN stays one.
#[inline(always)]
fn relu<S: Lanes>(x: S) -> (S, S) {
    let zero = S::splat(0.0);
    let slope = zero.select_lt(x, S::splat(1.0), zero);
    (x.select_lt(zero, zero, x), slope)
}

/// (tanh x, 1 − tanh² x)
#[inline(always)]
fn tanh<S: Lanes>(x: S) -> (S, S) {
    let t = sigmoid(x.add(x)).fma(S::splat(2.0), S::splat(-1.0));
    (t, t.mul(S::splat(-1.0)).fma(t, S::splat(1.0)))
}

/// Defines the forward and backward of one activation.
macro_rules! elements {
    ($forward:ident, $backward:ident, $act:path) => {
        simd! {
            fn $forward<S>(x: &[f32], out: &mut [f32]) {
                for (x, out) in x.chunks(LANES).zip(out.chunks_mut(LANES)) {
                    let (value, _) = $act(S::read(x, 0.0));
                    value.write(out);
                }
            }
        }

        simd! {
            fn $backward<S>(x: &[f32], dy: &[f32], dx: &mut [f32]) {
                for ((x, dy), dx) in x.chunks(LANES).zip(dy.chunks(LANES)).zip(dx.chunks_mut(LANES)) {
                    let (_, slope) = $act(S::read(x, 0.0));
                    S::read(dy, 0.0).mul(slope).write(dx);
                }
            }
        }
    };
}

elements!(gelu_forward, gelu_backward, gelu);
elements!(gelu_tanh_forward, gelu_tanh_backward, GeluTanh::act);
elements!(relu_forward, relu_backward, relu);
elements!(silu_forward, silu_backward, Silu::act);
elements!(tanh_forward, tanh_backward, tanh);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::tests::erf_f64;
    use crate::testing::*;

    const ALL: [Pointwise; 5] =
        [Pointwise::Gelu, Pointwise::GeluTanh, Pointwise::Relu, Pointwise::Silu, Pointwise::Tanh];

    fn act_f64(act: Pointwise, x: f64) -> f64 {
        match act {
            Pointwise::Gelu => 0.5 * x * (1.0 + erf_f64(x / std::f64::consts::SQRT_2)),
            Pointwise::GeluTanh => {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                0.5 * x * (1.0 + u.tanh())
            }
            Pointwise::Relu => x.max(0.0),
            Pointwise::Silu => x / (1.0 + (-x).exp()),
            Pointwise::Tanh => x.tanh(),
        }
    }

    #[test]
    fn forward_and_backward_at_every_length() {
        let mut random = Random(1);
        for act in ALL {
            for len in 0..=50 {
                let x: Vec<f32> = random.vec(len).iter().map(|x| 6.0 * x).collect();
                let dy = random.vec(len);
                let got = assert_all_agree("pointwise", || {
                    let (mut out, mut dx) = (vec![f32::NAN; len], vec![f32::NAN; len]);
                    pointwise(act, &x, &mut out);
                    pointwise_backward(act, &x, &dy, &mut dx);
                    [out, dx].concat()
                });
                let x = wide(&x);
                let out: Vec<f64> = x.iter().map(|&x| act_f64(act, x)).collect();
                let loss = |x: &[f64]| -> f64 {
                    x.iter().zip(&dy).map(|(x, dy)| act_f64(act, *x) * f64::from(*dy)).sum()
                };
                assert_close(&got[..len], &out, 5e-7, &format!("{act:?}"));
                assert_close(&got[len..], &gradient(&x, loss), 2e-6, &format!("{act:?} backward"));
            }
        }
    }

    #[test]
    fn awkward_values_agree() {
        let mut random = Random(2);
        let x = awkward_vec(&mut random, 61);
        let dy = random.vec(61);
        for act in ALL {
            let out = assert_all_agree("pointwise", || {
                let (mut out, mut dx) = (vec![0.0; 61], vec![0.0; 61]);
                pointwise(act, &x, &mut out);
                pointwise_backward(act, &x, &dy, &mut dx);
                [out, dx].concat()
            });
            for (x, out) in x.iter().zip(&out) {
                assert!(!x.is_nan() || out.is_nan(), "{act:?}: a NaN shows");
            }
        }
    }
}
