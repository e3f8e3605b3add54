//! SAPO: a soft gate instead of a clip.

use crate::objective::{BatchStats, Clip, PolicyLoss, Sequence, Term, Token};

/// −A·(4/τ)·sigmoid(τ(r−1)), τ by the sign of A: a soft gate instead of a clip (SAPO, arXiv 2511.20347).
pub(in crate::objective) struct Sapo {
    pub tau_positive: f64,
    pub tau_negative: f64,
}

impl PolicyLoss for Sapo {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        let term = |t: &Token| {
            let tau = if t.advantage > 0.0 { self.tau_positive } else { self.tau_negative };
            let gate = 1.0 / (1.0 + (-tau * (t.ratio - 1.0)).exp());
            Term {
                loss: -t.advantage * 4.0 / tau * gate,
                gradient: -t.advantage * 4.0 * gate * (1.0 - gate) * t.slope,
                clip: Clip::Inside,
            }
        };
        sequence.tokens.iter().map(term).collect()
    }
}
