//! The transformer: one set of layer functions for prefill, decode and training.
//!
//! ```text
//! bindings   where each projection lies in the arena        weights   the same, packed for the kernels
//! attention  mlp  moe  head      one block each: forward, and the backward that mirrors it; latent is MLA's part of it
//! cache      keys and values, in pages
//! inference  rows + KV pages → logits                        tape      sequences → log-probs → gradients
//! products   the shapes of all products with weights, to measure speed over
//! vision     tiles of images → rows that stand in for the embeddings of their tokens
//! ```
//!
//! Legend: T packed rows, D residual width, H query heads, F feed-forward width, E experts, K experts per token,
//! V vocabulary. A row's bits depend only on its own sequence: every block is row-wise but attention, which sees the
//! earlier rows of its sequence in fixed blocks and in fixed order.

mod attention;
mod bindings;
mod buffers;
mod cache;
mod head;
mod inference;
mod latent;
mod mlp;
mod moe;
mod places;
mod products;
mod residual;
mod tape;
mod vision;
mod weights;

use std::sync::Arc;

use freewheel_kernels::rope::RopeTable;
use freewheel_kernels::{CodeBits, Quantisation};

pub use cache::KvCache;
pub use head::chunk_rows as logits_chunk_rows;
pub use inference::{BatchSeq, ForwardBatch, ForwardOutput};
pub use products::ProductShape;
pub use tape::{LogProbs, Tape, Target, TrainBatch, TrainSeq, UpdatePart};
pub use vision::TileRows;
pub use weights::{PolicyWeights, Purpose, TrainOptions};

use crate::params::ParamLayout;
use crate::spec::{AttentionSpec, ModelSpec, RopeSpec};

/// The structure of a model: what there is to know of it without its weights.
#[derive(Debug)]
pub struct Transformer {
    spec: ModelSpec,
    layout: Arc<ParamLayout>,
    bindings: bindings::ModelBinding,
    /// Rotation table of each layer; layers with the same frequencies share one.
    ropes: Vec<Option<Arc<RopeTable>>>,
    /// Rotations of an image encoder's patches.
    vision_rope: Option<RopeTable>,
    quantisation: Option<Quantised>,
}

/// In what numbers the projections of a quantised model are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Quantised {
    /// Projections of the layers.
    layers: Quantisation,
    /// The output head, which takes rounding less well.
    head: Quantisation,
}

impl Transformer {
    /// The transformer of a checked spec.
    pub fn new(spec: ModelSpec) -> Arc<Self> {
        Arc::new(Self::assemble(spec))
    }

    fn assemble(spec: ModelSpec) -> Self {
        let layout = Arc::new(ParamLayout::new(&spec));
        let bindings = bindings::ModelBinding::new(&spec, &layout);
        let ropes = rope_tables(&spec);
        let vision_rope = spec.vision.as_ref().map(vision::rope_table);
        Self { spec, layout, bindings, ropes, vision_rope, quantisation: None }
    }

    /// The same transformer with the projections of its layers quantised to `bits` in groups of `group`, and the head to 8
    /// bits. What is sampled with reads codes; what is trained with has the same values in full, and its gradient goes
    /// straight through the rounding to the parameters (Bengio et al. 2013, arXiv:1308.3432). So log-probs agree to the
    /// bit. Embedding, norms, biases, routers and image encoders stay as they are.
    ///
    /// # Panics
    /// If `group` is no positive multiple of 32.
    pub fn quantised(&self, bits: CodeBits, group: usize) -> Arc<Self> {
        let mut model = Self::assemble(self.spec.clone());
        let (layers, head) = (Quantisation::new(bits, group), Quantisation::new(CodeBits::Eight, group));
        model.quantisation = Some(Quantised { layers, head });
        Arc::new(model)
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Where its parameters lie.
    pub fn layout(&self) -> &Arc<ParamLayout> {
        &self.layout
    }
}

fn rope_tables(spec: &ModelSpec) -> Vec<Option<Arc<RopeTable>>> {
    let mut tables: Vec<((&RopeSpec, usize), Arc<RopeTable>)> = Vec::new();
    let mut ropes = Vec::with_capacity(spec.layers.len());
    for (attention, _) in &spec.layers {
        ropes.push(rotation(attention).map(|(rope, first)| {
            if let Some((_, table)) = tables.iter().find(|(known, _)| *known == (rope, first)) {
                return table.clone();
            }
            let table = RopeTable::new(&rope.inv_freq, rope.attention_factor, spec.max_positions);
            let table = Arc::new(table.starting_at(first));
            tables.push(((rope, first), table.clone()));
            table
        }));
    }
    ropes
}

/// The rotation of a layer, and the first dimension of a head that it turns.
fn rotation(attention: &AttentionSpec) -> Option<(&RopeSpec, usize)> {
    let first = attention.latent.map_or(0, |latent| latent.nope_dim);
    attention.rope.as_ref().map(|rope| (rope, first))
}
