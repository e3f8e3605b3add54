//! Errors, by what a caller can do about them.

use std::fmt;

use freewheel_queue::QueueError;

/// One thing that is wrong with `[reward]`; all of them are reported at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigProblem {
    /// The key, as a path below the root: `reward.component[1].verifier`.
    pub key: String,
    /// What is wrong and how to cure it.
    pub message: String,
}

impl ConfigProblem {
    /// A problem with `key`.
    pub fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { key: key.into(), message: message.into() }
    }
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.message)
    }
}

/// Why the reward role ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RewardError {
    /// The configuration cannot work.
    #[error("[reward] is not usable: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Config(Vec<ConfigProblem>),
    /// The queue refused for a reason that waiting does not cure.
    #[error("reward worker {worker}: {what}")]
    Queue {
        /// The worker.
        worker: String,
        /// What it was doing.
        what: &'static str,
        /// The cause.
        #[source]
        source: QueueError,
    },
    /// A scoring thread could not be started.
    #[error("reward worker {worker}: cannot start a scoring thread")]
    Thread {
        /// The worker.
        worker: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}
