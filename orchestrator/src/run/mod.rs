//! A whole run: roles wired together, in one process or one each.

pub mod evals;
pub mod progress;
pub mod tap;
