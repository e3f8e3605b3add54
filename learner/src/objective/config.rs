//! The settings of the loss and their checks.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::aggregate::LossAggregation;
use super::correction::{Correction, SequenceRejection};
use super::covariance::CovarianceControl;
use super::entropy::AdaptiveEntropy;
use super::kl::KlEstimator;
use super::proximal::Proximal;
use super::recipes::{Objective, Recipe};
use crate::advantage::{Advantage, AdvantageConfig, CreditRules, Gae};

/// What the policy's ratio is taken against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RatioAnchor {
    /// The distribution the token was drawn from: w = π/μ.
    Behaviour,
    /// The learner frozen before the batch's first update: r = π/π_old; what lies between μ and π_old is left to `correction`.
    Proximal,
}

/// Where the divergence from the reference is felt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlPlacement {
    /// A term of the loss, with its gradient.
    #[default]
    Loss,
    /// Subtracted from the rewards, a constant: the advantage carries it.
    Reward,
}

/// Settings of advantage and objective, part of `[learner]`. `None` means the objective's own default (its recipe).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ObjectiveConfig {
    /// The policy loss: `aipo` (default), `aipo_surrogate`, `reinforce`, `reinforce_unbiased`, `asymmetric_reinforce`, `ppo`, `grpo`,
    /// `dr_grpo`, `dapo`, `two_sided`, `gspo`, `luspo`, `gmpo`, `sapo`, `cispo`, `rloo`, `decoupled_ppo`, `topr`, `vespo`, `dppo`,
    /// `dppo_symmetric`, `m2po`, `oapl` or `mirror_descent`. Each with its formula: docs/objectives.md.
    pub objective: Objective,
    /// The advantage: `grpo`, `dr_grpo`, `rloo`, `batch_std`, `opo`, `remax` (one more, greedy, sample a group), `maxrl`, `pass_k`, `reinforce_pp`, `reinforce_pp_baseline`,
    /// `magistral`, `gdpo`, `ema`, `gae` (with a critic) or `soft_value`. Default: the objective's own (`dr_grpo` for `aipo`, `grpo`
    /// for `grpo`, `gae` for `ppo`, …).
    pub advantage: Option<Advantage>,
    /// Added to the standard deviation that `grpo`, `batch_std`, `pass_k`, `magistral` and `gdpo` divide by. Above 0. Default 1e-6.
    pub advantage_std_eps: Option<f64>,
    /// Subtracted from every advantage: a baseline below the mean (negative value) trusts off-policy successes more than
    /// failures (asymmetric REINFORCE, arXiv 2506.20520). Reward units. Default 0; −0.1 for `asymmetric_reinforce`.
    pub advantage_shift: Option<f64>,
    /// How token terms become the loss: `token_mean`, `seq_mean_token_mean`, `seq_mean_token_sum`, `fixed_length` or `prompt_mean`.
    /// Default: the objective's own (`token_mean` for `aipo` and `dapo`, `seq_mean_token_mean` for `grpo`, …).
    pub loss_aggregation: Option<LossAggregation>,
    /// Discount γ of later rewards, for `gae`, `reinforce_pp` and its variant. In (0, 1]. Default 1.
    pub gamma: Option<f64>,
    /// λ of `gae`: 1 credits what followed, lower values lean on the critic. In [0, 1]. Default 0.95.
    pub gae_lambda: Option<f64>,
    /// Whether the advantages of `gae` are shifted and scaled to mean 0 and deviation 1 over the batch. Default true.
    pub gae_whiten: Option<bool>,
    /// The critic's values move at most this far in one batch. Above 0. Default 0.2.
    pub value_clip: Option<f64>,
    /// Peak learning rate of the critic; its course is the policy's. 0 or more. Default: that of the policy.
    pub critic_learning_rate: Option<f64>,
    /// What the running mean of the rewards keeps from batch to batch, for `ema`. In [0, 1). Default 0.9.
    pub reward_ema_decay: Option<f64>,
    /// Weights of the reward components for `gdpo`, in config order; those beyond the list weigh 1. Default: their `weight`s in
    /// `[[reward.component]]`.
    pub component_weights: Vec<f64>,
    /// What ratios are taken against: `behaviour` (the sampler) or `proximal` (the learner before the batch's first update).
    /// Default: `behaviour`; `proximal` for `decoupled_ppo` and whenever `correction` is set.
    pub ratio: Option<RatioAnchor>,
    /// How the log-probs before a batch's first update are had: `exact` (default; a forward pass where `minibatches` is above 1) or
    /// `log_linear` (between sampler and learner, by version, no pass).
    pub proximal: Proximal,
    /// Lower clip distance: ratios below 1 − `clip_low` stop counting where the advantage is negative. 0 or more.
    /// Default: the objective's own (0.2 for `grpo` and `dapo`, 3e-4 for `gspo`, 0.4 for `gmpo`, …).
    pub clip_low: Option<f64>,
    /// Upper clip distance: ratios above 1 + `clip_high` stop counting where the advantage is positive. 0 or more.
    /// Default: the objective's own (0.2 for `grpo`, 0.28 for `dapo`, 4e-4 for `gspo`, …).
    pub clip_high: Option<f64>,
    /// Dual clip: bounds the loss at `dual_clip` · |A| where the advantage is negative. Above 1; 3 is usual. Default: off.
    pub dual_clip: Option<f64>,
    /// Cap on the importance weight: c of `aipo`, `cispo`, `dppo`, `topr`, δ of `aipo_surrogate` and `two_sided`. Above 0.
    /// Default: the objective's own (4 for `aipo` and `two_sided`, 5 for `cispo`, 20 for `dppo`, 1 for `topr`, none for
    /// `reinforce_unbiased`).
    pub is_cap: Option<f64>,
    /// Temperature β of the regression objectives `oapl` and `mirror_descent` and of its advantage `soft_value`. Above 0. Default 1.
    pub regression_beta: Option<f64>,
    /// Mean of (log w)² that `m2po` leaves in a batch. Above 0. Default 0.04.
    pub m2po_tau: Option<f64>,
    /// Correction of the gap between sampler and learner, ρ = π_old/μ: `none`, `full` (weight ρ), `tis` (ρ truncated),
    /// `mis` (ρ, 0 outside the band), `icepop` (as `mis`, wider), `seq_tis`, `seq_mis` (the same on the product over the sequence).
    /// Default: `none`; `full` for `decoupled_ppo`.
    pub correction: Option<Correction>,
    /// Lower bound of the correction's weight. 0 or more. Default: the correction's own (0; 0.5 for `mis` and `icepop`).
    pub correction_low: Option<f64>,
    /// Upper bound of the correction's weight. Above `correction_low`. Default: the correction's own (2; 5 for `icepop`).
    pub correction_high: Option<f64>,
    /// Divides the correction's weights by their mean over the batch, after truncation. Default false.
    pub correction_normalise: bool,
    /// Drops whole sequences whose sampler and learner disagree: `none` (default), `geo` (geometric mean of ρ outside a band),
    /// `k2`, `k3` (mean divergence estimate above a bound).
    pub sequence_rejection: SequenceRejection,
    /// Lower bound for `sequence_rejection = "geo"`. Default 0.999.
    pub rejection_low: Option<f64>,
    /// Upper bound for `sequence_rejection`. Default 1.001 for `geo`, 2 for `k2`, 0.01 for `k3`.
    pub rejection_high: Option<f64>,
    /// Off-policy sequence mask (DeepSeek-V3.2): drops a sequence with a negative advantage whose mean of log(μ/π) is above this.
    /// 0.5 is usual. Nats. Default: off.
    pub opsm_delta: Option<f64>,
    /// Scales the learning rate of each update by √ESS, the effective sample size of its sequence weights (VCPO): updates from data
    /// that the policy has moved away from become small. Default false.
    pub ess_learning_rate: bool,
    /// Trains only on this share of tokens, those with the highest entropy. In (0, 1); 0.2 is usual. Default: off.
    pub top_entropy: Option<f64>,
    /// Weight of the divergence from the reference. 0 or more; above 0 the reference is kept in memory and run on every
    /// batch. Default 0.
    pub kl_coef: f64,
    /// The reference takes over the policy's weights every this many updates. 1 or more. Default: it stays at the first ones.
    pub reference_every: Option<u64>,
    /// Where that divergence goes: into the `loss` (default) or into the `reward`.
    pub kl_placement: KlPlacement,
    /// Estimator of that divergence: `k1`, `k2`, `k3` (default) or `k3_plus` (value of k3, gradient of k2).
    pub kl_estimator: KlEstimator,
    /// Whether the divergence is weighted by the ratio, gradient included, which makes it unbiased off policy. Default true.
    pub kl_importance_weighted: Option<bool>,
    /// Weight of the entropy bonus: this much times the mean token entropy is subtracted from the loss. Default 0.
    pub entropy_coef: f64,
    /// Mean token entropy to hold: after each batch below it the weight of the bonus grows by `entropy_step`, after each above it
    /// shrinks, and it is applied only below (Skywork-OR1); `entropy_coef` is where it starts. Nats, above 0. Default: off.
    pub entropy_target: Option<f64>,
    /// What the weight of the entropy bonus moves by. Above 0. Default 5e-3.
    pub entropy_step: Option<f64>,
    /// Weight of (log π/μ)² in the loss, which holds the policy near the sampler. 0 or more; 1e-3 is usual. Default 0.
    pub anchor_coef: f64,
    /// What is done about the tokens that lower the entropy most: `none` (default), `clip` (Clip-Cov) or `kl` (KL-Cov).
    pub covariance_control: CovarianceControl,
    /// Share of the batch's tokens that `covariance_control` acts on, one token at least. In (0, 1). Default 2e-4.
    pub covariance_fraction: Option<f64>,
    /// Lower bound of the covariance that `covariance_control = "clip"` draws from. Default 1.
    pub covariance_low: Option<f64>,
    /// Upper bound of it. Above `covariance_low`. Default 5.
    pub covariance_high: Option<f64>,
    /// What `covariance_control = "kl"` charges for |log r|. 0 or more. Default 1.
    pub covariance_kl_coef: Option<f64>,
    /// Whether truncated completions are left out of the loss; they still count in their group's baseline (DAPO). Default false.
    pub overlong_filter: bool,
    /// Soft overlong punishment (DAPO): the last this many tokens before `max_new_tokens` cost up to 1 reward, linearly. Tokens.
    /// Default: off.
    pub overlong_buffer: Option<u32>,
}

