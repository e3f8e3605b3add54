//! What jobs on a fixed set of examples share: the keys of their loop, the order of examples, and the loop itself.
//!
//! The order is a function of the seed alone, so the same data and seed give the same bytes again.

use std::time::Instant;

use freewheel_kernels::Threads;
use freewheel_model::{Adapter, LoadedModel};
use freewheel_types::CounterRng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::LearnerError;
use crate::metrics::MetricsSink;
use crate::optim::{OptimizerConfig, OptimizerSettings, Schedule, ScheduleConfig, ScheduleKind, StepOutcome};
use crate::policy::Policy;
use crate::trainer::{ExpertLoad, PolicyTrainer};

/// Keys of the loop over examples, part of `[sft]`, `[dpo]`, `[reward_model]` and `[distill]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FitConfig {
    /// Optimiser updates to make; data is gone through again when it ends. 1 or more. Default 1000.
    #[schemars(range(min = 1))]
    pub steps: u64,
    /// Examples in one update. 1 or more. Default 64.
    #[schemars(range(min = 1))]
    pub batch_size: usize,
    /// Peak learning rate. 0 or more. Default 1e-4 for `sft` and `distill`, 1e-5 for `reward_model`, 1e-6 for `dpo`.
    #[schemars(range(min = 0))]
    pub learning_rate: f64,
    /// Updates over which the learning rate rises from 0. Default 0.
    pub warmup_steps: u64,
    /// Course of the learning rate: "constant", "linear", "cosine" (default), "wsd" and the others of `[learner]`.
    pub schedule: ScheduleKind,
    /// The learning rate's end as a share of `learning_rate`. In [0, 1]. Default 0.1.
    #[schemars(range(min = 0, max = 1))]
    pub min_lr_ratio: f64,
    /// Decay of the first moment of AdamW; of Lion, the moment's share in a step. In [0, 1). Default 0.9.
    pub beta1: f64,
    /// Decay of the second moment of AdamW; of Lion, of its moment. In [0, 1). Default 0.95.
    pub beta2: f64,
    /// Decoupled weight decay; not applied to norms and biases. 0 or more. Default 0.01 for `sft` and `distill`, else 0.
    pub weight_decay: f64,
    /// Largest global norm of the gradient. Above 0. Default 1.
    pub max_grad_norm: f64,
    /// Tokens in one forward and backward pass; bounds memory. Default 16384.
    #[schemars(range(min = 1))]
    pub micro_batch_tokens: usize,
    /// Longest example, prompt and completion together; longer ones are refused. Tokens. Default: the model's context.
    pub max_tokens: Option<usize>,
    /// Seed of the order of examples. Default 0.
    pub seed: u64,
    /// Compute threads; 0 takes all cores. No result depends on it. Default 0.
    pub threads: usize,
}

impl Default for FitConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch_size: 64,
            learning_rate: 1e-4,
            warmup_steps: 0,
            schedule: ScheduleKind::Cosine,
            min_lr_ratio: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            micro_batch_tokens: 16_384,
            max_tokens: None,
            seed: 0,
            threads: 0,
        }
    }
}

impl FitConfig {
    fn schedule(&self) -> ScheduleConfig {
        ScheduleConfig {
            schedule: self.schedule,
            warmup_steps: self.warmup_steps,
            min_lr_ratio: self.min_lr_ratio,
            ..Default::default()
        }
    }

    /// The learning rate of update `step`, counted from 0.
    pub fn rate(&self, step: u64) -> f64 {
        self.learning_rate * Schedule::new(self.schedule(), self.steps).factor(step)
    }

    /// All that the optimiser is told.
    pub fn optimizer_settings(&self, optimizer: &OptimizerConfig) -> OptimizerSettings {
        OptimizerSettings {
            config: optimizer.clone(),
            betas: [self.beta1, self.beta2],
            weight_decay: self.weight_decay,
            decay_1d: false,
            max_grad_norm: Some(self.max_grad_norm),
        }
    }

    /// Everything wrong with the keys, one line each, naming the key in `section`. Empty: all is well.
    pub fn problems(&self, section: &str) -> Vec<String> {
        let mut problems: Vec<String> = self
            .schedule()
            .problems(self.steps)
            .iter()
            .map(|line| line.replace("learner.", &format!("{section}.")))
            .collect();
        let mut check = |good: bool, key: &str, value: String, limit: &str| {
            if !good {
                problems.push(format!("{section}.{key} is {value}, outside {limit}"));
            }
        };
        let whole = [
            ("steps", self.steps),
            ("batch_size", self.batch_size as u64),
            ("micro_batch_tokens", self.micro_batch_tokens as u64),
        ];
        for (key, value) in whole {
            check(value >= 1, key, value.to_string(), "values of 1 or more");
        }
        for (key, rate) in [("learning_rate", self.learning_rate), ("weight_decay", self.weight_decay)] {
            check(rate.is_finite() && rate >= 0.0, key, rate.to_string(), "finite values of 0 or more");
        }
        for (key, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            check((0.0..1.0).contains(&beta), key, beta.to_string(), "0 to below 1");
        }
        check(self.max_grad_norm > 0.0, "max_grad_norm", self.max_grad_norm.to_string(), "values above 0");
        problems
    }

    /// Example `k` of batch `step` out of `examples`: every pass over the data is a shuffle of its own.
    pub fn pick(&self, examples: usize, step: u64, k: u64) -> usize {
        let at = step * self.batch_size as u64 + k;
        let (pass, place) = (at / examples as u64, at % examples as u64);
        permuted(CounterRng::new(self.seed, pass), place, examples as u64) as usize
    }
}

