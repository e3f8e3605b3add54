//! AIPO, CISPO and AIPO's surrogate: the token's importance weight, capped.

use super::weighted;
use crate::objective::{BatchStats, Clip, PolicyLoss, Sequence, Term, Token};

/// −sg(min(w, c))·A·log π: AIPO (LlamaRL, arXiv 2505.24034) and CISPO (MiniMax-M1, 2506.13585; ScaleRL, 2510.13786), which also has
/// a lower bound in its paper and in practice none.
pub(in crate::objective) struct CappedWeight {
    pub cap: f64,
    /// Lower bound of the weight; 0 for none.
    pub floor: f64,
}

impl PolicyLoss for CappedWeight {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        let term = |t: &Token| {
            let clip = match t.ratio {
                r if r > self.cap => Clip::High,
                r if r < self.floor => Clip::Low,
                _ => Clip::Inside,
            };
            weighted(t, t.ratio.max(self.floor).min(self.cap), clip)
        };
        sequence.tokens.iter().map(term).collect()
    }
}

/// −min(w, δ)·A (prime-rl): tokens above δ have *no* gradient, unlike AIPO.
pub(in crate::objective) struct CappedSurrogate {
    pub cap: f64,
}

impl PolicyLoss for CappedSurrogate {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        let term = |t: &Token| {
            let inside = t.ratio <= self.cap;
            Term {
                loss: -t.ratio.min(self.cap) * t.advantage,
                gradient: if inside { -t.slope * t.advantage } else { 0.0 },
                clip: if inside { Clip::Inside } else { Clip::High },
            }
        };
        sequence.tokens.iter().map(term).collect()
    }
}
