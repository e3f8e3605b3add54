//! Errors, by what a caller can do about them.

use std::path::{Path, PathBuf};

use freewheel_model::ModelError;
use freewheel_queue::QueueError;
use freewheel_types::TypesError;

/// What ends a learner, or keeps it from starting.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LearnerError {
    /// A setting makes the work impossible: fix the config.
    #[error("{0}")]
    Config(String),
    /// The disk refused. After a failed fsync the file must not be used again: the process ends, a restart recovers.
    #[error("{}: {what}", path.display())]
    Disk {
        /// File or folder.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A journal segment is damaged where it must not be.
    #[error("{}: damaged at byte {offset}: {what}; restore the file or start a new run from the newest checkpoint", path.display())]
    Journal {
        /// The segment.
        path: PathBuf,
        /// Byte at which the bad record starts.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// A checkpoint cannot be used.
    #[error("{}: {what}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A replayed update came out different from the journalled one.
    #[error("step {step}: replay gives weights {computed}, the journal says {journalled}")]
    ReplayMismatch {
        /// The step.
        step: u64,
        /// Digest computed now.
        computed: String,
        /// Digest written then.
        journalled: String,
    },
    /// Several updates in a row had a non-finite loss or gradient, and going back did not help or was not possible.
    #[error(
        "{count} updates in a row had a non-finite loss or gradient, the last at step {step}; their batches are in {}; \
         lower learning_rate or look at the rewards", folder.display()
    )]
    Diverged {
        /// How many.
        count: u32,
        /// Weights' step.
        step: u64,
        /// Where the batches were written.
        folder: PathBuf,
    },
    /// Another learner took over: write nothing more.
    #[error("fenced: epoch {epoch} is over, {by}")]
    Fenced {
        /// This learner's epoch.
        epoch: u64,
        /// Who says so.
        by: String,
    },
    /// The queue failed in a way that retrying does not cure.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The model or tokenizer refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A payload of our own journal does not decode.
    #[error(transparent)]
    Payload(#[from] TypesError),
    /// A training example cannot be used.
    #[error("example {index}: {what}")]
    Example {
        /// Its place in the data, from 0.
        index: usize,
        /// What is wrong.
        what: String,
    },
}

impl LearnerError {
    /// For `map_err` on disk operations.
    pub(crate) fn disk(path: &Path, what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Disk { path, what, source }
    }
}
