//! What is believed about how often the policy solves a prompt.

use freewheel_types::CounterRng;
use serde::{Deserialize, Serialize};

/// A Beta belief over the probability of a right answer, discounted as the policy changes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Posterior {
    /// Right answers seen plus 1, discounted.
    pub alpha: f64,
    /// Wrong answers seen plus 1, discounted.
    pub beta: f64,
    /// Samples seen, never discounted.
    pub samples: u64,
    /// `step` of the newest version whose samples were seen.
    pub last_version: Option<u64>,
    /// Right ones among the last samples, however old: what retires a prompt must not fade while nobody asks it.
    #[serde(default)]
    pub recent_right: f64,
    /// How many samples that is, at most 64.
    #[serde(default)]
    pub recent: f64,
}

/// Samples that count as the last ones; older ones are scaled down.
const RECENT: f64 = 64.0;

impl Default for Posterior {
    fn default() -> Self {
        Self { alpha: 1.0, beta: 1.0, samples: 0, last_version: None, recent_right: 0.0, recent: 0.0 }
    }
}

impl Posterior {
    /// Takes in `right` of `n` samples drawn by `version`.
    ///
    /// With `d = decay^(version - last)`: `alpha <- 1 + (alpha - 1) d + right`, `beta` likewise with the wrong ones.
    /// Samples of an older version than the newest seen count `decay^lag` and move nothing else.
    pub fn observe(&mut self, right: u32, n: u32, version: u64, decay: f64) {
        let (right, wrong) = (f64::from(right.min(n)), f64::from(n - right.min(n)));
        let last = self.last_version.unwrap_or(version);
        if version >= last {
            let keep = power(decay, version - last);
            self.alpha = 1.0 + (self.alpha - 1.0) * keep + right;
            self.beta = 1.0 + (self.beta - 1.0) * keep + wrong;
            self.last_version = Some(version);
        } else {
            let weight = power(decay, last - version);
            self.alpha += weight * right;
            self.beta += weight * wrong;
        }
        self.samples += u64::from(n);
        let keep = (RECENT / (self.recent + f64::from(n))).min(1.0);
        self.recent_right = (self.recent_right + right) * keep;
        self.recent = (self.recent + f64::from(n)) * keep;
    }

    /// Share of right ones among the last samples; `None` before the first.
    pub fn recent_rate(&self) -> Option<f64> {
        (self.recent > 0.0).then(|| self.recent_right / self.recent)
    }

    /// What was seen counts no more than `worth` samples, and retires nothing.
    pub fn fade_to(&mut self, worth: f64) {
        let evidence = self.alpha + self.beta - 2.0;
        let keep = if evidence > worth { worth / evidence } else { 1.0 };
        self.alpha = 1.0 + (self.alpha - 1.0) * keep;
        self.beta = 1.0 + (self.beta - 1.0) * keep;
        (self.recent_right, self.recent) = (0.0, 0.0);
    }

    /// Nothing is known: no sample, nothing measured before.
    pub fn is_fresh(&self) -> bool {
        self.alpha + self.beta <= 2.0
    }

    /// Expected probability of a right answer.
    pub fn mean(&self) -> f64 {
        self.alpha / (self.alpha + self.beta)
    }
}

/// `base^n` by squaring: the same bits on every machine, unlike `powi`.
fn power(base: f64, n: u64) -> f64 {
    let (mut result, mut square, mut n) = (1.0, base, n);
    while n > 0 {
        if n & 1 == 1 {
            result *= square;
        }
        square *= square;
        n >>= 1;
    }
    result
}

/// Probability that a group of `group_size` samples holds both right and wrong ones, exact under a Beta belief:
/// `1 - prod (alpha+i)/(alpha+beta+i) - prod (beta+i)/(alpha+beta+i)`, `i < group_size`.
pub fn informative_probability(alpha: f64, beta: f64, group_size: u32) -> f64 {
    let (mut all_right, mut all_wrong) = (1.0, 1.0);
    for i in 0..group_size {
        let total = alpha + beta + f64::from(i);
        all_right *= (alpha + f64::from(i)) / total;
        all_wrong *= (beta + f64::from(i)) / total;
    }
    (1.0 - all_right - all_wrong).max(0.0)
}

/// A draw from Beta(alpha, beta), both at least 1: `x / (x + y)` of two Gamma draws.
pub fn draw_beta(alpha: f64, beta: f64, rng: &CounterRng) -> f64 {
    let (x, y) = (draw_gamma(alpha, rng, 0), draw_gamma(beta, rng, GAMMA_TRIES));
    x / (x + y)
}

/// Draws that one Gamma variate may take; each is refused with less than 5 %.
const GAMMA_TRIES: u64 = 64;

/// A draw from Gamma(shape, 1), shape at least 1 (Marsaglia and Tsang 2000); uses the draws from `first` on.
fn draw_gamma(shape: f64, rng: &CounterRng, first: u64) -> f64 {
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    for k in first..first + GAMMA_TRIES {
        let x = rng.normal(2 * k);
        let v = 1.0 + c * x;
        let v = v * v * v;
        let u = 1.0 - rng.uniform(2 * k + 1);
        if v > 0.0 && u.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return d * v;
        }
    }
    shape
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawn_skills_have_the_mean_and_variance_of_their_belief() {
        for (alpha, beta) in [(1.0, 1.0), (3.0, 7.0), (40.0, 2.0)] {
            let n = 20_000;
            let draws: Vec<f64> = (0..n).map(|k| draw_beta(alpha, beta, &CounterRng::new(7, k))).collect();
            let mean = draws.iter().sum::<f64>() / n as f64;
            let variance = draws.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n as f64;
            let total = alpha + beta;
            let expected = alpha * beta / (total * total * (total + 1.0));
            assert!((mean - alpha / total).abs() <= 0.006, "{alpha} {beta}: mean {mean}");
            assert!((variance / expected - 1.0).abs() <= 0.05, "{alpha} {beta}: variance {variance}");
        }
    }

    #[test]
    fn a_fresh_prompt_is_informative_seven_times_in_nine() {
        assert!((informative_probability(1.0, 1.0, 8) - 7.0 / 9.0).abs() <= 1e-12);
        // The value Monte-Carlo sampling gave for the design.
        assert!((informative_probability(3.0, 7.0, 8) - 0.8745).abs() <= 2e-4);
        assert!(informative_probability(1.0, 1.0, 1).abs() <= 1e-12);
        assert!(informative_probability(500.0, 1.0, 8) <= 0.02);
    }

    #[test]
    fn the_last_samples_do_not_fade_with_versions_and_give_way_to_newer_ones() {
        let mut p = Posterior::default();
        assert_eq!(p.recent_rate(), None);
        p.observe(8, 8, 0, 0.5);
        p.observe(0, 8, 1000, 0.5);
        assert_eq!(p.recent_rate(), Some(0.5));
        for _ in 0..100 {
            p.observe(8, 8, 1000, 0.5);
        }
        assert!(p.recent <= RECENT && p.recent_rate().unwrap() >= 0.999, "{p:?}");
    }

    #[test]
    fn old_beliefs_fade_and_late_results_never_overwrite_newer_ones() {
        let mut p = Posterior::default();
        p.observe(4, 4, 0, 0.5);
        assert_eq!((p.alpha, p.beta), (5.0, 1.0));
        p.observe(0, 4, 2, 0.5);
        assert_eq!((p.alpha, p.beta, p.last_version), (2.0, 5.0, Some(2)));
        p.observe(4, 4, 1, 0.5);
        assert_eq!((p.alpha, p.beta, p.last_version, p.samples), (4.0, 5.0, Some(2), 12));
    }
}
