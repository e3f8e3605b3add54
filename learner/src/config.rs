//! `[learner]`: the step loop's settings, with those of the objective beside them under the same heading.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::flat::flat_section;
use crate::objective::ObjectiveConfig;
use crate::optim::{OptimizerConfig, OptimizerSettings, ScheduleConfig};

/// The `[learner]` section. Written flat: the keys of all parts side by side, every other key refused.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LearnerConfig {
    /// Loop, optimiser, checkpoints, publishing. Its fields are also reached directly: `config.steps`.
    pub training: TrainingConfig,
    /// Course of the learning rate.
    pub schedule: ScheduleConfig,
    /// How the weights move.
    pub optimizer: OptimizerConfig,
    /// Advantage and loss.
    pub loss: ObjectiveConfig,
}

/// Loop, optimiser, checkpoints and publishing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingConfig {
    /// Optimiser updates to make; the run ends after the last. 1 or more. Default 100.
    #[schemars(range(min = 1))]
    pub steps: u64,
    /// Prompt groups in one update's batch. 1 or more. Default 16.
    #[schemars(range(min = 1))]
    pub groups_per_step: usize,
    /// Updates that one batch is split into, whole groups each. 1 to `groups_per_step`. Default 1.
    #[schemars(range(min = 1))]
    pub minibatches: usize,
    /// Peak learning rate. 0 or more; 0 leaves the weights exactly as they are. Default 1e-6.
    #[schemars(range(min = 0))]
    pub learning_rate: f64,
    /// Decay of the first moment of AdamW; of Lion, the moment's share in a step. In [0, 1). Default 0.9.
    #[schemars(range(min = 0, max = 1))]
    pub beta1: f64,
    /// Decay of the second moment of AdamW; of Lion, of its moment. In [0, 1). Default 0.95.
    #[schemars(range(min = 0, max = 1))]
    pub beta2: f64,
    /// Decoupled weight decay; not applied to norms and biases. 0 or more. Default 0.
    #[schemars(range(min = 0))]
    pub weight_decay: f64,
    /// Largest global norm of the gradient; a larger gradient is scaled down. Above 0. Default 1.
    #[schemars(range(min = 0))]
    pub max_grad_norm: f64,
    /// Tokens in one forward and backward pass; bounds memory, changes no result beyond the order of sums. Default 16384.
    #[schemars(range(min = 1))]
    pub micro_batch_tokens: usize,
    /// Optimiser updates that may lie between the oldest token of a sample and its use. 0 is synchronous. Default 4.
    pub max_staleness: u64,
    /// How far a batch may run ahead of an older, unfinished group, in batches; 0 keeps strict issue order. Default 2.
    pub window: u64,
    /// Groups that may have to be replaced (all answers right, or wrong) for each group of a batch; then the batch is smaller, the log
    /// says so and `train/groups` shows it; the groups then under way are drawn by the old or the new weights, as time has it. 0
    /// waits for a whole batch however long it takes. Default 4.
    pub refill_max: usize,
    /// Scored samples a group needs to be trained on; with fewer it is dropped and replaced. 1 to `prompts.group_size`.
    /// Default 2.
    #[schemars(range(min = 1))]
    pub min_valid: u32,
    /// Replay the experts recorded while sampling in the training forward (router replay). Only matters for mixture-of-experts
    /// models. Default true.
    pub router_replay: bool,
    /// Weights are published every this many updates. 1 or more, at most `max_staleness` + 1. Default 1.
    #[schemars(range(min = 1))]
    pub publish_every: u64,
    /// Every this many publications the whole weights go out instead of a delta. 1 or more. Default 32.
    #[schemars(range(min = 1))]
    pub keyframe_every: u64,
    /// A checkpoint is written every this many updates, and at the end. 1 or more. Default 50.
    #[schemars(range(min = 1))]
    pub checkpoint_every: u64,
    /// Most MiB of weights in one file of a checkpoint; a bigger model is cut into shards with an index. 1 or more.
    /// Default 4768.
    #[schemars(range(min = 1))]
    pub checkpoint_shard_mib: u64,
    /// Checkpoints kept. 2 or more. Default 2.
    #[schemars(range(min = 2))]
    pub keep_last: usize,
    /// What is kept of the journal of rollouts and updates. "checkpoints" keeps disks small on long runs; `freewheel replay`, and what
    /// `freewheel explain` says of a rollout, then reach back no further than the oldest checkpoint kept. Default "all".
    pub keep_journal: KeepJournal,
    /// Compute threads; 0 takes all cores. No result depends on it. Default 0.
    pub threads: usize,
}

/// What is kept of a journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeepJournal {
    /// All of it: every update can be made again.
    #[default]
    All,
    /// What the checkpoints kept resume from.
    Checkpoints,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            steps: 100,
            groups_per_step: 16,
            minibatches: 1,
            learning_rate: 1e-6,
            beta1: 0.9,
            beta2: 0.95,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            micro_batch_tokens: 16_384,
            max_staleness: 4,
            window: 2,
            refill_max: 4,
            min_valid: 2,
            router_replay: true,
            publish_every: 1,
            keyframe_every: 32,
            checkpoint_every: 50,
            checkpoint_shard_mib: 4768,
            keep_last: 2,
            keep_journal: KeepJournal::All,
            threads: 0,
        }
    }
}

