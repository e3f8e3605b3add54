//! The policy losses, one family a file. The table that names them is `recipes`.
//!
//! The stop-gradient forms (REINFORCE, AIPO, CISPO, DPPO, TOPR, VESPO) put −weight·A·log π into the loss, so that its value has
//! no meaning beyond its gradient; the surrogate forms differentiate the weight itself.

mod capped;
mod clip;
mod dppo;
mod gmpo;
mod m2po;
mod regression;
mod reinforce;
mod sapo;
mod topr;
mod vespo;

pub(super) use capped::{CappedSurrogate, CappedWeight};
pub(super) use clip::{ClippedSurrogate, RatioLevel};
pub(super) use dppo::{Dppo, Region};
pub(super) use gmpo::Gmpo;
pub(super) use m2po::M2po;
pub(super) use regression::Regression;
pub(super) use reinforce::{Reinforce, ReinforceUnbiased};
pub(super) use sapo::Sapo;
pub(super) use topr::Topr;
pub(super) use vespo::Vespo;

use super::{Clip, Term, Token};

/// −sg(weight)·A·log π.
fn weighted(token: &Token, weight: f64, clip: Clip) -> Term {
    let gradient = -weight * token.advantage;
    Term { loss: gradient * token.policy, gradient, clip }
}
