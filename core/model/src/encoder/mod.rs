//! Bidirectional encoders (BERT, DeBERTa-v2) for classifiers and sentence embeddings; forward and backward in f32.
//!
//! ```text
//! spec      what an encoder is                    layout    names, shapes, places of its tensors
//! linear    projections and norms, packed         relative  DeBERTa's distance buckets and position terms
//! attention softmax over a whole sequence         layer     one block: forward, and the backward that mirrors it
//! weights   a whole encoder, packed: forward      tape      forward that keeps what the backward needs
//! ```
//!
//! Sequences are packed without padding, and each attends within itself alone: a sequence's bits do not depend on what is
//! beside it in the batch. Devlin et al. 2019 (BERT); He et al. 2021, arXiv 2006.03654 (DeBERTa).
//!
//! Legend: T packed rows, D width, H heads, F feed-forward width, S positions on each side of DeBERTa's table.

mod attention;
mod layer;
mod layout;
mod linear;
mod relative;
mod spec;
mod tape;
#[cfg(test)]
mod tests;
mod weights;

use std::sync::Arc;

pub use spec::{EncoderFamily, EncoderSpec, PoolerSpec, Positions, RelativeSpec};
pub use tape::EncoderTape;
pub use weights::{EncoderBatch, EncoderWeights, mean_pooled};

use crate::params::ParamLayout;

/// The structure of an encoder: what there is to know of it without its weights.
#[derive(Debug)]
pub struct Encoder {
    spec: EncoderSpec,
    layout: Arc<ParamLayout>,
    at: layout::EncoderBinding,
    distances: Option<relative::Distances>,
}

impl Encoder {
    /// The encoder of a checked spec.
    pub fn new(spec: EncoderSpec) -> Arc<Self> {
        let (layout, at) = layout::bind(&spec);
        let distances = spec.relative.as_ref().map(|r| relative::Distances::new(r, spec.max_positions));
        Arc::new(Self { layout: Arc::new(layout), at, distances, spec })
    }

    /// What the encoder is.
    pub fn spec(&self) -> &EncoderSpec {
        &self.spec
    }

    /// Where its parameters lie.
    pub fn layout(&self) -> &Arc<ParamLayout> {
        &self.layout
    }
}
