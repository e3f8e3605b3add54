//! Tiles to rows of the residual stream, and back.

use freewheel_kernels::optim::add_assign;
use freewheel_kernels::rope::RopeTable;

use super::super::buffers::Buf;
use super::super::mlp::Context;
use super::layer::{Layer, SavedLayer, TileSeqs};
use super::shuffle::{shuffled_patches, unfold};
use super::weights::{VisionBinding, VisionWeights, affine, norm};
use super::{gelu, gelu_backward};
use crate::spec::VisionSpec;
use crate::vision::Tile;

/// The image encoder with everything it reads but the tiles.
pub(super) struct Encoder<'a> {
    pub spec: &'a VisionSpec,
    pub at: &'a VisionBinding,
    pub weights: &'a VisionWeights,
    pub rope: &'a RopeTable,
    /// Whether only the projector is trained.
    pub frozen: bool,
}

/// What the backward needs.
#[derive(Debug)]
pub(in crate::transformer) struct Saved {
    tiles: usize,
    /// `[U·(P − 1), 3·patch²]`
    patches: Buf,
    /// Before the first norm `[U·P, h]`.
    embedded: Buf,
    layers: Vec<SavedLayer>,
    /// After the last layer `[U·P, h]`.
    x: Buf,
    adapted: Adapted,
}

/// The adapter's values.
#[derive(Debug)]
struct Adapted {
    /// `[U·n, r²·h]`
    shuffled: Buf,
    /// Before the first GELU `[U·n, adapter width]`.
    first: Buf,
    /// Before the second GELU `[U·n, output]`.
    second: Buf,
    /// What leaves the adapter `[U·n, output]`.
    hidden: Buf,
}

impl Saved {
    pub fn tiles(&self) -> usize {
        self.tiles
    }
}

