//! Errors, by what a caller can do about them.

use freewheel_types::{PolicyVersion, TypesError};

/// What went wrong at a queue or policy store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The backend cannot be reached or is overloaded: retry with back-off.
    #[error("{backend} is not reachable: {what}")]
    Unavailable {
        /// Which backend, with its address (never a password).
        backend: String,
        /// What was tried.
        what: String,
        /// The cause.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// Another learner holds a newer epoch: stop at once and write nothing more.
    #[error("fenced: epoch {epoch} is over ({what})")]
    Fenced {
        /// The caller's epoch.
        epoch: u64,
        /// What was refused.
        what: &'static str,
    },
    /// Weights that are not newer than what is published.
    #[error("version {version} is not newer than the published one")]
    StaleVersion {
        /// The version offered.
        version: PolicyVersion,
    },
    /// Weights whose bytes do not match their manifest: refetch, keep the old ones.
    #[error("weights {version}: {what}")]
    BadWeights {
        /// The version fetched.
        version: PolicyVersion,
        /// What does not match.
        what: String,
    },
    /// The backend lost its data (restart without persistence, FLUSHALL): re-initialise, issue again.
    #[error("the queue of run {run} lost its data")]
    DataLost {
        /// The run.
        run: String,
    },
    /// One payload is bad: drop it and count it.
    #[error(transparent)]
    Payload(#[from] TypesError),
    /// A setting of the server or of the config makes the work impossible.
    #[error("{0}")]
    Config(String),
    /// The run was asked to stop while the call waited.
    #[error("the run is stopping")]
    Stopping,
}
