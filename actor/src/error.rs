//! Errors of engine and role, by what a caller can do about them.

use freewheel_model::ModelError;
use freewheel_queue::QueueError;
use freewheel_types::PolicyVersion;

/// What went wrong in an actor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ActorError {
    /// This request can never run: refuse it and go on.
    #[error("request {request}: {field} is {value}; {limit}")]
    BadRequest {
        /// [`Request::id`](crate::Request::id).
        request: u64,
        /// What is out of range.
        field: &'static str,
        /// Its value.
        value: String,
        /// The limit, and what to change.
        limit: String,
    },
    /// A setting that makes all work impossible.
    #[error("actor.{key} is {value}; {limit}")]
    Config {
        /// Key within `[actor]`.
        key: &'static str,
        /// Its value.
        value: String,
        /// The limit, and what to change.
        limit: String,
    },
    /// Published weights that this actor must not serve: keep the old ones, fetch again.
    #[error("weights {version} cannot be used: {what}")]
    BadWeights {
        /// The version offered.
        version: PolicyVersion,
        /// What does not fit.
        what: String,
    },
    /// The queue refused in a way that waiting does not cure.
    #[error("actor: {what}")]
    Queue {
        /// What was being done.
        what: &'static str,
        /// The cause.
        #[source]
        source: QueueError,
    },
    /// A prompt that the tokenizer or the template refuses.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A part of the actor ended that never should: a bug of ours.
    #[error("the {0} of this actor ended unexpectedly")]
    Died(&'static str),
}
