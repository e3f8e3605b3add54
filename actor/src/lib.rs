//! Rollout engine and actor role.
//!
//! ```text
//!            async tasks (I/O only)                      own thread (compute only)
//!  queue ──lease tasks──► admit ──────requests─────────► ┌────────┐
//!  queue ◄──put rollouts── deliver ◄──finished samples── │ engine │
//!  store ──payloads──► shadow copy ──weights, flip─────► └────────┘
//! ```
//!
//! [`engine`] knows no queue and can be driven by hand (generation, evaluation, benches); [`role`] joins it with the
//! rollout queue and the policy store. Nothing here judges a rollout or knows how it will be trained on.

pub mod config;
mod cpu;
pub mod engine;
mod error;
pub mod role;

pub use config::{ActorConfig, InFlight};
pub use cpu::{CpuBackend, CpuLoader};
pub use engine::{
    Backend, BackendInfo, Draw, Drawn, Engine, EngineConfig, EngineStats, Finished, LocalLayers, Request,
    SampleSpec, SeqRows, StepBatch, StepOutput, StopSpec, TextDecoder,
};
pub use error::ActorError;
pub use role::{ActorDeps, ActorMetrics, PolicyLoader, PromptCodec, run};
