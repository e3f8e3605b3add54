//! `[reward.combine]`: how the values of components become one reward.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[reward.combine]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CombineConfig {
    /// "weighted" (default): the weighted sum. "gate": `floor` when a gate fails, else the weighted sum of the rest, at
    /// least `floor`.
    /// "piecewise": the safety score where safety is at stake, else the weighted sum. "lexicographic": the weighted sum within
    /// -1 and 1, less 2.5 a tier, so that no rollout of a tier beats one of a lower tier. "lagrangian": the weighted sum,
    /// with costs that the learner keeps under limits; tiers still apply.
    pub mode: CombineMode,
    /// Weights by component name; a component not named here has its own `weight`, or 1; one that a tier, cost or
    /// the safety score reads has 0 unless it is given one.
    pub weights: BTreeMap<String, f32>,
    /// Gate: the components that must pass, verifiers or guards; they add nothing to the sum.
    pub gates: Vec<String>,
    /// Gate: the reward when one fails. Default -1.
    pub floor: f32,
    /// Piecewise: the safety score, 0 (unsafe) to 1, as an expression over components: "1 - guard".
    pub safety: Option<String>,
    /// Piecewise: prompts whose reward is the safety score whatever it is, by tag. Default ["safety"].
    pub safety_tags: Vec<String>,
    /// Piecewise: below this safety score the reward is at most that score. 0 to 1, default 0.15 (Llama 2).
    pub safety_floor: f32,
    /// Lexicographic, Lagrangian: tiers, the first whose condition holds counts.
    pub tier: Vec<TierConfig>,
    /// Lagrangian: the limits and how fast they bite.
    pub lagrangian: LagrangianConfig,
}

impl Default for CombineConfig {
    fn default() -> Self {
        Self {
            mode: CombineMode::Weighted,
            weights: BTreeMap::new(),
            gates: Vec::new(),
            floor: -1.0,
            safety: None,
            safety_tags: vec!["safety".into()],
            safety_floor: 0.15,
            tier: Vec::new(),
            lagrangian: LagrangianConfig::default(),
        }
    }
}

/// The rules of combination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CombineMode {
    /// Weighted sum.
    #[default]
    Weighted,
    /// Gates first, then the weighted sum.
    Gate,
    /// The safety score where safety is at stake, else the weighted sum.
    Piecewise,
    /// Tiers first, the weighted sum within a tier.
    Lexicographic,
    /// The weighted sum, and costs under limits.
    Lagrangian,
}

/// One `[[reward.combine.tier]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TierConfig {
    /// Name, shown in records.
    pub name: String,
    /// How far down: 1 to 10, default 1. Every rollout of a tier loses to every one of a lower tier.
    pub tier: u8,
    /// When a rollout falls into it: "guard > 0.5", "refusal == 'refuse' && tag in ['benign']".
    #[serde(rename = "if")]
    pub condition: String,
}

impl Default for TierConfig {
    fn default() -> Self {
        Self { name: String::new(), tier: 1, condition: String::new() }
    }
}

/// `[reward.combine.lagrangian]`: multipliers that only the learner moves (Safe RLHF, arXiv 2310.12773).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LagrangianConfig {
    /// How fast a multiplier follows its violation, per update. Above 0, up to 10, default 0.05.
    pub lr: f64,
    /// Multipliers at the start. 0.001 to `max`, default 0.1.
    pub init: f64,
    /// Largest multiplier. Up to 1000, default 20.
    pub max: f64,
    /// How much of the estimated cost is left after one update. 0 or more, below 1; default 0.9.
    pub ema: f64,
    /// Samples a cost must have been seen on before its multiplier moves. Default 256.
    pub min_samples: u64,
    /// What is kept under a limit.
    pub costs: Vec<CostConfig>,
}

impl Default for LagrangianConfig {
    fn default() -> Self {
        Self { lr: 0.05, init: 0.1, max: 20.0, ema: 0.9, min_samples: 256, costs: Vec::new() }
    }
}

/// One limited cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CostConfig {
    /// Name; names metrics (`cost/<name>/…`).
    pub name: String,
    /// The cost of a rollout, 0 or more: "guard", "refusal == 'refuse'".
    pub expr: String,
    /// What its mean is kept under. 0 or more.
    pub limit: f64,
    /// Prompts it is about: "tag:harmful|adversarial". Default: all.
    pub on: Option<String>,
}
