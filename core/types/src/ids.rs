//! Identities: newtypes, never bare integers.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::TypesError;

/// Most rollouts one task may ask for: a rollout id is `task * 64 + sample`.
pub const MAX_GROUP_SIZE: u32 = 64;

/// Name of a run: part of its folder and of every queue key.
///
/// Lower-case letters, digits, `.`, `_`, `-`; starts with a letter or digit;
/// at most 63 bytes; no `..`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct RunId(String);

impl RunId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RunId {
    type Err = TypesError;

    fn from_str(value: &str) -> Result<Self, TypesError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
        let starts_well = value.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if !starts_well || value.len() > 63 || !value.bytes().all(allowed) || value.contains("..") {
            return Err(TypesError::BadName {
                kind: "run name",
                value: value.chars().take(80).collect(),
                rule: "use 1 to 63 of a-z 0-9 . _ -, starting with a letter or digit, without '..'",
            });
        }
        Ok(Self(value.to_owned()))
    }
}

impl TryFrom<String> for RunId {
    type Error = TypesError;

    fn try_from(value: String) -> Result<Self, TypesError> {
        value.parse()
    }
}

impl From<RunId> for String {
    fn from(value: RunId) -> Self {
        value.0
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Name of one actor process within a run, for example `actor-0`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ActorId(pub String);

impl fmt::Display for ActorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// BLAKE3-128 of the canonical prompt JSON: the same prompt has the same id in every run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PromptId(pub [u8; 16]);

impl PromptId {
    /// Id of `bytes`, the canonical form of a prompt.
    pub fn of(bytes: &[u8]) -> Self {
        let mut id = [0; 16];
        id.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
        Self(id)
    }
}

impl fmt::Display for PromptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for PromptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PromptId({self})")
    }
}

/// One issued task: one prompt, G rollouts. Handed out by the prompt pool, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TaskId(pub u64);

impl TaskId {
    /// Largest task id whose rollout ids still fit.
    pub const MAX: Self = Self(u64::MAX / MAX_GROUP_SIZE as u64 - 1);

    /// Id of sample `index` of this task; `index < MAX_GROUP_SIZE`.
    ///
    /// # Panics
    /// If `index` is out of range: group sizes are checked when a config is read.
    pub fn rollout(self, index: u32) -> RolloutId {
        assert!(index < MAX_GROUP_SIZE, "sample index {index} >= {MAX_GROUP_SIZE}");
        RolloutId(self.0 * u64::from(MAX_GROUP_SIZE) + u64::from(index))
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A prompt group is the rollouts of one task, so they share an id.
pub type GroupId = TaskId;

/// One rollout: `task * 64 + sample index`. Deterministic, hence the key of every dedupe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RolloutId(pub u64);

impl RolloutId {
    /// The task this rollout belongs to.
    pub fn task(self) -> TaskId {
        TaskId(self.0 / u64::from(MAX_GROUP_SIZE))
    }

    /// Which of the task's samples this is, `0..MAX_GROUP_SIZE`.
    pub fn index(self) -> u32 {
        (self.0 % u64::from(MAX_GROUP_SIZE)) as u32
    }
}

impl fmt::Display for RolloutId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.task(), self.index())
    }
}

/// Which weights: `(epoch, step)`, compared lexicographically.
///
/// `step` counts optimiser updates (0 = the initial weights; published versions
/// may skip some). `epoch` is the learner's fencing epoch: after a roll-back the
/// new lineage wins although its step is lower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PolicyVersion {
    /// Fencing epoch of the learner that made these weights.
    pub epoch: u64,
    /// Optimiser updates in these weights.
    pub step: u64,
}

impl PolicyVersion {
    /// Version `step` of lineage `epoch`.
    pub fn new(epoch: u64, step: u64) -> Self {
        Self { epoch, step }
    }

    /// Optimiser updates between `older` and `self`; 0 if `older` is not older.
    pub fn steps_since(self, older: Self) -> u64 {
        self.step.saturating_sub(older.step)
    }
}

impl fmt::Display for PolicyVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-e{}", self.step, self.epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_names_that_could_leave_their_folder_are_refused() {
        for bad in ["", "../x", "a..b", "A", "a/b", ".hid", "a\0", "ä", &"x".repeat(64)] {
            assert!(bad.parse::<RunId>().is_err(), "{bad:?} was accepted");
        }
        assert_eq!("quick-start_1.2".parse::<RunId>().unwrap().as_str(), "quick-start_1.2");
    }

    #[test]
    fn a_rollout_id_holds_its_task_and_index() {
        let id = TaskId(12_345).rollout(63);
        assert_eq!((id.task(), id.index()), (TaskId(12_345), 63));
        assert_eq!(TaskId::MAX.rollout(63).task(), TaskId::MAX);
    }

    #[test]
    fn a_newer_lineage_wins_over_a_higher_step() {
        assert!(PolicyVersion::new(2, 10) > PolicyVersion::new(1, 400));
        assert_eq!(PolicyVersion::new(1, 3).steps_since(PolicyVersion::new(1, 9)), 0);
    }
}
