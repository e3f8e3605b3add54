//! What canaries find: retired prompts that are no longer what retired them.
//!
//! A class is the retired prompts with the same tags that were solved, or that were not. One canary that finds a wrong answer among solved prompts (or a right
//! one among the others) brings its own prompt back; others of its class follow at once, and when most of the last ones find the same, all of the class come
//! back: a policy that forgets, or learns, does so for more than one prompt, and one canary at a time would take as many steps as there are prompts.

use std::collections::BTreeMap;

use freewheel_types::GroupOutcome;
use serde::{Deserialize, Serialize};

use super::grades::alike;
use super::{Outstanding, PromptPool, Share};

/// Canaries of a class that are remembered.
const REMEMBERED: usize = 8;
/// Of those, how many bring the class back.
const ENOUGH: usize = 5;
/// Canaries that are out at a time after one has found something.
const FOLLOWING: usize = 4;

/// Set of tags, and whether its prompts were solved.
pub(super) type ClassKey = (usize, bool);

/// A class in a saved state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ClassState {
    tags: Vec<String>,
    solved: bool,
    found: Vec<bool>,
}

impl PromptPool {
    /// The class of a retired prompt.
    fn class(&self, i: usize) -> ClassKey {
        (self.tag_set[i], self.states[i].posterior.recent_rate() >= Some(0.5))
    }

    /// The class that a task was a canary of, if its prompt is still retired.
    pub(super) fn class_asked(&self, i: usize, ended: &Outstanding) -> Option<ClassKey> {
        let canary = ended.chosen.as_ref().is_some_and(|chosen| chosen.share == Share::Canary);
        (canary && self.retired(i)).then(|| self.class(i))
    }

    /// Takes in what a canary of `class` found; `right` of its samples count as right.
    pub(super) fn checked(&mut self, class: ClassKey, right: u32, outcome: &GroupOutcome) {
        let found = match (outcome.graded.is_empty(), class.1) {
            (false, _) => !alike(&outcome.graded),
            (true, true) => right < outcome.scored,
            (true, false) => right > 0,
        };
        let last = self.canaries.entry(class).or_default();
        if last.len() == REMEMBERED {
            last.remove(0);
        }
        last.push(found);
        if last.iter().filter(|found| **found).count() >= ENOUGH {
            self.canaries.remove(&class);
            self.bring_back(class);
        }
    }

    /// What was believed of a class no longer holds: its prompts are asked again as if they were new.
    fn bring_back(&mut self, class: ClassKey) {
        let all: Vec<usize> =
            (0..self.prompts.len()).filter(|i| self.retired(*i) && self.class(*i) == class).collect();
        for i in &all {
            self.states[*i].posterior.fade_to(0.0);
            self.states[*i].spread = None;
        }
        let tags = &self.tag_sets[class.0];
        for tag in tags {
            if let Some(posterior) = self.tags.get_mut(tag) {
                posterior.fade_to(self.params.curriculum.tag_prior);
            }
        }
        tracing::info!(
            ?tags,
            solved = class.1,
            prompts = all.len(),
            "retired prompts come back: canaries found otherwise"
        );
    }

    /// Retired prompts that are to be checked at once: of a class whose last canary found something, while few canaries of it are out.
    pub(super) fn suspects(&self, retired: &[usize]) -> Option<Vec<usize>> {
        let mut suspected = self.canaries.iter().filter(|(_, last)| last.last() == Some(&true));
        suspected.find_map(|(class, _)| {
            let out = self.outstanding.values().filter(|task| {
                task.chosen.as_ref().is_some_and(|chosen| chosen.share == Share::Canary)
                    && self.tag_set[self.index[&task.prompt]] == class.0
            });
            let all: Vec<usize> = retired.iter().copied().filter(|i| self.class(*i) == *class).collect();
            (!all.is_empty() && out.count() < FOLLOWING).then_some(all)
        })
    }

    /// The classes of a saved state; those of tags that are no longer there are left out.
    pub(super) fn classes_of(&self, saved: Vec<ClassState>) -> BTreeMap<ClassKey, Vec<bool>> {
        let known = |class: ClassState| {
            let tags = self.tag_sets.binary_search(&class.tags).ok()?;
            Some(((tags, class.solved), class.found))
        };
        saved.into_iter().filter_map(known).collect()
    }

    /// For a saved state.
    pub(super) fn class_states(&self) -> Vec<ClassState> {
        let state = |((tags, solved), found): (&ClassKey, &Vec<bool>)| ClassState {
            tags: self.tag_sets[*tags].clone(),
            solved: *solved,
            found: found.clone(),
        };
        self.canaries.iter().map(state).collect()
    }
}
