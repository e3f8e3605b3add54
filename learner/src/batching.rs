//! Which ready groups make the next batch: issue order, inside a window.
//!
//! ```text
//! task ids   12   13   14   15   16   17        R ready   . under way   x ended
//!             x    R    .    R    R    .        groups_per_step = 2: 13 and 15, overtaking 14
//! ```
//!
//! Task ids are gapless in issue order, so every id below the highest one seen that is neither ready nor ended is under
//! way. Batches take the lowest ready ids. A group under way may be overtaken by `window` batches at most, so that short
//! answers are not favoured, and never by one after which it would be too old itself: then the batch waits. With
//! `window = 0` batches are a function of the task ids alone.

use std::collections::BTreeMap;

use freewheel_types::TaskId;
use serde::{Deserialize, Serialize};

use crate::assembly::Assembly;

/// Settings of batch formation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchRules {
    /// Groups in a batch.
    pub groups_per_step: usize,
    /// Batches that may overtake a group.
    pub window: u64,
    /// Updates that may lie between a group's oldest token and its use.
    pub max_staleness: u64,
}

/// What formation remembers between batches; part of the checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Overtaking {
    /// For each group under way that was overtaken: by how many batches.
    overtaken: BTreeMap<TaskId, u64>,
    /// Oldest step that drew a token of each group seen so far, from the newest ended one on.
    drawn_at: BTreeMap<TaskId, u64>,
}

impl Overtaking {
    /// Notes that a member of `group` arrived whose oldest token was drawn at `step`.
    pub fn saw(&mut self, group: TaskId, step: u64) {
        self.drawn_at.entry(group).and_modify(|known| *known = step.min(*known)).or_insert(step);
    }

    /// Ready groups that are too old for weights at `step`, or that claim to come from later ones.
    pub fn stale(&self, rules: &BatchRules, assembly: &Assembly, step: u64) -> Vec<TaskId> {
        let stale = |oldest: u64, newest: u64| newest > step || step - oldest > rules.max_staleness;
        let old = assembly.ready().values().filter(|group| match (group.oldest(), group.newest()) {
            (Some(oldest), Some(newest)) => stale(oldest.step, newest.step),
            _ => false,
        });
        old.map(|group| group.id).collect()
    }

    /// The next batch for weights at `step`, if the rules allow one now. Stale groups must be gone.
    pub fn form(&self, rules: &BatchRules, assembly: &Assembly, step: u64) -> Option<Vec<TaskId>> {
        let mut batch = Vec::with_capacity(rules.groups_per_step);
        let highest = assembly.ready().keys().next_back()?.0;
        for id in (assembly.settled().low_water()..=highest).map(TaskId) {
            if assembly.ready().contains_key(&id) {
                batch.push(id);
                if batch.len() == rules.groups_per_step {
                    return Some(batch);
                }
            } else if !assembly.settled().contains(id.0) && !self.may_be_overtaken(rules, id, step) {
                return None;
            }
        }
        None
    }

    /// Notes that `batch` was taken out of `assembly`: the groups under way before its last member were overtaken.
    pub fn formed(&mut self, assembly: &Assembly, batch: &[TaskId]) {
        let low = assembly.settled().low_water();
        let last = batch.iter().max().map_or(low, |id| id.0);
        for id in (low..last).map(TaskId).filter(|id| !batch.contains(id)) {
            if !assembly.settled().contains(id.0) && !assembly.ready().contains_key(&id) {
                *self.overtaken.entry(id).or_insert(0) += 1;
            }
        }
        self.overtaken.retain(|id, _| id.0 >= low && !assembly.settled().contains(id.0));
        // One ended group is kept as a hint for the first one under way.
        let hint = self.drawn_at.range(..TaskId(low)).next_back().map(|(id, _)| *id);
        self.drawn_at.retain(|id, _| id.0 >= low || Some(*id) == hint);
    }

    /// How often `group` was overtaken.
    pub fn times_overtaken(&self, group: TaskId) -> u64 {
        self.overtaken.get(&group).copied().unwrap_or(0)
    }

    /// Whether one more batch may pass `group`, which is under way.
    fn may_be_overtaken(&self, rules: &BatchRules, group: TaskId, step: u64) -> bool {
        // Tasks are started in issue order: a group of which nothing is known was drawn no earlier than its predecessors,
        // as far as one can tell from here. If that guess is wrong the group is dropped as stale and asked again.
        let drawn_at = self.drawn_at.range(..=group).next_back().map_or(0, |(_, step)| *step);
        let age_next = (step + 1).saturating_sub(drawn_at);
        self.times_overtaken(group) < rules.window && age_next <= rules.max_staleness
    }
}
