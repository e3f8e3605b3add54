//! The prompt pool: which prompt is asked next, and when.
//!
//! **Admission.** A group is admitted only while fewer than `(max_staleness + 1) * groups_per_step` groups are
//! outstanding. The learner takes groups in issue order, `groups_per_step` an update; so the group that is
//! admitted behind `r` outstanding ones, with the learner at step `s`, is consumed at step
//! `s + r / groups_per_step` at the latest, and `min_version = s + r / groups_per_step - max_staleness` bounds its
//! staleness. `s` and `r` come from the outcomes alone, so they belong together even while the outcomes of one
//! update are still arriving. A dropped group frees its place, which is how it is replaced.
//!
//! **Choice.** Mostly by the probability that the group will hold both right and wrong answers, under a
//! Beta belief per prompt that starts from what its tags have shown, or from a measurement before the run; some prompts least
//! seen; some retired ones, to notice when they stop being solved ([`canaries`]). Every choice is a function of (seed, task id, state)
//! and goes into the log with its reason.

mod canaries;
mod choice;
mod grades;

use std::collections::{BTreeMap, BTreeSet};

use freewheel_types::{DropReason, GroupFate, GroupOutcome, PolicyVersion, Prompt, PromptId, Task, TaskId};
use serde::{Deserialize, Serialize};

use super::log::PoolRecord;
use super::params::{PoolError, PoolParams};
use super::posterior::{Posterior, informative_probability};
use canaries::{ClassKey, ClassState};
use choice::{Choice, measured_before};
use grades::{Grade, Spread};

pub use choice::{Chosen, Share};

/// Outcomes over which shares are reported.
const WINDOW: usize = 256;
/// Groups in a row without a verdict after which a prompt is set aside.
const UNSCORED_MAX: u32 = 3;
/// Groups over which the share of right answers is averaged.
const SUCCESS_OVER: f64 = 32.0;

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
    /// Where rewards are not yes or no: how far those of a group lie apart.
    #[serde(default)]
    spread: Option<Spread>,
}

impl PromptState {
    /// Nothing asked yet; believed is what its `meta` says was measured before the run.
    fn new(prompt: &Prompt, params: &PoolParams) -> Self {
        let mut state = Self::default();
        if let Some((share, n)) = prompt.meta.as_deref().and_then(measured_before) {
            let worth = f64::from(n).min(params.curriculum.import_samples);
            state.posterior.alpha += share * worth;
            state.posterior.beta += (1.0 - share) * worth;
        }
        state
    }
}

/// A task that has not ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Outstanding {
    prompt: PromptId,
    group_size: u32,
    min_version: PolicyVersion,
    #[serde(default)]
    chosen: Option<Chosen>,
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
    /// The newest version that an outcome was trained into, and how many groups of that update were reported.
    learner: PolicyVersion,
    reported: u32,
    /// How far the band has moved, 0 to 1.
    #[serde(default)]
    hardness: f64,
    /// Moving mean of the share of right answers.
    #[serde(default)]
    success: Option<f64>,
    /// What canaries of retired prompts found.
    #[serde(default)]
    canaries: Vec<ClassState>,
    /// Rewards by tag, where they are not yes or no.
    #[serde(default)]
    grades: Vec<(String, Grade)>,
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
    /// Middle of the band of skills that is asked for (selection "band").
    pub target: f64,
    /// Moving mean of the share of right answers; 0 before the first group.
    pub success: f64,
}

/// What is believed of one prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PromptBelief {
    /// Believed probability of a right answer.
    pub solved: f64,
    /// Probability that a group holds right and wrong answers; most tasks are chosen by it. Where rewards are not yes or no: how far those of a group lie
    /// apart, beside what is usual, up to 1.
    pub informative: f64,
    /// Samples seen.
    pub samples: u64,
    /// Tasks issued.
    pub issued: u64,
    /// Solved (nearly) always or never: asked only to check that it still is.
    pub retired: bool,
    /// Why it was set aside.
    pub quarantined: Option<String>,
}

/// What a tag set lends to its prompts.
struct Prior {
    /// Probability of a right answer.
    mean: f64,
    /// Samples it is worth, at most `tag_prior`.
    strength: f64,
    /// Selection weight of a prompt never seen.
    fresh: f64,
}

