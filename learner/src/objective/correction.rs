//! Corrections for the gap between sampler and learner: stages of their own, composable with any objective.
//!
//! Each gives a factor per live token, a constant for the gradient: 1 keeps, 0 drops, anything else weighs. ρ = π_old/μ. The
//! aggregation's denominator counts tokens *before* any of these, or the survivors would be inflated (AReaL).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::BatchStats;
use super::config::ObjectiveConfig;
use super::sequence::{Sequence, clamp_log};

/// Importance weight ρ and what becomes of extreme ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Correction {
    /// No weight.
    #[default]
    None,
    /// ρ as it is (decoupled PPO, arXiv 2505.24298), truncated only where a bound is set.
    Full,
    /// ρ truncated to the band, by token.
    Tis,
    /// ρ inside the band, 0 outside, by token.
    Mis,
    /// As `mis` with IcePop's band 0.5 to 5.
    Icepop,
    /// The sequence's product of ρ, truncated to the band.
    SeqTis,
    /// The sequence's product of ρ inside the band; outside, the sequence is dropped.
    SeqMis,
}

/// Rejection of whole sequences by mean divergence between sampler and learner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SequenceRejection {
    /// Keep all.
    #[default]
    None,
    /// Geometric mean of ρ outside the band (geo-RS).
    Geo,
    /// Mean of (log ρ)²/2 above the bound.
    K2,
    /// Mean of ρ − log ρ − 1 above the bound.
    K3,
}

impl Correction {
    /// Band of the weight with the config's overrides; `None` when there is no weight.
    pub fn bounds(self, config: &ObjectiveConfig) -> Option<(f64, f64)> {
        let (low, high) = match self {
            Self::None => return None,
            Self::Full => (0.0, f64::INFINITY),
            Self::Tis | Self::SeqTis | Self::SeqMis => (0.0, 2.0),
            Self::Mis => (0.5, 2.0),
            Self::Icepop => (0.5, 5.0),
        };
        Some((config.correction_low.unwrap_or(low), config.correction_high.unwrap_or(high)))
    }
}

impl SequenceRejection {
    /// Bounds with the config's overrides; the lower one matters for `Geo` only.
    pub fn bounds(self, config: &ObjectiveConfig) -> (f64, f64) {
        let high = match self {
            Self::None => f64::INFINITY,
            Self::Geo => 1.001,
            Self::K2 => 2.0,
            Self::K3 => 0.01,
        };
        (config.rejection_low.unwrap_or(0.999), config.rejection_high.unwrap_or(high))
    }
}

/// All stages of a run, resolved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Corrections {
    kind: Correction,
    low: f64,
    high: f64,
    rejection: SequenceRejection,
    rejection_low: f64,
    rejection_high: f64,
    opsm_delta: Option<f64>,
}

/// Whether a kind weighs whole sequences.
fn by_sequence(kind: Correction) -> bool {
    matches!(kind, Correction::SeqTis | Correction::SeqMis)
}

impl Corrections {
    pub(super) fn new(config: &ObjectiveConfig) -> Self {
        let kind = config.correction_kind();
        let (low, high) = kind.bounds(config).unwrap_or((0.0, f64::INFINITY));
        let (rejection_low, rejection_high) = config.sequence_rejection.bounds(config);
        Self {
            kind,
            low,
            high,
            rejection: config.sequence_rejection,
            rejection_low,
            rejection_high,
            opsm_delta: config.opsm_delta,
        }
    }

    /// One factor per live token.
    pub(super) fn factors(&self, sequence: &Sequence, stats: &BatchStats) -> Vec<f64> {
        if self.rejects(sequence) || self.off_policy_negative(sequence) {
            return vec![0.0; sequence.tokens.len()];
        }
        let mut factors = self.weights(sequence);
        if let Some(mean) = stats.correction_mean {
            factors.iter_mut().for_each(|factor| *factor /= mean);
        }
        if let Some(floor) = stats.entropy_floor {
            for (factor, token) in factors.iter_mut().zip(&sequence.tokens) {
                let kept = token.entropy.is_some_and(|entropy| entropy >= floor);
                *factor *= if kept { 1.0 } else { 0.0 };
            }
        }
        factors
    }

    fn weights(&self, sequence: &Sequence) -> Vec<f64> {
        let truncate = |rho: f64| rho.clamp(self.low, self.high);
        let mask = |rho: f64| if (self.low..=self.high).contains(&rho) { rho } else { 0.0 };
        let by_token =
            |f: &dyn Fn(f64) -> f64| sequence.tokens.iter().map(|t| f(t.log_rho().exp())).collect();
        let product = || clamp_log(sequence.log_rho_sum()).exp();
        match self.kind {
            Correction::None => vec![1.0; sequence.tokens.len()],
            Correction::Full | Correction::Tis => by_token(&truncate),
            Correction::Mis | Correction::Icepop => by_token(&mask),
            Correction::SeqTis => vec![truncate(product()); sequence.tokens.len()],
            Correction::SeqMis => vec![mask(product()); sequence.tokens.len()],
        }
    }

    /// Mean weight over the tokens of a batch, or over its sequences where those are weighed; `None` if nothing is left.
    pub(super) fn mean_weight(&self, sequences: &[Sequence]) -> Option<f64> {
        let weights: Vec<f64> = sequences
            .iter()
            .flat_map(|sequence| {
                let mut weights = self.weights(sequence);
                weights.truncate(if by_sequence(self.kind) { 1 } else { usize::MAX });
                weights
            })
            .collect();
        let mean = weights.iter().sum::<f64>() / weights.len() as f64;
        (mean > 0.0).then_some(mean)
    }

    fn rejects(&self, sequence: &Sequence) -> bool {
        let mean = |f: &dyn Fn(f64) -> f64| {
            sequence.tokens.iter().map(|t| f(t.log_rho())).sum::<f64>() / sequence.len_f64()
        };
        match self.rejection {
            SequenceRejection::None => false,
            SequenceRejection::Geo => {
                !(self.rejection_low..=self.rejection_high).contains(&mean(&|x| x).exp())
            }
            SequenceRejection::K2 => mean(&|x| 0.5 * x * x) > self.rejection_high,
            SequenceRejection::K3 => mean(&|x| x.exp_m1() - x) > self.rejection_high,
        }
    }

    /// OPSM: a failure that the policy has moved away from anyway.
    fn off_policy_negative(&self, sequence: &Sequence) -> bool {
        self.opsm_delta.is_some_and(|delta| {
            let drift =
                sequence.tokens.iter().map(|t| t.behaviour - t.policy).sum::<f64>() / sequence.len_f64();
            sequence.advantage() < 0.0 && drift > delta
        })
    }
}
