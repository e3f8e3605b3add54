//! What the pool is built for, and why it may refuse.

use std::collections::BTreeMap;

use freewheel_types::{MAX_GROUP_SIZE, PromptId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How prompts are chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CurriculumConfig {
    /// "informative" (default): by the probability that a group has both right and wrong answers. "band": a skill is drawn from
    /// each belief (Thompson sampling) and must lie in a band that gets harder as the run goes on. "pools": the prompts of one tag
    /// after the other, as `pools` lists them. "file": in the order of the file, round and round. "uniform": each prompt
    /// equally often. The last three retire nothing.
    pub selection: Selection,
    /// Exponent of that probability; higher is pickier. 0 to 16, default 4.
    pub sharpness: f64,
    /// Share of tasks that go to the prompts least seen. 0 to 1, default 0.1.
    pub explore: f64,
    /// Share of tasks that check retired prompts. 0 to 1, default 0.05.
    pub canary: f64,
    /// Share of tasks kept for prompts with the tag `intake_tag`, where new prompts come in (a red team's). 0 to 1, default 0.05.
    pub intake: f64,
    /// That tag. Default "adversarial".
    pub intake_tag: String,
    /// Shares of tasks by tag, `{ math = 0.5, code = 0.3 }`: batches stay mixed whatever is informative. Sum up to 1; the rest is
    /// for all. Default: none.
    pub quotas: BTreeMap<String, f64>,
    /// Band: middle at the start, as probability of a right answer. 0 to 1, default 0.7.
    pub band_start: f64,
    /// Band: middle at the end. It gets there by the run's progress, and only while the policy keeps up. 0 to 1, default 0.35.
    pub band_end: f64,
    /// Band: how far it reaches on both sides of the middle, within 0.05 and 0.95. Above 0, up to 0.5, default 0.3.
    pub band_width: f64,
    /// Pools: the tags, easiest first. A pool is left once its last samples are right as often as `pool_solved`, and taken up again
    /// if they no longer are.
    pub pools: Vec<String>,
    /// Pools: when one is solved. Above 0, up to 1, default 0.8.
    pub pool_solved: f64,
    /// Most samples that a column "avg@N" of the prompt file (`freewheel filter` writes one) counts as. 0 ignores it. Default 8.
    pub import_samples: f64,
    /// How much of a belief is left after one policy version. Above 0, up to 1, default 0.98.
    pub decay: f64,
    /// Until a prompt has this many samples of its own, what its tags have shown stands in for the rest. Samples,
    /// 0 or more, default 4.
    pub tag_prior: f64,
    /// A prompt solved more often than this is retired. Default 0.95.
    pub retire_above: f64,
    /// A prompt solved less often than this is retired. Default 0.02.
    pub retire_below: f64,
    /// Samples before a prompt may be retired. Default 32.
    pub retire_samples: u64,
    /// A prompt whose last samples were all right, or all wrong, is retired after this many of them. Samples, default 16.
    pub retire_streak: u64,
    /// Replacements per consumed group above which a warning is given. Default 4.
    pub refill_warn: u32,
    /// Replacements per group of an update, none of them trained on, after which the run ends: nothing teaches any more. 0 = never. Default 250.
    pub refill_stop: u32,
}

impl Default for CurriculumConfig {
    fn default() -> Self {
        Self {
            selection: Selection::Informative,
            sharpness: 4.0,
            explore: 0.1,
            canary: 0.05,
            intake: 0.05,
            intake_tag: "adversarial".into(),
            quotas: BTreeMap::new(),
            band_start: 0.7,
            band_end: 0.35,
            band_width: 0.3,
            pools: Vec::new(),
            pool_solved: 0.8,
            import_samples: 8.0,
            decay: 0.98,
            tag_prior: 4.0,
            retire_above: 0.95,
            retire_below: 0.02,
            retire_samples: 32,
            retire_streak: 16,
            refill_warn: 4,
            refill_stop: 250,
        }
    }
}

/// The ways to choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Selection {
    /// By the probability of a mixed group.
    #[default]
    Informative,
    /// By a drawn skill within a band.
    Band,
    /// Tag after tag.
    Pools,
    /// In file order.
    File,
    /// Least seen first, in random order.
    Uniform,
}

impl Selection {
    /// Whether what is believed of prompts decides: then some are retired, some explored, some checked.
    pub fn learns(self) -> bool {
        matches!(self, Self::Informative | Self::Band)
    }
}

