//! Objectives: from log-probs and advantages to the loss and its gradient with respect to every log-prob.
//!
//! ```text
//!  SequenceInput ─► Sequence (live tokens, ratios) ─► PolicyLoss::terms ──► × corrections ─► + kl ─► × aggregation weight
//!   (learner)         sequence.rs                     one file each          correction.rs   kl.rs    aggregate.rs
//! ```
//!
//! The step loop holds a [`Loss`] and never asks which algorithm it runs; a new objective is one small file with a
//! [`PolicyLoss`] and one row in `recipes`. All arithmetic is f64 and per sequence, with batch-wide constants
//! ([`BatchTotals`], [`BatchStats`]) known before the first micro-batch: any split of a batch gives the same bits per sequence.
//! Knows no model, no optimiser and no reward; refuses nothing (a NaN log-prob of a live token gives a NaN loss, which the
//! step loop must refuse).

mod aggregate;
mod config;
mod correction;
mod covariance;
mod diagnostics;
mod entropy;
mod kl;
mod losses;
mod proximal;
mod recipes;
mod regularise;
mod sequence;
mod stats;
mod value;

#[cfg(test)]
mod checks;

pub use aggregate::{BatchTotals, LossAggregation};
pub use config::{KlPlacement, ObjectiveConfig, RatioAnchor};
pub use correction::{Correction, SequenceRejection};
pub use covariance::{CovarianceControl, TokenId};
pub use diagnostics::Diagnostics;
pub use entropy::{AdaptiveEntropy, EntropyWeight};
pub use kl::{KlEstimator, reward_penalty};
pub use proximal::{Proximal, log_linear};
pub use recipes::{Objective, RECIPES, Recipe};
pub use sequence::{LOG_RATIO_LIMIT, Sequence, SequenceInput, Token, clamp_log, live_tokens, widen};
pub use stats::BatchStats;
pub use value::value_loss;

use correction::Corrections;
use covariance::Covariance;
use regularise::Regularisers;
use stats::Wanted;

/// Which bound held a token back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clip {
    /// None.
    #[default]
    Inside,
    /// The ratio was too small.
    Low,
    /// The ratio was too large.
    High,
}

/// One live token's part of the loss, before corrections and aggregation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Term {
    /// Loss of the token. Sequence-level objectives give every token the sequence's loss.
    pub loss: f64,
    /// d (Σ of the sequence's `loss`) / d (this token's policy log-prob).
    pub gradient: f64,
    /// Whether a bound held it back, for the metric.
    pub clip: Clip,
}

/// A policy loss. Pure: same tokens, same terms.
pub trait PolicyLoss: Send + Sync {
    /// One term per live token of `sequence`, which has at least one.
    fn terms(&self, sequence: &Sequence, stats: &BatchStats) -> Vec<Term>;
}

/// The whole loss of a run: policy term, corrections, KL, entropy, aggregation.
pub struct Loss {
    policy: Box<dyn PolicyLoss>,
    corrections: Corrections,
    aggregation: LossAggregation,
    anchor: RatioAnchor,
    proximal: Proximal,
    regularisers: Regularisers,
    reference: bool,
    entropy_coef: f64,
    entropies: bool,
    wanted: Wanted,
}

/// Loss and gradient of one sequence, aggregation weight included: those of a batch are the sums over its sequences.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceLoss {
    /// Its part of the batch's loss.
    pub loss: f64,
    /// d loss / d policy log-prob `[T]`; exactly 0 where masked.
    pub d_logprobs: Vec<f32>,
    /// d loss / d entropy `[T]`; `None` without an entropy bonus.
    pub d_entropies: Option<Vec<f32>>,
    /// d loss / d policy log-prob `[T]` in f64, for tests and checks.
    pub d_logprobs_f64: Vec<f64>,
    /// What to report.
    pub diagnostics: Diagnostics,
}

impl Loss {
    /// The loss that `config` describes.
    ///
    /// # Errors
    /// All problems of the config, as [`ObjectiveConfig::problems`] gives them.
    pub fn new(config: &ObjectiveConfig) -> Result<Self, Vec<String>> {
        let problems = config.problems();
        if !problems.is_empty() {
            return Err(problems);
        }
        Ok(Self {
            policy: (config.recipe().build)(config),
            corrections: Corrections::new(config),
            aggregation: config.aggregation(),
            anchor: config.anchor(),
            proximal: config.proximal,
            regularisers: Regularisers::new(config),
            reference: config.kl_coef > 0.0,
            entropy_coef: config.entropy_coef,
            entropies: config.entropy_coef != 0.0
                || config.top_entropy.is_some()
                || config.entropy_target.is_some(),
            wanted: Wanted::new(config),
        })
    }

