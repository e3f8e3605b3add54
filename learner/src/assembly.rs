//! From single deliveries to whole prompt groups, each rollout counted once.
//!
//! ```text
//! arrival ─► known id? ─► group ─ all members here ─► judge ─► ready (can teach) ─► batch
//!              │ yes: duplicate                         └────► dropped: unscored, invalid, zero signal
//! ```
//!
//! A group is whole when each of its rollout ids has arrived, as a scored rollout, as one that cannot be used, or as one
//! that will never come. Unscored members are left out; they are never zero. Which groups make a batch, and when a
//! group is too old, is decided in [`batching`](crate::batching).

use std::collections::BTreeMap;

use freewheel_types::{
    DropReason, Dropped, MAX_GROUP_SIZE, PolicyVersion, PromptId, RolloutId, ScoredRollout, TaskId,
};

use crate::advantage::is_informative;
use crate::consumed::IdSet;

/// One rollout id, as it reached the learner.
#[derive(Clone, Debug, PartialEq)]
pub enum Arrival {
    /// With a reward record.
    Scored(Box<ScoredRollout>),
    /// A greedy completion that its group is compared with, with a reward record: not to be trained on.
    Baseline(Box<ScoredRollout>),
    /// It came, but cannot be used.
    Bad(RolloutId),
    /// It will never come.
    Abandoned {
        /// The rollout.
        rollout: RolloutId,
        /// Its prompt.
        prompt: PromptId,
        /// Rollouts in its group.
        group_size: u32,
        /// Why.
        reason: String,
    },
}

impl Arrival {
    /// Which rollout.
    pub fn rollout(&self) -> RolloutId {
        match self {
            Self::Scored(scored) | Self::Baseline(scored) => scored.rollout.id,
            Self::Bad(rollout) | Self::Abandoned { rollout, .. } => *rollout,
        }
    }

    fn group_size(&self) -> Option<u32> {
        match self {
            Self::Scored(scored) | Self::Baseline(scored) => Some(scored.rollout.group_size),
            Self::Abandoned { group_size, .. } => Some(*group_size),
            Self::Bad(_) => None,
        }
    }

    fn prompt(&self) -> Option<PromptId> {
        match self {
            Self::Scored(scored) | Self::Baseline(scored) => Some(scored.rollout.prompt.id),
            Self::Abandoned { prompt, .. } => Some(*prompt),
            Self::Bad(_) => None,
        }
    }
}

/// The rollouts of one task, as far as they are here.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// The task.
    pub id: TaskId,
    /// Its members by sample index.
    pub members: BTreeMap<u32, Arrival>,
}

/// What a group's members have in common, for reports.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupSummary {
    /// Its prompt; `None` if no member says.
    pub prompt: Option<PromptId>,
    /// Oldest version that had a part in a token.
    pub oldest: Option<PolicyVersion>,
    /// Members with a reward.
    pub scored: u32,
    /// Of those, how many were right.
    pub correct: u32,
    /// Mean reward of the scored.
    pub reward_mean: Option<f32>,
}

/// The end of a group, as told to the prompt pool.
#[derive(Clone, Debug, PartialEq)]
pub struct SettledGroup {
    /// The group.
    pub group: Group,
    /// Why it left without being trained on.
    pub reason: DropReason,
}

impl Group {
    /// Members that were judged, also those that got no reward, in sample order.
    pub fn judged(&self) -> impl Iterator<Item = &ScoredRollout> {
        self.members.values().filter_map(|arrival| match arrival {
            Arrival::Scored(scored) | Arrival::Baseline(scored) => Some(&**scored),
            Arrival::Bad(_) | Arrival::Abandoned { .. } => None,
        })
    }

    /// Members with a reward that may be trained on, in sample order.
    pub fn scored(&self) -> impl Iterator<Item = &ScoredRollout> {
        self.members.values().filter_map(|arrival| match arrival {
            Arrival::Scored(scored) if scored.reward.reward().is_some() => Some(&**scored),
            _ => None,
        })
    }

    /// Reward of the greedy completion that the group is compared with, where there is one and it was scored.
    pub fn baseline(&self) -> Option<&ScoredRollout> {
        self.members.values().find_map(|arrival| match arrival {
            Arrival::Baseline(scored) if scored.reward.reward().is_some() => Some(&**scored),
            _ => None,
        })
    }