/// What the pool is built for.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolParams {
    /// Rollouts per task, 2 to 64 with those of `baselines`.
    pub group_size: u32,
    /// Further rollouts per task that are compared with and not trained on, 0 or 1.
    pub baselines: u32,
    /// Groups per update, at least 1.
    pub groups_per_step: u32,
    /// Largest staleness a sample may have when it is consumed, in updates.
    pub max_staleness: u32,
    /// Run seed.
    pub seed: u64,
    /// Updates the run is to make.
    pub steps: u64,
    /// How prompts are chosen.
    pub curriculum: CurriculumConfig,
}

impl PoolParams {
    /// Most groups that may be outstanding.
    pub fn budget(&self) -> usize {
        (self.max_staleness as usize + 1) * self.groups_per_step as usize
    }

    /// Everything out of range, as (key, message).
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let c = &self.curriculum;
        let share = |x: f64| (0.0..=1.0).contains(&x);
        let most = MAX_GROUP_SIZE - self.baselines;
        let checks = [
            ("group_size", self.group_size >= 2 && self.group_size <= most, &*format!("must be 2 to {most}")),
            ("groups_per_step", self.groups_per_step >= 1, "must be at least 1"),
            ("sharpness", (0.0..=16.0).contains(&c.sharpness), "must be 0 to 16"),
            ("explore", share(c.explore), "must be 0 to 1"),
            (
                "canary",
                share(c.canary) && c.explore + c.canary <= 1.0,
                "must be 0 to 1, with explore at most 1",
            ),
            (
                "intake",
                share(c.intake) && c.explore + c.canary + c.intake <= 1.0,
                "must be 0 to 1, with explore and canary at most 1",
            ),
            (
                "quotas",
                c.quotas.values().all(|x| share(*x)) && c.quotas.values().sum::<f64>() <= 1.0 + 1e-9,
                "must be shares of 0 to 1 whose sum is at most 1",
            ),
            ("band_start", share(c.band_start), "must be 0 to 1"),
            ("band_end", share(c.band_end), "must be 0 to 1"),
            ("band_width", c.band_width > 0.0 && c.band_width <= 0.5, "must be above 0, up to 0.5"),
            (
                "pools",
                c.selection != Selection::Pools || !c.pools.is_empty(),
                "is empty: list the tags, easiest first",
            ),
            ("pool_solved", c.pool_solved > 0.0 && share(c.pool_solved), "must be above 0, up to 1"),
            ("import_samples", (0.0..=1e6).contains(&c.import_samples), "must be 0 to 1000000"),
            ("decay", c.decay > 0.0 && c.decay <= 1.0, "must be above 0, up to 1"),
            ("tag_prior", (0.0..=1e6).contains(&c.tag_prior), "must be 0 to 1000000"),
            (
                "retire_above",
                share(c.retire_above) && c.retire_above > c.retire_below,
                "must be up to 1, above retire_below",
            ),
            ("retire_below", share(c.retire_below), "must be 0 to 1"),
        ];
        checks
            .iter()
            .filter(|(_, fine, _)| !fine)
            .map(|(key, _, message)| (*key, (*message).to_owned()))
            .collect()
    }
}

/// Why the pool cannot go on.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PoolError {
    /// No prompts.
    #[error("there are no prompts to issue")]
    NoPrompts,
    /// Every prompt was set aside.
    #[error(
        "all {prompts} prompts are quarantined: their groups failed or could not be scored; the last reason was {reason:?}"
    )]
    Exhausted {
        /// How many there are.
        prompts: usize,
        /// Why the last one was set aside.
        reason: String,
    },
    /// Nothing was trained on for very long.
    #[error(
        "the last {groups} groups were all dropped, most recently {why}: the prompts teach nothing any more (solved always or never), or the reward is wrong; \
         prompts.curriculum.refill_stop = 0 goes on for ever"
    )]
    Starved {
        /// How many.
        groups: u32,
        /// Why the last one was.
        why: &'static str,
    },
    /// Two prompts share an id.
    #[error("two prompts have the id {0}")]
    Duplicate(PromptId),
    /// A saved state or log names a prompt that is not there.
    #[error(
        "the saved pool names prompt {0}, which is not among the prompts of this run; the prompt file or generator settings were changed"
    )]
    UnknownPrompt(PromptId),
    /// A saved state or log contradicts itself.
    #[error("the saved pool is not consistent: {0}")]
    Inconsistent(String),
    /// A parameter is out of range.
    #[error("{0}")]
    Params(String),
}
