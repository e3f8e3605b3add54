//! Where prompts come from, and which one is asked next.
//!
//! ```text
//! file | generator ──► Prompt ──► PromptPool ──Task──► queue ──► … ──► learner
//!                                     ▲                                  │
//!                                     └────────── GroupOutcome ──────────┘
//! ```
//!
//! The pool decides alone (no I/O, no clock); [`run`] does the waiting and writes what it decided to
//! [`PoolLog`] before anybody else hears of it, so that the pool of a killed process can be rebuilt exactly.

mod file;
mod generator;
mod log;
mod params;
mod pool;
mod posterior;
mod role;

pub use file::{LINE_BYTES_MAX, LineProblem, Loaded, PromptFileError, load, parse};
pub use generator::{ArithmeticGenerator, ArithmeticItem, LEVEL_MAX, Split, Step, demonstration, is_worked};
pub use log::{LogError, PoolLog, PoolRecord};
pub use params::{CurriculumConfig, PoolError, PoolParams, Selection};
pub use pool::{Applied, PoolMetrics, PoolState, PromptPool};
pub use posterior::{Posterior, informative_probability};
pub use role::{PoolDeps, PoolRoleError, PoolSummary, run};