    /// Members that leave on their own account, whatever becomes of the rest.
    pub fn dropped_members(&self) -> Vec<(RolloutId, DropReason)> {
        let reason = |arrival: &Arrival| match arrival {
            Arrival::Scored(scored) if scored.reward.reward().is_some() => None,
            Arrival::Scored(_) => Some(DropReason::Unscored),
            Arrival::Baseline(_) => Some(DropReason::Baseline),
            Arrival::Bad(_) | Arrival::Abandoned { .. } => Some(DropReason::Invalid),
        };
        self.members.values().filter_map(|arrival| Some((arrival.rollout(), reason(arrival)?))).collect()
    }

    /// Why members never came, if any was given up.
    pub fn given_up(&self) -> Option<&str> {
        self.members.values().find_map(|arrival| match arrival {
            Arrival::Abandoned { reason, .. } => Some(reason.as_str()),
            Arrival::Scored(_) | Arrival::Baseline(_) | Arrival::Bad(_) => None,
        })
    }

    /// Whether some limited cost is not the same for all.
    fn costs_differ(&self) -> bool {
        let costs = self.scored().map(|s| s.reward.costs.len()).max().unwrap_or(0);
        let value = |s: &ScoredRollout, k: usize| s.reward.costs.get(k).and_then(|cost| cost.value);
        (0..costs).any(|k| is_informative(self.scored().map(|s| value(s, k))))
    }

    /// Rewards of the scored, if no component says of any of them whether it is right.
    pub fn graded(&self) -> Vec<f32> {
        if self.scored().any(|s| s.reward.correct().is_some()) {
            return Vec::new();
        }
        self.scored().filter_map(|s| s.reward.reward()).collect()
    }

    /// Counts for the report.
    pub fn summary(&self) -> GroupSummary {
        let rewards: Vec<f32> = self.scored().filter_map(|s| s.reward.reward()).collect();
        // Where no component decides what is right, a positive reward counts as right.
        let right =
            |s: &&ScoredRollout| s.reward.correct().unwrap_or(s.reward.reward().is_some_and(|r| r > 0.0));
        GroupSummary {
            prompt: self.members.values().find_map(Arrival::prompt),
            oldest: self.oldest(),
            scored: rewards.len() as u32,
            correct: self.scored().filter(right).count() as u32,
            reward_mean: (!rewards.is_empty()).then(|| rewards.iter().sum::<f32>() / rewards.len() as f32),
        }
    }

    /// Oldest version that drew a token of a member that may be trained on, or prefilled its prompt.
    pub fn oldest(&self) -> Option<PolicyVersion> {
        self.scored().filter_map(|s| s.rollout.version_oldest()).min()
    }

    /// Newest version that drew a token of a member that may be trained on.
    pub fn newest(&self) -> Option<PolicyVersion> {
        self.scored().filter_map(|s| s.rollout.version_newest()).max()
    }
}

/// What makes a whole group one to train on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupRules {
    /// Scored members it needs.
    pub min_valid: u32,
    /// Size of groups none of whose members says.
    pub group_size: u32,
    /// Whether a group must hold different rewards, because only differences within it are credited.
    pub needs_contrast: bool,
    /// Whether a group has a greedy member that the others are compared with.
    pub greedy_baseline: bool,
}

impl GroupRules {
    /// What an arrival is to its group.
    fn place(&self, arrival: Arrival) -> Arrival {
        match arrival {
            Arrival::Scored(scored) if self.greedy_baseline && scored.rollout.sampling.is_greedy() => {
                Arrival::Baseline(scored)
            }
            other => other,
        }
    }

    /// Why a whole group cannot be trained on, if it cannot. Depends on the group alone.
    fn verdict(&self, group: &Group) -> Option<DropReason> {
        let scored = group.scored().count() as u32;
        if scored < self.min_valid.min(group.members.len() as u32) || scored == 0 {
            let unscored = group.dropped_members().iter().any(|(_, reason)| *reason == DropReason::Unscored);
            return Some(if unscored { DropReason::Unscored } else { DropReason::Invalid });
        }
        // A group of one has no baseline of its own; it is for objectives that compare across the batch.
        let baseline = group.baseline();
        if self.greedy_baseline && baseline.is_none() {
            return Some(DropReason::Unscored);
        }
        let informative = !self.needs_contrast
            || group.members.len() == 1
            || is_informative(group.scored().chain(baseline).map(|s| s.reward.reward()))
            || group.costs_differ();
        (!informative).then_some(DropReason::ZeroSignal)
    }
}

