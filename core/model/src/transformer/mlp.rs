//! Gated MLP: `down(act(gate·x) ⊙ up·x)`; the dense feed-forward, a shared expert and the routed experts alike: each is a part
//! of the rows.

use std::ops::Range;

use freewheel_kernels::activation::{self, Activation as KernelActivation};
use freewheel_kernels::gemm::{GatedMlp, Group, Store, grouped_matmul, grouped_matmul_add, weight_grad};
use freewheel_kernels::optim::add_assign;
use freewheel_kernels::{PackedMatrix, Precision, Threads};

use super::bindings::{Linear, MlpBinding};
use super::buffers::{Buf, BufferPool};
use super::weights::MlpWeights;
use crate::spec::Activation;

/// Values of a part of a row-wise operation that is worth sharing out.
pub(super) const MIN_VALUES: usize = 1 << 14;

/// What every block needs: threads, buffers, precision.
pub(super) struct Context<'a> {
    pub threads: &'a Threads,
    pub pool: &'a BufferPool,
    pub precision: Precision,
}

impl Context<'_> {
    /// `grads[at] += dyᵀ·x`, in whichever way the tensor is stored. `dy` is `[t, n]`, `x` is `[t, k]`.
    pub fn accumulate(
        &self,
        precision: Precision,
        at: &Linear,
        dy: &[f32],
        x: &[f32],
        rows: usize,
        grads: &mut [f32],
    ) {
        let target = &mut grads[at.range()];
        if at.transposed {
            weight_grad(self.threads, precision, x, dy, rows, at.k, at.n, target);
        } else {
            weight_grad(self.threads, precision, dy, x, rows, at.n, at.k, target);
        }
    }
}

fn kernel(activation: Activation) -> KernelActivation {
    match activation {
        Activation::Silu => KernelActivation::Silu,
        Activation::GeluTanh => KernelActivation::GeluTanh,
        Activation::ClampedSwiglu { alpha, limit } => KernelActivation::ClampedSwiglu { alpha, limit },
    }
}

/// Adds the bias, if there is one, to every row.
pub(super) fn add_bias(x: &mut [f32], bias: Option<&[f32]>) {
    let Some(bias) = bias else { return };
    for row in x.chunks_exact_mut(bias.len()) {
        add_assign(row, bias);
    }
}

/// Adds the rows of `dy` to the gradient of the bias, if there is one.
pub(super) fn add_bias_grad(dy: &[f32], at: &Option<Range<usize>>, grads: &mut [f32]) {
    let Some(at) = at else { return };
    for row in dy.chunks_exact(at.len()) {
        add_assign(&mut grads[at.clone()], row);
    }
}

/// An MLP and the rows that go through it.
pub(super) struct Part<'a> {
    pub at: &'a MlpBinding,
    pub weights: &'a MlpWeights,
    pub rows: Range<usize>,
}

impl<'a> Part<'a> {
    /// `rows` rows that all go through one MLP.
    pub fn whole(at: &'a MlpBinding, weights: &'a MlpWeights, rows: usize) -> [Self; 1] {
        [Self { at, weights, rows: 0..rows }]
    }
}

/// Groups of a product with one of each part's weights.
fn groups<'a>(parts: &'a [Part], weight: impl Fn(&'a MlpWeights) -> &'a PackedMatrix) -> Vec<Group<'a>> {
    parts.iter().map(|part| Group { rows: part.rows.clone(), w: weight(part.weights) }).collect()
}

/// Adds each part's bias, if it has one, to its rows of `width` values.
fn add_biases<'a>(
    parts: &'a [Part],
    x: &mut [f32],
    width: usize,
    bias: impl Fn(&'a MlpWeights) -> Option<&'a [f32]>,
) {
    for part in parts {
        add_bias(&mut x[part.rows.start * width..part.rows.end * width], bias(part.weights));
    }
}

