//! The optimiser: f32 masters in one arena, a rule for each tensor, learning-rate schedules.
//!
//! ```text
//! gradient arena ─► global norm ─► clip ─► AdamW, Muon, Lion or SGD on the masters ─► nearest even ─► weights (bf16 or f32)
//!                                            moments: f32, bf16 or 8-bit
//! ```
//!
//! Same layout as the weights, so that a delta, a checkpoint and a gradient line up. A gradient that is not finite is refused and
//! changes nothing; what to do then is the step loop's business.

mod config;
mod moment;
mod muon;
mod optimizer;
mod schedule;
mod select;
#[cfg(test)]
mod tests;

pub use config::{MuonScale, OptimizerConfig, OptimizerKind, OptimizerSettings, ParamGroup, StateType};
pub use moment::{StateValues, StateValuesMut};
pub use optimizer::{Optimizer, StateTensor, StateTensorMut, StepOutcome};
pub use schedule::{DecayShape, Schedule, ScheduleConfig, ScheduleKind};
pub use select::Selector;
