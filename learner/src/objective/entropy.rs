//! The weight of the entropy bonus, adapting (Skywork-OR1, arXiv 2505.22312, §4.4).
//!
//! After each batch: below the target (or at it) the weight grows by a step, above it shrinks by one, never under 0; the
//! bonus is applied only while the entropy is not above the target. What counts is the last batch's mean entropy, so the
//! weight of a batch is known before it.

/// Settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaptiveEntropy {
    /// Mean token entropy to hold, nats.
    pub target: f64,
    /// What the weight moves by after a batch.
    pub step: f64,
}

/// Where the weight is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EntropyWeight {
    /// The weight.
    pub coef: f64,
    /// Whether the last batch was at or below the target; `false` before the first.
    pub active: bool,
}

impl AdaptiveEntropy {
    /// The weight after a batch of mean entropy `mean`.
    pub fn next(&self, weight: EntropyWeight, mean: f64) -> EntropyWeight {
        let active = mean <= self.target;
        let moved = if active { weight.coef + self.step } else { weight.coef - self.step };
        EntropyWeight { coef: moved.max(0.0), active }
    }
}

impl EntropyWeight {
    /// What the bonus is multiplied with now.
    pub fn value(&self) -> f64 {
        if self.active { self.coef } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weight_grows_below_the_target_and_rests_above_it() {
        let rule = AdaptiveEntropy { target: 0.2, step: 0.005 };
        let mut weight = EntropyWeight { coef: 0.0, active: false };
        for mean in [0.1, 0.2] {
            weight = rule.next(weight, mean);
        }
        assert_eq!((weight.coef, weight.value()), (0.01, 0.01));
        weight = rule.next(weight, 0.3);
        assert_eq!((weight.coef, weight.value()), (0.005, 0.0), "kept, but not applied");
        for _ in 0..3 {
            weight = rule.next(weight, 0.3);
        }
        assert_eq!(weight.coef, 0.0);
    }
}
