//! What a step tells the world: its metrics line and the fate of its groups.

use std::collections::BTreeMap;

use freewheel_types::{DropReason, GroupFate, GroupOutcome, PolicyVersion, PromptId, ScoredRollout};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::assembly::{Group, Ledger};
use crate::batch::Batch;
use crate::dual::{CostSum, Duals};
use crate::objective::Loss;
use crate::update::Updated;

/// One step, as it leaves the training thread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Version of the weights after it.
    pub version: PolicyVersion,
    /// Metrics known to the training thread.
    pub line: Map<String, Value>,
    /// Where every rollout is.
    pub ledger: Ledger,
}

/// Running figures of the groups that ended since the last step, trained or dropped.
#[derive(Clone, Debug, Default)]
pub struct Interval {
    rewards: Vec<f32>,
    components: BTreeMap<String, (f64, u64)>,
    lengths: u64,
    truncated: u64,
    correct: u64,
    judged: u64,
    groups: u64,
    zero_signal: u64,
    /// Shares of distinct runs of four tokens, summed over groups, and how many groups.
    distinct: (f64, u64),
}

impl Interval {
    /// Counts a group that ended.
    pub fn add(&mut self, group: &Group, dropped: Option<DropReason>) {
        self.groups += 1;
        self.zero_signal += u64::from(dropped == Some(DropReason::ZeroSignal));
        group.scored().for_each(|scored| self.add_sample(scored));
        if let Some(share) = distinct_runs(group.scored().map(|scored| scored.rollout.output_ids.as_slice()))
        {
            self.distinct = (self.distinct.0 + share, self.distinct.1 + 1);
        }
    }

    fn add_sample(&mut self, scored: &ScoredRollout) {
        self.rewards.extend(scored.reward.reward());
        self.lengths += scored.rollout.len() as u64;
        self.truncated += u64::from(scored.rollout.truncated());
        if let Some(correct) = scored.reward.correct() {
            self.judged += 1;
            self.correct += u64::from(correct);
        }
        for component in &scored.reward.components {
            if let Some(value) = component.value {
                let (sum, count) = self.components.entry(component.name.clone()).or_default();
                *sum += f64::from(value);
                *count += 1;
            }
        }
    }

    fn write(&self, line: &mut Map<String, Value>) {
        let n = self.rewards.len() as f64;
        if n > 0.0 {
            let mean = self.rewards.iter().map(|&r| f64::from(r)).sum::<f64>() / n;
            let variance = self.rewards.iter().map(|&r| (f64::from(r) - mean).powi(2)).sum::<f64>() / n;
            line.insert("reward/mean".into(), json!(mean));
            line.insert("reward/std".into(), json!(variance.sqrt()));
            line.insert("rollout/length_mean".into(), json!(self.lengths as f64 / n));
            line.insert("rollout/truncated".into(), json!(self.truncated as f64 / n));
        }
        if self.judged > 0 {
            line.insert("reward/accuracy".into(), json!(self.correct as f64 / self.judged as f64));
        }
        for (name, (sum, count)) in &self.components {
            line.insert(format!("reward/{name}/mean"), json!(sum / *count as f64));
        }
        if self.distinct.1 > 0 {
            line.insert("rollout/distinct_4".into(), json!(self.distinct.0 / self.distinct.1 as f64));
        }
        if self.groups > 0 {
            line.insert("prompts/zero_signal".into(), json!(self.zero_signal as f64 / self.groups as f64));
        }
    }
}

/// Share of the runs of four tokens of `completions` that occur for the first time: 1 where nothing comes twice, low where a
/// group says the same over and over. `None` where none is four tokens long.
fn distinct_runs<'a>(completions: impl Iterator<Item = &'a [u32]>) -> Option<f64> {
    let mut seen = std::collections::HashSet::new();
    let mut all = 0_u64;
    for run in completions.flat_map(|ids| ids.windows(4)) {
        all += 1;
        seen.insert(run);
    }
    (all > 0).then(|| seen.len() as f64 / all as f64)
}

/// Clock readings of one step, seconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepTimes {
    /// Since the learner started.
    pub wall_s: f64,
    /// Waiting for a batch.
    pub idle_s: f64,
    /// Training on it.
    pub train_s: f64,
}

/// The training thread's part of the metrics line.
pub fn line(
    version: PolicyVersion,
    batch: &Batch<'_>,
    updated: &Updated,
    loss: &Loss,
    learning_rate: f64,
    interval: &Interval,
    times: &StepTimes,
) -> Map<String, Value> {
    let mut line = Map::new();
    line.insert("step".into(), json!(version.step));
    line.insert("version".into(), json!(version.step));
    line.insert("epoch".into(), json!(version.epoch));
    let step_s = times.idle_s + times.train_s;
    line.insert("time/wall_s".into(), json!(times.wall_s));
    line.insert("time/step_s".into(), json!(step_s));
    interval.write(&mut line);
    let drawn: u64 = batch.samples.iter().map(|s| s.scored.rollout.len() as u64).sum();
    line.insert("rollout/tokens_per_s".into(), rate(drawn as f64, step_s));
    line.insert("train/tokens_per_s".into(), rate(updated.tokens as f64, times.train_s));
    line.insert("bubble/learner".into(), rate(times.idle_s, step_s));
    write_update(&mut line, updated, loss, learning_rate);
    write_staleness(
        &mut line,
        batch,
        if updated.moved { version.step.saturating_sub(1) } else { version.step },
    );
    line
}

