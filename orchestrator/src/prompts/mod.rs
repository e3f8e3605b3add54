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
mod shapes;
mod vault;

pub(crate) use file::messages_of;
pub use file::{LINE_BYTES_MAX, LineProblem, Loaded, PromptFileError, line_of, load, parse};
pub use generator::{ArithmeticGenerator, ArithmeticItem, LEVEL_MAX, Split, Step, demonstration, is_worked};
pub use log::{LogError, PoolLog, PoolRecord};
pub use params::{CurriculumConfig, PoolError, PoolParams, Selection};
pub use pool::{Applied, Chosen, PoolMetrics, PoolState, PromptBelief, PromptPool, Share};
pub use posterior::{Posterior, informative_probability};
pub use role::{PoolDeps, PoolRoleError, PoolSummary, run};
pub use shapes::{Shape, ShapesGenerator, ShapesItem};
pub use vault::{Ask, VaultGenerator, VaultItem, is_refused};

use crate::config::GeneratorKind;
use freewheel_types::Prompt;

/// A built-in prompt source.
#[derive(Clone, Debug)]
pub enum Generator {
    /// Chains of additions and subtractions.
    Arithmetic(ArithmeticGenerator),
    /// Images of shapes to count.
    Shapes(ShapesGenerator),
    /// Sums, some of them forbidden.
    Vault(VaultGenerator),
}

impl Generator {
    /// The source `kind` with questions of `levels` from one side of the split; `seed` gives their order.
    ///
    /// # Panics
    /// If `levels` is empty or one is not 1 to [`LEVEL_MAX`]: the configuration is checked before.
    pub fn new(kind: GeneratorKind, seed: u64, levels: &[u32], split: Split) -> Self {
        match kind {
            GeneratorKind::Arithmetic => Self::Arithmetic(ArithmeticGenerator::new(seed, levels, split)),
            GeneratorKind::Shapes => Self::Shapes(ShapesGenerator::new(seed, levels, split)),
            GeneratorKind::Vault => Self::Vault(VaultGenerator::new(seed, levels, split)),
        }
    }

    /// The first `n` questions; fewer, with a warning, if there are not so many.
    pub fn prompts(&self, n: usize) -> Vec<Prompt> {
        match self {
            Self::Arithmetic(generator) => generator.prompts(n),
            Self::Shapes(generator) => generator.prompts(n),
            Self::Vault(generator) => generator.prompts(n),
        }
    }
}
