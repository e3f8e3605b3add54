//! The optimiser: f32 masters in one arena, AdamW, learning-rate schedules.
//!
//! ```text
//! gradient arena ─► global norm ─► clip ─► AdamW on the masters ─► round to nearest even ─► weights (bf16 or f32)
//! ```
//!
//! Same layout as the weights, so that a delta, a checkpoint and a gradient line up. A gradient that is not finite is refused and
//! changes nothing; what to do then is the step loop's business.

mod adamw;
mod schedule;

pub use adamw::{AdamW, AdamWConfig, StateTensor, StateTensorMut, StepOutcome};
pub use schedule::{DecayShape, Schedule, ScheduleConfig, ScheduleKind};