/// Where every rollout that ever arrived is. `received = trained + dropped + held`, always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Ledger {
    /// Distinct rollout ids that arrived.
    pub received: u64,
    /// Rollouts that went into an update.
    pub trained: u64,
    /// Rollouts that left otherwise.
    pub dropped: Dropped,
    /// Further copies of rollouts that had arrived; outside the identity, nobody asked for them.
    pub duplicates: u64,
}

impl Ledger {
    /// Rollouts that wait here: in unfinished groups, or in groups that wait for a batch.
    pub fn held(&self) -> u64 {
        self.received - self.trained - self.dropped.total()
    }
}

/// Groups under way and groups that are ready.
#[derive(Clone, Debug)]
pub struct Assembly {
    rules: GroupRules,
    /// Every rollout id that arrived.
    seen: IdSet,
    partial: BTreeMap<TaskId, Group>,
    ready: BTreeMap<TaskId, Group>,
    /// Groups that ended, trained or dropped.
    settled: IdSet,
    ledger: Ledger,
}

impl Assembly {
    /// Nothing has arrived.
    pub fn new(rules: GroupRules) -> Self {
        Self::restore(rules, IdSet::default(), IdSet::default(), Ledger::default())
    }

    /// As it was when `settled` groups had ended with their `consumed` rollouts; whatever was held then is to be inserted again.
    pub fn restore(rules: GroupRules, consumed: IdSet, settled: IdSet, ledger: Ledger) -> Self {
        Self { rules, seen: consumed, partial: BTreeMap::new(), ready: BTreeMap::new(), settled, ledger }
    }

    /// Whether this rollout arrived before.
    pub fn knows(&self, rollout: RolloutId) -> bool {
        self.seen.contains(rollout.0)
    }

    /// Takes an arrival. Returns the group, if this ended it without making it ready.
    pub fn insert(&mut self, arrival: Arrival) -> Option<SettledGroup> {
        let arrival = self.rules.place(arrival);
        let id = arrival.rollout();
        if !self.seen.insert(id.0) {
            self.ledger.duplicates += 1;
            return None;
        }
        self.ledger.received += 1;
        let group = self
            .partial
            .entry(id.task())
            .or_insert_with(|| Group { id: id.task(), members: BTreeMap::new() });
        group.members.insert(id.index(), arrival);
        let size = group.members.values().find_map(Arrival::group_size).unwrap_or(self.rules.group_size);
        if (group.members.len() as u32) < size {
            return None;
        }
        let group = self.partial.remove(&id.task()).expect("it was just there");
        // All ids of the task, used or not: nothing more is to come, and the mark below which everything is known moves on.
        for index in 0..MAX_GROUP_SIZE {
            self.seen.insert(group.id.rollout(index).0);
        }
        match self.rules.verdict(&group) {
            Some(reason) => Some(self.settle_dropped(group, reason)),
            None => {
                self.ready.insert(group.id, group);
                None
            }
        }
    }

    /// Groups that can be trained on, by id.
    pub fn ready(&self) -> &BTreeMap<TaskId, Group> {
        &self.ready
    }

    /// Groups some of whose members are here, by id.
    pub fn partial(&self) -> &BTreeMap<TaskId, Group> {
        &self.partial
    }

    /// Every rollout id that arrived.
    pub fn seen(&self) -> &IdSet {
        &self.seen
    }

    /// Groups that ended.
    pub fn settled(&self) -> &IdSet {
        &self.settled
    }

    /// The counters.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Takes ready groups out, to be trained on; [`trained`](Self::trained) or [`drop_batch`](Self::drop_batch) ends them.
    ///
    /// # Panics
    /// If one is not ready.
    pub fn take(&mut self, ids: &[TaskId]) -> Vec<Group> {
        ids.iter()
            .map(|id| self.ready.remove(id).unwrap_or_else(|| panic!("group {id} is not ready")))
            .collect()
    }

    /// Drops a ready group.
    ///
    /// # Panics
    /// If it is not ready.
    pub fn drop_ready(&mut self, id: TaskId, reason: DropReason) -> SettledGroup {
        let group = self.ready.remove(&id).unwrap_or_else(|| panic!("group {id} is not ready"));
        self.settle_dropped(group, reason)
    }

    /// Counts groups that went into an update.
    pub fn trained(&mut self, groups: &[Group]) {
        for group in groups {
            self.count_members(group);
            self.ledger.trained += group.scored().count() as u64;
        }
    }

