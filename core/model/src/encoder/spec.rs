//! What an encoder is, independent of where its description came from.

use freewheel_kernels::pointwise::Pointwise;

/// Decides tensor names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncoderFamily {
    /// BERT and what has its names (MiniLM).
    Bert,
    /// DeBERTa-v2 and v3.
    DebertaV2,
}

/// A bidirectional encoder: norms behind each block, gated by nothing, with an optional pooler and classifier.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderSpec {
    /// Naming family.
    pub family: EncoderFamily,
    /// Vocabulary size.
    pub vocab_size: usize,
    /// Width D.
    pub hidden: usize,
    /// Number of layers.
    pub layers: usize,
    /// Heads H; divides D.
    pub heads: usize,
    /// Feed-forward width F.
    pub ffn_width: usize,
    /// Activation between the two feed-forward projections.
    pub activation: Pointwise,
    /// Epsilon of every layer norm.
    pub norm_eps: f32,
    /// What is added to the embeddings for a position.
    pub positions: Positions,
    /// Rows of the token-type table; 0 where there is none.
    pub token_types: usize,
    /// Disentangled attention, if switched on.
    pub relative: Option<RelativeSpec>,
    /// Projection of the first row, which the classifier reads.
    pub pooler: Option<PoolerSpec>,
    /// Labels of the classifier; `None` without one.
    pub labels: Option<usize>,
    /// Longest sequence, tokens.
    pub max_positions: usize,
    /// Architecture string as in `config.json`.
    pub architecture: String,
}

/// Positions in the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions {
    /// None: attention knows distances.
    None,
    /// A learned row for each position.
    Absolute,
}

/// DeBERTa's disentangled attention.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelativeSpec {
    /// Far distances share logarithmic buckets, so many on each side; `None`: a row for each distance.
    pub buckets: Option<usize>,
    /// Distances at or beyond this are alike.
    pub max_distance: usize,
    /// A query's content looks at the key's distance (c2p).
    pub content_to_position: bool,
    /// A key's content looks at the query's distance (p2c).
    pub position_to_content: bool,
    /// Positions go through the content's projections instead of their own.
    pub shared_projections: bool,
    /// The table of distances goes through a layer norm.
    pub normalised: bool,
}

impl RelativeSpec {
    /// S: rows of the table on each side of distance 0.
    pub fn span(&self) -> usize {
        self.buckets.unwrap_or(self.max_distance)
    }
}

/// `activation(dense(first row))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolerSpec {
    /// Output width.
    pub width: usize,
    /// Its activation.
    pub activation: Pointwise,
}

impl EncoderSpec {
    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Factor on attention scores: 1/sqrt(head width · terms of the score).
    pub fn scale(&self) -> f32 {
        let terms = self
            .relative
            .as_ref()
            .map_or(1, |r| 1 + usize::from(r.content_to_position) + usize::from(r.position_to_content));
        ((self.head_dim() * terms) as f32).sqrt().recip()
    }
}
