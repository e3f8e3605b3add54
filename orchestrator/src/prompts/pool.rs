//! The prompt pool: which prompt is asked next, and when.
//!
//! **Admission.** A group is admitted only while fewer than `(max_staleness + 1) * groups_per_step` groups are
//! outstanding. The learner takes groups in issue order, `groups_per_step` an update; so the group that is
//! admitted as number `r` (from 0) of the outstanding ones, with the learner at step `s`, is consumed at step
//! `s + r / groups_per_step` at the latest, and `min_version = s + r / groups_per_step - max_staleness` bounds its
//! staleness. A dropped group frees its place, which is how it is replaced.
//!
//! **Choice.** Mostly by the probability that the group will hold both right and wrong answers, under a
//! Beta belief per prompt that starts from what its tags have shown; some prompts least seen; some retired ones, to
//! notice when they stop being solved. Every choice is a function of (seed, task id, state).

use std::collections::{BTreeMap, BTreeSet};

use freewheel_types::{CounterRng, DropReason, GroupFate, GroupOutcome, PolicyVersion, Prompt, PromptId, Task, TaskId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::posterior::{Posterior, informative_probability};

/// Outcomes over which shares are reported.
const WINDOW: usize = 256;
/// Groups in a row without a verdict after which a prompt is set aside.
const UNSCORED_MAX: u32 = 3;

/// How prompts are chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CurriculumConfig {
    /// "informative" (default): by the probability that a group has both right and wrong answers. "uniform": each
    /// prompt equally often, nothing retired.
    pub selection: Selection,
    /// Exponent of that probability; higher is pickier. 0 to 16, default 4.
    pub sharpness: f64,
    /// Share of tasks that go to the prompts least seen. 0 to 1, default 0.1.
    pub explore: f64,
    /// Share of tasks that check retired prompts. 0 to 1, default 0.05.
    pub canary: f64,
    /// How much of a belief is left after one policy version. Above 0, up to 1, default 0.98.
    pub decay: f64,
    /// How many samples what a prompt's tags have shown is worth. 0 or more, default 4.
    pub tag_prior: f64,
    /// A prompt solved more often than this is retired. Default 0.95.
    pub retire_above: f64,
    /// A prompt solved less often than this is retired. Default 0.02.
    pub retire_below: f64,
    /// Samples before a prompt may be retired. Default 32.
    pub retire_samples: u64,
    /// Replacements per consumed group above which a warning is given. Default 4.
    pub refill_warn: u32,
}

impl Default for CurriculumConfig {
    fn default() -> Self {
        Self {
            selection: Selection::Informative,
            sharpness: 4.0,
            explore: 0.1,
            canary: 0.05,
            decay: 0.98,
            tag_prior: 4.0,
            retire_above: 0.95,
            retire_below: 0.02,
            retire_samples: 32,
            refill_warn: 4,
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
    /// Least seen first, in random order.
    Uniform,
}

/// What the pool is built for.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolParams {
    /// Rollouts per task, 2 to 64.
    pub group_size: u32,
    /// Groups per update, at least 1.
    pub groups_per_step: u32,
    /// Largest staleness a sample may have when it is consumed, in updates.
    pub max_staleness: u32,
    /// Run seed.
    pub seed: u64,
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
        let checks = [
            ("group_size", (2..=64).contains(&self.group_size), "must be 2 to 64"),
            ("groups_per_step", self.groups_per_step >= 1, "must be at least 1"),
            ("sharpness", (0.0..=16.0).contains(&c.sharpness), "must be 0 to 16"),
            ("explore", share(c.explore), "must be 0 to 1"),
            ("canary", share(c.canary) && c.explore + c.canary <= 1.0, "must be 0 to 1, with explore at most 1"),
            ("decay", c.decay > 0.0 && c.decay <= 1.0, "must be above 0, up to 1"),
            ("tag_prior", (0.0..=1e6).contains(&c.tag_prior), "must be 0 to 1000000"),
            ("retire_above", share(c.retire_above) && c.retire_above > c.retire_below, "must be up to 1, above retire_below"),
            ("retire_below", share(c.retire_below), "must be 0 to 1"),
        ];
        checks.iter().filter(|(_, fine, _)| !fine).map(|(key, _, message)| (*key, (*message).to_owned())).collect()
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
    #[error("all {prompts} prompts are quarantined: their groups failed or could not be scored; the last reason was {reason:?}")]
    Exhausted {
        /// How many there are.
        prompts: usize,
        /// Why the last one was set aside.
        reason: String,
    },
    /// Two prompts share an id.
    #[error("two prompts have the id {0}")]
    Duplicate(PromptId),
    /// A saved state or log names a prompt that is not there.
    #[error("the saved pool names prompt {0}, which is not among the prompts of this run; the prompt file or generator settings were changed")]
    UnknownPrompt(PromptId),
    /// A saved state or log contradicts itself.
    #[error("the saved pool is not consistent: {0}")]
    Inconsistent(String),
    /// A parameter is out of range.
    #[error("{0}")]
    Params(String),
}

/// What an outcome did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It ended an outstanding task.
    Ended,
    /// The task had ended before, or was never issued: nothing changed.
    Ignored,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PromptState {
    posterior: Posterior,
    /// Tasks issued.
    issued: u64,
    unscored_in_a_row: u32,
    quarantined: Option<String>,
}

/// A task that has not ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Outstanding {
    prompt: PromptId,
    group_size: u32,
    min_version: PolicyVersion,
}

