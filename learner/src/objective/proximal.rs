//! The proximal policy without a forward pass of its own.
//!
//! A-3PO (arXiv 2512.06547) takes log π_prox for a point on the line between sampler and learner:
//! log π_prox ≈ log μ + a·(log π − log μ), a = (v_prox − v_μ)/(v_θ − v_μ), versions token by token. Detached. A token drawn by
//! the newest weights has no line to lie on: there the three are one, a = 1.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the log-probs before a batch's first update are had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Proximal {
    /// By a forward pass over the batch, where `minibatches` is above 1; with one update a batch they are the policy's own.
    #[default]
    Exact,
    /// On the line between behaviour and policy log-probs, by version (A-3PO): saves that pass.
    LogLinear,
}

/// Proximal log-probs `[T]` of a sequence whose tokens were drawn by `versions` `[T]`; `now` is the version of the weights that
/// gave `policy`, `proximal` that of the batch's start. Versions in updates, fractions between the updates of a batch.
///
/// # Panics
/// If the lengths differ.
pub fn log_linear(policy: &[f64], behaviour: &[f64], versions: &[f64], proximal: f64, now: f64) -> Vec<f64> {
    assert!(policy.len() == behaviour.len() && policy.len() == versions.len(), "one length for all fields");
    let point = |((&policy, &behaviour), &version): ((&f64, &f64), &f64)| {
        let share =
            if now > version { ((proximal - version) / (now - version)).clamp(0.0, 1.0) } else { 1.0 };
        // At the ends exactly, and without 0 · ∞.
        match share {
            0.0 => behaviour,
            1.0 => policy,
            share => behaviour + share * (policy - behaviour),
        }
    };
    policy.iter().zip(behaviour).zip(versions).map(point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_point_lies_where_the_versions_say() {
        // Drawn by 6, 9, 10; the batch starts at 10, half of its updates are made.
        let got = log_linear(&[-1.0; 3], &[-2.0; 3], &[6.0, 9.0, 10.0], 10.0, 10.5);
        assert!((got[0] - (-2.0 + 4.0 / 4.5)).abs() <= 1e-15 && (got[1] - (-2.0 + 1.0 / 1.5)).abs() <= 1e-15);
        assert_eq!(got[2], -2.0, "drawn by the proximal policy itself");
    }

    #[test]
    fn before_the_first_update_it_is_the_policy() {
        let got = log_linear(&[-1.0, f64::NEG_INFINITY], &[-2.0, -1.0], &[3.0, 10.0], 10.0, 10.0);
        assert_eq!(got, [-1.0, f64::NEG_INFINITY]);
    }
}
