//! A rollout that has been judged.

use serde::{Deserialize, Serialize};

use crate::Rollout;

/// A rollout with its reward record; only this can become a training sample.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredRollout {
    /// What was judged.
    pub rollout: Rollout,
    /// The judgement.
    pub reward: RewardRecord,
}

/// How a completion was judged: every component's raw value, and what came of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RewardRecord {
    /// The outcome.
    pub verdict: Verdict,
    /// Every component, in config order.
    pub components: Vec<ComponentScore>,
    /// Hash of the reward configuration that judged.
    pub reward_version: String,
    /// Milliseconds spent judging.
    pub latency_ms: f32,
}

/// The composed outcome. *Unscored is never zero.*
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// A reward.
    Scored {
        /// Composed reward, finite.
        reward: f32,
        /// Whether the answer counts as right (pass rates, accuracy); `None` when no component decides that.
        correct: Option<bool>,
        /// Name of the gate that failed, if one did.
        gated_by: Option<String>,
    },
    /// No reward could be had, and why. Never trained on, never counted as 0.
    Unscored {
        /// Reason, for people.
        reason: String,
    },
}

/// One component's contribution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ComponentScore {
    /// Name from the config.
    pub name: String,
    /// Raw value; `None` if this component did not apply or could not score.
    pub value: Option<f32>,
    /// What the component wants to say: categories hit, parsed answer, error.
    pub detail: Option<String>,
    /// Milliseconds.
    pub latency_ms: f32,
}

impl RewardRecord {
    /// The reward, if there is one.
    pub fn reward(&self) -> Option<f32> {
        match self.verdict {
            Verdict::Scored { reward, .. } => Some(reward),
            Verdict::Unscored { .. } => None,
        }
    }

    /// Whether the answer was right, if known.
    pub fn correct(&self) -> Option<bool> {
        match self.verdict {
            Verdict::Scored { correct, .. } => correct,
            Verdict::Unscored { .. } => None,
        }
    }
}