/// The pool. Owns the prompts; decides without I/O or clock.
#[derive(Clone, Debug)]
pub struct PromptPool {
    params: PoolParams,
    prompts: Vec<Prompt>,
    index: BTreeMap<PromptId, usize>,
    states: Vec<PromptState>,
    /// The different sets of tags, and which one each prompt has.
    tag_sets: Vec<Vec<String>>,
    tag_set: Vec<usize>,
    tags: BTreeMap<String, Posterior>,
    outstanding: BTreeMap<TaskId, Outstanding>,
    /// Prompts with an outstanding task.
    busy: BTreeSet<usize>,
    next_task: u64,
    trained: u64,
    dropped: u64,
    recent_zero_signal: std::collections::VecDeque<bool>,
    dropped_in_a_row: u32,
    /// Why the last group that was dropped in this process was.
    dropped_for: Option<DropReason>,
    learner: PolicyVersion,
    reported: u32,
    hardness: f64,
    success: Option<f64>,
    /// The last canaries of each class of retired prompts: whether they found something else than what retired them.
    canaries: BTreeMap<ClassKey, Vec<bool>>,
    grades: BTreeMap<String, Grade>,
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
        let tag_sets: Vec<Vec<String>> =
            prompts.iter().map(|p| p.tags.clone()).collect::<BTreeSet<_>>().into_iter().collect();
        let tag_set =
            prompts.iter().map(|p| tag_sets.binary_search(&p.tags).expect("collected above")).collect();
        Ok(Self {
            tag_sets,
            tag_set,
            states: prompts.iter().map(|prompt| PromptState::new(prompt, &params)).collect(),
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
            dropped_for: None,
            learner: PolicyVersion::default(),
            reported: 0,
            hardness: 0.0,
            success: None,
            canaries: BTreeMap::new(),
            grades: BTreeMap::new(),
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
            let i =
                *pool.index.get(&outstanding.prompt).ok_or(PoolError::UnknownPrompt(outstanding.prompt))?;
            if task.0 >= state.next_task {
                return Err(PoolError::Inconsistent(format!(
                    "task {task} is outstanding, next is {}",
                    state.next_task
                )));
            }
            pool.busy.insert(i);
            pool.outstanding.insert(task, outstanding);
        }
        pool.tags = state.tags.into_iter().collect();
        (pool.next_task, pool.trained, pool.dropped) = (state.next_task, state.trained, state.dropped);
        pool.recent_zero_signal = state.recent_zero_signal.into();
        (pool.dropped_in_a_row, pool.learner, pool.reported) =
            (state.dropped_in_a_row, state.learner, state.reported);
        (pool.hardness, pool.success) = (state.hardness, state.success);
        pool.grades = state.grades.into_iter().collect();
        pool.canaries = pool.classes_of(state.canaries);
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
            learner: self.learner,
            reported: self.reported,
            hardness: self.hardness,
            success: self.success,
            canaries: self.class_states(),
            grades: self.grades.iter().map(|(tag, grade)| (tag.clone(), *grade)).collect(),
        }
    }

    /// Chooses and issues the next task, if the staleness budget has room.
    ///
    /// # Errors
    /// If every prompt has been set aside, or nothing was trained on for as long as `refill_stop` says.
    pub fn next_task(&mut self) -> Result<Option<Task>, PoolError> {
        let rank = self.outstanding.len();
        if rank >= self.params.budget() {
            return Ok(None);
        }
        let stop = self.params.curriculum.refill_stop.saturating_mul(self.params.groups_per_step);
        if let Some(why) = self.dropped_for.filter(|_| stop > 0 && self.dropped_in_a_row >= stop) {
            return Err(PoolError::Starved { groups: self.dropped_in_a_row, why: why.name() });
        }
        let Choice { prompt, group_size, chosen } = self.choose()?;
        let group_size = group_size + self.params.baselines;
        let (prompt, min_version) = (self.prompts[prompt].id, self.min_version(rank));
        let id = TaskId(self.next_task);
        self.issued(id, Outstanding { prompt, group_size, min_version, chosen: Some(chosen) })?;
        Ok(Some(self.task(id).expect("just issued")))
    }

    /// Oldest weights for a group that is admitted behind `rank` others.
    fn min_version(&self, rank: usize) -> PolicyVersion {
        let per_step = self.params.groups_per_step as usize;
        // Groups of the newest update whose outcome is still under way count as outstanding but are consumed.
        let consumed =
            if self.learner.step == 0 { 0 } else { per_step.saturating_sub(self.reported as usize) };
        let ahead = (rank.saturating_sub(consumed) / per_step) as u64;
        let step = (self.learner.step + ahead).saturating_sub(u64::from(self.params.max_staleness));
        if step == 0 { PolicyVersion::default() } else { PolicyVersion::new(self.learner.epoch, step) }
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

    /// Which rule chose an outstanding task.
    pub fn chosen(&self, id: TaskId) -> Option<&Chosen> {
        self.outstanding.get(&id)?.chosen.as_ref()
    }

    /// The tasks that have not ended, in issue order.
    pub fn outstanding(&self) -> Vec<TaskId> {
        self.outstanding.keys().copied().collect()
    }

    /// Takes in a record of the log: the pool then is as it was when the record was written. Records older than
    /// a restored state change nothing.
    ///
    /// # Errors
    /// If the prompt is unknown or a task id was left out.
    pub fn replay(&mut self, record: &PoolRecord) -> Result<(), PoolError> {
        match record {
            PoolRecord::Issued { task, .. } if task.0 < self.next_task => Ok(()),
            PoolRecord::Issued { task, prompt, group_size, min_version, chosen } => {
                let (prompt, group_size, min_version) = (*prompt, *group_size, *min_version);
                let chosen = chosen.clone();
                self.issued(*task, Outstanding { prompt, group_size, min_version, chosen })
            }
            PoolRecord::Ended(outcome) => {
                self.apply(outcome);
                Ok(())
            }
        }
    }

    fn issued(&mut self, id: TaskId, outstanding: Outstanding) -> Result<(), PoolError> {
        if id.0 != self.next_task {
            return Err(PoolError::Inconsistent(format!(
                "task {id} was issued where {} was next",
                self.next_task
            )));
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
        let class = self.class_asked(i, &ended);
        let right = self.learn(i, outcome);
        if let (Some(class), Some(right)) = (class, right) {
            self.checked(class, right, outcome);
        }
        match outcome.fate {
            GroupFate::Trained { step } => {
                let made = PolicyVersion::new(outcome.version.epoch, step);
                if made > self.learner {
                    (self.learner, self.reported) = (made, 0);
                    self.harden();
                }
                self.reported += u32::from(made == self.learner);
                self.trained += 1;
                self.dropped_in_a_row = 0;
            }
            GroupFate::Dropped(reason) => {
                self.dropped += 1;
                self.dropped_in_a_row += 1;
                self.dropped_for = Some(reason);
                self.set_aside(i, reason, outcome.given_up.as_deref());
                let warn_at = self.params.curriculum.refill_warn.saturating_mul(self.params.groups_per_step);
                if self.dropped_in_a_row.is_multiple_of(warn_at.max(1)) {
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

    /// Takes in what the samples of a group show; how many of them count as right, `None` if there were none.
    fn learn(&mut self, i: usize, outcome: &GroupOutcome) -> Option<u32> {
        if outcome.scored == 0 {
            return None;
        }
        let (mut right, n, version) = (outcome.correct, outcome.scored, outcome.sampled_by.step);
        if !outcome.graded.is_empty() {
            right = self.grade(i, &outcome.graded);
        } else if matches!(outcome.fate, GroupFate::Trained { .. }) && (right == 0 || right == n) {
            // It had contrast, though not between right and wrong: in other parts of the reward, or in costs.
            right = n / 2;
        }
        let rate = f64::from(right) / f64::from(n);
        self.success = Some(self.success.map_or(rate, |mean| mean + (rate - mean) / SUCCESS_OVER));
        let decay = self.params.curriculum.decay;
        self.states[i].posterior.observe(right, n, version, decay);
        for tag in &self.prompts[i].tags {
            self.tags.entry(tag.clone()).or_default().observe(right, n, version, decay);
        }
        Some(right)
    }

    /// After an update: the band moves towards what the run's progress allows, at most twice as fast as even progress would, and
    /// only while the policy solves what it is asked as often as the band's lower half says.
    fn harden(&mut self) {
        let steps = self.params.steps.max(1) as f64;
        let allowed = (self.learner.step as f64 / steps).min(1.0);
        if self.success >= Some(self.target() - self.params.curriculum.band_width / 2.0) {
            self.hardness = (self.hardness + 2.0 / steps).min(allowed).max(self.hardness);
        }
    }

    fn set_aside(&mut self, i: usize, reason: DropReason, given_up: Option<&str>) {
        let state = &mut self.states[i];
        state.unscored_in_a_row =
            if reason == DropReason::Unscored { state.unscored_in_a_row + 1 } else { 0 };
        if reason == DropReason::Invalid {
            // No actor can run its task, none survived it, or its payloads were bad.
            let why = given_up.unwrap_or("its rollouts were invalid");
            tracing::warn!(prompt = %self.prompts[i].id, why, "the prompt is set aside");
            state.quarantined = Some(why.to_owned());
        } else if state.unscored_in_a_row >= UNSCORED_MAX {
            state.quarantined = Some(format!("{UNSCORED_MAX} groups in a row could not be scored"));
        }
    }

    /// The newest weights that an outcome was trained into.
    pub fn learner(&self) -> PolicyVersion {
        self.learner
    }

    /// What is believed of a prompt now, which is what chooses it; `None` if it is not here.
    pub fn why(&self, prompt: PromptId) -> Option<PromptBelief> {
        let i = *self.index.get(&prompt)?;
        let (alpha, beta) = self.belief(i, &self.priors());
        let state = &self.states[i];
        Some(PromptBelief {
            solved: alpha / (alpha + beta),
            informative: self
                .contrast(i)
                .unwrap_or_else(|| informative_probability(alpha, beta, self.params.group_size)),
            samples: state.posterior.samples,
            issued: state.issued,
            retired: self.retired(i),
            quarantined: state.quarantined.clone(),
        })
    }

    /// What the pool tells about itself.
    pub fn metrics(&self) -> PoolMetrics {
        let (mut active, mut retired, mut quarantined, mut difficulty) = (0, 0, 0, 0.0);
        let priors = self.priors();
        for i in 0..self.prompts.len() {
            if self.states[i].quarantined.is_some() {
                quarantined += 1;
            } else if self.retired(i) {
                retired += 1;
            } else {
                active += 1;
                let (alpha, beta) = self.belief(i, &priors);
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
            target: self.target(),
            success: self.success.unwrap_or(0.0),
        }
    }
}

#[cfg(test)]
mod tests;