/// Mean cost of the groups that ended since the step before, its moving mean, and the multiplier from here on.
pub fn write_duals(line: &mut Map<String, Value>, duals: &Duals, sums: &[CostSum]) {
    for (state, sum) in duals.states().iter().zip(sums) {
        if sum.count > 0 {
            let mean = sum.micros as f64 / 1e6 / sum.count as f64;
            line.insert(format!("cost/{}/mean", state.name), json!(mean));
        }
        if let Some(mean) = state.mean {
            line.insert(format!("cost/{}/ema", state.name), json!(mean));
        }
        line.insert(format!("cost/{}/lambda", state.name), json!(state.lambda));
    }
}

fn write_update(line: &mut Map<String, Value>, updated: &Updated, loss: &Loss, learning_rate: f64) {
    let d = &updated.diagnostics;
    line.insert("train/loss".into(), number(updated.loss));
    if let Some(value_loss) = updated.value_loss {
        line.insert("train/value_loss".into(), number(value_loss));
    }
    line.insert("train/grad_norm".into(), number(updated.grad_norm));
    line.insert("train/lr".into(), json!(learning_rate));
    if let Some(violation) = updated.max_violation {
        line.insert("moe/max_violation".into(), json!(violation));
    }
    line.insert("train/applied".into(), json!(updated.applied));
    line.insert("train/clip_fraction".into(), number(d.clip_fraction()));
    line.insert("train/clip_low".into(), number(d.clip_low_fraction()));
    line.insert("train/rejected".into(), number(d.rejected_fraction()));
    line.insert("train/ess".into(), number(d.ess()));
    line.insert("train/ratio_mean".into(), number(d.ratio_mean()));
    if let Some(entropy) = d.entropy() {
        line.insert("train/entropy".into(), number(entropy));
    }
    if loss.needs_reference()
        && let Some(kl) = d.kl_ref()
    {
        line.insert("train/kl_ref".into(), number(kl));
    }
    line.insert("mismatch/kl".into(), number(d.mismatch_kl()));
    line.insert("mismatch/fraction".into(), number(d.mismatch_fraction()));
    line.insert("mismatch/logprob_abs_max".into(), number(d.logprob_abs_max));
    line.insert(
        "mismatch/same_version_abs_max".into(),
        number(updated.agreement.same_version_abs_max.into()),
    );
    line.insert("mismatch/same_version_tokens".into(), json!(updated.agreement.same_version_tokens));
}

fn write_staleness(line: &mut Map<String, Value>, batch: &Batch<'_>, trained_step: u64) {
    let oldest = batch.samples.iter().filter_map(|s| s.scored.rollout.version_oldest());
    let staleness: Vec<u64> = oldest.map(|oldest| trained_step.saturating_sub(oldest.step)).collect();
    let mean = staleness.iter().sum::<u64>() as f64 / staleness.len().max(1) as f64;
    line.insert("staleness/mean".into(), json!(mean));
    line.insert("staleness/max".into(), json!(staleness.iter().max()));
}

/// JSON has no NaN: what is not finite is written as a string, so that it shows.
fn number(value: f64) -> Value {
    if value.is_finite() { json!(value) } else { json!(value.to_string()) }
}

fn rate(count: f64, seconds: f64) -> Value {
    if seconds > 0.0 { json!(count / seconds) } else { json!(0.0) }
}

/// What the prompt pool is told of a group.
pub fn outcome(group: &Group, version: PolicyVersion, fate: GroupFate) -> GroupOutcome {
    let summary = group.summary();
    GroupOutcome {
        task: group.id,
        // No member could be read: the pool knows the prompt by the task.
        prompt: summary.prompt.unwrap_or(PromptId([0; 16])),
        version,
        sampled_by: summary.oldest.unwrap_or(version),
        scored: summary.scored,
        correct: summary.correct,
        reward_mean: summary.reward_mean,
        graded: group.graded(),
        fate,
        dropped: group.dropped_members(),
        given_up: group.given_up().map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_that_says_the_same_is_less_diverse() {
        let (a, b): ([u32; 6], [u32; 6]) = ([1, 2, 3, 4, 5, 6], [7, 2, 3, 4, 5, 6]);
        let of = |completions: &[&[u32]]| distinct_runs(completions.iter().copied());
        assert_eq!(of(&[&a]), Some(1.0));
        assert_eq!(of(&[&a, &a]), Some(0.5));
        // Of b's three runs only the first is new.
        assert_eq!(of(&[&a, &b]), Some(4.0 / 6.0));
        assert_eq!(of(&[&[1, 2, 3], &[]]), None);
    }
}
