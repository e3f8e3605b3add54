//! Rewards: verifiers, guards, composition, and the role that runs them.
//!
//! ```text
//! lease_rollouts ─► RewardStack::score ─► forward_scored
//!                     ├ component 1 (verifier | guard | rule | model | remote) ─ raw value, or why there is none
//!                     ├ component 2 …
//!                     └ combine: weighted sum, gates, safety score, tiers, costs for the learner's limits
//! ```
//!
//! A wrong answer is 0. A verifier that fails *itself* (bad reference answer, deadline, panic, NaN) leaves the
//! rollout **unscored**: it is never trained on and never counts as 0. A completion is data; nothing in it is
//! interpreted or expanded; programs run in the sandbox alone. Only `remote` components talk to a network.

mod batcher;
mod combine;
mod combine_config;
mod config;
mod error;
mod expr;
mod finish;
pub mod fit;
pub mod guard;
mod json_file;
mod model;
pub mod rbr;
pub mod refusal;
mod remote;
mod role;
mod rule;
pub mod sandbox;
mod shared;
mod stack;
mod validate;
pub mod verifiers;
mod when;
mod windows;

pub use combine_config::{CombineConfig, CombineMode, CostConfig, LagrangianConfig, TierConfig};
pub use config::{
    ComponentConfig, ComponentKind, GuardCategory, GuardFamily, GuardRole, ModelInput, ModelOutput,
    OnUnscored, OverlongInput, RewardConfig, RuleKind, VerifierKind,
};
pub use error::{ConfigProblem, RewardError};
pub use finish::{Calibration, Odds};
pub use remote::{Backend, Ensemble, JudgeMode, RemoteConfig};
pub use role::{RewardDeps, RewardSummary, run};
pub use sandbox::{Sandbox, SandboxConfig};
pub use stack::{Completion, Component, Judgement, RawScore, RewardStack, Unscored};
