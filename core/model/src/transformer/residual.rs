//! How a block's output joins the residual stream: added as it is, or normed on its way (Gemma's sandwich norms).

use std::ops::Range;

use freewheel_kernels::norm::{NormScale, rms_norm};
use freewheel_kernels::optim::add_assign;

use super::attention::norm_backward;
use super::buffers::Buf;
use super::mlp::Context;

/// The norm a block's output goes through.
#[derive(Clone, Copy)]
pub(super) struct OutNorm<'a> {
    /// Gain `[D]`.
    pub gain: &'a Vec<f32>,
    /// Where its weight lies in the arena.
    pub at: &'a Range<usize>,
    pub eps: f32,
}

/// Adds to `x` what `block` adds to the rows it is handed, through `norm` if there is one. Returns what `block` returns,
/// and its output before the norm, which [`add_block_backward`] needs.
pub(super) fn add_block<R>(
    cx: &Context,
    norm: Option<OutNorm>,
    x_td: &mut [f32],
    block: impl FnOnce(&mut [f32]) -> R,
) -> (R, Option<Buf>) {
    let Some(norm) = norm else { return (block(x_td), None) };
    let mut raw_td = cx.pool.zeros(x_td.len());
    let result = block(&mut raw_td);
    let mut normed_td = cx.pool.take(x_td.len());
    let scale = NormScale::Weight(norm.gain);
    rms_norm(cx.threads, &raw_td, norm.gain.len(), scale, norm.eps, &mut normed_td);
    add_assign(x_td, &normed_td);
    (result, Some(raw_td))
}

/// The gradient at the block's output; `None` where that is `dx` itself. Adds the gain's gradient.
pub(super) fn add_block_backward(
    cx: &Context,
    norm: Option<OutNorm>,
    raw_td: Option<&Buf>,
    dx_td: &[f32],
    grads: &mut [f32],
) -> Option<Buf> {
    let (norm, raw_td) = (norm?, raw_td.expect("saved by add_block where there is a norm"));
    let mut d_raw_td = cx.pool.zeros(dx_td.len());
    let gain = Some((norm.gain, &mut grads[norm.at.clone()]));
    norm_backward(cx, raw_td, norm.gain.len(), gain, norm.eps, dx_td, &mut d_raw_td);
    Some(d_raw_td)
}
