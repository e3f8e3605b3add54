//! DPPO: a trust region on probabilities instead of ratios.

use super::weighted;
use crate::objective::{BatchStats, Clip, PolicyLoss, Sequence, Term, Token};

/// −keep·A·sg(min(w, cap))·log π with the trust region on d = π − μ, the total variation of the one token (DPPO-Binary-TV as in
/// verl and prime-rl; its symmetric variant as in prime-rl).
pub(in crate::objective) struct Dppo {
    pub region: Region,
    pub cap: f64,
}

/// Which tokens are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::objective) enum Region {
    /// d ≤ high where A > 0, d ≥ −low where A ≤ 0: only steps that lead further out are held back.
    Binary { low: f64, high: f64 },
    /// −low ≤ d ≤ high, whatever the sign of A.
    Symmetric { low: f64, high: f64 },
}

impl Region {
    /// Which bound a token with this `d` and advantage is outside of.
    fn clip(self, d: f64, advantage: f64) -> Clip {
        let (low, high, both) = match self {
            Self::Binary { low, high } => (low, high, false),
            Self::Symmetric { low, high } => (low, high, true),
        };
        match advantage > 0.0 {
            true if d > high => Clip::High,
            false if both && d > high => Clip::High,
            false if d < -low => Clip::Low,
            true if both && d < -low => Clip::Low,
            _ => Clip::Inside,
        }
    }
}

impl PolicyLoss for Dppo {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        let term = |t: &Token| {
            let d = t.policy.exp() - t.behaviour.exp();
            match self.region.clip(d, t.advantage) {
                Clip::Inside => weighted(t, t.ratio.min(self.cap), Clip::Inside),
                clip => Term { clip, ..Term::default() },
            }
        };
        sequence.tokens.iter().map(term).collect()
    }
}
