//! Updates with one moment: Lion, and descent with momentum.

use crate::simd::{LANES, simd};

/// Constants of a Lion step (Chen et al., arXiv 2302.06675, algorithm 2).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lion {
    /// Learning rate.
    pub lr: f32,
    /// Share of the moment in the direction taken, in [0, 1).
    pub beta1: f32,
    /// Decay of the moment, in [0, 1).
    pub beta2: f32,
    /// Decoupled weight decay; parameters shrink by `lr · weight_decay`.
    pub weight_decay: f32,
}

/// Constants of a step of gradient descent with momentum, as `torch.optim.SGD` applies them, but for the decay, which is decoupled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the momentum, in [0, 1).
    pub momentum: f32,
    /// Whether the step looks ahead by one more share of the momentum.
    pub nesterov: bool,
    /// Decoupled weight decay; parameters shrink by `lr · weight_decay`.
    pub weight_decay: f32,
}

/// One Lion update of `params` with moment `m` and gradient `grad · grad_scale`.
///
/// p −= lr·wd·p; p −= lr · sign(β1·m + (1−β1)·g); m = β2·m + (1−β2)·g. The sign of 0 is 0.
///
/// # Panics
/// When the lengths differ.
pub fn lion_step(params: &mut [f32], m: &mut [f32], grad: &[f32], constants: &Lion, grad_scale: f32) {
    assert!(m.len() == params.len() && grad.len() == params.len(), "lion_step: lengths");
    lion(params, m, grad, constants, grad_scale);
}

/// One update of `params` with `momentum` and gradient `grad · grad_scale`.
///
/// p −= lr·wd·p; b = μ·b + g; p −= lr · (g + μ·b with `nesterov`, else b).
///
/// # Panics
/// When the lengths differ.
pub fn sgd_step(params: &mut [f32], momentum: &mut [f32], grad: &[f32], constants: &Sgd, grad_scale: f32) {
    assert!(momentum.len() == params.len() && grad.len() == params.len(), "sgd_step: lengths");
    sgd(params, momentum, grad, constants, grad_scale);
}

simd! {
    fn lion<S>(params: &mut [f32], m: &mut [f32], grad: &[f32], c: &Lion, grad_scale: f32) {
        let shrink = S::splat(1.0 - c.lr * c.weight_decay);
        let (rest1, rest2) = (S::splat(1.0 - c.beta1), S::splat(1.0 - c.beta2));
        let (zero, up, down) = (S::splat(0.0), S::splat(c.lr), S::splat(-c.lr));
        let values = params.chunks_mut(LANES).zip(m.chunks_mut(LANES)).zip(grad.chunks(LANES));
        for ((params, m), grad) in values {
            let g = S::read(grad, 0.0).mul(S::splat(grad_scale));
            let old = S::read(m, 0.0);
            let ahead = g.sub(old);
            let direction = ahead.fma(rest1, old);
            let negative = direction.select_lt(zero, up, zero);
            let move_by = zero.select_lt(direction, down, negative);
            S::read(params, 0.0).fma(shrink, move_by).write(params);
            ahead.fma(rest2, old).write(m);
        }
    }
}

simd! {
    fn sgd<S>(params: &mut [f32], momentum: &mut [f32], grad: &[f32], c: &Sgd, grad_scale: f32) {
        let shrink = S::splat(1.0 - c.lr * c.weight_decay);
        let (decay, step) = (S::splat(c.momentum), S::splat(-c.lr));
        let values = params.chunks_mut(LANES).zip(momentum.chunks_mut(LANES)).zip(grad.chunks(LANES));
        for ((params, momentum), grad) in values {
            let g = S::read(grad, 0.0).mul(S::splat(grad_scale));
            let moment = S::read(momentum, 0.0).fma(decay, g);
            let direction = if c.nesterov { moment.fma(decay, g) } else { moment };
            direction.fma(step, S::read(params, 0.0).mul(shrink)).write(params);
            moment.write(momentum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn lion_follows_the_formula_over_steps_and_lengths() {
        let mut random = Random(5);
        let c = Lion { lr: 1e-2, beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };
        for len in 0..=50 {
            let start = random.vec(len);
            let mut grads: Vec<Vec<f32>> = (0..3).map(|_| random.vec(len)).collect();
            // A direction of exactly 0 moves nothing.
            grads.iter_mut().for_each(|grad| grad.iter_mut().step_by(7).for_each(|g| *g = 0.0));
            let got = assert_all_agree("lion", || {
                let (mut p, mut m) = (start.clone(), vec![0.0; len]);
                grads.iter().for_each(|grad| lion_step(&mut p, &mut m, grad, &c, 0.5));
                [p, m].concat()
            });
            let (mut p, mut m) = (wide(&start), vec![0.0f64; len]);
            for grad in &grads {
                for i in 0..len {
                    let g = 0.5 * f64::from(grad[i]);
                    let direction = 0.9 * m[i] + 0.1 * g;
                    let sign = if direction == 0.0 { 0.0 } else { direction.signum() };
                    p[i] = p[i] * (1.0 - 1e-3) - 1e-2 * sign;
                    m[i] = 0.99 * m[i] + 0.01 * g;
                }
            }
            assert_close(&got, &[p, m].concat(), 1e-5, &format!("lion {len}"));
        }
    }

    #[test]
    fn momentum_follows_the_formula_over_steps_and_lengths() {
        let mut random = Random(6);
        for (len, nesterov) in (0..=50).flat_map(|len| [(len, false), (len, true)]) {
            let c = Sgd { lr: 1e-1, momentum: 0.8, nesterov, weight_decay: 0.1 };
            let start = random.vec(len);
            let grads: Vec<Vec<f32>> = (0..3).map(|_| random.vec(len)).collect();
            let got = assert_all_agree("sgd", || {
                let (mut p, mut b) = (start.clone(), vec![0.0; len]);
                grads.iter().for_each(|grad| sgd_step(&mut p, &mut b, grad, &c, 0.5));
                [p, b].concat()
            });
            let (mut p, mut b) = (wide(&start), vec![0.0f64; len]);
            for grad in &grads {
                for i in 0..len {
                    let g = 0.5 * f64::from(grad[i]);
                    b[i] = 0.8 * b[i] + g;
                    let direction = if nesterov { g + 0.8 * b[i] } else { b[i] };
                    p[i] = p[i] * (1.0 - 1e-2) - 1e-1 * direction;
                }
            }
            assert_close(&got, &[p, b].concat(), 1e-5, &format!("sgd {len}"));
        }
    }
}
