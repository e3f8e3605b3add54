//! TOPR: successes as they are, failures by a truncated sequence weight.

use super::weighted;
use crate::objective::sequence::clamp_log;
use crate::objective::{BatchStats, Clip, PolicyLoss, Sequence, Term};

/// Successes as they are, failures by sg(clip(Π w, 0, cap)) (TOPR, arXiv 2503.14286).
pub(in crate::objective) struct Topr {
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
