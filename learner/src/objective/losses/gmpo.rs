//! GMPO: the geometric mean of clipped token ratios.

use crate::objective::{BatchStats, Clip, PolicyLoss, Sequence, Term, Token};

/// J = A·exp(mean of clipped log-ratios): the geometric mean instead of the arithmetic one (GMPO, arXiv 2507.20673). The clip is
/// on log-ratios, one-sided by the sign of A.
pub(in crate::objective) struct Gmpo {
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
        let term = |t: &Token| {
            let clip = clip_of(t.log_ratio);
            let moves = clip == Clip::Inside && t.slope != 0.0;
            Term { loss, gradient: if moves { loss } else { 0.0 }, clip }
        };
        sequence.tokens.iter().map(term).collect()
    }
}