impl ObjectiveConfig {
    /// The objective's table row.
    pub fn recipe(&self) -> &'static Recipe {
        self.objective.recipe()
    }

    /// Advantage settings with defaults filled in.
    pub fn advantage_config(&self) -> AdvantageConfig {
        AdvantageConfig {
            kind: self.advantage.unwrap_or(self.recipe().advantage),
            std_eps: self.advantage_std_eps.unwrap_or(1e-6),
            shift: self.advantage_shift.unwrap_or(self.recipe().shift),
            beta: self.regression_beta.unwrap_or(1.0),
            reward_ema: None,
        }
    }

    /// How rewards become the credit of tokens, defaults filled in.
    pub fn credit_rules(&self) -> CreditRules {
        CreditRules {
            advantage: self.advantage_config(),
            gae: Gae { gamma: self.gamma.unwrap_or(1.0), lambda: self.gae_lambda.unwrap_or(0.95) },
            whiten: self.gae_whiten.unwrap_or(true),
            component_weights: self.component_weights.clone(),
        }
    }

    /// Whether every group has one more sample, a greedy one, that the others are compared with.
    pub fn needs_greedy(&self) -> bool {
        self.advantage_config().kind == Advantage::Remax
    }

    /// Whether a critic is trained beside the policy.
    pub fn needs_critic(&self) -> bool {
        self.advantage_config().kind == Advantage::Gae
    }

    /// The estimator and weight of a divergence in the reward, if it goes there.
    pub fn reward_divergence(&self) -> Option<(KlEstimator, f64)> {
        let there = self.kl_placement == KlPlacement::Reward && self.kl_coef > 0.0;
        there.then_some((self.kl_estimator, self.kl_coef))
    }

    /// How the weight of the entropy bonus adapts, if it does.
    pub fn adaptive_entropy(&self) -> Option<AdaptiveEntropy> {
        let step = self.entropy_step.unwrap_or(5e-3);
        self.entropy_target.map(|target| AdaptiveEntropy { target, step })
    }

    /// The aggregation, default filled in.
    pub fn aggregation(&self) -> LossAggregation {
        self.loss_aggregation.unwrap_or(self.recipe().aggregation)
    }

    /// The correction, default filled in.
    pub fn correction_kind(&self) -> Correction {
        self.correction.unwrap_or(self.recipe().correction)
    }

    /// The anchor of ratios, default filled in.
    pub fn anchor(&self) -> RatioAnchor {
        let default = if self.correction_kind() == Correction::None {
            RatioAnchor::Behaviour
        } else {
            RatioAnchor::Proximal
        };
        self.ratio.unwrap_or(default)
    }

    /// Everything wrong with the settings, one line each, keys as in `[learner]`. Empty: all is well.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (key, value, limit, bad) in self.ranges() {
            if value.is_some_and(|x| !x.is_finite() || bad(x)) {
                problems.push(format!("learner.{key} is {}, outside {limit}", value.unwrap_or(f64::NAN)));
            }
        }
        if let Some((low, high)) = self.correction_kind().bounds(self)
            && low >= high
        {
            problems.push(format!(
                "learner.correction_low is {low}, must be below learner.correction_high ({high})"
            ));
        }
        if self.correction_kind() != Correction::None && self.ratio == Some(RatioAnchor::Behaviour) {
            problems.push(
                "learner.correction weighs by π_old/μ, but learner.ratio = \"behaviour\" already contains it: \
                 remove one, or set ratio = \"proximal\""
                    .to_owned(),
            );
        }
        if self.sequence_rejection == SequenceRejection::Geo {
            let (low, high) = self.sequence_rejection.bounds(self);
            if low >= high {
                problems.push(format!(
                    "learner.rejection_low is {low}, must be below learner.rejection_high ({high})"
                ));
            }
        }
        let (low, high) = (self.covariance_low.unwrap_or(1.0), self.covariance_high.unwrap_or(5.0));
        if low >= high {
            problems.push(format!(
                "learner.covariance_low is {low}, must be below learner.covariance_high ({high})"
            ));
        }
        if self.reference_every == Some(0) {
            problems.push("learner.reference_every is 0, outside values of 1 or more".to_owned());
        }
        if self.component_weights.iter().any(|weight| !weight.is_finite()) {
            problems.push("learner.component_weights holds a value that is not finite".to_owned());
        }
        if self.reward_divergence().is_some() && self.advantage_config().kind == Advantage::Gdpo {
            problems.push(
                "learner.kl_placement = \"reward\" has no place in learner.advantage = \"gdpo\", which normalises each component: \
                 put the divergence into the loss"
                    .to_owned(),
            );
        }
        if self.correction_normalise && self.correction_kind() == Correction::None {
            problems.push(
                "learner.correction_normalise divides weights by their mean, but there are none: set learner.correction".to_owned(),
            );
        }
        if self.objective == Objective::Oapl && self.advantage.is_some_and(|a| a != Advantage::SoftValue) {
            problems.push("learner.objective = \"oapl\" regresses on reward minus soft value: leave learner.advantage out".to_owned());
        }
        problems
    }

    #[expect(clippy::type_complexity, reason = "a table, read top to bottom")]
    fn ranges(&self) -> [(&'static str, Option<f64>, &'static str, fn(f64) -> bool); 28] {
        [
            ("advantage_std_eps", self.advantage_std_eps, "values above 0", |x| x <= 0.0),
            ("advantage_shift", self.advantage_shift, "finite values", |_| false),
            ("clip_low", self.clip_low, "values of 0 or more", |x| x < 0.0),
            ("clip_high", self.clip_high, "values of 0 or more", |x| x < 0.0),
            ("dual_clip", self.dual_clip, "values above 1", |x| x <= 1.0),
            ("is_cap", self.is_cap, "values above 0", |x| x <= 0.0),
            ("regression_beta", self.regression_beta, "values above 0", |x| x <= 0.0),
            ("m2po_tau", self.m2po_tau, "values above 0", |x| x <= 0.0),
            ("correction_low", self.correction_low, "values of 0 or more", |x| x < 0.0),
            ("correction_high", self.correction_high, "values above 0", |x| x <= 0.0),
            ("rejection_low", self.rejection_low, "values above 0", |x| x <= 0.0),
            ("rejection_high", self.rejection_high, "values above 0", |x| x <= 0.0),
            ("opsm_delta", self.opsm_delta, "finite values", |_| false),
            ("top_entropy", self.top_entropy, "values above 0 and below 1", |x| x <= 0.0 || x >= 1.0),
            ("kl_coef", Some(self.kl_coef), "values of 0 or more", |x| x < 0.0),
            ("entropy_coef", Some(self.entropy_coef), "finite values", |_| false),
            ("gamma", self.gamma, "values above 0, at most 1", |x| x <= 0.0 || x > 1.0),
            ("gae_lambda", self.gae_lambda, "0 to 1", |x| !(0.0..=1.0).contains(&x)),
            ("value_clip", self.value_clip, "values above 0", |x| x <= 0.0),
            ("critic_learning_rate", self.critic_learning_rate, "values of 0 or more", |x| x < 0.0),
            ("reward_ema_decay", self.reward_ema_decay, "0 to below 1", |x| !(0.0..1.0).contains(&x)),
            ("entropy_target", self.entropy_target, "values above 0", |x| x <= 0.0),
            ("entropy_step", self.entropy_step, "values above 0", |x| x <= 0.0),
            ("anchor_coef", Some(self.anchor_coef), "values of 0 or more", |x| x < 0.0),
            ("covariance_fraction", self.covariance_fraction, "values above 0 and below 1", |x| {
                x <= 0.0 || x >= 1.0
            }),
            ("covariance_low", self.covariance_low, "finite values", |_| false),
            ("covariance_high", self.covariance_high, "finite values", |_| false),
            ("covariance_kl_coef", self.covariance_kl_coef, "values of 0 or more", |x| x < 0.0),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_aipo_against_the_behaviour_policy() {
        let config = ObjectiveConfig::default();
        assert_eq!(config.objective, Objective::Aipo);
        assert_eq!(config.anchor(), RatioAnchor::Behaviour);
        assert_eq!(config.aggregation(), LossAggregation::TokenMean);
        assert_eq!(config.advantage_config().kind, Advantage::DrGrpo);
        assert_eq!(config.problems(), Vec::<String>::new());
    }

    #[test]
    fn every_problem_is_reported_at_once_with_its_key() {
        let config = ObjectiveConfig {
            clip_low: Some(-0.1),
            kl_coef: f64::NAN,
            top_entropy: Some(1.0),
            correction: Some(Correction::Tis),
            ratio: Some(RatioAnchor::Behaviour),
            correction_low: Some(3.0),
            ..Default::default()
        };
        let problems = config.problems().join("\n");
        for key in ["clip_low is -0.1", "kl_coef is NaN", "top_entropy is 1", "correction_low is 3", "ratio"]
        {
            assert!(problems.contains(key), "{key} missing in:\n{problems}");
        }
        assert_eq!(config.problems().len(), 5);
    }

    #[test]
    fn a_correction_moves_the_anchor_so_that_nothing_is_weighed_twice() {
        let config = ObjectiveConfig { correction: Some(Correction::Tis), ..Default::default() };
        assert_eq!(config.anchor(), RatioAnchor::Proximal);
        assert_eq!(config.problems(), Vec::<String>::new());
    }

    #[test]
    fn names_are_those_of_the_field() {
        let text = r#"{"objective":"two_sided","advantage":"dr_grpo","loss_aggregation":"prompt_mean","kl_estimator":"k3_plus"}"#;
        let config: ObjectiveConfig = serde_json::from_str(text).unwrap();
        assert_eq!(config.objective, Objective::TwoSided);
        assert_eq!(config.kl_estimator, KlEstimator::K3Plus);
        assert!(serde_json::from_str::<ObjectiveConfig>(r#"{"clip_hi":1}"#).is_err());
    }
}