    /// Counts groups whose update was not applied.
    pub fn drop_batch(&mut self, groups: Vec<Group>, reason: DropReason) -> Vec<SettledGroup> {
        groups.into_iter().map(|group| self.settle_dropped(group, reason)).collect()
    }

    /// Rollout ids that are held: those of partial and ready groups.
    pub fn held(&self) -> impl Iterator<Item = RolloutId> {
        self.partial
            .values()
            .chain(self.ready.values())
            .flat_map(|group| group.members.values().map(Arrival::rollout))
    }

    /// Rollout ids that arrived and are not held any more.
    pub fn consumed(&self) -> IdSet {
        let mut consumed = self.seen.clone();
        self.held().for_each(|id| consumed.remove(id.0));
        consumed
    }

    fn settle_dropped(&mut self, group: Group, reason: DropReason) -> SettledGroup {
        self.count_members(&group);
        self.ledger.dropped.add(reason, group.scored().count() as u64);
        SettledGroup { group, reason }
    }

    fn count_members(&mut self, group: &Group) {
        self.settled.insert(group.id.0);
        group.dropped_members().iter().for_each(|(_, reason)| self.ledger.dropped.add(*reason, 1));
    }
}

#[cfg(test)]
mod tests {
    use freewheel_types::GroupFate;

    use super::*;
    use crate::report::outcome;
    use crate::testing::{arrival, scored, unscored};

    const RULES: GroupRules =
        GroupRules { min_valid: 2, group_size: 3, needs_contrast: true, greedy_baseline: false };

    fn sample(index: u32, reward: f32) -> Arrival {
        Arrival::Scored(Box::new(scored(0, index, PolicyVersion::default(), reward)))
    }

    /// Puts one whole group in; `None`: it became ready.
    fn fate(members: [Arrival; 3]) -> (Option<DropReason>, Ledger, GroupSummary) {
        let mut assembly = Assembly::new(RULES);
        let ended: Vec<SettledGroup> =
            members.into_iter().filter_map(|member| assembly.insert(member)).collect();
        let group = ended
            .first()
            .map_or_else(|| assembly.ready()[&TaskId(0)].clone(), |settled| settled.group.clone());
        (ended.first().map(|settled| settled.reason), *assembly.ledger(), group.summary())
    }

    #[test]
    fn unscored_samples_are_left_out_and_never_zero() {
        let away = Arrival::Scored(Box::new(unscored(scored(0, 1, PolicyVersion::default(), 0.0))));
        // With the unscored one as zero this group would have a signal.
        let (reason, ledger, summary) = fate([sample(0, 1.0), away.clone(), sample(2, 1.0)]);
        assert_eq!(reason, Some(DropReason::ZeroSignal));
        assert_eq!((summary.scored, summary.reward_mean), (2, Some(1.0)));
        assert_eq!(
            (ledger.dropped.get(DropReason::ZeroSignal), ledger.dropped.get(DropReason::Unscored)),
            (2, 1)
        );
        let (reason, ledger, _) = fate([sample(0, 1.0), away.clone(), sample(2, 0.0)]);
        assert_eq!((reason, ledger.held()), (None, 3));
    }

    #[test]
    fn too_few_verdicts_drop_the_group_for_what_is_missing() {
        let away =
            |index| Arrival::Scored(Box::new(unscored(scored(0, index, PolicyVersion::default(), 0.0))));
        let (reason, ledger, summary) = fate([away(0), away(1), sample(2, 1.0)]);
        assert_eq!(
            (reason, ledger.dropped.get(DropReason::Unscored), ledger.held()),
            (Some(DropReason::Unscored), 3, 0)
        );
        assert_eq!(summary.reward_mean, Some(1.0));
        let gone = |index| Arrival::Abandoned {
            rollout: TaskId(0).rollout(index),
            prompt: PromptId([1; 16]),
            group_size: 3,
            reason: "too long".into(),
        };
        let (reason, ledger, summary) = fate([gone(0), gone(1), gone(2)]);
        assert_eq!((reason, ledger.dropped.get(DropReason::Invalid)), (Some(DropReason::Invalid), 3));
        assert_eq!((summary.prompt, summary.reward_mean), (Some(PromptId([1; 16])), None));
        let bad = |index| Arrival::Bad(TaskId(0).rollout(index));
        assert_eq!(fate([bad(0), bad(1), bad(2)]).0, Some(DropReason::Invalid), "its size is the run's");
    }

