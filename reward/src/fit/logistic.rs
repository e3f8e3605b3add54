//! Logistic regression with an L2 penalty: the head of an embedding guard.
//!
//! Minimises Σ ln(1 + exp(−s z)) + l2/2 · |w|², s = ±1 the label, z = w·x + b, the bias not penalised; by Newton steps whose directions come from conjugate
//! gradients. Strictly convex in w, so the same examples in the same order give the same bits.

use crate::fit::calibration::logistic;

const STEPS: usize = 100;
const DIRECTIONS: usize = 250;
const HALVINGS: usize = 40;
/// Largest gradient entry at the minimum, per example.
const GRADIENT_MAX: f64 = 1e-7;

/// A linear score.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// One weight for each input.
    pub weights: Vec<f32>,
    /// Added to the sum.
    pub bias: f32,
}

impl Linear {
    /// w·x + b, added up in f64.
    ///
    /// # Panics
    /// If `x` has another length than the weights.
    pub fn score(&self, x: &[f32]) -> f32 {
        assert_eq!(x.len(), self.weights.len(), "inputs for {} weights", self.weights.len());
        let sum: f64 = self.weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
        (sum + f64::from(self.bias)) as f32
    }
}

/// Inputs with labels, and the penalty.
struct Problem<'a> {
    xs: &'a [&'a [f32]],
    labels: &'a [bool],
    l2: f64,
}

/// Fits the score to `labels`.
///
/// # Errors
/// If there are no examples of either label, inputs differ in length or are not finite, or `l2` is not above 0.
pub fn fit(xs: &[&[f32]], labels: &[bool], l2: f64) -> Result<Linear, String> {
    let positive = labels.iter().filter(|label| **label).count();
    if xs.len() != labels.len() || positive == 0 || positive == labels.len() {
        return Err(format!("{} examples, {positive} of them true; both labels are needed", labels.len()));
    }
    if !(l2 > 0.0 && l2.is_finite()) {
        return Err(format!("the penalty must be above 0 and finite, is {l2}"));
    }
    let width = xs[0].len();
    if xs.iter().any(|x| x.len() != width || x.iter().any(|x| !x.is_finite())) {
        return Err(format!("every example must have {width} finite inputs"));
    }
    let problem = Problem { xs, labels, l2 };
    let mut at = vec![0.0; width + 1];
    let (mut loss, mut gradient, mut curvature) = problem.at(&at);
    for _ in 0..STEPS {
        if gradient.iter().all(|g| g.abs() <= GRADIENT_MAX * xs.len() as f64) {
            break;
        }
        let step = problem.direction(&gradient, &curvature);
        let slope = dot(&step, &gradient);
        let Some((next, reached)) = (0..HALVINGS).find_map(|halving| {
            let scale = 0.5_f64.powi(halving as i32);
            let next: Vec<f64> = at.iter().zip(&step).map(|(at, step)| at + scale * step).collect();
            let reached = problem.loss(&next);
            (reached < loss + 1e-4 * scale * slope).then_some((next, reached))
        }) else {
            break;
        };
        at = next;
        loss = reached;
        (_, gradient, curvature) = problem.at(&at);
    }
    let bias = at.pop().unwrap_or_default() as f32;
    Ok(Linear { weights: at.into_iter().map(|w| w as f32).collect(), bias })
}

impl Problem<'_> {
    fn z(at: &[f64], x: &[f32]) -> f64 {
        let (bias, weights) = at.split_last().expect("a bias");
        weights.iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum::<f64>() + bias
    }

    fn penalty(&self, at: &[f64]) -> f64 {
        self.l2 / 2.0 * at[..at.len() - 1].iter().map(|w| w * w).sum::<f64>()
    }

    fn loss(&self, at: &[f64]) -> f64 {
        let terms = self.xs.iter().zip(self.labels).map(|(x, label)| {
            let z = Self::z(at, x);
            z.max(0.0) - if *label { z } else { 0.0 } + (-z.abs()).exp().ln_1p()
        });
        terms.sum::<f64>() + self.penalty(at)
    }

    /// Loss, gradient, and the second derivative by every example's score.
    fn at(&self, at: &[f64]) -> (f64, Vec<f64>, Vec<f64>) {
        let mut gradient: Vec<f64> = at.iter().map(|w| self.l2 * w).collect();
        let width = at.len() - 1;
        gradient[width] = 0.0;
        let mut curvature = Vec::with_capacity(self.xs.len());
        for (x, label) in self.xs.iter().zip(self.labels) {
            let p = logistic(Self::z(at, x));
            let d = p - if *label { 1.0 } else { 0.0 };
            add_scaled(&mut gradient[..width], x, d);
            gradient[width] += d;
            curvature.push(p * (1.0 - p));
        }
        (self.loss(at), gradient, curvature)
    }

    /// The Hessian times `v`.
    fn curve(&self, v: &[f64], curvature: &[f64]) -> Vec<f64> {
        let width = v.len() - 1;
        let mut out: Vec<f64> = v.iter().map(|v| self.l2 * v).collect();
        // Not quite 0, so that examples far on the right side leave the bias a direction.
        out[width] = 1e-9 * v[width];
        for (x, c) in self.xs.iter().zip(curvature) {
            let scaled = c * Self::z(v, x);
            add_scaled(&mut out[..width], x, scaled);
            out[width] += scaled;
        }
        out
    }

    /// The Newton step, by conjugate gradients, as exact as the gradient is small.
    fn direction(&self, gradient: &[f64], curvature: &[f64]) -> Vec<f64> {
        let mut step = vec![0.0; gradient.len()];
        let mut residual: Vec<f64> = gradient.iter().map(|g| -g).collect();
        let mut search = residual.clone();
        let size = dot(gradient, gradient);
        let wanted = size * size.sqrt().clamp(1e-12, 0.25);
        let mut square = size;
        for _ in 0..DIRECTIONS {
            let curved = self.curve(&search, curvature);
            let along = square / dot(&search, &curved);
            step.iter_mut().zip(&search).for_each(|(step, search)| *step += along * search);
            residual.iter_mut().zip(&curved).for_each(|(residual, curved)| *residual -= along * curved);
            let next = dot(&residual, &residual);
            if next <= wanted {
                break;
            }
            search.iter_mut().zip(&residual).for_each(|(search, r)| *search = r + next / square * *search);
            square = next;
        }
        step
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(to: &mut [f64], x: &[f32], by: f64) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += by * f64::from(*x));
}

