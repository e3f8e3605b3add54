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
    /// What the learner keeps under a limit, in config order; empty unless rewards are combined with limits.
    pub costs: Vec<CostScore>,
    /// The tier that the rollout fell into, where tiers are configured and one matched.
    pub tier: Option<TierHit>,
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
    /// The class it chose, for components that sort completions into classes.
    pub label: Option<String>,
    /// Identity of what judged beyond the configuration: digest of a model's weights, name of a server's model.
    pub version: Option<String>,
    /// Milliseconds.
    pub latency_ms: f32,
}

/// One limited cost of one rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CostScore {
    /// Name from the config.
    pub name: String,
    /// The cost, finite; `None` if it does not apply to this prompt.
    pub value: Option<f32>,
}

/// The tier a rollout fell into: it loses to every rollout of a lower one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TierHit {
    /// Name from the config.
    pub name: String,
    /// Its height, 1 or more.
    pub tier: u8,
}

impl RewardRecord {
    /// A record of what could not be judged, by nothing.
    pub fn unscored(reason: impl Into<String>, reward_version: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Unscored { reason: reason.into() },
            components: Vec::new(),
            costs: Vec::new(),
            tier: None,
            reward_version: reward_version.into(),
            latency_ms: 0.0,
        }
    }

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
