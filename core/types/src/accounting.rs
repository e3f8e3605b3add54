//! The accounting identity: every rollout that was asked for is somewhere.

use serde::{Deserialize, Serialize};

/// Why a rollout was not trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// Too many optimiser updates since it was sampled.
    Stale,
    /// All rewards of its group were equal.
    ZeroSignal,
    /// No reward could be had, or too few of its group were scored.
    Unscored,
    /// The payload failed a check, or the actor gave the task up.
    Invalid,
    /// The same rollout id had been consumed before.
    Duplicate,
    /// Its reward was what its group was compared with (ReMax); it was never meant to be trained on.
    Baseline,
}

impl DropReason {
    /// Every reason, in the order of the metrics.
    pub const ALL: [Self; 6] =
        [Self::Stale, Self::ZeroSignal, Self::Unscored, Self::Invalid, Self::Duplicate, Self::Baseline];

    /// Metric suffix: `accounting/dropped_<name>`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stale => "stale",
            Self::ZeroSignal => "zero_signal",
            Self::Unscored => "unscored",
            Self::Invalid => "invalid",
            Self::Duplicate => "duplicate",
            Self::Baseline => "baseline",
        }
    }
}

/// Rollouts dropped, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    counts: [u64; 6],
}

impl Dropped {
    /// Counts `n` more for `reason`.
    pub fn add(&mut self, reason: DropReason, n: u64) {
        self.counts[reason as usize] += n;
    }

    /// Count for one reason.
    pub fn get(&self, reason: DropReason) -> u64 {
        self.counts[reason as usize]
    }

    /// All reasons together.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// A consistent snapshot of where every rollout of a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accounting {
    /// Rollouts asked for by issued tasks.
    pub issued: u64,
    /// Rollouts that went into an update.
    pub trained: u64,
    /// Rollouts that left, by reason.
    pub dropped: Dropped,
    /// Delivered and waiting: in a stream, at the reward workers, or held by the learner.
    pub queued: u64,
    /// Asked for and not delivered yet.
    pub in_flight: u64,
}

impl Accounting {
    /// `issued - (trained + dropped + queued + in_flight)`: 0, or something was lost (> 0) or counted twice (< 0).
    pub fn imbalance(&self) -> i64 {
        self.issued as i64 - (self.trained + self.dropped.total() + self.queued + self.in_flight) as i64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_rollout_shows_as_a_positive_imbalance() {
        let mut accounting =
            Accounting { issued: 10, trained: 4, queued: 2, in_flight: 1, ..Default::default() };
        accounting.dropped.add(DropReason::Stale, 2);
        assert_eq!(accounting.imbalance(), 1);
        accounting.dropped.add(DropReason::ZeroSignal, 1);
        assert_eq!(accounting.imbalance(), 0);
    }
}
