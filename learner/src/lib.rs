//! The learner: from scored rollouts to better weights.
//!
//! ```text
//!          ┌ async ────────────────┐   ┌ a thread of its own ──────────────────────────────────────────────┐
//! queue ─► fetch ► journal ► ack ──┼─► assembly ► batching ► advantages ► log-probs ► loss ► backward ► optim │
//!          report outcomes ◄───────┼── settled groups              journal ◄ step formed ◄──────────────────┤
//! store ◄─ publish ◄───────────────┼── weights                 checkpoint (the commit point) ◄──────────────┘
//! ```
//!
//! Truth is on disk here: the journal (what was consumed, which batches were formed) and the checkpoint. The queue may lose
//! anything; a crash at any point re-runs work and never trains a rollout twice. The training thread waits only for rollouts;
//! publishing runs beside it, and nothing in this crate waits for an actor. It does not choose prompts or judge answers.

pub mod advantage;
pub mod assembly;
mod batch;
pub mod batching;
pub mod checkpoint;
mod companions;
pub mod config;
pub mod consumed;
pub mod coordinates;
pub mod core;
pub mod critic;
pub mod disk;
pub mod distill;
pub mod dual;
mod error;
pub mod fit;
mod flat;
mod intake;
pub mod journal;
pub mod lora;
pub mod metrics;
pub mod objective;
pub mod optim;
pub mod packing;
pub mod policy;
pub mod preference;
pub mod publish;
mod received;
mod report;
mod role;
pub mod sft;
pub mod trainer;
pub mod transformer;
mod update;

#[cfg(test)]
mod recovery_tests;
#[cfg(test)]
mod role_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod update_tests;

pub use crate::core::{CurriculumSource, Recovery, Replayed};
pub use config::{LearnerConfig, TrainingConfig};
pub use error::LearnerError;
pub use received::received;
pub use role::{LearnerDeps, LearnerEnd, LearnerSummary, RunShape, replay, run};