/// Everything that changes while the pool works; in the checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolState {
    next_task: u64,
    /// Prompts that were issued at least once.
    prompts: Vec<(PromptId, PromptState)>,
    tags: Vec<(String, Posterior)>,
    outstanding: Vec<(TaskId, Outstanding)>,
    trained: u64,
    dropped: u64,
    /// Whether each of the last groups had zero signal, oldest first.
    recent_zero_signal: Vec<bool>,
    /// Groups dropped since one was last trained on.
    dropped_in_a_row: u32,
}

/// What the pool tells about itself; names as in the metrics, `prompts/…`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PoolMetrics {
    /// Share of zero-signal groups among the last ones that ended.
    pub zero_signal: f64,
    /// Prompts that may be chosen.
    pub active: usize,
    /// Prompts solved (nearly) always or never.
    pub retired: usize,
    /// Prompts set aside because they fail or cannot be scored.
    pub quarantined: usize,
    /// Mean of 1 - believed probability of a right answer, over active prompts.
    pub difficulty_mean: f64,
    /// Tasks that have not ended.
    pub outstanding: usize,
    /// Tasks issued.
    pub issued: u64,
    /// Groups trained on.
    pub trained: u64,
    /// Groups dropped.
    pub dropped: u64,
}

/// The pool. Owns the prompts; decides without I/O or clock.
#[derive(Clone, Debug)]
pub struct PromptPool {
    params: PoolParams,
    prompts: Vec<Prompt>,
    index: BTreeMap<PromptId, usize>,
    states: Vec<PromptState>,
    tags: BTreeMap<String, Posterior>,
    outstanding: BTreeMap<TaskId, Outstanding>,
    /// Prompts with an outstanding task.
    busy: BTreeSet<usize>,
    next_task: u64,
    trained: u64,
    dropped: u64,
    recent_zero_signal: std::collections::VecDeque<bool>,
    dropped_in_a_row: u32,
}

impl PromptPool {
    /// A pool that has issued nothing.
    ///
    /// # Errors
    /// No prompts, two with one id, or parameters out of range.
    pub fn new(prompts: Vec<Prompt>, params: PoolParams) -> Result<Self, PoolError> {
        if let Some((key, message)) = params.problems().into_iter().next() {
            return Err(PoolError::Params(format!("prompt pool: {key} {message}")));
        }
        if prompts.is_empty() {
            return Err(PoolError::NoPrompts);
        }
        let mut index = BTreeMap::new();
        for (i, prompt) in prompts.iter().enumerate() {
            if index.insert(prompt.id, i).is_some() {
                return Err(PoolError::Duplicate(prompt.id));
            }
        }
        Ok(Self {
            states: vec![PromptState::default(); prompts.len()],
            params,
            prompts,
            index,
            tags: BTreeMap::new(),
            outstanding: BTreeMap::new(),
            busy: BTreeSet::new(),
            next_task: 0,
            trained: 0,
            dropped: 0,
            recent_zero_signal: std::collections::VecDeque::new(),
            dropped_in_a_row: 0,
        })
    }

