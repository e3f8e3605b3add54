//! What runs next: admission, pages, and the rows of a step.
//!
//! Age decides everything. Groups are admitted in the order of `submit`; when pages run out the youngest gives its own
//! away and is computed again later, so that the oldest always goes on and every request ends.

use super::backend::Backend;
use super::group::{Group, State};
use super::prefix::Prefix;
use super::{Drawer, Engine};

/// A sequence with pages: the prompt of a group, or one of its samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    /// The prompt of the group of this age.
    Prompt { age: u64 },
    /// Sample `index` (its place in the group now) of the group of this age.
    Sample { age: u64, index: usize },
}

/// Rows of one sequence in the coming step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planned {
    pub(super) unit: Unit,
    /// Position of the first row.
    pub(super) position: usize,
    pub(super) rows: usize,
    /// How many of its last rows' logits are wanted.
    pub(super) logits: usize,
}

impl Unit {
    pub(super) fn age(self) -> u64 {
        match self {
            Self::Prompt { age } | Self::Sample { age, .. } => age,
        }
    }
}

impl<B: Backend> Engine<B> {
    /// Starts waiting samples whose prompt is computed and gives pages to prompts that are to be computed, oldest first
    /// and without overtaking.
    pub(super) fn admit(&mut self) {
        let mut slots = self.config.max_live - self.live();
        // A prompt takes a step or more; those next in line are computed before a slot is free, so that it never waits.
        let ahead_max = (self.config.max_live / 4).max(1);
        let mut ahead = 0;
        let ages: Vec<u64> =
            self.groups.iter().filter(|(_, group)| group.waiting() > 0).map(|(&age, _)| age).collect();
        for age in ages {
            let group = &self.groups[&age];
            if self.pending.is_some() && !group.begun {
                continue; // Finish mode: what has not begun waits for the new weights.
            }
            if group.ready() {
                slots = self.start_samples(age, slots);
                let left = self.groups.get(&age).map_or(0, Group::waiting);
                if left > 0 && slots > 0 {
                    return; // Out of pages; nobody younger overtakes.
                }
                ahead += left;
            } else {
                if !group.prefilling() && (ahead >= slots + ahead_max || !self.place_prompt(age)) {
                    return;
                }
                ahead += self.groups[&age].waiting();
            }
        }
    }

    /// Gives the prompt of group `age` its pages, if there are enough: those that an earlier sequence left, and more.
    fn place_prompt(&mut self, age: u64) -> bool {
        let group = &self.groups[&age];
        let prefix = match self.config.prefix_cache {
            true => self.cache.find(group.reusable(), self.info.page_tokens),
            false => Prefix::default(),
        };
        let (pages, found) = (group.target_pages(), prefix.pages.len());
        if !self.reserve(pages - found, age) {
            return false;
        }
        self.stats.prefix_tokens += (found * self.info.page_tokens) as u64;
        let version = self.backend.version();
        self.groups
            .get_mut(&age)
            .expect("a group being admitted is there")
            .place(prefix, &self.pool, version);
        true
    }

    /// Starts waiting samples of group `age` while there are slots and pages, and draws the first token of fresh ones.
    /// Returns the slots left.
    fn start_samples(&mut self, age: u64, mut slots: usize) -> usize {
        let (mut draws, mut drawers) = (Vec::new(), Vec::new());
        for index in 0..self.groups[&age].samples.len() {
            let group = &self.groups[&age];
            let sample = &group.samples[index];
            if sample.state == State::Running {
                continue;
            }
            let page_tokens = self.info.page_tokens;
            let own_pages = group.known(sample).div_ceil(page_tokens) - group.shared() / page_tokens;
            if slots == 0 || !self.reserve(own_pages, age) {
                break;
            }
            let group = self.groups.get_mut(&age).expect("a group being started is there");
            if group.samples[index].state == State::Unstarted {
                draws.push(group.draw(&group.samples[index], 0, 0));
                drawers.push(Drawer { age, index, draws: 1, rows: 0, experts: 0..0 });
            }
            if let Some((from, to)) = group.start(index, &self.pool) {
                self.backend.copy_page(from, to);
            }
            slots -= 1;
        }
        if !draws.is_empty() {
            let group = self.groups.get_mut(&age).expect("a group that draws is there");
            let (row, version) =
                group.logits.as_ref().expect("a ready prompt keeps its logits for unstarted samples");
            let (drawn, version) = (self.backend.sample(row, &draws), *version);
            group.trim();
            self.push_drawn(&drawers, &drawn, &[], version);
        }
        slots
    }

    /// Whether `pages` can be taken for group `age`. Running samples keep a page each to grow into; but when nothing
    /// else is under way, whoever is next gets what it needs from those that only wait.
    fn reserve(&mut self, pages: usize, age: u64) -> bool {
        let live = self.live();
        if self.has_room(pages + live) {
            return true;
        }
        if live > 0 || self.groups.values().any(Group::prefilling) {
            return false;
        }
        let others: Vec<u64> = self.groups.keys().rev().copied().filter(|&other| other != age).collect();
        for other in others {
            if self.has_room(pages) {
                break;
            }
            self.groups.get_mut(&other).expect("listed above").release();
        }
        assert!(self.has_room(pages), "submit refuses what all pages together cannot hold");
        true
    }

    /// Whether `pages` are free, or can be without taking any from a sequence.
    fn has_room(&mut self, pages: usize) -> bool {
        self.pool.free() >= pages || self.cache.make_room(&self.pool, pages)
    }