    #[test]
    fn a_greedy_member_is_what_the_others_are_compared_with() {
        let rules = GroupRules { greedy_baseline: true, ..RULES };
        let greedy = |index, reward| {
            let mut scored = scored(0, index, PolicyVersion::default(), reward);
            scored.rollout.sampling = freewheel_types::SamplingParams::GREEDY;
            Arrival::Scored(Box::new(scored))
        };
        let whole = |members: [Arrival; 3]| {
            let mut assembly = Assembly::new(rules);
            let ended: Vec<DropReason> =
                members.into_iter().filter_map(|member| assembly.insert(member)).map(|s| s.reason).collect();
            (ended.first().copied(), assembly)
        };
        // Both samples are right and the greedy one is wrong: there is a contrast.
        let (reason, mut assembly) = whole([sample(0, 1.0), sample(1, 1.0), greedy(2, 0.0)]);
        assert_eq!((reason, assembly.ledger().held()), (None, 3));
        let groups = assembly.take(&[TaskId(0)]);
        assert_eq!(groups[0].baseline().and_then(|s| s.reward.reward()), Some(0.0));
        assert_eq!((groups[0].scored().count(), groups[0].judged().count()), (2, 3));
        assembly.trained(&groups);
        let ledger = assembly.ledger();
        assert_eq!((ledger.trained, ledger.dropped.get(DropReason::Baseline), ledger.held()), (2, 1, 0));
        let told = outcome(&groups[0], PolicyVersion::new(1, 4), GroupFate::Trained { step: 5 });
        assert_eq!(told.dropped, [(TaskId(0).rollout(2), DropReason::Baseline)]);
        assert_eq!((told.scored, told.correct), (2, 2), "what is believed of the prompt is by drawn samples");
        assert_eq!(whole([sample(0, 1.0), sample(1, 1.0), greedy(2, 1.0)]).0, Some(DropReason::ZeroSignal));
        let (reason, assembly) = whole([sample(0, 1.0), sample(1, 0.0), Arrival::Bad(TaskId(0).rollout(2))]);
        assert_eq!(reason, Some(DropReason::Unscored), "nothing to compare with");
        assert_eq!((assembly.ledger().held(), assembly.ledger().dropped.total()), (0, 3));
    }

    #[test]
    fn a_copy_counts_once_whenever_it_comes() {
        let mut assembly = Assembly::new(RULES);
        for index in [0, 0, 1, 2, 2] {
            assembly.insert(arrival(5, index));
        }
        let groups = assembly.take(&[TaskId(5)]);
        assembly.trained(&groups);
        assembly.insert(arrival(5, 1));
        let ledger = assembly.ledger();
        assert_eq!((ledger.received, ledger.trained, ledger.duplicates, ledger.held()), (3, 3, 3, 0));
        assert!(assembly.ready().is_empty() && assembly.partial().is_empty());
    }

    #[test]
    fn the_outcome_names_every_member_that_left_on_its_own() {
        let mut assembly = Assembly::new(RULES);
        assembly.insert(sample(0, 1.0));
        assembly.insert(Arrival::Bad(TaskId(0).rollout(1)));
        assembly.insert(sample(2, 0.0));
        let groups = assembly.take(&[TaskId(0)]);
        let told = outcome(&groups[0], PolicyVersion::new(1, 4), GroupFate::Trained { step: 5 });
        assert_eq!(told.dropped, [(TaskId(0).rollout(1), DropReason::Invalid)]);
        assert_eq!((told.scored, told.correct, told.reward_mean), (2, 1, Some(0.5)));
        assert!(told.graded.is_empty(), "a verifier says what is right");
    }

    #[test]
    fn the_outcome_has_the_rewards_where_nobody_says_what_is_right() {
        let mut assembly = Assembly::new(RULES);
        for (index, reward) in [0.25, -0.5, 0.75].into_iter().enumerate() {
            let Arrival::Scored(mut scored) = sample(index as u32, reward) else { unreachable!() };
            scored.reward.verdict =
                freewheel_types::Verdict::Scored { reward, correct: None, gated_by: None };
            assembly.insert(Arrival::Scored(scored));
        }
        let groups = assembly.take(&[TaskId(0)]);
        let told = outcome(&groups[0], PolicyVersion::new(1, 4), GroupFate::Trained { step: 5 });
        assert_eq!((told.graded, told.scored, told.correct), (vec![0.25, -0.5, 0.75], 3, 2));
    }
}