    /// A pool with a saved state, for the same prompts.
    ///
    /// # Errors
    /// As [`new`](Self::new), or if the state names a prompt that is not there.
    pub fn restore(prompts: Vec<Prompt>, params: PoolParams, state: PoolState) -> Result<Self, PoolError> {
        let mut pool = Self::new(prompts, params)?;
        for (id, prompt) in state.prompts {
            let i = *pool.index.get(&id).ok_or(PoolError::UnknownPrompt(id))?;
            pool.states[i] = prompt;
        }
        for (task, outstanding) in state.outstanding {
            let i = *pool.index.get(&outstanding.prompt).ok_or(PoolError::UnknownPrompt(outstanding.prompt))?;
            if task.0 >= state.next_task {
                return Err(PoolError::Inconsistent(format!("task {task} is outstanding, next is {}", state.next_task)));
            }
            pool.busy.insert(i);
            pool.outstanding.insert(task, outstanding);
        }
        pool.tags = state.tags.into_iter().collect();
        (pool.next_task, pool.trained, pool.dropped) = (state.next_task, state.trained, state.dropped);
        pool.recent_zero_signal = state.recent_zero_signal.into();
        pool.dropped_in_a_row = state.dropped_in_a_row;
        Ok(pool)
    }

    /// Everything that [`restore`](Self::restore) needs.
    pub fn state(&self) -> PoolState {
        let seen = self.prompts.iter().zip(&self.states).filter(|(_, state)| state.issued > 0);
        PoolState {
            next_task: self.next_task,
            prompts: seen.map(|(prompt, state)| (prompt.id, state.clone())).collect(),
            tags: self.tags.iter().map(|(tag, posterior)| (tag.clone(), *posterior)).collect(),
            outstanding: self.outstanding.iter().map(|(task, o)| (*task, o.clone())).collect(),
            trained: self.trained,
            dropped: self.dropped,
            recent_zero_signal: self.recent_zero_signal.iter().copied().collect(),
            dropped_in_a_row: self.dropped_in_a_row,
        }
    }

    /// Chooses and issues the next task, if the staleness budget has room; `progress` is the learner's version.
    ///
    /// # Errors
    /// If every prompt has been set aside.
    pub fn next_task(&mut self, progress: PolicyVersion) -> Result<Option<Task>, PoolError> {
        let rank = self.outstanding.len();
        if rank >= self.params.budget() {
            return Ok(None);
        }
        let (i, group_size) = self.choose()?;
        let ahead = (rank / self.params.groups_per_step as usize) as u64;
        let step = (progress.step + ahead).saturating_sub(u64::from(self.params.max_staleness));
        // Weights of an older lineage are fine as long as they are not too old; the step says that.
        let epoch = if step == 0 { 0 } else { progress.epoch };
        let min_version = PolicyVersion::new(epoch, step);
        let id = TaskId(self.next_task);
        self.issued(id, Outstanding { prompt: self.prompts[i].id, group_size, min_version })?;
        Ok(Some(self.task(id).expect("just issued")))
    }

    /// An outstanding task, for issuing it again.
    pub fn task(&self, id: TaskId) -> Option<Task> {
        let outstanding = self.outstanding.get(&id)?;
        Some(Task {
            id,
            prompt: self.prompts[self.index[&outstanding.prompt]].clone(),
            group_size: outstanding.group_size,
            seed: self.params.seed,
            min_version: outstanding.min_version,
        })
    }

    /// The tasks that have not ended, in issue order.
    pub fn outstanding(&self) -> Vec<TaskId> {
        self.outstanding.keys().copied().collect()
    }

