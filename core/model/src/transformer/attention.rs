//! The attention block: norm, q/k/v, rotation, cached attention, output projection, residual.

use freewheel_kernels::attention::{
    AttentionSeq, AttentionShape, KvPages, KvPagesMut, add_sinks, attention, attention_backward, kv_write,
    sinks_backward,
};
use freewheel_kernels::gemm::{matmul, matmul_add};
use freewheel_kernels::norm::{NormScale, rms_norm, rms_norm_backward};
use freewheel_kernels::rope::{self, RopeTable, rope, rope_backward};

use super::bindings::LayerBinding;
use super::buffers::Buf;
use super::mlp::{Context, MIN_VALUES, add_bias, add_bias_grad};
use super::residual::{OutNorm, add_block, add_block_backward};
use super::weights::LayerWeights;
use crate::spec::{AttentionSpec, QkNorm, RopeStyle, TemperatureTuning};

/// One attention layer with everything it reads but the rows.
pub(super) struct AttentionLayer<'a> {
    pub spec: &'a AttentionSpec,
    pub at: &'a LayerBinding,
    pub weights: &'a LayerWeights,
    pub rope: Option<&'a RopeTable>,
    pub norm_eps: f32,
}

/// Where the rows of a batch are in their sequences.
pub(super) struct Rows<'a> {
    /// Absolute position of every row `[T]`.
    pub positions: &'a [u32],
    /// Sequences in row order with their KV pages.
    pub seqs: &'a [AttentionSeq<'a>],
    /// Rows once more, for sequences that hold a copy of another's rows in a page of their own.
    pub copies: &'a [AttentionSeq<'a>],
}

/// What the backward needs of one attention layer.
#[derive(Debug)]
pub(super) struct Saved {
    /// Residual input `[T, D]`.
    x_td: Buf,
    /// Queries as attended with `[T, H·hd]`.
    q: Buf,
    /// Compressed queries, keys and values as projected, where the layer has them.
    latent: Option<Buf>,
    /// Inputs of the query and key norms, where the layer has them.
    before_norm: Option<(Buf, Buf)>,
    /// Attention output, value heads side by side `[T, H·vd]`.
    out: Buf,
    /// Log-sum-exp of the scores `[T, H]`.
    lse: Buf,
    /// The block's output before its sandwich norm `[T, D]`, where the layer has one.
    raw_td: Option<Buf>,
}

impl Saved {
    /// Residual input `[T, D]`.
    pub fn input(&self) -> &[f32] {
        &self.x_td
    }

    /// Values of its buffers.
    pub fn held_values(&self) -> usize {
        let (before, after) = self.before_norm.as_ref().map_or((0, 0), |(q, k)| (q.len(), k.len()));
        let optional = [&self.latent, &self.raw_td].into_iter().flatten().map(|buf| buf.len());
        let always = [&self.x_td, &self.q, &self.out, &self.lse].map(|buf| buf.len());
        always.iter().sum::<usize>() + optional.sum::<usize>() + before + after
    }
}

