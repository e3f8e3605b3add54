//! Estimators of KL(policy ‖ reference) from sampled tokens, as a loss term.
//!
//! With d = log π − log π_ref (Schulman, "Approximating KL divergence", 2020):
//! k1 = d, k2 = d²/2, k3 = exp(−d) − 1 + d. As a *loss*, k1's gradient has mean zero, k2's is the right one on policy, k3's is
//! biased; `k3_plus` shows k3 and descends k2. Weighted by the ratio (gradient included) the estimate is unbiased off
//! policy too (DeepSeek-V3.2, §3.1).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::sequence::{Token, clamp_log};

/// Which estimator of the divergence from the reference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlEstimator {
    /// d. Unbiased as a value; useless as an unweighted loss.
    K1,
    /// d²/2. The gradient of the reverse KL, on policy.
    K2,
    /// exp(−d) − 1 + d. Never negative, low variance.
    #[default]
    K3,
    /// The value of k3 with the gradient of k2 ("k3+", straight-through).
    K3Plus,
}

impl KlEstimator {
    /// (value, d value / d policy log-prob) for log-probs `policy` and `reference`.
    pub fn evaluate(self, policy: f64, reference: f64) -> (f64, f64) {
        let raw = policy - reference;
        let d = clamp_log(raw);
        let inside = if d == raw { 1.0 } else { 0.0 };
        let k3 = (-d).exp_m1() + d;
        match self {
            Self::K1 => (d, inside),
            Self::K2 => (0.5 * d * d, d * inside),
            Self::K3 => (k3, -(-d).exp_m1() * inside),
            Self::K3Plus => (k3, d * inside),
        }
    }
}

/// (value, gradient) of the KL term of one token, before `kl_coef`.
pub(super) fn term(
    estimator: KlEstimator,
    importance_weighted: bool,
    token: &Token,
    reference: f64,
) -> (f64, f64) {
    let (value, slope) = estimator.evaluate(token.policy, reference);
    if importance_weighted {
        (token.ratio * value, token.ratio * slope + token.slope * value)
    } else {
        (value, slope)
    }
}

/// Penalty −`coef`·Σ (log π_prox − log π_ref) over the mask, for KL in the reward (RLOO, REINFORCE++): a constant of
/// the sample, no gradient.
pub fn reward_penalty(coef: f64, proximal_logprobs: &[f64], ref_logprobs: &[f64], loss_mask: &[bool]) -> f64 {
    let pairs = proximal_logprobs.iter().zip(ref_logprobs).zip(loss_mask);
    -coef * pairs.filter(|(_, mask)| **mask).map(|((p, r), _)| p - r).sum::<f64>()
}
