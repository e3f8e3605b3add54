//! Holding entropy up by the tokens that pull it down: Clip-Cov and KL-Cov (Cui et al., "The Entropy Mechanism", arXiv 2505.22617).
//!
//! A step lowers the entropy through tokens that are likely and well rewarded at once, cov = (A − mean A)(log π − mean log π)
//! over the batch. Few tokens carry most of it: Clip-Cov takes the gradient of some of them away, KL-Cov holds the top ones
//! near the anchor. Unlike verl, tokens that the objective clips anyway are candidates too.

use std::collections::BTreeSet;

use freewheel_types::CounterRng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::config::ObjectiveConfig;
use super::sequence::{Sequence, Token};

/// What is done about the tokens whose covariance is high.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CovarianceControl {
    /// Nothing.
    #[default]
    None,
    /// A share of all tokens, drawn from those with a covariance in the band, gets no gradient (Clip-Cov).
    Clip,
    /// The share of all tokens with the highest covariance pays for its distance from the anchor, |log r| (KL-Cov).
    Kl,
}

/// A token by its sequence's id and its place there.
pub type TokenId = (u64, usize);

/// The stage, resolved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Covariance {
    control: CovarianceControl,
    fraction: f64,
    low: f64,
    high: f64,
    kl_coef: f64,
}

/// Keys the draw of Clip-Cov; any constant would do.
const SEED: u64 = 0x636f_7661;

impl Covariance {
    pub(super) fn new(config: &ObjectiveConfig) -> Option<Self> {
        let control = config.covariance_control;
        (control != CovarianceControl::None).then(|| Self {
            control,
            fraction: config.covariance_fraction.unwrap_or(2e-4),
            low: config.covariance_low.unwrap_or(1.0),
            high: config.covariance_high.unwrap_or(5.0),
            kl_coef: config.covariance_kl_coef.unwrap_or(1.0),
        })
    }

    /// The tokens of a batch that it acts on: at least one, if there is a candidate.
    pub(super) fn pick(&self, sequences: &[Sequence]) -> BTreeSet<TokenId> {
        let mut found = covariances(sequences);
        let wanted = ((self.fraction * found.len() as f64) as usize).max(1);
        match self.control {
            CovarianceControl::None => BTreeSet::new(),
            CovarianceControl::Clip => {
                found.retain(|(_, cov)| (self.low..=self.high).contains(cov));
                let stream = sequences.first().map_or(0, |sequence| sequence.id);
                shuffle_front(&mut found, wanted, &CounterRng::new(SEED, stream));
                found.into_iter().take(wanted).map(|(id, _)| id).collect()
            }
            CovarianceControl::Kl => {
                found.sort_by(|(a_id, a), (b_id, b)| b.total_cmp(a).then(a_id.cmp(b_id)));
                found.into_iter().take(wanted).map(|(id, _)| id).collect()
            }
        }
    }

    /// Whether a picked token's gradient goes.
    pub(super) fn drops(&self) -> bool {
        self.control == CovarianceControl::Clip
    }

    /// (value, gradient) that a picked token pays.
    pub(super) fn toll(&self, token: &Token) -> (f64, f64) {
        let slope = if token.slope == 0.0 { 0.0 } else { token.log_ratio.signum() };
        match self.control {
            CovarianceControl::Kl if token.log_ratio != 0.0 => {
                (self.kl_coef * token.log_ratio.abs(), self.kl_coef * slope)
            }
            _ => (0.0, 0.0),
        }
    }
}

fn covariances(sequences: &[Sequence]) -> Vec<(TokenId, f64)> {
    let tokens = || sequences.iter().flat_map(|s| s.tokens.iter().map(move |t| (s.id, t)));
    let n = tokens().count() as f64;
    let mean = |f: fn(&Token) -> f64| tokens().map(|(_, t)| f(t)).sum::<f64>() / n;
    let (advantage, log_prob) = (mean(|t| t.advantage), mean(|t| t.policy));
    tokens().map(|(id, t)| ((id, t.index), (t.advantage - advantage) * (t.policy - log_prob))).collect()
}

/// Draws the first `count` of `items` without putting back.
fn shuffle_front<T>(items: &mut [T], count: usize, rng: &CounterRng) {
    let n = items.len();
    for i in 0..count.min(n) {
        let j = i + rng.below(i as u64, (n - i) as u64) as usize;
        items.swap(i, j);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objective::{RatioAnchor, SequenceInput};

    /// Advantage and log-prob rise together along the second sequence.
    fn sequences() -> Vec<Sequence> {
        let sequence = |id: u64, advantage: f64, slope: f64| {
            let input = SequenceInput {
                id,
                policy_logprobs: (0..10).map(|t| -4.0 + slope * f64::from(t)).collect(),
                behaviour_logprobs: vec![-4.0; 10],
                advantages: vec![advantage; 10],
                loss_mask: vec![true; 10],
                ..Default::default()
            };
            Sequence::new(&input, RatioAnchor::Behaviour)
        };
        vec![sequence(3, -1.0, 0.0), sequence(9, 1.0, 0.4)]
    }

    fn control(control: CovarianceControl, fraction: f64) -> Covariance {
        let config = ObjectiveConfig {
            covariance_control: control,
            covariance_fraction: Some(fraction),
            ..Default::default()
        };
        Covariance::new(&config).unwrap()
    }

    #[test]
    fn kl_cov_takes_the_highest() {
        // Mean log-prob −3.1, mean advantage 0: the last tokens of the second sequence have the highest covariance.
        let picked = control(CovarianceControl::Kl, 0.15).pick(&sequences());
        assert_eq!(picked.into_iter().collect::<Vec<_>>(), [(9, 7), (9, 8), (9, 9)]);
    }

    #[test]
    fn clip_cov_draws_within_the_band_and_always_the_same() {
        let stage = Covariance { low: 0.5, high: 2.0, ..control(CovarianceControl::Clip, 0.2) };
        let (once, again) = (stage.pick(&sequences()), stage.pick(&sequences()));
        assert_eq!(once, again);
        assert_eq!(once.len(), 4);
        let inside = |&(id, t): &TokenId| match id {
            3 => true, // (−1)(−4 + 3.1) = 0.9
            _ => (0.5..=2.0).contains(&(-0.9 + 0.4 * t as f64)),
        };
        assert!(once.iter().all(inside), "{once:?}");
    }

    #[test]
    fn one_token_at_least_is_taken_and_none_where_there_is_none() {
        assert_eq!(control(CovarianceControl::Kl, 2e-4).pick(&sequences()).len(), 1);
        let out_of_reach = Covariance { low: 50.0, high: 60.0, ..control(CovarianceControl::Clip, 0.5) };
        assert!(out_of_reach.pick(&sequences()).is_empty());
    }
}
