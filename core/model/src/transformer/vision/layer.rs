//! One encoder layer: attention among the rows of a tile, then a GELU feed-forward, each after a layer norm.

use freewheel_kernels::attention::{
    AttentionMask, AttentionSeq, AttentionShape, KV_BLOCK, KvPages, KvPagesMut, attention,
    attention_backward, kv_write,
};
use freewheel_kernels::optim::add_assign;
use freewheel_kernels::rope::{RopeStyle, RopeTable, rope, rope_backward};

use super::super::attention::join;
use super::super::buffers::Buf;
use super::super::mlp::Context;
use super::weights::{VisionLayerBinding, VisionLayerWeights, affine, norm};
use super::{gelu, gelu_backward, like};
use crate::spec::VisionSpec;

/// A layer with everything it reads but the rows.
pub(super) struct Layer<'a> {
    pub spec: &'a VisionSpec,
    pub at: &'a VisionLayerBinding,
    pub weights: &'a VisionLayerWeights,
    pub rope: &'a RopeTable,
}

/// What the backward needs of one layer.
#[derive(Debug)]
pub(super) struct SavedLayer {
    /// Input `[T, h]`.
    x: Buf,
    /// Queries as attended with `[T, h]`.
    q: Buf,
    k_pages: Buf,
    v_pages: Buf,
    /// Attention output `[T, h]`.
    out: Buf,
    /// Log-sum-exp of the scores `[T, heads]`.
    lse: Buf,
    /// Between attention and feed-forward `[T, h]`.
    x_mid: Buf,
    /// Feed-forward before the GELU `[T, width]`.
    up: Buf,
}

/// The rows of a number of tiles as sequences of attention.
pub(super) struct TileSeqs {
    rows_of_tile: usize,
    tiles: usize,
    pages: Vec<u32>,
    /// Row of every row within its tile: its "position".
    positions: Vec<u32>,
}

impl TileSeqs {
    pub fn new(spec: &VisionSpec, tiles: usize) -> Self {
        let rows = spec.rows();
        let pages = (0..(tiles * rows.div_ceil(KV_BLOCK)) as u32).collect();
        let positions = (0..tiles).flat_map(|_| 0..rows as u32).collect();
        Self { rows_of_tile: rows, tiles, pages, positions }
    }

    fn seqs(&self) -> Vec<AttentionSeq<'_>> {
        let rows = self.rows_of_tile;
        self.pages
            .chunks(rows.div_ceil(KV_BLOCK))
            .enumerate()
            .map(|(tile, pages)| AttentionSeq { first_row: tile * rows, rows, position: 0, pages })
            .collect()
    }

    /// Rows of all tiles T.
    pub fn rows(&self) -> usize {
        self.tiles * self.rows_of_tile
    }
}

