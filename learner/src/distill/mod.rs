//! Distillation: a student learns what a teacher thinks likely, beside what is written.
//!
//! ```text
//! teacher ─► its k likeliest tokens at every position ─┐        (computed on the way, or read from a file)
//! examples ─► what is written ─────────────────────────┴─► a · soft + (1 − a) · hard ─► student
//! ```
//!
//! Soft: KL(teacher ‖ student) over k + 1 classes, the last one being all other tokens together, so that nothing is made up about
//! probabilities that were not kept. Hard: −log p of the token written. The weight a follows a rule, token by token where it looks
//! at the teacher's confidence. With `teacher.train` the teacher learns from the same examples in the same run: codistillation. On policy the student writes and the
//! teacher's log-probs of that are the advantage.

mod job;
mod loss;
mod on_policy;
mod teacher;

pub use job::{DistillConfig, DistillKeys, Weighting, run_distill, train};
pub use loss::{SoftToken, soft_loss};
pub use on_policy::{Sampler, run_on_policy};
pub use teacher::{SoftTargets, Teacher, TopK};
