//! Gated activations: `out = act(gate) · up`, forward and backward; and the logistic sigmoid.
//!
//! Elementwise, hence batch-invariant. gelu_tanh is x·sigmoid(2u) with u = √(2/π)·(x + 0.044715·x³), which equals
//! x/2·(1 + tanh u).

use crate::math::sigmoid as sigmoid_lanes;
use crate::simd::{LANES, Lanes, simd};

/// The activation of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x·sigmoid(x) (Qwen, Llama, Mixtral).
    Silu,
    /// The tanh form of GELU (Gemma).
    GeluTanh,
}

/// Computes `out [T,F] = act(gate)·up` from `gate_up [T,2F]`, the gate first in each row.
///
/// # Panics
/// When a length does not fit `width` (F).
pub fn gated(activation: Activation, gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert!(width > 0 && out.len().is_multiple_of(width), "gated: out is [T,F], F = {width}");
    assert_eq!(gate_up.len(), 2 * out.len(), "gated: gate_up is [T,2F]");
    match activation {
        Activation::Silu => silu_rows(gate_up, width, out),
        Activation::GeluTanh => gelu_rows(gate_up, width, out),
    }
}

/// Gradient of [`gated`]: `dgate_up [T,2F]` is overwritten.
///
/// # Panics
/// When a length does not fit `width` (F).
pub fn gated_backward(
    activation: Activation,
    gate_up: &[f32],
    width: usize,
    dy: &[f32],
    dgate_up: &mut [f32],
) {
    assert!(width > 0 && dy.len().is_multiple_of(width), "gated_backward: dy is [T,F], F = {width}");
    assert_eq!(gate_up.len(), 2 * dy.len(), "gated_backward: gate_up is [T,2F]");
    assert_eq!(gate_up.len(), dgate_up.len(), "gated_backward: dgate_up is [T,2F]");
    match activation {
        Activation::Silu => silu_rows_backward(gate_up, width, dy, dgate_up),
        Activation::GeluTanh => gelu_rows_backward(gate_up, width, dy, dgate_up),
    }
}

/// [`gated`] with [`Activation::Silu`].
pub fn silu_mul(gate_up: &[f32], width: usize, out: &mut [f32]) {
    gated(Activation::Silu, gate_up, width, out);
}

/// [`gated_backward`] with [`Activation::Silu`].
pub fn silu_mul_backward(gate_up: &[f32], width: usize, dy: &[f32], dgate_up: &mut [f32]) {
    gated_backward(Activation::Silu, gate_up, width, dy, dgate_up);
}

/// [`gated`] with [`Activation::GeluTanh`].
pub fn gelu_tanh_mul(gate_up: &[f32], width: usize, out: &mut [f32]) {
    gated(Activation::GeluTanh, gate_up, width, out);
}

/// [`gated_backward`] with [`Activation::GeluTanh`].
pub fn gelu_tanh_mul_backward(gate_up: &[f32], width: usize, dy: &[f32], dgate_up: &mut [f32]) {
    gated_backward(Activation::GeluTanh, gate_up, width, dy, dgate_up);
}

simd! {
    /// `out = 1 / (1 + e^−x)`
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn sigmoid<S>(x: &[f32], out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "sigmoid: lengths");
        for (x, out) in x.chunks(LANES).zip(out.chunks_mut(LANES)) {
            sigmoid_lanes(S::read(x, 0.0)).write(out);
        }
    }
}

/// (act(x), act'(x))
#[inline(always)]
fn silu<S: Lanes>(x: S) -> (S, S) {
    let s = sigmoid_lanes(x);
    let slope = s.mul(x.fma(S::splat(1.0).sub(s), S::splat(1.0)));
    (x.mul(s), slope)
}

/// (act(x), act'(x))
#[inline(always)]
fn gelu_tanh<S: Lanes>(x: S) -> (S, S) {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    const CUBIC: f32 = 0.044715;
    let x2 = x.mul(x);
    // 2u = 2·√(2/π)·x·(1 + 0.044715·x²)
    let u2 = x.mul(x2.fma(S::splat(2.0 * SQRT_2_OVER_PI * CUBIC), S::splat(2.0 * SQRT_2_OVER_PI)));
    let s = sigmoid_lanes(u2);
    let du2 = x2.fma(S::splat(6.0 * SQRT_2_OVER_PI * CUBIC), S::splat(2.0 * SQRT_2_OVER_PI));
    let slope = s.mul(x.mul(du2).fma(S::splat(1.0).sub(s), S::splat(1.0)));
    (x.mul(s), slope)
}