impl Layer<'_> {
    fn shape(&self) -> AttentionShape {
        let head_dim = self.spec.head_dim();
        AttentionShape {
            heads: self.spec.heads,
            kv_heads: self.spec.heads,
            head_dim,
            value_dim: head_dim,
            scale: (head_dim as f32).powf(-0.5),
            mask: AttentionMask::Bidirectional,
        }
    }

    /// Changes `x` in place; what the backward needs if `save`.
    pub fn forward(&self, cx: &Context, x: &mut Buf, tiles: &TileSeqs, save: bool) -> Option<SavedLayer> {
        let t = tiles.rows();
        let saved_x = save.then(|| cx.pool.copy(x));
        let normed = norm(&self.at.input_norm, &self.weights.input_norm, self.spec.norm_eps).forward(cx, x);
        let qkv = affine(&self.at.qkv, &self.weights.qkv).forward(cx, &normed, t);
        let [mut q, mut k, v] = self.split(cx, &qkv);
        let (heads, head_dim) = (self.spec.heads, self.spec.head_dim());
        rope(cx.threads, self.rope, RopeStyle::Interleaved, &mut q, heads, head_dim, &tiles.positions);
        rope(cx.threads, self.rope, RopeStyle::Interleaved, &mut k, heads, head_dim, &tiles.positions);
        let page_values = tiles.pages.len() * self.shape().k_page_len();
        let (mut k_pages, mut v_pages) = (cx.pool.zeros(page_values), cx.pool.zeros(page_values));
        let seqs = tiles.seqs();
        let mut pages = KvPagesMut::F32 { k: &mut k_pages, v: &mut v_pages };
        kv_write(cx.threads, &self.shape(), &k, &v, &seqs, &mut pages);
        let (mut out, mut lse) = (like(cx, &q), cx.pool.take(t * heads));
        attention(cx.threads, &self.shape(), &q, pages.as_ref(), &seqs, &mut out, Some(&mut lse));
        affine(&self.at.out, &self.weights.out).forward_add(cx, &out, t, x);
        let x_mid = save.then(|| cx.pool.copy(x));
        let up = self.feed_forward(cx, x, t);
        Some(SavedLayer { x: saved_x?, q, k_pages, v_pages, out, lse, x_mid: x_mid?, up })
    }

    /// Adds the feed-forward to `x`; returns what its GELU read.
    fn feed_forward(&self, cx: &Context, x: &mut Buf, t: usize) -> Buf {
        let normed = norm(&self.at.post_norm, &self.weights.post_norm, self.spec.norm_eps).forward(cx, x);
        let up = affine(&self.at.up, &self.weights.up).forward(cx, &normed, t);
        let act = gelu(cx, &up);
        affine(&self.at.down, &self.weights.down).forward_add(cx, &act, t, x);
        up
    }

    /// Turns the gradient of the layer's output into that of its input, in place, and adds the weight gradients.
    pub fn backward(
        &self,
        cx: &Context,
        saved: SavedLayer,
        tiles: &TileSeqs,
        dx: &mut [f32],
        grads: &mut [f32],
    ) {
        self.feed_forward_backward(cx, &saved, dx, grads);
        let t = tiles.rows();
        let d_out = affine(&self.at.out, &self.weights.out).backward(cx, dx, &saved.out, t, grads);
        let (mut dq, mut dk, mut dv) = (like(cx, &saved.q), like(cx, &saved.q), like(cx, &saved.q));
        attention_backward(
            cx.threads,
            &self.shape(),
            &saved.q,
            KvPages::F32 { k: &saved.k_pages, v: &saved.v_pages },
            &tiles.seqs(),
            &saved.out,
            &saved.lse,
            &d_out,
            &mut dq,
            &mut dk,
            &mut dv,
        );
        let (h, heads, head_dim) = (self.spec.hidden, self.spec.heads, self.spec.head_dim());
        rope_backward(
            cx.threads,
            self.rope,
            RopeStyle::Interleaved,
            &mut dq,
            heads,
            head_dim,
            &tiles.positions,
        );
        rope_backward(
            cx.threads,
            self.rope,
            RopeStyle::Interleaved,
            &mut dk,
            heads,
            head_dim,
            &tiles.positions,
        );
        let d_qkv = join(cx, &[&dq, &dk, &dv], &[h, h, h], t);
        let input_norm = norm(&self.at.input_norm, &self.weights.input_norm, self.spec.norm_eps);
        let normed = input_norm.forward(cx, &saved.x);
        let d_normed = affine(&self.at.qkv, &self.weights.qkv).backward(cx, &d_qkv, &normed, t, grads);
        add_assign(dx, &input_norm.backward(cx, &saved.x, &d_normed, grads));
    }

    fn feed_forward_backward(&self, cx: &Context, saved: &SavedLayer, dx: &mut [f32], grads: &mut [f32]) {
        let t = dx.len() / self.spec.hidden;
        let act = gelu(cx, &saved.up);
        let d_act = affine(&self.at.down, &self.weights.down).backward(cx, dx, &act, t, grads);
        let d_up = gelu_backward(cx, &saved.up, &d_act);
        let post_norm = norm(&self.at.post_norm, &self.weights.post_norm, self.spec.norm_eps);
        let normed = post_norm.forward(cx, &saved.x_mid);
        let d_normed = affine(&self.at.up, &self.weights.up).backward(cx, &d_up, &normed, t, grads);
        add_assign(dx, &post_norm.backward(cx, &saved.x_mid, &d_normed, grads));
    }

    fn split(&self, cx: &Context, qkv: &[f32]) -> [Buf; 3] {
        let h = self.spec.hidden;
        [0, 1, 2].map(|part| {
            let mut out = cx.pool.take(qkv.len() / 3);
            for (out, row) in out.chunks_exact_mut(h).zip(qkv.chunks_exact(3 * h)) {
                out.copy_from_slice(&row[part * h..(part + 1) * h]);
            }
            out
        })
    }
}