/// `out (+)= mlp(x)`, `x` and `out` `[T, D]`: parts of one shape, their rows ascending, all rows in some part. Returns gate and
/// up `[T, 2F]`, which the backward needs, if `save`.
pub(super) fn forward(
    cx: &Context,
    parts: &[Part],
    x_td: &[f32],
    out_td: &mut [f32],
    add: bool,
    save: bool,
) -> Option<Buf> {
    let Some(Part { at, .. }) = parts.first() else { return save.then(|| cx.pool.take(0)) };
    let rows = parts.last().map_or(0, |part| part.rows.end);
    let mut gate_up_tf = save.then(|| cx.pool.take(rows * 2 * at.width));
    let biased = |part: &Part| part.weights.gate_up_bias.is_some();
    let (gate_up, down) = (groups(parts, |w| &w.gate_up.forward), groups(parts, |w| &w.down.forward));
    let mlp = GatedMlp { gate_up: &gate_up, activation: kernel(at.activation), down: &down };
    let store = if add { Store::Add } else { Store::Set };
    // In one step where the kernels have it: the same bits.
    if parts.iter().any(biased) || !mlp.forward(cx.threads, x_td, out_td, store, gate_up_tf.as_deref_mut()) {
        let gate_up_tf = gate_up_tf.get_or_insert_with(|| cx.pool.take(rows * 2 * at.width));
        grouped_matmul(cx.threads, x_td, &gate_up, gate_up_tf);
        add_biases(parts, gate_up_tf, 2 * at.width, |w| w.gate_up_bias.as_deref());
        let mut act_tf = cx.pool.take(rows * at.width);
        activation::gated(cx.threads, mlp.activation, gate_up_tf, at.width, &mut act_tf);
        let product = if add { grouped_matmul_add } else { grouped_matmul };
        product(cx.threads, &act_tf, &down, out_td);
    }
    add_biases(parts, out_td, at.gate_up.k, |w| w.down_bias.as_deref());
    gate_up_tf.filter(|_| save)
}

/// Adds the weight gradients and returns the gradient with respect to `x`.
pub(super) fn backward(
    cx: &Context,
    parts: &[Part],
    x_td: &[f32],
    gate_up_tf: &[f32],
    dy_td: &[f32],
    grads: &mut [f32],
) -> Buf {
    let mut dx_td = cx.pool.take(x_td.len());
    let Some(Part { at, .. }) = parts.first() else { return dx_td };
    let (d, width) = (at.gate_up.k, at.width);
    let mut act_tf = cx.pool.take(gate_up_tf.len() / 2);
    // Its gradient first; what was activated comes of the same pass as the gradient of gate and up.
    grouped_matmul(cx.threads, dy_td, &groups(parts, |w| w.down.transpose()), &mut act_tf);
    let mut d_gate_up_tf = cx.pool.take(gate_up_tf.len());
    let activation = kernel(at.activation);
    activation::gated_backward(cx.threads, activation, gate_up_tf, width, &mut act_tf, &mut d_gate_up_tf);
    for Part { at, rows, .. } in parts {
        let (dy, act) = (&dy_td[rows.start * d..rows.end * d], &act_tf[rows.start * width..rows.end * width]);
        cx.accumulate(cx.precision, &at.down, dy, act, rows.len(), grads);
        add_bias_grad(dy, &at.down_bias, grads);
    }
    drop(act_tf);
    for Part { at, rows, .. } in parts {
        let d_gate_up = &d_gate_up_tf[rows.start * 2 * width..rows.end * 2 * width];
        cx.accumulate(
            cx.precision,
            &at.gate_up,
            d_gate_up,
            &x_td[rows.start * d..rows.end * d],
            rows.len(),
            grads,
        );
        add_bias_grad(d_gate_up, &at.gate_up_bias, grads);
    }
    grouped_matmul(cx.threads, &d_gate_up_tf, &groups(parts, |w| w.gate_up.transpose()), &mut dx_td);
    dx_td
}
