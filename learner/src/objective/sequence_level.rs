//! Losses with one weight for a whole sequence: GMPO, TOPR, VESPO and the regression objective OAPL.

use super::sequence::clamp_log;
use super::weighted::weighted;
use super::{BatchStats, Clip, PolicyLoss, Sequence, Term};

/// J = A·exp(mean of clipped log-ratios): the geometric mean instead of the arithmetic one (GMPO, arXiv 2507.20673). The clip is
/// on log-ratios, one-sided by the sign of A.
pub(super) struct Gmpo {
    pub low: f64,
    pub high: f64,
}

impl PolicyLoss for Gmpo {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        let advantage = sequence.advantage();
        let clip_of = |log_ratio: f64| match advantage >= 0.0 {
            true if log_ratio > self.high => Clip::High,
            false if log_ratio < -self.low => Clip::Low,
            _ => Clip::Inside,
        };
        let clipped = |log_ratio: f64| match clip_of(log_ratio) {
            Clip::Inside => log_ratio,
            Clip::Low => -self.low,
            Clip::High => self.high,
        };
        let mean = sequence.tokens.iter().map(|t| clipped(t.log_ratio)).sum::<f64>() / sequence.len_f64();
        let loss = -advantage * mean.exp();
        let term = |t: &super::Token| {
            let clip = clip_of(t.log_ratio);
            let moves = clip == Clip::Inside && t.slope != 0.0;
            Term { loss, gradient: if moves { loss } else { 0.0 }, clip }
        };
        sequence.tokens.iter().map(term).collect()
    }
}

/// Successes as they are, failures by sg(clip(Π w, 0, cap)) (TOPR, arXiv 2503.14286).
pub(super) struct Topr {
    pub cap: f64,
}

impl PolicyLoss for Topr {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        let product = clamp_log(sequence.log_ratio_sum()).exp();
        let (weight, clip) = match sequence.advantage() >= 0.0 {
            true => (1.0, Clip::Inside),
            false if product > self.cap => (self.cap, Clip::High),
            false => (product, Clip::Inside),
        };
        sequence.tokens.iter().map(|t| weighted(t, weight, clip)).collect()
    }
}

/// −sg(W^k·exp(λ(1−W)))·A·log π, W = Π w: a smooth weight with its own maximum, (k, λ) by the sign of A (VESPO).
pub(super) struct Vespo;

impl PolicyLoss for Vespo {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        let (k, lambda) = if sequence.advantage() >= 0.0 { (2.0, 3.0) } else { (3.0, 2.0) };
        // The reference bounds W to [1e-8, e^20].
        let w = sequence.log_ratio_sum().clamp(1e-8f64.ln(), super::LOG_RATIO_LIMIT).exp();
        let weight = (lambda + k * w.ln() - lambda * w).exp();
        sequence.tokens.iter().map(|t| weighted(t, weight, Clip::Inside)).collect()
    }
}

/// (β·log(π(y)/μ(y)) − A)² with A = R − V, V the soft value of the prompt: the optimum of KL-regularised RL by least squares
/// (A*-PO, arXiv 2505.20686; OAPL with a lagged policy as anchor).
pub(super) struct Oapl {
    pub beta: f64,
}

impl PolicyLoss for Oapl {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        let error = self.beta * sequence.log_ratio_sum() - sequence.advantage();
        // Each of the T equal terms moves with every token: T · d(error²).
        let gradient = sequence.len_f64() * 2.0 * self.beta * error;
        let term = |t: &super::Token| Term {
            loss: error * error,
            gradient: if t.slope == 0.0 { 0.0 } else { gradient },
            clip: Clip::Inside,
        };
        sequence.tokens.iter().map(term).collect()
    }
}