impl AttentionLayer<'_> {
    fn shape(&self) -> AttentionShape {
        AttentionShape {
            heads: self.spec.heads,
            kv_heads: self.spec.kv_heads,
            head_dim: self.spec.head_dim,
            value_dim: self.spec.value_dim(),
            scale: self.spec.scale,
            mask: self.spec.mask(),
        }
    }

    /// Columns of queries, keys and values.
    pub(super) fn widths(&self) -> [usize; 3] {
        [self.spec.query_width(), self.spec.key_width(), self.spec.value_width()]
    }

    /// `x += attention(norm(x))`; writes the rows' keys and values into the pages.
    pub fn forward(
        &self,
        cx: &Context,
        x_td: &mut [f32],
        rows: &Rows,
        mut pages: KvPagesMut,
        save: bool,
    ) -> Option<Saved> {
        let t = rows.positions.len();
        let saved_x = save.then(|| cx.pool.copy(x_td));
        let normed_td = self.normed(cx, x_td);
        let (mut q, mut k, v, latent) = self.project(cx, &normed_td, t);
        drop(normed_td);
        let latent = latent.filter(|_| save);
        let before_norm = self.position(cx, &mut q, &mut k, rows, save);
        for seqs in [rows.seqs, rows.copies] {
            kv_write(cx.threads, &self.shape(), &k, &v, seqs, &mut pages);
        }
        let mut out = cx.pool.take(t * self.spec.out_width());
        let mut lse = (save || self.spec.sinks).then(|| cx.pool.take(t * self.spec.heads));
        attention(cx.threads, &self.shape(), &q, pages.as_ref(), rows.seqs, &mut out, lse.as_deref_mut());
        if let (Some(sinks), Some(lse)) = (&self.weights.sinks, lse.as_deref_mut()) {
            add_sinks(sinks, &mut out, lse);
        }
        let ((), raw_td) = add_block(cx, self.out_norm(), x_td, |x_td| {
            matmul_add(cx.threads, &out, t, &self.weights.out.forward, x_td);
            add_bias(x_td, self.weights.out_bias.as_deref());
        });
        Some(Saved { x_td: saved_x?, q, latent, before_norm, out, lse: lse?, raw_td })
    }

    /// Turns the gradient of the block's output into that of its input, in place, and adds the weight gradients.
    pub fn backward(
        &self,
        cx: &Context,
        saved: Saved,
        rows: &Rows,
        pages: KvPages,
        dx_td: &mut [f32],
        grads: &mut [f32],
    ) {
        let t = rows.positions.len();
        let [q_width, k_width, v_width] = self.widths();
        let d_raw_td = add_block_backward(cx, self.out_norm(), saved.raw_td.as_ref(), dx_td, grads);
        let dy_td: &[f32] = d_raw_td.as_deref().unwrap_or(dx_td);
        cx.accumulate(cx.precision, &self.at.out, dy_td, &saved.out, t, grads);
        add_bias_grad(dy_td, &self.at.out_bias, grads);
        let mut d_out = cx.pool.take(t * self.spec.out_width());
        matmul(cx.threads, dy_td, t, self.weights.out.transpose(), &mut d_out);
        let (mut dq, mut dk, mut dv) =
            (cx.pool.take(t * q_width), cx.pool.take(t * k_width), cx.pool.take(t * v_width));
        attention_backward(
            cx.threads,
            &self.shape(),
            &saved.q,
            pages,
            rows.seqs,
            &saved.out,
            &saved.lse,
            &d_out,
            &mut dq,
            &mut dk,
            &mut dv,
        );
        if let (Some(sinks), Some(at)) = (&self.weights.sinks, &self.at.sinks) {
            sinks_backward(sinks, &saved.out, &saved.lse, &d_out, &mut grads[at.clone()]);
        }
        self.position_backward(cx, &saved, rows, &mut dq, &mut dk, grads);
        let d_qkv = match &saved.latent {
            None => join(cx, &[&dq, &dk, &dv], &[q_width, k_width, v_width], t),
            Some(latent) => self.unpack_backward(cx, latent, &dq, &dk, &dv, t, grads),
        };
        add_bias_grad(&d_qkv, &self.at.qkv_bias, grads);
        let normed_td = self.normed(cx, &saved.x_td);
        cx.accumulate(cx.precision, &self.at.qkv, &d_qkv, &normed_td, t, grads);
        let mut d_normed_td = normed_td;
        matmul(cx.threads, &d_qkv, t, self.weights.qkv.transpose(), &mut d_normed_td);
        let width = dx_td.len() / t;
        norm_backward(
            cx,
            &saved.x_td,
            width,
            Some((&self.weights.input_norm, &mut grads[self.at.input_norm.clone()])),
            self.norm_eps,
            &d_normed_td,
            dx_td,
        );
    }

    fn out_norm(&self) -> Option<OutNorm<'_>> {
        let (gain, at) = self.weights.attention_out_norm.as_ref().zip(self.at.attention_out_norm.as_ref())?;
        Some(OutNorm { gain, at, eps: self.norm_eps })
    }

    fn normed(&self, cx: &Context, x_td: &[f32]) -> Buf {
        let mut normed_td = cx.pool.take(x_td.len());
        let scale = NormScale::Weight(&self.weights.input_norm);
        rms_norm(cx.threads, x_td, self.weights.input_norm.len(), scale, self.norm_eps, &mut normed_td);
        normed_td
    }

    /// Queries, keys and values; and what they were unpacked from.
    fn project(&self, cx: &Context, normed_td: &[f32], t: usize) -> (Buf, Buf, Buf, Option<Buf>) {
        let mut qkv = cx.pool.take(t * self.spec.qkv_width());
        matmul(cx.threads, normed_td, t, &self.weights.qkv.forward, &mut qkv);
        add_bias(&mut qkv, self.weights.qkv_bias.as_deref());
        if self.spec.latent.is_some() {
            let (q, k, v) = self.unpack(cx, &qkv, t);
            return (q, k, v, Some(qkv));
        }
        let [q, k, v] = split(cx, &qkv, self.widths());
        (q, k, v, None)
    }

    /// Norms, rotation and temperature of queries and keys, in the order the family wants.
    fn position(
        &self,
        cx: &Context,
        q: &mut Buf,
        k: &mut Buf,
        rows: &Rows,
        save: bool,
    ) -> Option<(Buf, Buf)> {
        let mut before_norm = None;
        if let (Some(q_norm), Some(k_norm)) = (&self.weights.q_norm, &self.weights.k_norm) {
            before_norm = Some(self.normalise(cx, q, k, Some((q_norm, k_norm))));
        }
        if let Some(table) = self.rope {
            let style = self.rope_style();
            rope(cx.threads, table, style, q, self.spec.heads, self.spec.head_dim, rows.positions);
            rope(cx.threads, table, style, k, self.spec.kv_heads, self.spec.head_dim, rows.positions);
        }
        if self.spec.qk_norm == QkNorm::WeightlessAfterRope {
            before_norm = Some(self.normalise(cx, q, k, None));
        }
        self.tune_temperature(q, rows);
        before_norm.filter(|_| save)
    }

    fn position_backward(
        &self,
        cx: &Context,
        saved: &Saved,
        rows: &Rows,
        dq: &mut Buf,
        dk: &mut Buf,
        grads: &mut [f32],
    ) {
        self.tune_temperature(dq, rows);
        if self.spec.qk_norm == QkNorm::WeightlessAfterRope {
            self.normalise_backward(cx, saved, dq, dk, grads);
        }
        if let Some(table) = self.rope {
            let style = self.rope_style();
            rope_backward(cx.threads, table, style, dq, self.spec.heads, self.spec.head_dim, rows.positions);
            rope_backward(
                cx.threads,
                table,
                style,
                dk,
                self.spec.kv_heads,
                self.spec.head_dim,
                rows.positions,
            );
        }
        if self.weights.q_norm.is_some() {
            self.normalise_backward(cx, saved, dq, dk, grads);
        }
    }

    /// Replaces queries and keys by their norms; returns what they were.
    fn normalise(
        &self,
        cx: &Context,
        q: &mut Buf,
        k: &mut Buf,
        gains: Option<(&Vec<f32>, &Vec<f32>)>,
    ) -> (Buf, Buf) {
        let (q_gain, k_gain) = (gains.map(|(g, _)| g), gains.map(|(_, g)| g));
        let one = |x: &mut Buf, gain: Option<&Vec<f32>>| {
            let mut normed = cx.pool.take(x.len());
            let width = gain.map_or(self.spec.head_dim, Vec::len);
            let scale = gain.map_or(NormScale::None, |g| NormScale::Weight(g));
            rms_norm(cx.threads, x, width, scale, self.norm_eps, &mut normed);
            std::mem::replace(x, normed)
        };
        (one(q, q_gain), one(k, k_gain))
    }

    fn normalise_backward(&self, cx: &Context, saved: &Saved, dq: &mut Buf, dk: &mut Buf, grads: &mut [f32]) {
        let (q_raw, k_raw) = saved.before_norm.as_ref().expect("saved by forward for layers with a q/k norm");
        for (raw, d, gain, at) in [
            (q_raw, dq, &self.weights.q_norm, &self.at.q_norm),
            (k_raw, dk, &self.weights.k_norm, &self.at.k_norm),
        ] {
            let mut d_raw = cx.pool.zeros(d.len());
            let weight = gain.as_ref().zip(at.as_ref()).map(|(g, at)| (g, &mut grads[at.clone()]));
            let width = weight.as_ref().map_or(self.spec.head_dim, |(g, _)| g.len());
            norm_backward(cx, raw, width, weight, self.norm_eps, d, &mut d_raw);
            *d = d_raw;
        }
    }

    fn tune_temperature(&self, q: &mut [f32], rows: &Rows) {
        let Some(tuning) = self.spec.temperature else { return };
        for (row, &position) in q.chunks_exact_mut(self.spec.query_width()).zip(rows.positions) {
            let factor = temperature(tuning, position);
            row.iter_mut().for_each(|x| *x *= factor);
        }
    }

    fn rope_style(&self) -> rope::RopeStyle {
        match self.spec.rope.as_ref().map(|r| r.style) {
            Some(RopeStyle::Interleaved) => rope::RopeStyle::Interleaved,
            Some(RopeStyle::Half) | None => rope::RopeStyle::Half,
        }
    }
}

