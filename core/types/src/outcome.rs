//! What the learner tells the prompt pool about a group it is done with.

use serde::{Deserialize, Serialize};

use crate::{DropReason, PolicyVersion, PromptId, RolloutId, TaskId};

/// The end of one group. Sent exactly once per task in a lineage; the pool dedupes by task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupOutcome {
    /// The task that is over.
    pub task: TaskId,
    /// Its prompt.
    pub prompt: PromptId,
    /// Learner version when the outcome was decided.
    pub version: PolicyVersion,
    /// Oldest version that drew a token of the group.
    pub sampled_by: PolicyVersion,
    /// Samples with a verdict.
    pub scored: u32,
    /// Of those, how many were right (reward above the success threshold when no component decides).
    pub correct: u32,
    /// Mean reward of the scored samples; `None` if there were none.
    pub reward_mean: Option<f32>,
    /// Rewards of the scored samples where no component says what is right; empty where one does.
    #[serde(default)]
    pub graded: Vec<f32>,
    /// What became of the group.
    pub fate: GroupFate,
    /// Samples dropped on their own, with the reason (the rest shared `fate`).
    pub dropped: Vec<(RolloutId, DropReason)>,
    /// Why its samples never came, in the words of whoever gave them up.
    #[serde(default)]
    pub given_up: Option<String>,
}

/// What became of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupFate {
    /// Its samples went into the update that made this version.
    Trained {
        /// `step` of the weights made by that update.
        step: u64,
    },
    /// Left the batch; the pool issues a replacement.
    Dropped(DropReason),
}
