//! Losses whose gradient is a weight times A·∇log π, token by token.
//!
//! The stop-gradient forms (REINFORCE, AIPO, CISPO, DPPO) put −weight·A·log π into the loss, so that its value has no meaning
//! beyond its gradient; the surrogate forms (AIPO's surrogate, M2PO, SAPO) differentiate the weight itself.

use super::{BatchStats, Clip, PolicyLoss, Sequence, Term, Token};

/// −A·log π (Williams 1992). Biased off policy by construction.
pub(super) struct Reinforce;

impl PolicyLoss for Reinforce {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        sequence.tokens.iter().map(|t| weighted(t, 1.0, Clip::Inside)).collect()
    }
}

/// −sg(min(w, c))·A·log π: AIPO (LlamaRL, arXiv 2505.24034) and CISPO (MiniMax-M1, 2506.13585; ScaleRL, 2510.13786), which also has
/// a lower bound in its paper and in practice none.
pub(super) struct CappedWeight {
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
pub(super) struct CappedSurrogate {
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

/// −keep·A·sg(min(w, cap))·log π with the trust region on probabilities, d = π − μ: keep if d ≤ high where A > 0, if d ≥ −low
/// where A ≤ 0 (DPPO-Binary-TV as in verl and prime-rl).
pub(super) struct Dppo {
    pub low: f64,
    pub high: f64,
    pub cap: f64,
}

impl PolicyLoss for Dppo {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        let term = |t: &Token| {
            let d = t.policy.exp() - t.behaviour.exp();
            match t.advantage > 0.0 {
                true if d > self.high => Term { clip: Clip::High, ..Term::default() },
                false if d < -self.low => Term { clip: Clip::Low, ..Term::default() },
                _ => weighted(t, t.ratio.min(self.cap), Clip::Inside),
            }
        };
        sequence.tokens.iter().map(term).collect()
    }
}

/// −w·A on the tokens that keep the batch's mean (log w)² below τ (M2PO, arXiv 2510.01161).
pub(super) struct M2po;

impl PolicyLoss for M2po {
    fn terms(&self, sequence: &Sequence, stats: &BatchStats) -> Vec<Term> {
        let limit = stats.m2po_limit.unwrap_or(f64::INFINITY);
        let term = |t: &Token| {
            if t.log_ratio * t.log_ratio > limit {
                let clip = if t.log_ratio > 0.0 { Clip::High } else { Clip::Low };
                return Term { clip, ..Term::default() };
            }
            Term { loss: -t.ratio * t.advantage, gradient: -t.slope * t.advantage, clip: Clip::Inside }
        };
        sequence.tokens.iter().map(term).collect()
    }
}

/// −A·(4/τ)·sigmoid(τ(r−1)), τ by the sign of A: a soft gate instead of a clip (SAPO, arXiv 2511.20347).
pub(super) struct Sapo {
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

/// −sg(weight)·A·log π.
pub(super) fn weighted(token: &Token, weight: f64, clip: Clip) -> Term {
    let gradient = -weight * token.advantage;
    Term { loss: gradient * token.policy, gradient, clip }
}