#[cfg(test)]
mod tests {
    use freewheel_types::CounterRng;

    use super::*;

    #[test]
    fn by_hand() {
        // x = ±1, b = 0 by symmetry: 2 · (p − 1) + l2 · w = 0 with p = 1 / (1 + e^−w). For w = ln 3, p = 3/4, l2 = 1 / (2 ln 3).
        let (up, down) = ([1.0_f32], [-1.0_f32]);
        let fitted = fit(&[&up, &down], &[true, false], 0.5 / 3_f64.ln()).unwrap();
        assert!((fitted.weights[0] - 3_f32.ln()).abs() <= 1e-5 && fitted.bias.abs() <= 1e-6, "{fitted:?}");
        assert!((fitted.score(&[2.0]) - 2.0 * 3_f32.ln()).abs() <= 1e-5);
    }

    #[test]
    fn at_the_minimum_the_gradient_vanishes_and_the_truth_is_near() {
        let truth = [1.5_f64, -2.0, 0.0, 0.7];
        let rows: Vec<Vec<f32>> =
            (0..4000).map(|i| (0..4).map(|d| CounterRng::new(5, i).normal(d) as f32).collect()).collect();
        let labels: Vec<bool> = rows
            .iter()
            .enumerate()
            .map(|(i, x)| {
                let z: f64 = truth.iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum::<f64>() - 1.0;
                CounterRng::new(6, i as u64).uniform(0) < logistic(z)
            })
            .collect();
        let xs: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let fitted = fit(&xs, &labels, 0.1).unwrap();
        for (found, truth) in fitted.weights.iter().zip(truth) {
            assert!((f64::from(*found) - truth).abs() <= 0.2, "{fitted:?}");
        }
        assert!((fitted.bias + 1.0).abs() <= 0.2, "{fitted:?}");
        // Finite differences of the loss, at the minimum.
        let problem = Problem { xs: &xs, labels: &labels, l2: 0.1 };
        let mut at: Vec<f64> = fitted.weights.iter().map(|w| f64::from(*w)).collect();
        at.push(fitted.bias.into());
        for d in 0..at.len() {
            let moved = |by: f64| {
                let mut at = at.clone();
                at[d] += by;
                problem.loss(&at)
            };
            let slope = (moved(1e-4) - moved(-1e-4)) / 2e-4;
            assert!(slope.abs() <= 1e-2, "{d}: {slope}");
        }
        // The gradient against finite differences, away from the minimum.
        let start = vec![0.3; 5];
        let (_, gradient, _) = problem.at(&start);
        for d in 0..start.len() {
            let moved = |by: f64| {
                let mut at = start.clone();
                at[d] += by;
                problem.loss(&at)
            };
            let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!(
                (slope - gradient[d]).abs() <= 1e-4 * gradient[d].abs().max(1.0),
                "{d}: {slope} {}",
                gradient[d]
            );
        }
    }

    #[test]
    fn separable_examples_stay_finite_and_bad_ones_are_refused() {
        let rows: Vec<[f32; 2]> = (0..40).map(|i| [if i < 5 { 1.0 } else { -1.0 }, 0.0]).collect();
        let xs: Vec<&[f32]> = rows.iter().map(<[f32; 2]>::as_slice).collect();
        let labels: Vec<bool> = (0..40).map(|i| i < 5).collect();
        let fitted = fit(&xs, &labels, 1e-3).unwrap();
        assert!(fitted.score(&[1.0, 0.0]) > 3.0 && fitted.score(&[-1.0, 0.0]) < -3.0, "{fitted:?}");
        assert!(fit(&xs, &[true; 40], 0.1).unwrap_err().contains("both labels"));
        assert!(fit(&xs, &labels, 0.0).unwrap_err().contains("above 0"));
        let nan = [f32::NAN, 0.0];
        assert!(fit(&[&nan, &rows[0]], &[true, false], 0.1).unwrap_err().contains("finite"));
    }
}
