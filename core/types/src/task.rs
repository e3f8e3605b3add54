//! What the prompt pool asks of an actor.

use serde::{Deserialize, Serialize};

use crate::{PolicyVersion, Prompt, TaskId};

/// One prompt, `group_size` rollouts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// Identity; a task issued again keeps it, so that duplicates are found.
    pub id: TaskId,
    /// The prompt, whole: an actor needs no other source.
    pub prompt: Prompt,
    /// Rollouts wanted, 1 to [`MAX_GROUP_SIZE`](crate::MAX_GROUP_SIZE).
    pub group_size: u32,
    /// Run seed; the stream of rollout `k` is keyed by `(seed, id.rollout(k))`.
    pub seed: u64,
    /// Oldest weights that may draw a token of it: the staleness bound at admission.
    pub min_version: PolicyVersion,
}
