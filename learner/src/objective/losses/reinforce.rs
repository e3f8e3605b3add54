//! Plain policy gradients: REINFORCE, with and without the weight that makes it unbiased off policy.

use super::weighted;
use crate::objective::sequence::clamp_log;
use crate::objective::{BatchStats, Clip, PolicyLoss, Sequence, Term};

/// −A·log π (Williams 1992). Biased off policy by construction.
pub(in crate::objective) struct Reinforce;

impl PolicyLoss for Reinforce {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        sequence.tokens.iter().map(|t| weighted(t, 1.0, Clip::Inside)).collect()
    }
}

/// −sg(Π w)·A·log π: the weight of the whole sequence makes the gradient unbiased off policy, and its variance grows with
/// the length. A cap trades some of one for the other.
pub(in crate::objective) struct ReinforceUnbiased {
    pub cap: Option<f64>,
}

impl PolicyLoss for ReinforceUnbiased {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        let product = clamp_log(sequence.log_ratio_sum()).exp();
        let (weight, clip) = match self.cap {
            Some(cap) if product > cap => (cap, Clip::High),
            _ => (product, Clip::Inside),
        };
        sequence.tokens.iter().map(|t| weighted(t, weight, clip)).collect()
    }
}
