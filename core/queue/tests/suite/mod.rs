//! One suite, run against every backend.

pub mod bench;
pub mod cases;
mod faults;
pub mod random;
