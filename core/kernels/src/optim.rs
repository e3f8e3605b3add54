//! The optimiser's arithmetic over flat parameter slices: AdamW, Lion, momentum, sums of squares, axpy and the like.
//!
//! Elementwise but for [`sum_squares`], whose order is fixed by position alone, so no result depends on threads.

mod momentum;

pub use momentum::{Lion, Sgd, lion_step, sgd_step};

use crate::Threads;
use crate::simd::{LANES, simd};
use crate::threads::SharedMut;

/// Constants of one AdamW step (Loshchilov and Hutter 2019), as `torch.optim.AdamW` applies them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment, in [0, 1).
    pub beta1: f32,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay; parameters shrink by `lr · weight_decay`.
    pub weight_decay: f32,
    /// 1 − beta1^step.
    pub bias_correction1: f32,
    /// 1 − beta2^step.
    pub bias_correction2: f32,
}

impl AdamW {
    /// The constants for update number `step`, from 1 on; bias corrections are computed in f64.
    pub fn at_step(lr: f32, beta1: f32, beta2: f32, eps: f32, weight_decay: f32, step: u64) -> Self {
        let correction = |beta: f32| (1.0 - power(f64::from(beta), step)) as f32;
        AdamW {
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            bias_correction1: correction(beta1),
            bias_correction2: correction(beta2),
        }
    }
}

/// base^exponent by squaring: plain products, the same bits everywhere.
fn power(base: f64, exponent: u64) -> f64 {
    let (mut result, mut square, mut left) = (1.0, base, exponent);
    while left > 0 {
        if left & 1 == 1 {
            result *= square;
        }
        square *= square;
        left >>= 1;
    }
    result
}

/// Values worth a thread of their own.
const MIN_VALUES: usize = 1 << 16;

/// One AdamW update of `params` with moments `m`, `v` and gradient `grad · grad_scale`.
///
/// p −= lr·wd·p; m = β1·m + (1−β1)·g; v = β2·v + (1−β2)·g²; p −= lr/bc1 · m / (√v/√bc2 + eps).
///
/// # Panics
/// When the lengths differ.
pub fn adamw_step(
    threads: &Threads,
    params: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    grad: &[f32],
    constants: &AdamW,
    grad_scale: f32,
) {
    let len = params.len();
    assert!(m.len() == len && v.len() == len && grad.len() == len, "adamw_step: lengths");
    let (m, v) = (SharedMut::new(m), SharedMut::new(v));
    threads.for_each_row_chunk(params, 1, MIN_VALUES, |first, params| {
        let len = params.len();
        // SAFETY: chunks are disjoint, and both slices are borrowed until this call ends.
        let (m, v) = unsafe { (m.slice(first, len), v.slice(first, len)) };
        adamw_chunk(params, m, v, &grad[first..first + len], constants, grad_scale);
    });
}

simd! {
    fn adamw_chunk<S>(params: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32], c: &AdamW, grad_scale: f32) {
        let shrink = S::splat(1.0 - c.lr * c.weight_decay);
        let step = S::splat(-(c.lr / c.bias_correction1));
        let root = S::splat(c.bias_correction2.sqrt());
        let (beta2, rest1, rest2) = (S::splat(c.beta2), S::splat(1.0 - c.beta1), S::splat(1.0 - c.beta2));
        let moments = m.chunks_mut(LANES).zip(v.chunks_mut(LANES));
        for ((params, grad), (m, v)) in params.chunks_mut(LANES).zip(grad.chunks(LANES)).zip(moments) {
            let g = S::read(grad, 0.0).mul(S::splat(grad_scale));
            let old_m = S::read(m, 0.0);
            let new_m = g.sub(old_m).fma(rest1, old_m);
            let new_v = g.mul(g).fma(rest2, S::read(v, 0.0).mul(beta2));
            let denominator = new_v.sqrt().div(root).add(S::splat(c.eps));
            let p = S::read(params, 0.0).mul(shrink);
            new_m.div(denominator).fma(step, p).write(params);
            new_m.write(m);
            new_v.write(v);
        }
    }
}

/// Σ x², summed in f64: blocks of 4,096 values, sixteen lanes each, then block by block in ascending order.
pub fn sum_squares(threads: &Threads, x: &[f32]) -> f64 {
    const BLOCK: usize = 4096;
    let mut sums = vec![0.0f64; x.len().div_ceil(BLOCK)];
    threads.for_each_row_chunk(&mut sums, 1, MIN_VALUES / BLOCK, |first, sums| {
        for (i, sum) in sums.iter_mut().enumerate() {
            let start = (first + i) * BLOCK;
            *sum = sum_squares_block(&x[start..x.len().min(start + BLOCK)]);
        }
    });
    sums.iter().sum()
}

simd! {
    fn sum_squares_block<S>(x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let (chunks, tail) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                // The square of an f32 is exact in f64.
                *lane += f64::from(x) * f64::from(x);
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(tail) {
            *lane += f64::from(x) * f64::from(x);
        }
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }
}

/// `y += a · x`, one fused multiply-add a value.
///
/// # Panics
/// When the lengths differ.
pub fn axpy(threads: &Threads, a: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "axpy: lengths");
    threads.for_each_row_chunk(y, 1, MIN_VALUES, |first, y| axpy_chunk(a, &x[first..first + y.len()], y));
}

