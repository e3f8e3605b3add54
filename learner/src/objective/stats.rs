//! What needs the whole batch before the first gradient: thresholds, picks, a mean weight.

use std::collections::BTreeSet;

use super::config::{ObjectiveConfig, RatioAnchor};
use super::correction::Corrections;
use super::covariance::{Covariance, TokenId};
use super::recipes::Objective;
use super::sequence::{Sequence, SequenceInput};

/// Batch-wide figures; the default has none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchStats {
    pub(super) measured: bool,
    /// Entropy below which a token is left out (`top_entropy`).
    pub entropy_floor: Option<f64>,
    /// (log w)² above which `m2po` leaves a token out.
    pub m2po_limit: Option<f64>,
    /// Mean weight that `correction_normalise` divides by.
    pub correction_mean: Option<f64>,
    /// Tokens that `covariance_control` acts on.
    pub covariance_picks: BTreeSet<TokenId>,
    /// Weight of the entropy bonus where it adapts, in place of `entropy_coef`.
    pub entropy_coef: Option<f64>,
}

impl BatchStats {
    /// The same with the weight of an entropy bonus that adapts.
    pub fn with_entropy_coef(self, entropy_coef: Option<f64>) -> Self {
        Self { entropy_coef, ..self }
    }
}

/// Which of them a run's loss asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    top_entropy: Option<f64>,
    m2po_tau: Option<f64>,
    correction_mean: bool,
    covariance: Option<Covariance>,
}

impl Wanted {
    pub(super) fn new(config: &ObjectiveConfig) -> Self {
        Self {
            top_entropy: config.top_entropy,
            m2po_tau: (config.objective == Objective::M2po).then(|| config.m2po_tau.unwrap_or(0.04)),
            correction_mean: config.correction_normalise,
            covariance: Covariance::new(config),
        }
    }

    pub(super) fn anything(&self) -> bool {
        self.top_entropy.is_some()
            || self.m2po_tau.is_some()
            || self.correction_mean
            || self.covariance.is_some()
    }

    pub(super) fn covariance(&self) -> Option<&Covariance> {
        self.covariance.as_ref()
    }

    pub(super) fn measure(&self, batch: &[SequenceInput], corrections: &Corrections) -> BatchStats {
        let sequences: Vec<Sequence> =
            batch.iter().map(|input| Sequence::new(input, RatioAnchor::Behaviour)).collect();
        let tokens = || sequences.iter().flat_map(|sequence| &sequence.tokens);
        let sorted = |mut values: Vec<f64>| {
            values.sort_by(f64::total_cmp);
            values
        };
        BatchStats {
            measured: true,
            entropy_floor: self.top_entropy.and_then(|share| {
                quantile(&sorted(tokens().filter_map(|t| t.entropy).collect()), 1.0 - share)
            }),
            m2po_limit: self.m2po_tau.and_then(|tau| {
                second_moment_limit(&sorted(tokens().map(|t| t.log_ratio * t.log_ratio).collect()), tau)
            }),
            correction_mean: self.correction_mean.then(|| corrections.mean_weight(&sequences)).flatten(),
            covariance_picks: self.covariance.map(|stage| stage.pick(&sequences)).unwrap_or_default(),
            entropy_coef: None,
        }
    }
}

/// The `q` quantile of ascending `values`, linear interpolation.
fn quantile(values: &[f64], q: f64) -> Option<f64> {
    let last = values.len().checked_sub(1)?;
    let at = q * last as f64;
    let (below, above) = (values[at.floor() as usize], values[at.ceil() as usize]);
    Some(below + (above - below) * at.fract())
}

/// The largest of ascending `squares` that can stay so that the mean of those that stay is below `tau`; the smallest always
/// stays if any is below `tau`, else the limit is below all of them.
fn second_moment_limit(squares: &[f64], tau: f64) -> Option<f64> {
    let mut sum = 0.0;
    let mut limit = -1.0;
    for (count, &square) in (1u32..).zip(squares) {
        sum += square;
        if sum / f64::from(count) >= tau {
            break;
        }
        limit = square;
    }
    (!squares.is_empty()).then_some(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quantile_interpolates_as_torch_does() {
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.75), Some(3.0));
        assert_eq!(quantile(&[1.0], 0.3), Some(1.0));
        assert_eq!(quantile(&[], 0.3), None);
    }

    #[test]
    fn the_largest_squares_go_until_the_mean_is_below_tau() {
        // Means of prefixes: 0, 0.01, 0.04, 0.13.
        assert_eq!(second_moment_limit(&[0.0, 0.02, 0.1, 0.4], 0.04), Some(0.02));
        assert_eq!(second_moment_limit(&[0.0, 0.02, 0.1, 0.4], 0.05), Some(0.1));
        assert_eq!(second_moment_limit(&[0.5], 0.04), Some(-1.0), "no token may stay");
    }
}
