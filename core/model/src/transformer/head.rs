//! The head: final norm, logits (or a classifier's scores), and their gradient, for chosen rows in chunks.

use freewheel_kernels::gemm::matmul;
use freewheel_kernels::norm::{NormScale, rms_norm};

use super::attention::norm_backward;
use super::buffers::Buf;
use super::mlp::Context;
use super::weights::PolicyWeights;

/// Rows whose logits are held at once, of `width` values each: as many as 128 MiB hold, so that the gradient of the head is added
/// to few times, and no fewer than 256, so that the head is read few times.
pub fn chunk_rows(width: usize) -> usize {
    ((1 << 25) / width.max(1)).clamp(256, 2048)
}

/// Rows of the residual stream, and their final norm.
pub(super) struct HeadRows {
    x: Buf,
    normed: Buf,
}

impl HeadRows {
    pub fn gather(
        weights: &PolicyWeights,
        cx: &Context,
        x_td: &[f32],
        rows: impl ExactSizeIterator<Item = usize>,
    ) -> Self {
        let d = weights.model.spec().hidden;
        let mut x = cx.pool.take(rows.len() * d);
        for (to, row) in x.chunks_exact_mut(d).zip(rows) {
            to.copy_from_slice(&x_td[row * d..][..d]);
        }
        let mut normed = cx.pool.take(x.len());
        let scale = NormScale::Weight(&weights.final_norm);
        rms_norm(cx.threads, &x, d, scale, weights.model.spec().norm_eps, &mut normed);
        Self { x, normed }
    }

    pub fn len(&self, weights: &PolicyWeights) -> usize {
        self.x.len() / weights.model.spec().hidden
    }

    /// Logits `[rows, V]`, or scores `[rows, labels]`.
    pub fn logits(&self, weights: &PolicyWeights, cx: &Context, out: &mut [f32]) {
        matmul(cx.threads, &self.normed, self.len(weights), &weights.head.forward, out);
    }

    /// Adds the head's and final norm's gradients; returns the gradient of the gathered residual rows.
    pub fn backward(
        &self,
        weights: &PolicyWeights,
        cx: &Context,
        d_logits: &[f32],
        grads: &mut [f32],
    ) -> Buf {
        let rows = self.len(weights);
        let bindings = &weights.model.bindings;
        cx.accumulate(cx.precision, &bindings.head, d_logits, &self.normed, rows, grads);
        let mut d_normed = cx.pool.take(self.x.len());
        matmul(cx.threads, d_logits, rows, weights.head.transpose(), &mut d_normed);
        let mut dx = cx.pool.zeros(self.x.len());
        let gain = Some((&weights.final_norm, &mut grads[bindings.final_norm.clone()]));
        let d = weights.model.spec().hidden;
        norm_backward(cx, &self.x, d, gain, weights.model.spec().norm_eps, &d_normed, &mut dx);
        dx
    }
}

/// Logits (a classifier's scores) of some rows, to `logits` `[rows, V]`.
pub(super) fn logits_of_rows(
    weights: &PolicyWeights,
    cx: &Context,
    x_td: &[f32],
    rows: &[usize],
    logits: &mut [f32],
) {
    let v = weights.model.spec().head_width();
    for (rows, out) in rows.chunks(chunk_rows(v)).zip(logits.chunks_mut(chunk_rows(v) * v)) {
        HeadRows::gather(weights, cx, x_td, rows.iter().copied()).logits(weights, cx, out);
    }
}