impl Encoder<'_> {
    /// Rows of the residual stream `[U·n, D]`, and what the backward needs if `save`.
    pub fn forward(&self, cx: &Context, tiles: &[&Tile], save: bool) -> (Buf, Option<Saved>) {
        let saved = self.encode(cx, tiles, save && !self.frozen);
        let rows = tiles.len() * self.spec.tokens();
        let projector = affine(&self.at.projector, &self.weights.projector);
        let features = projector.forward(cx, &saved.adapted.hidden, rows);
        (features, save.then_some(saved))
    }

    /// What enters the projector `[U·n, output]`.
    pub fn hidden_states(&self, cx: &Context, tiles: &[&Tile]) -> Buf {
        self.encode(cx, tiles, false).adapted.hidden
    }

    /// Everything up to the projector. `layers` of the result are empty unless `save`.
    fn encode(&self, cx: &Context, tiles: &[&Tile], save: bool) -> Saved {
        let patches = self.patches(cx, tiles);
        let embedded = self.embed(cx, &patches, tiles.len());
        let mut x = norm(&self.at.pre, &self.weights.pre, self.spec.norm_eps).forward(cx, &embedded);
        let seqs = TileSeqs::new(self.spec, tiles.len());
        let layers = (0..self.spec.layers).filter_map(|i| self.layer(i).forward(cx, &mut x, &seqs, save));
        let layers = layers.collect();
        let normed = norm(&self.at.post, &self.weights.post, self.spec.norm_eps).forward(cx, &x);
        let adapted = self.adapt(cx, &normed, tiles.len());
        Saved { tiles: tiles.len(), patches, embedded, layers, x, adapted }
    }

    /// Adds the gradients of all the encoder's parameters, given that of its rows `[U·n, D]`.
    pub fn backward(&self, cx: &Context, saved: Saved, d_features: &[f32], grads: &mut [f32]) {
        let Saved { tiles, patches, embedded, layers, x, adapted } = saved;
        let rows = tiles * self.spec.tokens();
        let projector = affine(&self.at.projector, &self.weights.projector);
        if self.frozen {
            return projector.accumulate(cx, d_features, &adapted.hidden, rows, grads);
        }
        let d_hidden = projector.backward(cx, d_features, &adapted.hidden, rows, grads);
        let d_shuffled = self.adapt_backward(cx, &adapted, &d_hidden, rows, grads);
        let d_normed = self.unshuffle(cx, &d_shuffled, tiles);
        let mut dx =
            norm(&self.at.post, &self.weights.post, self.spec.norm_eps).backward(cx, &x, &d_normed, grads);
        let seqs = TileSeqs::new(self.spec, tiles);
        for (i, layer) in layers.into_iter().enumerate().rev() {
            self.layer(i).backward(cx, layer, &seqs, &mut dx, grads);
        }
        let d_embedded =
            norm(&self.at.pre, &self.weights.pre, self.spec.norm_eps).backward(cx, &embedded, &dx, grads);
        self.embed_backward(cx, &d_embedded, &patches, tiles, grads);
    }

    fn layer(&self, index: usize) -> Layer<'_> {
        let (at, weights) = (&self.at.layers[index], &self.weights.layers[index]);
        Layer { spec: self.spec, at, weights, rope: self.rope }
    }

    fn patches(&self, cx: &Context, tiles: &[&Tile]) -> Buf {
        let values = self.spec.pixels();
        let mut patches = cx.pool.take(tiles.len() * values);
        for (tile, out) in tiles.iter().zip(patches.chunks_exact_mut(values)) {
            assert_eq!(tile.pixels().len(), values, "a tile of another size than the model's");
            unfold(self.spec, tile.pixels(), out);
        }
        patches
    }

    /// Patches through their linear map, the class token behind them, plus positions.
    fn embed(&self, cx: &Context, patches: &[f32], tiles: usize) -> Buf {
        let (h, rows) = (self.spec.hidden, self.spec.rows());
        let mapped = affine(&self.at.patch, &self.weights.patch).forward(cx, patches, tiles * (rows - 1));
        let mut x = cx.pool.take(tiles * rows * h);
        for (x, mapped) in x.chunks_exact_mut(rows * h).zip(mapped.chunks_exact((rows - 1) * h)) {
            let (patch_rows, class) = x.split_at_mut((rows - 1) * h);
            patch_rows.copy_from_slice(mapped);
            class.copy_from_slice(&self.weights.class);
            add_assign(x, &self.weights.positions);
        }
        x
    }

    fn embed_backward(&self, cx: &Context, dx: &[f32], patches: &[f32], tiles: usize, grads: &mut [f32]) {
        let (h, rows) = (self.spec.hidden, self.spec.rows());
        let mut d_mapped = cx.pool.take(tiles * (rows - 1) * h);
        for (dx, d_mapped) in dx.chunks_exact(rows * h).zip(d_mapped.chunks_exact_mut((rows - 1) * h)) {
            let (patch_rows, class) = dx.split_at((rows - 1) * h);
            d_mapped.copy_from_slice(patch_rows);
            add_assign(&mut grads[self.at.class.clone()], class);
            add_assign(&mut grads[self.at.positions.clone()], dx);
        }
        let patch = affine(&self.at.patch, &self.weights.patch);
        patch.accumulate(cx, &d_mapped, patches, tiles * (rows - 1), grads);
    }

    fn adapt(&self, cx: &Context, normed: &[f32], tiles: usize) -> Adapted {
        let h = self.spec.hidden;
        let rows = tiles * self.spec.tokens();
        let mut shuffled = cx.pool.take(tiles * (self.spec.rows() - 1) * h);
        let mut parts = shuffled.chunks_exact_mut(h);
        for tile in normed.chunks_exact(self.spec.rows() * h) {
            for patch in shuffled_patches(self.spec) {
                let part = parts.next().expect("as many parts as patches");
                part.copy_from_slice(&tile[patch * h..][..h]);
            }
        }
        let first = affine(&self.at.adapter[0], &self.weights.adapter[0]).forward(cx, &shuffled, rows);
        let second =
            affine(&self.at.adapter[1], &self.weights.adapter[1]).forward(cx, &gelu(cx, &first), rows);
        let hidden = gelu(cx, &second);
        Adapted { shuffled, first, second, hidden }
    }

    /// The gradient of the shuffled patches, given that of what leaves the adapter.
    fn adapt_backward(
        &self,
        cx: &Context,
        adapted: &Adapted,
        d_hidden: &[f32],
        rows: usize,
        grads: &mut [f32],
    ) -> Buf {
        let [first, second] = [0, 1].map(|i| affine(&self.at.adapter[i], &self.weights.adapter[i]));
        let d_second = gelu_backward(cx, &adapted.second, d_hidden);
        let d_act = second.backward(cx, &d_second, &gelu(cx, &adapted.first), rows, grads);
        let d_first = gelu_backward(cx, &adapted.first, &d_act);
        first.backward(cx, &d_first, &adapted.shuffled, rows, grads)
    }

    /// The shuffle undone, with zero for the class token, which does not leave the encoder.
    fn unshuffle(&self, cx: &Context, d_shuffled: &[f32], tiles: usize) -> Buf {
        let (h, rows) = (self.spec.hidden, self.spec.rows());
        let mut d_normed = cx.pool.zeros(tiles * rows * h);
        let mut parts = d_shuffled.chunks_exact(h);
        for tile in d_normed.chunks_exact_mut(rows * h) {
            for patch in shuffled_patches(self.spec) {
                let part = parts.next().expect("as many parts as patches");
                tile[patch * h..][..h].copy_from_slice(part);
            }
        }
        d_normed
    }
}
