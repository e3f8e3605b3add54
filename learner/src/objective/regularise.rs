//! Terms beside the policy loss, token by token: divergence from the reference, anchor to the sampler, KL-Cov's toll.

use super::config::{KlPlacement, ObjectiveConfig};
use super::covariance::Covariance;
use super::kl::{self, KlEstimator};
use super::sequence::Token;

/// The terms of a run, resolved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Regularisers {
    kl_coef: f64,
    kl_estimator: KlEstimator,
    kl_importance_weighted: bool,
    anchor_coef: f64,
}

impl Regularisers {
    pub(super) fn new(config: &ObjectiveConfig) -> Self {
        let in_loss = config.kl_placement == KlPlacement::Loss;
        Self {
            kl_coef: if in_loss { config.kl_coef } else { 0.0 },
            kl_estimator: config.kl_estimator,
            kl_importance_weighted: config.kl_importance_weighted.unwrap_or(true),
            anchor_coef: config.anchor_coef,
        }
    }

    /// (value, gradient) of all terms at one token; `covariance` is given where the token was picked.
    pub(super) fn term(&self, token: &Token, covariance: Option<&Covariance>) -> (f64, f64) {
        let parts = [self.kl(token), self.anchor(token), covariance.map_or((0.0, 0.0), |c| c.toll(token))];
        parts.into_iter().fold((0.0, 0.0), |(value, gradient), part| (value + part.0, gradient + part.1))
    }

    fn kl(&self, token: &Token) -> (f64, f64) {
        if self.kl_coef == 0.0 {
            return (0.0, 0.0);
        }
        let reference = token.reference.expect("needs_reference() asked for ref_logprobs");
        let (value, gradient) = kl::term(self.kl_estimator, self.kl_importance_weighted, token, reference);
        (self.kl_coef * value, self.kl_coef * gradient)
    }

    /// τ·(log π/μ)² (Kimi K2.5; prime-rl), which holds the policy near the sampler.
    fn anchor(&self, token: &Token) -> (f64, f64) {
        let log_w = token.log_w();
        (self.anchor_coef * log_w * log_w, 2.0 * self.anchor_coef * log_w)
    }
}