impl LearnerConfig {
    /// Everything wrong with the section, one line each, naming the key. Empty: all is well.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.loss.problems();
        problems.extend(self.schedule.problems(self.steps));
        problems.extend(self.optimizer.problems("learner"));
        let mut check = |good: bool, key: &str, value: String, limit: &str| {
            if !good {
                problems.push(format!("learner.{key} is {value}, outside {limit}"));
            }
        };
        let t = &self.training;
        let unit = |x: f64| (0.0..1.0).contains(&x);
        let positive = |x: f64| x.is_finite() && x > 0.0;
        check(t.steps >= 1, "steps", t.steps.to_string(), "values of 1 or more");
        check(
            t.groups_per_step >= 1,
            "groups_per_step",
            t.groups_per_step.to_string(),
            "values of 1 or more",
        );
        check(
            (1..=t.groups_per_step.max(1)).contains(&t.minibatches),
            "minibatches",
            t.minibatches.to_string(),
            "1 to learner.groups_per_step",
        );
        check(
            t.learning_rate.is_finite() && t.learning_rate >= 0.0,
            "learning_rate",
            t.learning_rate.to_string(),
            "finite values of 0 or more",
        );
        check(unit(t.beta1), "beta1", t.beta1.to_string(), "0 to below 1");
        check(unit(t.beta2), "beta2", t.beta2.to_string(), "0 to below 1");
        check(
            t.weight_decay.is_finite() && t.weight_decay >= 0.0,
            "weight_decay",
            t.weight_decay.to_string(),
            "finite values of 0 or more",
        );
        check(
            positive(t.max_grad_norm),
            "max_grad_norm",
            t.max_grad_norm.to_string(),
            "finite values above 0",
        );
        check(
            t.micro_batch_tokens >= 1,
            "micro_batch_tokens",
            t.micro_batch_tokens.to_string(),
            "values of 1 or more",
        );
        check(t.min_valid >= 1, "min_valid", t.min_valid.to_string(), "values of 1 or more");
        check(t.publish_every >= 1, "publish_every", t.publish_every.to_string(), "values of 1 or more");
        check(
            t.publish_every <= t.max_staleness.saturating_add(1),
            "publish_every",
            t.publish_every.to_string(),
            &format!("1 to learner.max_staleness + 1 ({})", t.max_staleness.saturating_add(1)),
        );
        check(t.keyframe_every >= 1, "keyframe_every", t.keyframe_every.to_string(), "values of 1 or more");
        check(
            t.checkpoint_every >= 1,
            "checkpoint_every",
            t.checkpoint_every.to_string(),
            "values of 1 or more",
        );
        check(
            (1..=1 << 30).contains(&t.checkpoint_shard_mib),
            "checkpoint_shard_mib",
            t.checkpoint_shard_mib.to_string(),
            "values of 1 to 2^30",
        );
        check(t.keep_last >= 2, "keep_last", t.keep_last.to_string(), "values of 2 or more");
        problems
    }
}

impl LearnerConfig {
    /// All that the optimiser is told.
    pub fn optimizer_settings(&self) -> OptimizerSettings {
        OptimizerSettings {
            config: self.optimizer.clone(),
            betas: [self.beta1, self.beta2],
            weight_decay: self.weight_decay,
            decay_1d: false,
            max_grad_norm: Some(self.max_grad_norm),
        }
    }
}

flat_section!(LearnerConfig {
    training: TrainingConfig,
    schedule: ScheduleConfig,
    optimizer: OptimizerConfig,
    loss: ObjectiveConfig,
});

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::flat::table;

    #[test]
    fn both_halves_are_written_flat_and_unknown_keys_are_refused() {
        let config: LearnerConfig =
            serde_json::from_str(r#"{"steps": 7, "clip_low": 0.3, "warmup_steps": 2}"#).unwrap();
        assert_eq!((config.steps, config.loss.clip_low, config.schedule.warmup_steps), (7, Some(0.3), 2));
        let error = serde_json::from_str::<LearnerConfig>(r#"{"stepz": 7}"#).unwrap_err().to_string();
        assert!(error.contains("stepz"), "{error}");
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<LearnerConfig>(&text).unwrap(), config);
    }

    #[test]
    fn the_schema_knows_every_key_of_both_halves_with_its_documentation() {
        let schema = schemars::schema_for!(LearnerConfig);
        let properties = schema.get("properties").and_then(Value::as_object).unwrap();
        let config = table(&LearnerConfig::default());
        for key in config.keys() {
            assert!(properties[key].get("description").is_some(), "{key} has no documentation");
        }
        assert_eq!(properties.len(), config.len());
    }

    #[test]
    fn no_key_is_in_two_parts() {
        let config = LearnerConfig::default();
        let parts =
            [table(&config.training), table(&config.schedule), table(&config.optimizer), table(&config.loss)];
        assert_eq!(table(&config).len(), parts.iter().map(serde_json::Map::len).sum::<usize>());
    }

    #[test]
    fn all_problems_come_at_once() {
        let mut config = LearnerConfig::default();
        (config.keep_last, config.learning_rate, config.max_staleness, config.publish_every) =
            (1, f64::NAN, 0, 2);
        config.loss.kl_coef = -1.0;
        let problems = config.problems().join("\n");
        for key in ["keep_last is 1", "learning_rate is NaN", "publish_every is 2", "kl_coef is -1"] {
            assert!(problems.contains(key), "{key} missing in\n{problems}");
        }
    }
}