/// Where `place` goes in a pseudo-random permutation of `0..n`: a Feistel network on the next power of four, walked until the value
/// is inside (Black and Rogaway 2002). Needs no table.
fn permuted(rng: CounterRng, place: u64, n: u64) -> u64 {
    let half_bits = (64 - (n - 1).max(1).leading_zeros()).div_ceil(2);
    let mask = (1u64 << half_bits) - 1;
    let mut value = place;
    loop {
        let (mut left, mut right) = (value >> half_bits, value & mask);
        for round in 0..4 {
            (left, right) = (right, left ^ (rng.u64(round << 32 | right) & mask));
        }
        value = left << half_bits | right;
        if value < n {
            return value;
        }
    }
}

/// A pool of `count` threads; 0 takes all cores.
pub fn threads(count: usize) -> Threads {
    let all = || std::thread::available_parallelism().map_or(1, usize::from);
    Threads::new(if count == 0 { all() } else { count })
}

/// What one batch gave, its gradient being in the policy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchLoss {
    /// Mean loss.
    pub loss: f64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Metrics of the job, by their names.
    pub extra: Map<String, Value>,
}

/// What a run over examples did.
#[derive(Clone, Debug, PartialEq)]
pub struct FitSummary {
    /// Updates made.
    pub steps: u64,
    /// Loss of the last batch.
    pub loss: f64,
    /// Tokens trained on, all steps together.
    pub tokens: u64,
    /// The adapters trained, where there are some and PEFT has a place for them.
    pub adapter: Option<Adapter>,
}

/// A policy that trains `model` as its section asks.
///
/// # Errors
/// [`LearnerError::Config`] with everything that is wrong with `problems` and with `optimizer` for this model.
pub fn policy(
    (section, config): (&str, &FitConfig),
    optimizer: &OptimizerConfig,
    mut problems: Vec<String>,
    model: &LoadedModel,
    trainer: impl FnOnce(Threads) -> Box<dyn PolicyTrainer>,
) -> Result<Policy, LearnerError> {
    problems.extend(optimizer.problems_with(section, &model.params.layout));
    if !problems.is_empty() {
        return Err(LearnerError::Config(problems.join("\n")));
    }
    let threads = threads(config.threads);
    let settings = config.optimizer_settings(optimizer);
    Ok(Policy::new(trainer(threads.clone()), model.params.clone(), settings, threads))
}

/// The loop: picks a batch of `0..examples`, lets `batch` put its gradient into the policy, updates, tells `metrics`.
///
/// # Errors
/// If loss or gradient stop being finite.
pub fn fit(
    (section, config): (&str, &FitConfig),
    policy: &mut Policy,
    examples: usize,
    metrics: &dyn MetricsSink,
    mut batch: impl FnMut(&mut Policy, u64, &[usize]) -> BatchLoss,
) -> Result<FitSummary, LearnerError> {
    let started = Instant::now();
    let mut summary = FitSummary { steps: 0, loss: f64::NAN, tokens: 0, adapter: None };
    for step in 0..config.steps {
        let step_started = Instant::now();
        let picked: Vec<usize> =
            (0..config.batch_size as u64).map(|k| config.pick(examples, step, k)).collect();
        let learning_rate = config.rate(step);
        let BatchLoss { loss, tokens, extra } = batch(policy, step, &picked);
        let diverged = || {
            let what = format!("step {step}: loss or gradient is not finite; lower {section}.learning_rate");
            LearnerError::Config(what)
        };
        if !loss.is_finite() {
            return Err(diverged());
        }
        let StepOutcome::Applied { grad_norm, .. } = policy.update(learning_rate) else {
            return Err(diverged());
        };
        policy.advance();
        summary = FitSummary { steps: step + 1, loss, tokens: summary.tokens + tokens, adapter: None };
        let step_s = step_started.elapsed().as_secs_f64();
        let mut line = Map::new();
        line.insert("step".into(), json!(step + 1));
        line.insert("train/loss".into(), json!(loss));
        line.insert("train/grad_norm".into(), json!(grad_norm));
        line.insert("train/lr".into(), json!(learning_rate));
        line.extend(extra);
        if let Some(violation) = policy.expert_load().and_then(ExpertLoad::max_violation) {
            line.insert("moe/max_violation".into(), json!(violation));
        }
        line.insert("train/tokens_per_s".into(), json!(tokens as f64 / step_s));
        line.insert("time/step_s".into(), json!(step_s));
        line.insert("time/wall_s".into(), Value::from(started.elapsed().as_secs_f64()));
        metrics.step(&line);
    }
    summary.adapter = policy.adapter();
    Ok(summary)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn problems_name_their_section() {
        let bad = FitConfig { steps: 5, warmup_steps: 9, beta2: 1.0, ..Default::default() };
        let problems = bad.problems("sft").join("\n");
        assert!(
            problems.contains("sft.warmup_steps (9)") && problems.contains("sft.beta2 is 1"),
            "{problems}"
        );
    }

    proptest! {
        #[test]
        fn every_pass_sees_every_example_once(seed in any::<u64>(), n in 1usize..70, pass in 0u64..4) {
            let config = FitConfig { seed, batch_size: 1, ..Default::default() };
            let order: Vec<usize> = (0..n as u64).map(|k| config.pick(n, pass * n as u64 + k, 0)).collect();
            prop_assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), n);
            prop_assert!(order.iter().all(|&i| i < n));
        }
    }
}
