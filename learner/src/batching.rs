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
//!
//! Where most groups teach nothing, a whole batch may take forever. Once `refill_max` groups for each of a batch's places ended without
//! being trained on, counted in id order, the batch is closed with what it has.

use std::collections::{BTreeMap, BTreeSet};

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
    /// Groups that may have to be replaced for each of a batch, before a smaller one is formed; 0: any number.
    pub refill_max: usize,
    /// Groups that a smaller batch must have.
    pub groups_min: usize,
}

/// What formation remembers between batches; part of the checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Overtaking {
    /// For each group under way that was overtaken: by how many batches.
    overtaken: BTreeMap<TaskId, u64>,
    /// Oldest step that drew a token of each group seen so far, from the newest ended one on.
    drawn_at: BTreeMap<TaskId, u64>,
    /// Groups after the last batch that had to be replaced.
    #[serde(default)]
    replaced: BTreeSet<TaskId>,
}

impl Overtaking {
    /// Notes that a member of `group` arrived whose oldest token was drawn at `step`.
    pub fn saw(&mut self, group: TaskId, step: u64) {
        self.drawn_at.entry(group).and_modify(|known| *known = step.min(*known)).or_insert(step);
    }

    /// Notes that `group` taught nothing, or could not be judged: another is asked for in its place.
    pub fn replaced(&mut self, group: TaskId) {
        self.replaced.insert(group);
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
        let highest = assembly.ready().keys().next_back()?.max(self.replaced.last().unwrap_or(&TaskId(0))).0;
        let patience = rules.refill_max.saturating_mul(rules.groups_per_step);
        let mut replaced = 0;
        for id in (assembly.settled().low_water()..=highest).map(TaskId) {
            if assembly.ready().contains_key(&id) {
                batch.push(id);
            } else if !assembly.settled().contains(id.0) && !self.may_be_overtaken(rules, id, step) {
                return None;
            }
            replaced = if patience > 0 && replaced < patience {
                self.replaced.range(..=id).count()
            } else {
                replaced
            };
            let tired = patience > 0 && replaced >= patience && batch.len() >= rules.groups_min.max(1);
            if batch.len() == rules.groups_per_step || tired {
                return Some(batch);
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
        self.replaced.retain(|id| id.0 > last);
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

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use freewheel_types::{CounterRng, DropReason, PolicyVersion};
    use proptest::prelude::*;

    use super::*;
    use crate::assembly::{Arrival, GroupRules};
    use crate::testing::scored;

    fn insert(assembly: &mut Assembly, overtaking: &mut Overtaking, task: u64, index: u32, step: u64) {
        let rollout = scored(task, index, PolicyVersion::new(1, step), index as f32);
        overtaking.saw(TaskId(task), step);
        assembly.insert(Arrival::Scored(Box::new(rollout)));
    }

    proptest! {
        /// Groups arrive in any order, each drawn by the weights current when it was issued; the pool keeps a budget.
        #[test]
        fn no_batch_breaks_the_bound_or_runs_ahead_of_its_window(
            seed in any::<u64>(),
            max_staleness in 0u64..5,
            window in 0u64..4,
            groups_per_step in 1usize..4,
        ) {
            let rules = BatchRules { groups_per_step, window, max_staleness, refill_max: 0, groups_min: 1 };
            let rng = CounterRng::new(seed, 0);
            let mut assembly = groups_of_three();
            let mut overtaking = Overtaking::default();
            // Under way: task and how many members arrived; issued at a step.
            let mut under_way: BTreeMap<u64, (u32, u64)> = BTreeMap::new();
            let (mut next, mut step, mut trained, mut passed) = (0, 0, BTreeSet::new(), BTreeMap::<u64, u64>::new());
            for draw in 0..600 {
                let outstanding = next - trained.len() as u64 - dropped(&assembly, trained.len());
                if outstanding < (max_staleness + 1) * groups_per_step as u64 {
                    under_way.insert(next, (0, step));
                    next += 1;
                } else if !under_way.is_empty() {
                    let pick = rng.below(draw, under_way.len() as u64) as usize;
                    let (&task, &(index, drawn)) = under_way.iter().nth(pick).unwrap();
                    insert(&mut assembly, &mut overtaking, task, index, drawn);
                    if index == 2 { under_way.remove(&task); } else { under_way.insert(task, (index + 1, drawn)); }
                }
                for task in overtaking.stale(&rules, &assembly, step) {
                    assembly.drop_ready(task, DropReason::Stale);
                }
                let Some(batch) = overtaking.form(&rules, &assembly, step) else { continue };
                prop_assert_eq!(batch.len(), groups_per_step);
                prop_assert!(batch.is_sorted());
                for task in &batch {
                    let oldest = assembly.ready()[task].oldest().unwrap();
                    prop_assert!(step - oldest.step <= max_staleness, "staleness at step {}", step);
                }
                let last = batch.last().unwrap().0;
                prop_assert!(assembly.ready().keys().all(|id| batch.contains(id) || id.0 > last), "lowest first");
                for &task in under_way.keys().filter(|&&task| task < last) {
                    let times = passed.entry(task).or_insert(0);
                    *times += 1;
                    prop_assert!(*times <= window, "group {} was overtaken {} times", task, *times);
                    prop_assert!(window > 0 && max_staleness > 0, "strict order was asked for");
                }
                overtaking.formed(&assembly, &batch);
                let groups = assembly.take(&batch);
                assembly.trained(&groups);
                trained.extend(batch);
                step += 1;
            }
            prop_assert!(step > 20, "it got stuck after {} steps", step);
        }
    }

    /// Groups of three that need two valid samples and a contrast.
    fn groups_of_three() -> Assembly {
        Assembly::new(GroupRules {
            min_valid: 2,
            group_size: 3,
            needs_contrast: true,
            greedy_baseline: false,
        })
    }

    fn dropped(assembly: &Assembly, trained: usize) -> u64 {
        assembly.settled().len() - trained as u64
    }

    #[test]
    fn a_straggler_is_overtaken_at_most_window_times_and_then_waited_for() {
        let rules =
            BatchRules { groups_per_step: 1, window: 2, max_staleness: 10, refill_max: 0, groups_min: 1 };
        let mut assembly = groups_of_three();
        let mut overtaking = Overtaking::default();
        insert(&mut assembly, &mut overtaking, 0, 0, 0);
        for task in 1..5 {
            (0..3).for_each(|index| insert(&mut assembly, &mut overtaking, task, index, 0));
        }
        let mut formed = Vec::new();
        for step in 0..4 {
            let Some(batch) = overtaking.form(&rules, &assembly, step) else { break };
            overtaking.formed(&assembly, &batch);
            let groups = assembly.take(&batch);
            assembly.trained(&groups);
            formed.extend(batch);
        }
        assert_eq!(formed, [TaskId(1), TaskId(2)]);
        (1..3).for_each(|index| insert(&mut assembly, &mut overtaking, 0, index, 0));
        assert_eq!(overtaking.form(&rules, &assembly, 2), Some(vec![TaskId(0)]));
    }

    #[test]
    fn a_batch_that_waits_for_too_many_replacements_is_closed_with_what_it_has() {
        let rules =
            BatchRules { groups_per_step: 3, window: 0, max_staleness: 10, refill_max: 2, groups_min: 2 };
        let mut assembly = groups_of_three();
        let mut overtaking = Overtaking::default();
        let end = |overtaking: &mut Overtaking, assembly: &mut Assembly, task: u64, teaches: bool| {
            (0..3).for_each(|index| insert(assembly, overtaking, task, index, 0));
            if !teaches {
                assembly.drop_ready(TaskId(task), DropReason::ZeroSignal);
                overtaking.replaced(TaskId(task));
            }
        };
        (0..7).for_each(|task| end(&mut overtaking, &mut assembly, task, task == 3));
        assert_eq!(
            overtaking.form(&rules, &assembly, 0),
            None,
            "six were replaced, and one is no batch of two"
        );
        let least = BatchRules { groups_min: 1, ..rules };
        assert_eq!(
            overtaking.form(&least, &assembly, 0),
            Some(vec![TaskId(3)]),
            "though nothing after it is ready"
        );
        end(&mut overtaking, &mut assembly, 7, true);
        let batch = overtaking.form(&rules, &assembly, 0);
        assert_eq!(batch, Some(vec![TaskId(3), TaskId(7)]));
        let patient = BatchRules { refill_max: 0, ..rules };
        assert_eq!(overtaking.form(&patient, &assembly, 0), None);
        // The next batch starts to count anew.
        overtaking.formed(&assembly, &batch.unwrap());
        let groups = assembly.take(&[TaskId(3), TaskId(7)]);
        assembly.trained(&groups);
        (8..10).for_each(|task| end(&mut overtaking, &mut assembly, task, true));
        assert_eq!(overtaking.form(&rules, &assembly, 0), None);
    }

    #[test]
    fn a_group_from_weights_that_do_not_exist_is_stale() {
        let rules =
            BatchRules { groups_per_step: 1, window: 0, max_staleness: 10, refill_max: 0, groups_min: 1 };
        let mut assembly = groups_of_three();
        let mut overtaking = Overtaking::default();
        (0..3).for_each(|index| insert(&mut assembly, &mut overtaking, 0, index, 7));
        assert_eq!(overtaking.stale(&rules, &assembly, 6), [TaskId(0)]);
        assert_eq!(overtaking.stale(&rules, &assembly, 17), []);
        assert_eq!(overtaking.stale(&rules, &assembly, 18), [TaskId(0)]);
    }
}
