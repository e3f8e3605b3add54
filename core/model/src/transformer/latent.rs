//! Multi-head latent attention: queries, keys and values unpacked from what was projected of the residual stream.
//!
//! ```text
//! row of the projection   [ c_q  or q | c_kv | k_r ]        r rotating dimensions, n without position, v of a value
//! q  = W_qb norm(c_q)     [H, n + r]
//! kv = W_kvb norm(c_kv)   [H, n + v]                        k = [H, n of kv + k_r], the same k_r in every head
//! ```
//!
//! Rotation comes after, as for any other attention. The cache holds the unpacked keys and values: as fast as any other,
//! and as large as with as many key-value heads as query heads. A cache of `c_kv` and `k_r` alone would be
//! `H·(n + r + v) / (kv_rank + r)` times smaller; it would take a second attention kernel (W_kvb absorbed into queries
//! and outputs), whose sums have other bits, in sampling *and* training.

use freewheel_kernels::gemm::matmul;
use freewheel_kernels::norm::{NormScale, rms_norm};
use freewheel_kernels::optim::add_assign;

use super::attention::{AttentionLayer, join, norm_backward, split};
use super::bindings::UnpackBinding;
use super::buffers::Buf;
use super::mlp::Context;
use super::weights::UnpackWeights;
use crate::spec::LatentSpec;

impl AttentionLayer<'_> {
    /// Queries, keys and values, none rotated yet, of the rows `packed` of the projection.
    pub(super) fn unpack(&self, cx: &Context, packed: &[f32], t: usize) -> (Buf, Buf, Buf) {
        let latent = self.latent();
        let [c_q, c_kv, k_r] = split(cx, packed, self.spec.projected_widths());
        let weights = self.weights.latent.as_ref().expect("a latent layer has such weights");
        let q = match &weights.q {
            None => c_q,
            Some(weights) => self.unpack_one(cx, weights, &c_q, t),
        };
        let kv = self.unpack_one(cx, &weights.kv, &c_kv, t);
        let [_, k_width, v_width] = self.widths();
        let (mut k, mut v) = (cx.pool.take(t * k_width), cx.pool.take(t * v_width));
        let (n, value_dim) = (latent.nope_dim, latent.value_dim);
        let heads = kv.chunks_exact(n + value_dim);
        let targets = k.chunks_exact_mut(self.spec.head_dim).zip(v.chunks_exact_mut(value_dim));
        let rotary = self.spec.head_dim - n;
        for (slot, ((k, v), kv)) in targets.zip(heads).enumerate() {
            k[..n].copy_from_slice(&kv[..n]);
            k[n..].copy_from_slice(&k_r[slot / self.spec.heads * rotary..][..rotary]);
            v.copy_from_slice(&kv[n..]);
        }
        (q, k, v)
    }

    /// Adds the gradients of what [`Self::unpack`] multiplied with and returns that of `packed`.
    #[expect(clippy::too_many_arguments, reason = "the mirror of unpack, plus its gradients")]
    pub(super) fn unpack_backward(
        &self,
        cx: &Context,
        packed: &[f32],
        dq: &[f32],
        dk: &[f32],
        dv: &[f32],
        t: usize,
        grads: &mut [f32],
    ) -> Buf {
        let widths = self.spec.projected_widths();
        let [c_q, c_kv, _] = split(cx, packed, widths);
        let weights = self.weights.latent.as_ref().expect("a latent layer has such weights");
        let at = self.at.latent.as_ref().expect("a latent layer has such bindings");
        let unpacked_q = weights.q.as_ref().zip(at.q.as_ref());
        let dc_q =
            unpacked_q.map(|(weights, at)| self.unpack_one_backward(cx, weights, at, &c_q, dq, t, grads));
        let (d_kv, dk_r) = self.pack_gradients(cx, dk, dv, t);
        let dc_kv = self.unpack_one_backward(cx, &weights.kv, &at.kv, &c_kv, &d_kv, t, grads);
        join(cx, &[dc_q.as_deref().unwrap_or(dq), &dc_kv, &dk_r], &widths, t)
    }

    /// Gradients of the unpacked keys and values `[T, H·(n + v)]`, and of the rotating part that all heads share.
    fn pack_gradients(&self, cx: &Context, dk: &[f32], dv: &[f32], t: usize) -> (Buf, Buf) {
        let latent = self.latent();
        let (n, value_dim) = (latent.nope_dim, latent.value_dim);
        let rotary = self.spec.head_dim - n;
        let mut d_kv = cx.pool.take(t * self.spec.heads * (n + value_dim));
        let mut dk_r = cx.pool.zeros(t * rotary);
        let heads = dk.chunks_exact(self.spec.head_dim).zip(dv.chunks_exact(value_dim));
        for (slot, (d_kv, (dk, dv))) in d_kv.chunks_exact_mut(n + value_dim).zip(heads).enumerate() {
            d_kv[..n].copy_from_slice(&dk[..n]);
            d_kv[n..].copy_from_slice(dv);
            add_assign(&mut dk_r[slot / self.spec.heads * rotary..][..rotary], &dk[n..]);
        }
        (d_kv, dk_r)
    }

    fn unpack_one(&self, cx: &Context, weights: &UnpackWeights, compressed: &[f32], t: usize) -> Buf {
        let normed = self.latent_norm(cx, weights, compressed);
        let mut unpacked = cx.pool.take(t * weights.up.forward.rows());
        matmul(cx.threads, &normed, t, &weights.up.forward, &mut unpacked);
        unpacked
    }

    #[expect(clippy::too_many_arguments, reason = "the mirror of unpack_one, plus its gradients")]
    fn unpack_one_backward(
        &self,
        cx: &Context,
        weights: &UnpackWeights,
        at: &UnpackBinding,
        compressed: &[f32],
        d_unpacked: &[f32],
        t: usize,
        grads: &mut [f32],
    ) -> Buf {
        let normed = self.latent_norm(cx, weights, compressed);
        cx.accumulate(cx.precision, &at.up, d_unpacked, &normed, t, grads);
        let mut d_normed = normed;
        matmul(cx.threads, d_unpacked, t, weights.up.transpose(), &mut d_normed);
        let mut d_compressed = cx.pool.zeros(compressed.len());
        let gain = Some((&weights.norm, &mut grads[at.norm.clone()]));
        let (width, eps) = (weights.norm.len(), self.latent().norm_eps);
        norm_backward(cx, compressed, width, gain, eps, &d_normed, &mut d_compressed);
        d_compressed
    }

    fn latent_norm(&self, cx: &Context, weights: &UnpackWeights, compressed: &[f32]) -> Buf {
        let mut normed = cx.pool.take(compressed.len());
        let (scale, eps) = (NormScale::Weight(&weights.norm), self.latent().norm_eps);
        rms_norm(cx.threads, compressed, weights.norm.len(), scale, eps, &mut normed);
        normed
    }

    fn latent(&self) -> &LatentSpec {
        self.spec.latent.as_ref().expect("called for latent layers only")
    }
}
