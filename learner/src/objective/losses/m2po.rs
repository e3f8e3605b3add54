//! M2PO: the second moment of the log-ratios bounded over the batch.

use crate::objective::{BatchStats, Clip, PolicyLoss, Sequence, Term, Token};

/// −w·A on the tokens that keep the batch's mean (log w)² below τ (M2PO, arXiv 2510.01161).
pub(in crate::objective) struct M2po;

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
