//! Gated activations: `out = act(gate) · up`, forward and backward; and the logistic sigmoid.
//!
//! Elementwise, hence batch-invariant; threads take rows. gelu_tanh is x·sigmoid(2u) with u = √(2/π)·(x + 0.044715·x³), which equals
//! x/2·(1 + tanh u). gpt-oss's clamped SwiGLU bounds gate and up, takes them alternating, and multiplies by up + 1.

use crate::Threads;
use crate::math::sigmoid as sigmoid_lanes;
use crate::simd::{LANES, Lanes, simd};
use crate::threads::SharedMut;

/// The activation of a gate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// x·sigmoid(x) (Qwen, Llama, Mixtral).
    Silu,
    /// The tanh form of GELU (Gemma).
    GeluTanh,
    /// g·sigmoid(alpha·g)·(u + 1) with g = min(gate, limit), u = up within ±limit (gpt-oss). Gate and up alternate in a
    /// row: gate in the even columns, up in the odd ones.
    ClampedSwiglu {
        /// Steepness of the sigmoid, 1.702 in released models.
        alpha: f32,
        /// Bound of gate (above) and up (both sides), 7 in released models.
        limit: f32,
    },
}

/// Computes `out [T,F] = act(gate)·up` from `gate_up [T,2F]`, the gate first in each row (but see
/// [`Activation::ClampedSwiglu`]).
///
/// # Panics
/// When a length does not fit `width` (F).
pub fn gated(threads: &Threads, activation: Activation, gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert!(width > 0 && out.len().is_multiple_of(width), "gated: out is [T,F], F = {width}");
    assert_eq!(gate_up.len(), 2 * out.len(), "gated: gate_up is [T,2F]");
    threads.for_each_row_chunk(out, width, MIN_VALUES / width + 1, |first, out| {
        let gate_up = &gate_up[2 * first * width..][..2 * out.len()];
        match activation {
            Activation::Silu => silu_rows(gate_up, width, out),
            Activation::GeluTanh => gelu_rows(gate_up, width, out),
            Activation::ClampedSwiglu { alpha, limit } => clamped(gate_up, alpha, limit, out),
        }
    });
}

/// Values of a part of an operation that is worth sharing out.
const MIN_VALUES: usize = 1 << 14;