/// Defines the forward and backward over rows for one activation.
macro_rules! rows {
    ($forward:ident, $backward:ident, $act:ident) => {
        simd! {
            fn $forward<S>(gate_up: &[f32], width: usize, out: &mut [f32]) {
                for (gate_up, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
                    let (gate, up) = gate_up.split_at(width);
                    for ((gate, up), out) in gate.chunks(LANES).zip(up.chunks(LANES)).zip(out.chunks_mut(LANES)) {
                        let (value, _) = $act(S::read(gate, 0.0));
                        value.mul(S::read(up, 0.0)).write(out);
                    }
                }
            }
        }

        simd! {
            fn $backward<S>(gate_up: &[f32], width: usize, dy: &[f32], dgate_up: &mut [f32]) {
                let rows = gate_up.chunks_exact(2 * width).zip(dy.chunks_exact(width));
                for ((gate_up, dy), dgate_up) in rows.zip(dgate_up.chunks_exact_mut(2 * width)) {
                    let (gate, up) = gate_up.split_at(width);
                    let (dgate, dup) = dgate_up.split_at_mut(width);
                    let inputs = gate.chunks(LANES).zip(up.chunks(LANES)).zip(dy.chunks(LANES));
                    let outputs = dgate.chunks_mut(LANES).zip(dup.chunks_mut(LANES));
                    for (((gate, up), dy), (dgate, dup)) in inputs.zip(outputs) {
                        let (value, slope) = $act(S::read(gate, 0.0));
                        let dy = S::read(dy, 0.0);
                        dy.mul(S::read(up, 0.0)).mul(slope).write(dgate);
                        dy.mul(value).write(dup);
                    }
                }
            }
        }
    };
}

rows!(silu_rows, silu_rows_backward, silu);
rows!(gelu_rows, gelu_rows_backward, gelu_tanh);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    fn act_f64(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                0.5 * x * (1.0 + u.tanh())
            }
        }
    }

    fn gated_f64(activation: Activation, gate_up: &[f64], width: usize) -> Vec<f64> {
        let rows = gate_up.chunks(2 * width);
        rows.flat_map(|row| (0..width).map(|i| act_f64(activation, row[i]) * row[width + i])).collect()
    }

    #[test]
    fn forward_and_backward_at_every_width() {
        let mut random = Random(1);
        for activation in [Activation::Silu, Activation::GeluTanh] {
            for width in 1..=50 {
                let gate_up: Vec<f32> = random.vec(4 * width).iter().map(|x| 6.0 * x).collect();
                let dy = random.vec(2 * width);
                let out = assert_all_agree("gated", || {
                    let mut out = vec![f32::NAN; 2 * width];
                    gated(activation, &gate_up, width, &mut out);
                    out
                });
                let wide_in = wide(&gate_up);
                assert_close(&out, &gated_f64(activation, &wide_in, width), 1e-6, "gated");
                let dgate_up = assert_all_agree("gated_backward", || {
                    let mut dgate_up = vec![f32::NAN; 4 * width];
                    gated_backward(activation, &gate_up, width, &dy, &mut dgate_up);
                    dgate_up
                });
                let loss = |x: &[f64]| -> f64 {
                    gated_f64(activation, x, width).iter().zip(&dy).map(|(o, d)| o * f64::from(*d)).sum()
                };
                assert_close(&dgate_up, &gradient(&wide_in, loss), 1e-5, "gated_backward");
            }
        }
    }

    #[test]
    fn awkward_values_agree() {
        let mut random = Random(2);
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let gate_up = awkward_vec(&mut random, 2 * 61);
            let dy = random.vec(61);
            let out = assert_all_agree("gated", || {
                let (mut out, mut dgate_up) = (vec![0.0; 61], vec![0.0; 122]);
                gated(activation, &gate_up, 61, &mut out);
                gated_backward(activation, &gate_up, 61, &dy, &mut dgate_up);
                out.extend(dgate_up);
                out
            });
            for i in 0..61 {
                let nan = gate_up[i].is_nan() || gate_up[61 + i].is_nan();
                assert!(!nan || out[i].is_nan(), "a NaN at {i} shows");
            }
        }
    }

    #[test]
    fn sigmoid_saturates() {
        let mut out = [0.0; 5];
        sigmoid(&[0.0, 200.0, -200.0, f32::NEG_INFINITY, f32::NAN], &mut out);
        assert_same_bits(&out, &[0.5, 1.0, 0.0, 0.0, f32::NAN], "sigmoid");
    }
}
