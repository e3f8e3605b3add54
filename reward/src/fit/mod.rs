//! Fitting to labelled examples: what guards and calibrations are made from. Deterministic, one thread, no randomness.

pub mod calibration;
mod folds;
pub mod hinge;
pub mod logistic;
mod measures;

pub use folds::folds;
pub use measures::{Counts, auc, calibration_error};