/// Llama 4's query factor; 1 below the first step.
fn temperature(tuning: TemperatureTuning, position: u32) -> f32 {
    let steps = ((position as f32 + 1.0) / tuning.floor_scale).floor();
    steps.ln_1p() * tuning.attn_scale + 1.0
}

/// `dx += d norm(x)`; the gain's gradient is added where there is a gain.
pub(super) fn norm_backward(
    cx: &Context,
    x: &[f32],
    width: usize,
    weight: Option<(&Vec<f32>, &mut [f32])>,
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
) {
    let (scale, d_weight) = match weight {
        Some((gain, grad)) => (NormScale::Weight(gain), Some(grad)),
        None => (NormScale::None, None),
    };
    rms_norm_backward(cx.threads, x, width, scale, eps, dy, dx, d_weight);
}

/// The columns of `x`, cut into matrices of these widths.
pub(super) fn split<const N: usize>(cx: &Context, x: &[f32], widths: [usize; N]) -> [Buf; N] {
    let total: usize = widths.iter().sum();
    let mut first = 0;
    widths.map(|width| {
        let mut part = cx.pool.take(x.len() / total * width);
        cx.threads.for_each_row_chunk(&mut part, width, MIN_VALUES / width + 1, |row, part| {
            for (part, x) in part.chunks_exact_mut(width).zip(x[row * total..].chunks_exact(total)) {
                part.copy_from_slice(&x[first..first + width]);
            }
        });
        first += width;
        part
    })
}

/// Columns of several `[T, width]` matrices side by side.
pub(super) fn join(cx: &Context, parts: &[&[f32]], widths: &[usize], t: usize) -> Buf {
    let total: usize = widths.iter().sum();
    let mut joined = cx.pool.take(t * total);
    cx.threads.for_each_row_chunk(&mut joined, total, MIN_VALUES / total + 1, |first, joined| {
        for (row, out) in (first..).zip(joined.chunks_exact_mut(total)) {
            let mut at = 0;
            for (part, &width) in parts.iter().zip(widths) {
                out[at..at + width].copy_from_slice(&part[row * width..][..width]);
                at += width;
            }
        }
    });
    joined
}