    /// Takes in an issue from the log: the pool then is as it was after [`next_task`](Self::next_task).
    ///
    /// # Errors
    /// If the prompt is unknown or the id is not the next one.
    pub fn replay_issue(&mut self, task: &Task) -> Result<(), PoolError> {
        if task.id.0 < self.next_task {
            return Ok(()); // the saved state is newer than this record
        }
        let (prompt, group_size, min_version) = (task.prompt.id, task.group_size, task.min_version);
        self.issued(task.id, Outstanding { prompt, group_size, min_version })
    }

    pub(super) fn prompt(&self, id: PromptId) -> Option<&Prompt> {
        self.index.get(&id).map(|i| &self.prompts[*i])
    }

    fn issued(&mut self, id: TaskId, outstanding: Outstanding) -> Result<(), PoolError> {
        if id.0 != self.next_task {
            return Err(PoolError::Inconsistent(format!("task {id} was issued where {} was next", self.next_task)));
        }
        let i = *self.index.get(&outstanding.prompt).ok_or(PoolError::UnknownPrompt(outstanding.prompt))?;
        self.states[i].issued += 1;
        self.busy.insert(i);
        self.outstanding.insert(id, outstanding);
        self.next_task += 1;
        Ok(())
    }

    /// Takes in what became of a group. Each task ends once; what comes again is ignored.
    pub fn apply(&mut self, outcome: &GroupOutcome) -> Applied {
        let Some(ended) = self.outstanding.remove(&outcome.task) else { return Applied::Ignored };
        let i = self.index[&ended.prompt];
        if !self.outstanding.values().any(|other| other.prompt == ended.prompt) {
            self.busy.remove(&i);
        }
        self.learn(i, outcome);
        match outcome.fate {
            GroupFate::Trained { .. } => {
                self.trained += 1;
                self.dropped_in_a_row = 0;
            }
            GroupFate::Dropped(reason) => {
                self.dropped += 1;
                self.dropped_in_a_row += 1;
                self.set_aside(i, reason);
                let warn_at = self.params.curriculum.refill_warn.saturating_mul(self.params.groups_per_step);
                if self.dropped_in_a_row % warn_at.max(1) == 0 {
                    tracing::warn!(
                        dropped = self.dropped_in_a_row,
                        last = reason.name(),
                        "no group was trained on since; the prompts may be too easy or too hard, or the verifier wrong"
                    );
                }
            }
        }
        if self.recent_zero_signal.len() == WINDOW {
            self.recent_zero_signal.pop_front();
        }
        self.recent_zero_signal.push_back(outcome.fate == GroupFate::Dropped(DropReason::ZeroSignal));
        Applied::Ended
    }

    fn learn(&mut self, i: usize, outcome: &GroupOutcome) {
        if outcome.scored == 0 {
            return;
        }
        let (right, n, version) = (outcome.correct, outcome.scored, outcome.sampled_by.step);
        let decay = self.params.curriculum.decay;
        self.states[i].posterior.observe(right, n, version, decay);
        for tag in &self.prompts[i].tags {
            self.tags.entry(tag.clone()).or_default().observe(right, n, version, decay);
        }
    }

    fn set_aside(&mut self, i: usize, reason: DropReason) {
        let state = &mut self.states[i];
        state.unscored_in_a_row = if reason == DropReason::Unscored { state.unscored_in_a_row + 1 } else { 0 };
        if reason == DropReason::Invalid {
            // Its task was given up after several deliveries, or its payloads were bad.
            state.quarantined = Some("its group was invalid or given up by the actors".into());
        } else if state.unscored_in_a_row >= UNSCORED_MAX {
            state.quarantined = Some(format!("{UNSCORED_MAX} groups in a row could not be scored"));
        }
    }

    /// What is believed about prompt `i`: its own samples, and its tags as a prior.
    fn belief(&self, i: usize) -> (f64, f64) {
        let own = &self.states[i].posterior;
        let (mut mean, mut known, mut strength) = (0.0, 0, 0.0_f64);
        for tag in &self.prompts[i].tags {
            if let Some(posterior) = self.tags.get(tag) {
                mean += posterior.mean();
                known += 1;
                strength = strength.max(posterior.alpha + posterior.beta - 2.0);
            }
        }
        if known == 0 {
            return (own.alpha, own.beta);
        }
        let (mean, strength) = (mean / f64::from(known), strength.min(self.params.curriculum.tag_prior));
        (own.alpha + strength * mean, own.beta + strength * (1.0 - mean))
    }

