//! Rewards: verifiers, guards, composition, and the role that runs them.
//!
//! ```text
//! lease_rollouts ─► RewardStack::score ─► forward_scored
//!                     ├ component 1 (verifier | guard | rule | model) ─ raw value, or why there is none
//!                     ├ component 2 …
//!                     └ combine: weighted sum, or gate then weighted sum
//! ```
//!
//! A wrong answer is 0. A verifier that fails *itself* (bad reference answer, deadline, panic, NaN) leaves the
//! rollout **unscored**: it is never trained on and never counts as 0. A completion is data; nothing in
//! it is interpreted, executed or expanded. No component here talks to a network.

mod combine;
mod config;
mod error;
pub mod guard;
mod model;
mod role;
mod rule;
mod stack;
mod validate;
pub mod verifiers;
mod when;

pub use config::{
    CombineConfig, CombineMode, ComponentConfig, ComponentKind, GuardCategory, GuardRole, ModelInput,
    ModelOutput, OnUnscored, OverlongInput, RewardConfig, RuleKind, VerifierKind,
};
pub use error::{ConfigProblem, RewardError};
pub use role::{RewardDeps, RewardSummary, run};
pub use stack::{Completion, Component, Judgement, RewardStack, Unscored};