simd! {
    fn axpy_chunk<S>(a: f32, x: &[f32], y: &mut [f32]) {
        for (x, y) in x.chunks(LANES).zip(y.chunks_mut(LANES)) {
            S::splat(a).fma(S::read(x, 0.0), S::read(y, 0.0)).write(y);
        }
    }
}

simd! {
    /// `Σ a·b`: sixteen lanes of fused multiply-adds, then the fixed tree.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn dot<S>(a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len(), "dot: lengths");
        let mut sum = S::splat(0.0);
        for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
            sum = S::read(a, 0.0).fma(S::read(b, 0.0), sum);
        }
        sum.sum()
    }
}

simd! {
    /// `y += x`
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn add_assign<S>(y: &mut [f32], x: &[f32]) {
        assert_eq!(x.len(), y.len(), "add_assign: lengths");
        for (x, y) in x.chunks(LANES).zip(y.chunks_mut(LANES)) {
            S::read(y, 0.0).add(S::read(x, 0.0)).write(y);
        }
    }
}

simd! {
    /// `x *= factor`
    pub fn scale<S>(x: &mut [f32], factor: f32) {
        for x in x.chunks_mut(LANES) {
            S::read(x, 0.0).mul(S::splat(factor)).write(x);
        }
    }
}

simd! {
    /// Whether no value is infinite or NaN.
    pub fn all_finite<S>(x: &[f32]) -> bool {
        let mut finite = true;
        for x in x {
            finite &= x.to_bits() & 0x7f80_0000 != 0x7f80_0000;
        }
        finite
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn adamw_follows_the_formula_over_steps_and_lengths() {
        let mut random = Random(1);
        for len in 0..=50 {
            let start = random.vec(len);
            let grads: Vec<Vec<f32>> = (0..3).map(|_| random.vec(len)).collect();
            let got = assert_all_agree("adamw", || {
                let (mut p, mut m, mut v) = (start.clone(), vec![0.0; len], vec![0.0; len]);
                for (step, grad) in grads.iter().enumerate() {
                    let constants = AdamW::at_step(1e-2, 0.9, 0.95, 1e-8, 0.1, step as u64 + 1);
                    adamw_step(&Threads::single(), &mut p, &mut m, &mut v, grad, &constants, 0.5);
                }
                [p, m, v].concat()
            });
            let (mut p, mut m, mut v) = (wide(&start), vec![0.0; len], vec![0.0; len]);
            for (step, grad) in grads.iter().enumerate() {
                let (bc1, bc2) = (1.0 - 0.9f64.powi(step as i32 + 1), 1.0 - 0.95f64.powi(step as i32 + 1));
                for i in 0..len {
                    let g = 0.5 * f64::from(grad[i]);
                    p[i] -= 1e-2 * 0.1 * p[i];
                    m[i] = 0.9 * m[i] + 0.1 * g;
                    v[i] = 0.95 * v[i] + 0.05 * g * g;
                    p[i] -= 1e-2 / bc1 * m[i] / ((v[i] / bc2).sqrt() + 1e-8);
                }
            }
            assert_close(&got, &[p, m, v].concat(), 1e-5, &format!("adamw {len}"));
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let mut random = Random(2);
        let len = 300_001;
        let (start, grad) = (random.vec(len), random.vec(len));
        let constants = AdamW::at_step(1e-3, 0.9, 0.999, 1e-8, 0.0, 1);
        let run = |threads: &Threads| {
            let (mut p, mut m, mut v) = (start.clone(), vec![0.0; len], vec![0.0; len]);
            adamw_step(threads, &mut p, &mut m, &mut v, &grad, &constants, 1.0);
            axpy(threads, 0.3, &grad, &mut m);
            (sum_squares(threads, &p).to_bits(), [p, m, v].concat())
        };
        let (one, three) = (run(&Threads::single()), run(&Threads::new(3)));
        assert_eq!(one.0, three.0);
        assert_same_bits(&three.1, &one.1, "three threads");
    }

    #[test]
    fn sum_of_squares_is_accurate_and_the_same_everywhere() {
        let mut random = Random(3);
        for len in (0..=40).chain([5000, 10_000]) {
            let x = random.vec(len);
            let sums = crate::isa::forced::under_each(|| sum_squares(&Threads::single(), &x).to_bits());
            assert!(sums.iter().all(|s| s.1 == sums[0].1), "{len}");
            let want: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!((f64::from_bits(sums[0].1) - want).abs() <= 1e-12 * want, "{len}");
        }
    }

    #[test]
    fn small_operations_at_every_length() {
        let mut random = Random(4);
        for len in 0..=40 {
            let (x, y) = (awkward_vec(&mut random, len), random.vec(len));
            let got = assert_all_agree("axpy, add, scale", || {
                let (mut a, mut b, mut c) = (y.clone(), y.clone(), x.clone());
                axpy(&Threads::single(), 2.5, &x, &mut a);
                add_assign(&mut b, &x);
                scale(&mut c, -3.0);
                [a, b, c].concat()
            });
            let want: Vec<f32> = (0..len)
                .map(|i| 2.5f32.mul_add(x[i], y[i]))
                .chain((0..len).map(|i| y[i] + x[i]))
                .chain((0..len).map(|i| -3.0 * x[i]))
                .collect();
            assert_same_bits(&got, &want, &format!("length {len}"));
            assert!(all_finite(&y));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in 0..len {
                    let mut y = y.clone();
                    y[at] = bad;
                    assert!(!all_finite(&y), "{bad} at {at} of {len}");
                }
            }
        }
    }
}
