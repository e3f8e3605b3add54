//! Advantages: from the rewards of whole prompt groups to the credit of every sample.
//!
//! Unscored samples are left out of every mean, deviation and batch, and get no advantage; they are never zero. Whole batches
//! go in because some baselines (`batch_std`, `reinforce_pp`) span groups. Sources are named at each kind. What is credited token
//! by token (returns with a divergence in the reward, GAE) is in [`credit()`].

mod credit;
mod group;
mod returns;
mod shaping;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use credit::{CreditRules, CreditSample, TokenCredit, credit};
pub use returns::{Gae, GaeOutput, discounted_returns, gae, whiten};
pub use shaping::{combine_normalised, overlong_penalty, soft_value};

/// How rewards become advantages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Advantage {
    /// (R − mean of the group) / (standard deviation of the group + eps), n − 1 in the deviation (GRPO, arXiv 2402.03300).
    Grpo,
    /// R − mean of the group (Dr. GRPO, 2503.20783).
    #[default]
    DrGrpo,
    /// R − mean of the *other* samples of the group (RLOO, 2402.14740).
    Rloo,
    /// (R − mean of the group) / (standard deviation of all rewards of the batch + eps) (Lite PPO, 2508.08221).
    BatchStd,
    /// R − length-weighted mean of the group, the variance-optimal baseline (OPO, 2505.23585).
    Opo,
    /// R − the reward of a greedy completion of the same prompt (ReMax, 2310.10505): one more sample a group, not trained on.
    Remax,
    /// (R − mean of the group) / mean of the group: hard prompts weigh ~1/p (MaxRL). A group whose mean is not above 0 gets 0.
    Maxrl,
    /// Only the best sample of a group: (best − second) / (standard deviation + eps) (pass@k, 2503.19595).
    PassK,
    /// R whitened over all tokens of the batch (REINFORCE++, 2501.03262, outcome reward, γ = 1).
    ReinforcePp,
    /// R − mean of the group, then whitened over all tokens of the batch (REINFORCE++ with baseline).
    ReinforcePpBaseline,
    /// (R − mean of the group), normalised to mean 0 and deviation 1 over the batch (Magistral, 2506.10910).
    Magistral,
    /// Each reward component normalised in its group, summed, normalised over the batch (GDPO, TRL's `normalize_then_sum`).
    Gdpo,
    /// R − a running mean of the rewards of earlier batches (`reward_ema_decay`); for groups without a contrast of their own.
    Ema,
    /// Generalised advantage estimation with a critic that is trained beside the policy (1506.02438), token by token.
    Gae,
    /// R − β·log mean exp(R/β) over the group: what `oapl` regresses on.
    SoftValue,
}

/// Settings, defaults filled in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdvantageConfig {
    /// Which one.
    pub kind: Advantage,
    /// Added to standard deviations.
    pub std_eps: f64,
    /// Subtracted from every advantage.
    pub shift: f64,
    /// Temperature of the soft value.
    pub beta: f64,
    /// Running mean of the rewards before this batch; `None` before the first.
    pub reward_ema: Option<f64>,
}

impl Advantage {
    /// Whether a group whose rewards are all equal has nothing to teach, because only differences within it count.
    pub fn needs_contrast(self) -> bool {
        !matches!(self, Self::ReinforcePp | Self::Gdpo | Self::Ema | Self::Gae)
    }
}

impl Default for AdvantageConfig {
    fn default() -> Self {
        Self { kind: Advantage::default(), std_eps: 1e-6, shift: 0.0, beta: 1.0, reward_ema: None }
    }
}

/// What an advantage needs of one sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Its reward, after any shaping; `None` if it could not be scored.
    pub reward: Option<f64>,
    /// Its live tokens.
    pub tokens: u64,
    /// Reward of its group's greedy completion, where there is one.
    pub greedy: Option<f64>,
}

/// Advantage of every sample of every group of a batch; `None` where the sample is unscored.
///
/// # Panics
/// For `gdpo` and `gae`, which need more than a reward: see [`credit()`]; for `remax` where a group has no greedy completion.
pub fn advantages(config: &AdvantageConfig, groups: &[Vec<Sample>]) -> Vec<Vec<Option<f64>>> {
    let scored: Vec<Vec<Scored>> = groups.iter().map(|group| scored(group)).collect();
    let values = group::evaluate(config, &scored);
    groups.iter().zip(values).map(|(group, values)| scatter(group, &values, config.shift)).collect()
}

/// Whether a group can teach anything: two samples are scored and their rewards differ.
pub fn is_informative(rewards: impl IntoIterator<Item = Option<f32>>) -> bool {
    let mut scored = rewards.into_iter().flatten();
    scored.next().is_some_and(|first| scored.any(|reward| reward != first))
}

/// A scored sample.
#[derive(Clone, Copy, Debug)]
struct Scored {
    reward: f64,
    tokens: f64,
    greedy: Option<f64>,
}

fn scored(group: &[Sample]) -> Vec<Scored> {
    let scored = |sample: &Sample| {
        sample.reward.map(|reward| Scored { reward, tokens: sample.tokens as f64, greedy: sample.greedy })
    };
    group.iter().filter_map(scored).collect()
}

fn scatter(group: &[Sample], values: &[f64], shift: f64) -> Vec<Option<f64>> {
    let mut values = values.iter();
    let mut next = || values.next().expect("one value for each scored sample") - shift;
    group.iter().map(|sample| sample.reward.map(|_| next())).collect()
}