    fn retired(&self, i: usize) -> bool {
        let c = &self.params.curriculum;
        let posterior = &self.states[i].posterior;
        c.selection == Selection::Informative
            && posterior.samples >= c.retire_samples
            && !(c.retire_below..=c.retire_above).contains(&posterior.mean())
    }

    /// The prompt of the next task and its group size.
    fn choose(&self) -> Result<(usize, u32), PoolError> {
        let usable: Vec<usize> = (0..self.prompts.len()).filter(|i| self.states[*i].quarantined.is_none()).collect();
        if usable.is_empty() {
            let reason = self.states.iter().rev().find_map(|state| state.quarantined.clone()).unwrap_or_default();
            return Err(PoolError::Exhausted { prompts: self.prompts.len(), reason });
        }
        // A prompt that is out already is asked again only when all are.
        let free: Vec<usize> = usable.iter().copied().filter(|i| !self.busy.contains(i)).collect();
        let free = if free.is_empty() { usable } else { free };
        let (retired, active): (Vec<usize>, Vec<usize>) = free.iter().partition(|i| self.retired(**i));
        let c = &self.params.curriculum;
        let rng = CounterRng::new(self.params.seed ^ 0x706f_6f6c, self.next_task);
        let draw = rng.uniform(0);
        let full = self.params.group_size;
        if c.selection == Selection::Uniform {
            return Ok((self.least_seen(&active, &rng), full));
        }
        if !retired.is_empty() && (active.is_empty() || draw < c.canary) {
            // Two samples are enough to notice that a solved prompt no longer is.
            let size = if active.is_empty() { full } else { 2 };
            return Ok((self.least_seen(&retired, &rng), size));
        }
        if draw < c.canary + c.explore {
            return Ok((self.least_seen(&active, &rng), full));
        }
        Ok((self.weighted(&active, &rng), full))
    }

    /// One of the prompts issued least often.
    fn least_seen(&self, among: &[usize], rng: &CounterRng) -> usize {
        let least = among.iter().map(|i| self.states[*i].issued).min().expect("not empty");
        let least: Vec<usize> = among.iter().copied().filter(|i| self.states[*i].issued == least).collect();
        least[rng.below(1, least.len() as u64) as usize]
    }

    /// One prompt with probability proportional to its informative probability to the power of `sharpness`.
    fn weighted(&self, among: &[usize], rng: &CounterRng) -> usize {
        let mut total = 0.0;
        let cumulative: Vec<f64> = among
            .iter()
            .map(|i| {
                let (alpha, beta) = self.belief(*i);
                let q = informative_probability(alpha, beta, self.params.group_size);
                total += q.powf(self.params.curriculum.sharpness);
                total
            })
            .collect();
        if !(total > 0.0) {
            return self.least_seen(among, rng);
        }
        let target = rng.uniform(1) * total;
        among[cumulative.partition_point(|sum| *sum <= target).min(among.len() - 1)]
    }

    /// What the pool tells about itself.
    pub fn metrics(&self) -> PoolMetrics {
        let (mut active, mut retired, mut quarantined, mut difficulty) = (0, 0, 0, 0.0);
        for i in 0..self.prompts.len() {
            if self.states[i].quarantined.is_some() {
                quarantined += 1;
            } else if self.retired(i) {
                retired += 1;
            } else {
                active += 1;
                let (alpha, beta) = self.belief(i);
                difficulty += beta / (alpha + beta);
            }
        }
        let zero = self.recent_zero_signal.iter().filter(|zero| **zero).count();
        PoolMetrics {
            zero_signal: zero as f64 / self.recent_zero_signal.len().max(1) as f64,
            active,
            retired,
            quarantined,
            difficulty_mean: difficulty / active.max(1) as f64,
            outstanding: self.outstanding.len(),
            issued: self.next_task,
            trained: self.trained,
            dropped: self.dropped,
        }
    }
}

#[cfg(test)]
mod tests;
