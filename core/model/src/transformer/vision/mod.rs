//! The image encoder of Llama 4: tiles to rows of the residual stream, in place of the embeddings of their tokens.
//!
//! ```text
//! tile [3, S, S] ─► patches ─► + class token, positions ─► norm ─► layers ─► norm ─► pixel shuffle ─► adapter ─► projector
//!                   (unfold)    (class last)                       (bidirectional,    r × r patches    2 × GELU   to D
//!                                                                   2-D rotary)       to one token
//! ```
//!
//! Legend: U distinct tiles, P rows of a tile (its patches and the class token), h encoder width, n tokens of a tile, D
//! residual width. A tile knows nothing of the others, so its rows have the same bits whatever else is encoded.

mod affine;
mod encoder;
mod layer;
mod shuffle;
mod weights;

use std::ops::Range;

use freewheel_kernels::Threads;
use freewheel_kernels::optim::add_assign;
use freewheel_kernels::pointwise::{Pointwise, pointwise, pointwise_backward};
use freewheel_kernels::rope::RopeTable;

use super::buffers::Buf;
use super::mlp::Context;
use super::weights::PolicyWeights;
use crate::spec::VisionSpec;
use crate::vision::Tile;
use encoder::Encoder;
use encoder::Saved;
pub(super) use weights::{VisionBinding, VisionWeights};

/// Rows of a batch that show (a part of) a tile instead of the embeddings of their tokens.
#[derive(Clone, Debug)]
pub struct TileRows<'a> {
    /// The tile.
    pub tile: &'a Tile,
    /// First row of the batch that shows it.
    pub row: usize,
    /// Which of the tile's tokens the rows from `row` on are.
    pub tokens: Range<usize>,
}

/// What the backward needs of the tiles of a batch.
#[derive(Debug)]
pub(super) struct ShownTiles {
    encoded: Saved,
    places: Vec<Place>,
}

/// Rows of the batch, and the encoder's output rows that they show.
#[derive(Clone, Copy, Debug)]
struct Place {
    row: usize,
    from: usize,
    rows: usize,
}

impl PolicyWeights {
    /// Replaces the rows of `x_td` that show tiles. Each distinct tile is encoded once.
    ///
    /// # Panics
    /// If the model reads no images, a tile is of another size, or rows are out of range.
    pub(super) fn show_tiles(
        &self,
        cx: &Context,
        tiles: &[TileRows<'_>],
        x_td: &mut [f32],
        save: bool,
    ) -> Option<ShownTiles> {
        if tiles.is_empty() {
            return None;
        }
        let encoder = self.encoder();
        let per_tile = encoder.spec.tokens();
        let (distinct, places) = place(tiles, per_tile);
        let (features, encoded) = encoder.forward(cx, &distinct, save);
        let d = self.model.spec().hidden;
        for Place { row, from, rows } in places.iter().copied() {
            x_td[row * d..(row + rows) * d].copy_from_slice(&features[from * d..(from + rows) * d]);
        }
        Some(ShownTiles { encoded: encoded?, places })
    }

    /// Runs the gradient of the rows that show tiles back through projector and encoder into `grads`.
    pub(super) fn tiles_backward(&self, cx: &Context, shown: ShownTiles, dx_td: &[f32], grads: &mut [f32]) {
        let encoder = self.encoder();
        let d = self.model.spec().hidden;
        let mut d_features = cx.pool.zeros(shown.encoded.tiles() * encoder.spec.tokens() * d);
        for Place { row, from, rows } in shown.places.iter().copied() {
            add_assign(&mut d_features[from * d..(from + rows) * d], &dx_td[row * d..(row + rows) * d]);
        }
        encoder.backward(cx, shown.encoded, &d_features, grads);
    }

    /// What the vision encoder makes of `tiles`, before the projector: `[tiles, tokens, width]`.
    ///
    /// # Panics
    /// If the model reads no images or a tile is of another size.
    pub fn image_hidden_states(&self, threads: &Threads, tiles: &[&Tile]) -> Vec<f32> {
        let cx = self.context(threads);
        self.encoder().hidden_states(&cx, tiles).to_vec()
    }

    fn encoder(&self) -> Encoder<'_> {
        let model = &self.model;
        let (Some(spec), Some(at), Some(weights), Some(rope)) =
            (&model.spec().vision, &model.bindings.vision, &self.vision, &model.vision_rope)
        else {
            panic!("{} reads no images: the caller refuses them", model.spec().architecture);
        };
        Encoder { spec, at, weights, rope, frozen: self.vision_frozen }
    }
}

impl ShownTiles {
    /// Whether row `row` of the batch shows a tile.
    pub fn covers(&self, row: usize) -> bool {
        self.places.iter().any(|place| (place.row..place.row + place.rows).contains(&row))
    }
}

/// The distinct tiles in order of appearance, and where each run of rows finds its features.
fn place<'a>(tiles: &[TileRows<'a>], per_tile: usize) -> (Vec<&'a Tile>, Vec<Place>) {
    let mut distinct: Vec<&Tile> = Vec::new();
    let mut places = Vec::with_capacity(tiles.len());
    for TileRows { tile, row, tokens } in tiles {
        assert!(tokens.start <= tokens.end && tokens.end <= per_tile, "tokens {tokens:?} of {per_tile}");
        let known = distinct.iter().position(|other| other.digest() == tile.digest());
        let index = known.unwrap_or_else(|| {
            distinct.push(tile);
            distinct.len() - 1
        });
        places.push(Place { row: *row, from: index * per_tile + tokens.start, rows: tokens.len() });
    }
    (distinct, places)
}

/// Rotations of a tile's rows: of every pair of a head's first half by the column (from 1), of its second half by the
/// row (from 1); the class token does not turn.
pub(super) fn rope_table(spec: &VisionSpec) -> RopeTable {
    let (grid, pairs) = (spec.grid(), 2 * spec.inv_freq.len());
    let mut angles = Vec::with_capacity(spec.rows() * pairs);
    for patch in 0..grid * grid {
        for place in [patch % grid, patch / grid] {
            angles.extend(spec.inv_freq.iter().map(|f| (place + 1) as f32 * f));
        }
    }
    angles.extend(std::iter::repeat_n(0.0, pairs));
    RopeTable::from_angles(&angles, pairs)
}

/// `GELU(x)`.
fn gelu(cx: &Context, x: &[f32]) -> Buf {
    let mut out = like(cx, x);
    pointwise(Pointwise::Gelu, x, &mut out);
    out
}

/// The gradient of `x`, given that of `GELU(x)`.
fn gelu_backward(cx: &Context, x: &[f32], dy: &[f32]) -> Buf {
    let mut dx = like(cx, x);
    pointwise_backward(Pointwise::Gelu, x, dy, &mut dx);
    dx
}

/// A buffer like `x`.
fn like(cx: &Context, x: &[f32]) -> Buf {
    cx.pool.take(x.len())
}