    /// The rows of the coming step: one for every running sample that has all but its last token computed, and guesses
    /// after it where rows cost little; then chunks of prompts and of what must be computed again.
    pub(super) fn plan(&mut self) -> Vec<Planned> {
        let mut plan = Vec::new();
        let ages: Vec<u64> = self.groups.keys().copied().collect();
        let mut decoding = Vec::new();
        for &age in &ages {
            let ready = (0..self.groups[&age].samples.len()).filter(|&i| self.uncomputed(age, i) == 1);
            decoding.extend(ready.map(|index| (age, index)));
        }
        let mut spare = self.info.cheap_rows.saturating_sub(decoding.len());
        for (age, index) in decoding {
            // Whoever is older may have taken this one's pages.
            if self.uncomputed(age, index) == 1 && self.plan_sample(&mut plan, age, index, 1) {
                spare -= self.plan_guesses(&mut plan, age, index, spare);
            }
        }
        let mut budget = self.config.prefill_tokens;
        for &age in &ages {
            budget -= self.plan_prompt(&mut plan, age, budget);
            for index in 0..self.groups[&age].samples.len() {
                let rows = self.uncomputed(age, index).min(budget);
                if self.uncomputed(age, index) > 1
                    && rows > 0
                    && self.plan_sample(&mut plan, age, index, rows)
                {
                    budget -= rows;
                }
            }
        }
        // Whoever gave its pages away after it was planned is out again.
        plan.retain(|planned| match planned.unit {
            Unit::Prompt { age } => self.groups[&age].pages.len() > 0,
            Unit::Sample { age, index } => self.groups[&age].samples[index].state == State::Running,
        });
        plan
    }

    /// Known tokens of a running sample that are not computed; 0 if it does not run or its prompt is not there.
    fn uncomputed(&self, age: u64, index: usize) -> usize {
        let group = &self.groups[&age];
        let sample = &group.samples[index];
        if sample.state != State::Running || group.computed < group.shared() {
            return 0;
        }
        group.known(sample) - sample.computed
    }

    fn plan_prompt(&self, plan: &mut Vec<Planned>, age: u64, budget: usize) -> usize {
        let group = &self.groups[&age];
        let rows = group.target().saturating_sub(group.computed).min(budget);
        if group.pages.len() == 0 || rows == 0 {
            return 0;
        }
        let wants_logits = group.computed + rows == group.prompt.len() && group.any(State::Unstarted);
        let logits = usize::from(wants_logits);
        plan.push(Planned { unit: Unit::Prompt { age }, position: group.computed, rows, logits });
        rows
    }

    /// Plans `rows` of a running sample; `false` if it had to give its own pages away for want of one more.
    fn plan_sample(&mut self, plan: &mut Vec<Planned>, age: u64, index: usize, rows: usize) -> bool {
        let group = &self.groups[&age];
        let (sample, known) = (&group.samples[index], group.known(&group.samples[index]));
        let (position, held) = (sample.computed, sample.pages.len());
        let pages = (position + rows).div_ceil(self.info.page_tokens);
        if pages > held && !self.make_room(pages - held, age, index) {
            self.preempt(age, index);
            return false;
        }
        let sample = &mut self.groups.get_mut(&age).expect("a planned group is there").samples[index];
        sample.pages.grow(&self.pool, pages);
        let logits = usize::from(position + rows == known);
        plan.push(Planned { unit: Unit::Sample { age, index }, position, rows, logits });
        true
    }

    /// Adds at most `most` guesses to the row just planned for a sample, as far as there are pages that nobody waits for.
    /// Returns how many.
    fn plan_guesses(&mut self, plan: &mut [Planned], age: u64, index: usize, most: usize) -> usize {
        let most = most.min(self.config.draft_tokens);
        if most == 0 {
            return 0;
        }
        let group = self.groups.get_mut(&age).expect("a planned group is there");
        group.guess(index, most);
        let sample = &group.samples[index];
        let guesses = sample.draft.len();
        let pages = (group.known(sample) + guesses).div_ceil(self.info.page_tokens);
        let more = pages.saturating_sub(sample.pages.len());
        if more > 0 && !self.has_room(more + self.live()) {
            self.groups.get_mut(&age).expect("as above").samples[index].draft.clear();
            return 0;
        }
        self.groups.get_mut(&age).expect("as above").samples[index].pages.grow(&self.pool, pages);
        let planned = plan.last_mut().expect("its row was just planned");
        planned.rows += guesses;
        planned.logits += guesses;
        guesses
    }

    /// Frees pages for sample `(age, index)` by taking those of everyone younger, youngest first.
    fn make_room(&mut self, pages: usize, age: u64, index: usize) -> bool {
        while !self.has_room(pages) {
            let youngest = self.groups.range(age..).rev().find_map(|(&victim_age, group)| {
                let younger =
                    |&i: &usize| group.samples[i].state == State::Running && (victim_age, i) > (age, index);
                match (0..group.samples.len()).rev().find(younger) {
                    Some(i) => Some(Unit::Sample { age: victim_age, index: i }),
                    None => (victim_age > age && group.pages.len() > 0)
                        .then_some(Unit::Prompt { age: victim_age }),
                }
            });
            match youngest {
                Some(Unit::Sample { age, index }) => self.preempt(age, index),
                Some(Unit::Prompt { age }) => self.groups.get_mut(&age).expect("found above").release(),
                None => return false,
            }
        }
        true
    }

    fn preempt(&mut self, age: u64, index: usize) {
        self.groups.get_mut(&age).expect("a preempted group is there").samples[index].preempt();
        self.stats.preemptions += 1;
    }
}