/// Gradient of [`gated`]: `dgate_up [T,2F]` is overwritten, and `dy [T,F]`, once read, by what [`gated`] gives: the weight behind
/// it wants that for its own gradient.
///
/// # Panics
/// When a length does not fit `width` (F).
pub fn gated_backward(
    threads: &Threads,
    activation: Activation,
    gate_up: &[f32],
    width: usize,
    dy: &mut [f32],
    dgate_up: &mut [f32],
) {
    assert!(width > 0 && dy.len().is_multiple_of(width), "gated_backward: dy is [T,F], F = {width}");
    assert_eq!(gate_up.len(), 2 * dy.len(), "gated_backward: gate_up is [T,2F]");
    assert_eq!(gate_up.len(), dgate_up.len(), "gated_backward: dgate_up is [T,2F]");
    let rows = dy.len() / width;
    let (dy, dgate_up) = (SharedMut::new(dy), SharedMut::new(dgate_up));
    threads.for_each_chunk(rows, MIN_VALUES / width + 1, &|rows| {
        let (first, len) = (rows.start * width, rows.len() * width);
        let gate_up = &gate_up[2 * first..][..2 * len];
        // SAFETY: rows are handed out once, and both are borrowed until all are done.
        let (dy, dgate_up) = unsafe { (dy.slice(first, len), dgate_up.slice(2 * first, 2 * len)) };
        match activation {
            Activation::Silu => silu_rows_backward(gate_up, width, dy, dgate_up),
            Activation::GeluTanh => gelu_rows_backward(gate_up, width, dy, dgate_up),
            Activation::ClampedSwiglu { alpha, limit } => {
                clamped_backward(gate_up, alpha, limit, dy, dgate_up)
            }
        }
    });
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

/// An activation as a type, for kernels that are compiled for each.
pub(crate) trait Activate {
    /// (act(x), act'(x))
    fn act<S: Lanes>(x: S) -> (S, S);

    /// `act(gate) · up`
    #[inline(always)]
    fn gate<S: Lanes>(gate: S, up: S) -> S {
        Self::act(gate).0.mul(up)
    }
}

/// [`Activation::Silu`]
pub(crate) struct Silu;

impl Activate for Silu {
    #[inline(always)]
    fn act<S: Lanes>(x: S) -> (S, S) {
        let s = sigmoid_lanes(x);
        let slope = s.mul(x.fma(S::splat(1.0).sub(s), S::splat(1.0)));
        (x.mul(s), slope)
    }
}

/// [`Activation::GeluTanh`]
pub(crate) struct GeluTanh;

impl Activate for GeluTanh {
    #[inline(always)]
    fn act<S: Lanes>(x: S) -> (S, S) {
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
}

/// Defines the forward and backward over rows for one activation.
macro_rules! rows {
    ($forward:ident, $backward:ident, $act:ident) => {
        simd! {
            fn $forward<S>(gate_up: &[f32], width: usize, out: &mut [f32]) {
                for (gate_up, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
                    let (gate, up) = gate_up.split_at(width);
                    for ((gate, up), out) in gate.chunks(LANES).zip(up.chunks(LANES)).zip(out.chunks_mut(LANES)) {
                        $act::gate(S::read(gate, 0.0), S::read(up, 0.0)).write(out);
                    }
                }
            }
        }

        simd! {
            fn $backward<S>(gate_up: &[f32], width: usize, dy: &mut [f32], dgate_up: &mut [f32]) {
                let rows = gate_up.chunks_exact(2 * width).zip(dy.chunks_exact_mut(width));
                for ((gate_up, dy), dgate_up) in rows.zip(dgate_up.chunks_exact_mut(2 * width)) {
                    let (gate, up) = gate_up.split_at(width);
                    let (dgate, dup) = dgate_up.split_at_mut(width);
                    let inputs = gate.chunks(LANES).zip(up.chunks(LANES)).zip(dy.chunks_mut(LANES));
                    let outputs = dgate.chunks_mut(LANES).zip(dup.chunks_mut(LANES));
                    for (((gate, up), dy), (dgate, dup)) in inputs.zip(outputs) {
                        let (value, slope) = $act::act(S::read(gate, 0.0));
                        let (up, d) = (S::read(up, 0.0), S::read(dy, 0.0));
                        d.mul(up).mul(slope).write(dgate);
                        d.mul(value).write(dup);
                        value.mul(up).write(dy);
                    }
                }
            }
        }
    };
}

rows!(silu_rows, silu_rows_backward, Silu);
rows!(gelu_rows, gelu_rows_backward, GeluTanh);

/// Even and odd elements of up to sixteen pairs.
#[inline(always)]
fn unzip<S: Lanes>(pairs: &[f32]) -> (S, S) {
    let (mut even, mut odd) = ([0.0; LANES], [0.0; LANES]);
    for (i, pair) in pairs.chunks_exact(2).enumerate() {
        (even[i], odd[i]) = (pair[0], pair[1]);
    }
    (S::load(&even), S::load(&odd))
}

/// The inverse of [`unzip`].
#[inline(always)]
fn zip<S: Lanes>(even: S, odd: S, pairs: &mut [f32]) {
    let (even, odd) = (even.to_array(), odd.to_array());
    for (i, pair) in pairs.chunks_exact_mut(2).enumerate() {
        (pair[0], pair[1]) = (even[i], odd[i]);
    }
}

/// Gate and up within their bounds. A NaN passes through `min` and `max` where it stands second.
#[inline(always)]
fn clamp<S: Lanes>(gate: S, up: S, limit: f32) -> (S, S) {
    let above = S::splat(limit);
    (above.min(gate), S::splat(-limit).max(above.min(up)))
}

simd! {
    fn clamped<S>(gate_up: &[f32], alpha: f32, limit: f32, out: &mut [f32]) {
        for (pairs, out) in gate_up.chunks(2 * LANES).zip(out.chunks_mut(LANES)) {
            let (gate, up) = unzip::<S>(pairs);
            let (gate, up) = clamp(gate, up, limit);
            let glu = gate.mul(sigmoid_lanes(gate.mul(S::splat(alpha))));
            glu.mul(up.add(S::splat(1.0))).write(out);
        }
    }
}

simd! {
    /// A value at its bound still has a gradient, as in torch.
    fn clamped_backward<S>(gate_up: &[f32], alpha: f32, limit: f32, dy: &mut [f32], dgate_up: &mut [f32]) {
        let (one, zero) = (S::splat(1.0), S::splat(0.0));
        let inputs = gate_up.chunks(2 * LANES).zip(dy.chunks_mut(LANES));
        for ((pairs, dy), dpairs) in inputs.zip(dgate_up.chunks_mut(2 * LANES)) {
            let (raw_gate, raw_up) = unzip::<S>(pairs);
            let (gate, up) = clamp(raw_gate, raw_up, limit);
            let d = S::read(dy, 0.0);
            let steep = gate.mul(S::splat(alpha));
            let s = sigmoid_lanes(steep);
            let slope = s.mul(steep.fma(one.sub(s), one));
            let dgate = d.mul(up.add(one)).mul(slope);
            let dup = d.mul(gate.mul(s));
            gate.mul(s).mul(up.add(one)).write(dy);
            let dgate = S::splat(limit).select_lt(raw_gate, zero, dgate);
            let dup = S::splat(limit).select_lt(raw_up, zero, raw_up.select_lt(S::splat(-limit), zero, dup));
            zip(dgate, dup, dpairs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    const ALL: [Activation; 3] =
        [Activation::Silu, Activation::GeluTanh, Activation::ClampedSwiglu { alpha: 1.702, limit: 3.0 }];

    /// Columns of the gate and the up of output `i`.
    fn columns(activation: Activation, i: usize, width: usize) -> (usize, usize) {
        if matches!(activation, Activation::ClampedSwiglu { .. }) {
            (2 * i, 2 * i + 1)
        } else {
            (i, width + i)
        }
    }

    fn gated_one(activation: Activation, gate: f64, up: f64) -> f64 {
        match activation {
            Activation::ClampedSwiglu { alpha, limit } => {
                let limit = f64::from(limit);
                let (g, u) = (gate.min(limit), up.clamp(-limit, limit));
                g / (1.0 + (-f64::from(alpha) * g).exp()) * (u + 1.0)
            }
            plain => act_f64(plain, gate) * up,
        }
    }

    fn act_f64(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::ClampedSwiglu { .. } => unreachable!("not a function of the gate alone"),
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                0.5 * x * (1.0 + u.tanh())
            }
        }
    }

    fn gated_f64(activation: Activation, gate_up: &[f64], width: usize) -> Vec<f64> {
        let rows = gate_up.chunks(2 * width);
        let one = |row: &[f64], i| {
            let (gate, up) = columns(activation, i, width);
            gated_one(activation, row[gate], row[up])
        };
        rows.flat_map(|row| (0..width).map(move |i| one(row, i))).collect()
    }

    #[test]
    fn forward_and_backward_at_every_width() {
        let mut random = Random(1);
        for activation in ALL {
            for width in 1..=50 {
                let gate_up: Vec<f32> = random.vec(4 * width).iter().map(|x| 6.0 * x).collect();
                let dy = random.vec(2 * width);
                let out = assert_all_agree("gated", || {
                    let mut out = vec![f32::NAN; 2 * width];
                    gated(&Threads::new(2), activation, &gate_up, width, &mut out);
                    out
                });
                let wide_in = wide(&gate_up);
                assert_close(&out, &gated_f64(activation, &wide_in, width), 1e-6, "gated");
                let dgate_up = assert_all_agree("gated_backward", || {
                    let (mut dgate_up, mut d) = (vec![f32::NAN; 4 * width], dy.clone());
                    gated_backward(&Threads::new(2), activation, &gate_up, width, &mut d, &mut dgate_up);
                    assert_same_bits(&d, &out, "what gated gives");
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
    fn threads_change_no_bit() {
        let (width, mut random) = (61, Random(3));
        let rows = 3 * MIN_VALUES / width;
        let (gate_up, dy) = (random.vec(2 * rows * width), random.vec(rows * width));
        let run = |threads: &Threads| {
            let (mut out, mut d) = (vec![0.0; dy.len()], vec![0.0; gate_up.len()]);
            gated(threads, Activation::Silu, &gate_up, width, &mut out);
            gated_backward(threads, Activation::Silu, &gate_up, width, &mut dy.clone(), &mut d);
            out.extend(d);
            out
        };
        assert_same_bits(&run(&Threads::single()), &run(&Threads::new(3)), "gated");
    }

    #[test]
    fn awkward_values_agree() {
        let mut random = Random(2);
        for activation in ALL {
            let gate_up = awkward_vec(&mut random, 2 * 61);
            let dy = random.vec(61);
            let out = assert_all_agree("gated", || {
                let (mut out, mut dgate_up) = (vec![0.0; 61], vec![0.0; 122]);
                gated(&Threads::new(2), activation, &gate_up, 61, &mut out);
                gated_backward(&Threads::new(2), activation, &gate_up, 61, &mut dy.clone(), &mut dgate_up);
                out.extend(dgate_up);
                out
            });
            for (i, out) in out.iter().enumerate().take(61) {
                let (gate, up) = columns(activation, i, 61);
                let nan = gate_up[gate].is_nan() || gate_up[up].is_nan();
                assert!(!nan || out.is_nan(), "a NaN at {i} shows");
            }
        }
    }

    #[test]
    fn clamping_stops_values_and_gradients() {
        let activation = Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };
        // Gate above, up above, up below; then both at their bounds.
        let gate_up = [9.0, 1.0, 2.0, 8.0, 2.0, -8.0, 7.0, 7.0];
        let (mut out, mut d) = ([0.0; 4], [f32::NAN; 8]);
        gated(&Threads::new(2), activation, &gate_up, 4, &mut out);
        gated_backward(&Threads::new(2), activation, &gate_up, 4, &mut [1.0; 4], &mut d);
        let glu = |g: f64| g / (1.0 + (-1.702 * g).exp());
        assert_close(&out, &[glu(7.0) * 2.0, glu(2.0) * 8.0, glu(2.0) * -6.0, glu(7.0) * 8.0], 1e-6, "out");
        assert_eq!([d[0], d[3], d[5]], [0.0; 3], "clamped inputs have no gradient");
        assert!([d[1], d[2], d[4], d[6], d[7]].iter().all(|d| *d != 0.0), "{d:?}");
    }

    #[test]
    fn sigmoid_saturates() {
        let mut out = [0.0; 5];
        sigmoid(&[0.0, 200.0, -200.0, f32::NEG_INFINITY, f32::NAN], &mut out);
        assert_same_bits(&out, &[0.5, 1.0, 0.0, 0.0, f32::NAN], "sigmoid");
    }
}
