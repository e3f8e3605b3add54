//! Clipped surrogates: PPO (arXiv 1707.06347), GRPO (2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), two-sided GRPO
//! (INTELLECT-2, 2505.07291), and with a sequence-level ratio GSPO (2507.18071), LUSPO and RLOO's loss.
//!
//! J = min(min(r, δ)·A, clip(r, 1−ε_low, 1+ε_high)·A), bounded below by c·A where A < 0 (dual clip, 1912.09729).
//! They differ in the ratio's level and in their table row (clip range, aggregation, advantage).

use crate::objective::sequence::clamp_log;
use crate::objective::{BatchStats, Clip, PolicyLoss, Sequence, Term};

/// What one ratio is taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::objective) enum RatioLevel {
    /// Each token.
    Token,
    /// The geometric mean over the sequence (GSPO).
    SequenceMean,
    /// The product over the sequence (RLOO).
    SequenceProduct,
}

/// The clipped surrogate.
pub(in crate::objective) struct ClippedSurrogate {
    pub low: f64,
    pub high: f64,
    pub dual: Option<f64>,
    /// δ of two-sided clipping.
    pub cap: Option<f64>,
    pub level: RatioLevel,
}

impl PolicyLoss for ClippedSurrogate {
    fn terms(&self, sequence: &Sequence, _stats: &BatchStats) -> Vec<Term> {
        let length = sequence.len_f64();
        // Every token's log-prob moves the shared ratio, and the sequence's terms are all alike: T terms × 1/T each.
        let (log_ratio, slope_share) = match self.level {
            RatioLevel::Token => {
                return sequence.tokens.iter().map(|t| self.term(t.ratio, t.slope, t.advantage)).collect();
            }
            RatioLevel::SequenceMean => (sequence.log_ratio_sum() / length, 1.0),
            RatioLevel::SequenceProduct => (sequence.log_ratio_sum(), length),
        };
        let ratio = clamp_log(log_ratio).exp();
        let slope = if clamp_log(log_ratio) == log_ratio { ratio * slope_share } else { 0.0 };
        vec![self.term(ratio, slope, sequence.advantage()); sequence.tokens.len()]
    }
}

impl ClippedSurrogate {
    fn term(&self, ratio: f64, slope: f64, advantage: f64) -> Term {
        let (low, high) = (1.0 - self.low, 1.0 + self.high);
        let capped = self.cap.map_or(ratio, |cap| ratio.min(cap));
        let free = capped * advantage;
        let clipped = ratio.clamp(low, high) * advantage;
        let (mut gain, mut moves) =
            if free <= clipped { (free, capped == ratio) } else { (clipped, (low..=high).contains(&ratio)) };
        if let Some(floor) = self.dual.map(|c| c * advantage)
            && advantage < 0.0
            && gain < floor
        {
            (gain, moves) = (floor, false);
        }
        let clip = match moves {
            true => Clip::Inside,
            false if ratio < 1.0 => Clip::Low,
            false => Clip::High,
        };
        Term { loss: -gain, gradient: if moves { -advantage * slope } else { 0.0 }, clip }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn surrogate(dual: Option<f64>, cap: Option<f64>) -> ClippedSurrogate {
        ClippedSurrogate { low: 0.2, high: 0.3, dual, cap, level: RatioLevel::Token }
    }

    #[test]
    fn each_side_is_clipped_only_where_it_would_gain() {
        let s = surrogate(None, None);
        assert_eq!(s.term(1.5, 1.5, 2.0), Term { loss: -2.6, gradient: 0.0, clip: Clip::High });
        assert_eq!(s.term(0.5, 0.5, 2.0), Term { loss: -1.0, gradient: -1.0, clip: Clip::Inside });
        assert_eq!(s.term(0.5, 0.5, -2.0), Term { loss: 1.6, gradient: 0.0, clip: Clip::Low });
        assert_eq!(s.term(1.5, 1.5, -2.0), Term { loss: 3.0, gradient: 3.0, clip: Clip::Inside });
    }

    #[test]
    fn dual_clip_and_cap_bound_what_a_failure_can_cost() {
        assert_eq!(
            surrogate(Some(3.0), None).term(5.0, 5.0, -1.0),
            Term { loss: 3.0, gradient: 0.0, clip: Clip::High }
        );
        assert_eq!(
            surrogate(None, Some(4.0)).term(5.0, 5.0, -1.0),
            Term { loss: 4.0, gradient: 0.0, clip: Clip::High }
        );
        assert_eq!(
            surrogate(None, Some(4.0)).term(3.0, 3.0, -1.0),
            Term { loss: 3.0, gradient: 3.0, clip: Clip::Inside }
        );
    }
}
