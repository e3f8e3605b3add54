//! The seam to whatever computes: processor cores today, a GPU when there is one.
//!
//! The engine decides *which* rows are computed and *where* their keys and values live; a backend computes them. A
//! backend must give a row the same bits whatever else is in the batch: everything the engine promises rests on it.

use std::sync::Arc;

use freewheel_kernels::Pages;
use freewheel_kernels::attention::AttentionMask;
use freewheel_model::TileRows;
use freewheel_types::{PolicyVersion, SamplingParams};

/// What the engine must know of the model behind a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendInfo {
    /// Vocabulary size V: length of a row of logits.
    pub vocab_size: usize,
    /// Longest sequence, prompt and completion together, tokens.
    pub max_positions: usize,
    /// MoE layers whose expert ids a forward reports; 0 for dense models.
    pub moe_layers: usize,
    /// Experts per token in those layers.
    pub top_k: usize,
    /// Positions in one KV page.
    pub page_tokens: usize,
    /// Bytes of one KV page, all layers.
    pub page_bytes: usize,
    /// Layers that see a part of the sequence only, where there are such.
    pub local: Option<LocalLayers>,
    /// Rows that a step computes for about the price of one: guesses are made for no more.
    pub cheap_rows: usize,
    /// Whether it reads images.
    pub images: bool,
}

/// Layers whose rows see a chunk or window: what lies before it takes no memory in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalLayers {
    /// Which positions a row sees.
    pub mask: AttentionMask,
    /// Bytes of one KV page in these layers.
    pub page_bytes: usize,
}

impl BackendInfo {
    /// The first page that a row at `position` or any later one sees in local layers.
    pub fn first_local_page(&self, position: usize) -> Option<usize> {
        self.local.map(|local| local.mask.first_visible(position) / self.page_tokens)
    }
}

/// Rows of one sequence in a step.
#[derive(Clone, Copy, Debug)]
pub struct SeqRows<'a> {
    /// How many rows.
    pub rows: usize,
    /// Position of the first row.
    pub position: usize,
    /// KV pages of the sequence from position 0; they cover `position + rows`.
    pub pages: &'a [u32],
}

/// One forward over packed sequences.
#[derive(Clone, Copy, Debug)]
pub struct StepBatch<'a> {
    /// Token of every row `[T]`, sequence after sequence.
    pub tokens: &'a [u32],
    /// The sequences.
    pub seqs: &'a [SeqRows<'a>],
    /// Rows whose logits are wanted, rising.
    pub logit_rows: &'a [usize],
    /// Rows that show tiles of images instead of their token.
    pub tiles: &'a [TileRows<'a>],
}

/// What a forward gives back.
#[derive(Clone, Debug, Default)]
pub struct StepOutput {
    /// Logits `[logit_rows, V]`.
    pub logits: Pages<f32>,
    /// Expert ids `[T, moe_layers, top_k]`; empty for dense models.
    pub experts: Vec<u16>,
}

/// One token to be drawn.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// Row of the logits handed over with it; several draws may share a row.
    pub row: usize,
    /// The transform.
    pub sampling: SamplingParams,
    /// Uniform number in `[0, 1)` that decides.
    pub uniform: f64,
}

/// A drawn token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// Its id.
    pub token: u32,
    /// Its log-prob under the distribution it was drawn from, nats.
    pub logprob: f32,
}

/// One policy on one device, with its KV pages. Owned by one engine, used from one thread.
pub trait Backend: Send + 'static {
    /// One version of the policy in the backend's own layout.
    type Weights: Send + Sync + 'static;

    /// Shape of the model and of a KV page.
    fn info(&self) -> BackendInfo;

    /// Makes `pages` KV pages, with room for about `local` of them in local layers; called once, before the first forward.
    fn allocate(&mut self, pages: usize, local: usize);

    /// Version of the weights in use.
    fn version(&self) -> PolicyVersion;

    /// Uses `weights` from the next forward on and returns those used so far. A pointer flip.
    fn swap(&mut self, weights: Arc<Self::Weights>) -> Arc<Self::Weights>;

    /// Computes every row, writes its keys and values, returns the logits asked for.
    fn forward(&mut self, batch: &StepBatch<'_>) -> StepOutput;

    /// Takes back the memory of what a forward gave.
    fn reuse(&mut self, _output: StepOutput) {}

    /// Copies KV page `from` to page `to`.
    fn copy_page(&mut self, from: u32, to: u32);

    /// No row to come sees `pages` in local layers, until they are written again.
    fn forget(&mut self, _pages: &[u32]) {}

    /// Draws tokens from rows of `logits`, `[rows, V]`; one result for each draw, in order.
    fn sample(&mut self, logits: &[f32], draws: &[Draw]) -> Vec<Drawn>;
}

/// Ids to text, special tokens left out.
pub trait TextDecoder: Send + Sync {
    /// Text of `ids`; bytes that are no complete character yet show as U+FFFD.
    fn decode(&self, ids: &[u32]) -> String;
}
