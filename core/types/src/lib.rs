//! What crosses a process boundary in Freewheel, and its codec.
//!
//! ```text
//! prompt pool ──Task──► actor ──Rollout──► reward ──ScoredRollout──► learner ──Manifest──► actor
//!      ▲                                                                │
//!      └───────────────────────── GroupOutcome ─────────────────────────┘
//! ```
//!
//! Every type here is plain data: no I/O, no async, no model. Raw bytes become a
//! checked value once, in [`codec`]; nothing downstream checks again.

mod accounting;
pub mod codec;
mod error;
mod ids;
mod outcome;
mod prompt;
mod random;
mod rollout;
mod sampling;
mod scored;
mod task;
mod weights;

pub use accounting::{Accounting, DropReason, Dropped};
pub use error::TypesError;
pub use ids::{ActorId, GroupId, MAX_GROUP_SIZE, PolicyVersion, PromptId, RolloutId, RunId, TaskId};
pub use outcome::{GroupFate, GroupOutcome};
pub use prompt::{ContentPart, ImagePart, MAX_IMAGE_BYTES, Message, MessageContent, Prompt, PromptBody};
pub use random::CounterRng;
pub use rollout::{ExpertTrace, FinishReason, Rollout, VersionSpan};
pub use sampling::SamplingParams;
pub use scored::{ComponentScore, CostScore, RewardRecord, ScoredRollout, TierHit, Verdict};
pub use task::Task;
pub use weights::{ChunkDigest, Digest, Manifest, TensorEntry, WeightsDtype, WeightsPayload};