    /// Whether log-probs before the batch's first update matter; with one optimiser step a batch they are the policy's own
    /// and may be left out.
    pub fn needs_proximal(&self) -> bool {
        self.anchor == RatioAnchor::Proximal
    }

    /// Whether every sequence needs `ref_logprobs`.
    pub fn needs_reference(&self) -> bool {
        self.reference
    }

    /// Whether every sequence needs `entropies`.
    pub fn needs_entropies(&self) -> bool {
        self.entropies
    }

    /// Whether [`Loss::batch_stats`] needs the log-probs of the whole batch before the first gradient. If not,
    /// `BatchStats::default()` will do.
    pub fn needs_batch_pass(&self) -> bool {
        self.wanted.anything()
    }

    /// Figures over the whole batch.
    pub fn batch_stats(&self, batch: &[SequenceInput]) -> BatchStats {
        self.wanted.measure(batch, &self.corrections)
    }

    /// How the proximal log-probs are had where they are needed.
    pub fn proximal(&self) -> Proximal {
        self.proximal
    }

    /// Loss and gradient of one sequence.
    ///
    /// # Panics
    /// If a field that the loss needs is missing or of the wrong length: a bug of the caller.
    pub fn sequence(&self, input: &SequenceInput, totals: &BatchTotals, stats: &BatchStats) -> SequenceLoss {
        assert!(
            !self.needs_batch_pass() || stats.measured,
            "this objective needs batch_stats of the whole batch first"
        );
        let sequence = Sequence::new(input, self.anchor);
        let len = input.policy_logprobs.len();
        let mut out = SequenceLoss {
            loss: 0.0,
            d_logprobs: vec![0.0; len],
            d_entropies: (self.entropy_weight(stats) != 0.0).then(|| vec![0.0; len]),
            d_logprobs_f64: vec![0.0; len],
            diagnostics: Diagnostics::default(),
        };
        if sequence.tokens.is_empty() {
            return out;
        }
        if sequence.tokens.iter().any(|token| token.policy.is_nan()) {
            // Caps and clips would hide it: min(NaN, c) is c.
            out.loss = f64::NAN;
            return out;
        }
        let terms = self.policy.terms(&sequence, stats);
        let mut factors = self.corrections.factors(&sequence, stats);
        let covariance = self.wanted.covariance();
        let picked = |token: &Token| stats.covariance_picks.contains(&(input.id, token.index));
        let weight = self.aggregation.weight(totals, sequence.tokens.len() as u64, input.group_tokens);
        for ((token, term), factor) in sequence.tokens.iter().zip(&terms).zip(&mut factors) {
            let picking = covariance.filter(|_| picked(token));
            if picking.is_some_and(Covariance::drops) {
                *factor = 0.0;
            }
            let (extra, extra_gradient) = self.regularisers.term(token, picking);
            // A dropped token is dropped: 0 · NaN would not be.
            let (loss, gradient) =
                if *factor == 0.0 { (0.0, 0.0) } else { (*factor * term.loss, *factor * term.gradient) };
            out.loss += weight * (loss + extra);
            out.d_logprobs_f64[token.index] = weight * (gradient + extra_gradient);
            out.d_logprobs[token.index] = out.d_logprobs_f64[token.index] as f32;
        }
        self.add_entropy_bonus(&sequence, totals, stats, &mut out);
        out.diagnostics = Diagnostics::of(&sequence, &terms, &factors);
        out
    }

    fn entropy_weight(&self, stats: &BatchStats) -> f64 {
        stats.entropy_coef.unwrap_or(self.entropy_coef)
    }

    /// The bonus is on the token mean, whatever the aggregation of the policy term.
    fn add_entropy_bonus(
        &self,
        sequence: &Sequence,
        totals: &BatchTotals,
        stats: &BatchStats,
        out: &mut SequenceLoss,
    ) {
        let Some(d_entropies) = &mut out.d_entropies else { return };
        let weight = -self.entropy_weight(stats) / totals.tokens as f64;
        for token in &sequence.tokens {
            out.loss += weight * token.entropy.expect("needs_entropies() asked for entropies");
            d_entropies[token.index] = weight as f32;
        }
    }
}
