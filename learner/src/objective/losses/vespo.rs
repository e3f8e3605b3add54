//! VESPO: a smooth weight on the sequence.

use super::weighted;
use crate::objective::{BatchStats, Clip, LOG_RATIO_LIMIT, PolicyLoss, Sequence, Term};

/// −sg(W^k·exp(λ(1−W)))·A·log π, W = Π w: a smooth weight with its own maximum, (k, λ) by the sign of A (VESPO, after TRL).
pub(in crate::objective) struct Vespo;

impl PolicyLoss for Vespo {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        let (k, lambda) = if sequence.advantage() >= 0.0 { (2.0, 3.0) } else { (3.0, 2.0) };
        // The reference bounds W to [1e-8, e^20].
        let w = sequence.log_ratio_sum().clamp(1e-8f64.ln(), LOG_RATIO_LIMIT).exp();
        let weight = (lambda + k * w.ln() - lambda * w).exp();
        sequence.tokens.iter().map(|t| weighted(t, weight, Clip::Inside)).collect()
    }
}
