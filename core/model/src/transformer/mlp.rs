//! Gated MLP: `down(act(gate·x) ⊙ up·x)`; the dense feed-forward, a shared expert and one routed expert alike.

use std::ops::Range;

use freewheel_kernels::activation::{self, Activation as KernelActivation};
use freewheel_kernels::gemm::{matmul, matmul_add, weight_grad};
use freewheel_kernels::optim::add_assign;
use freewheel_kernels::{Precision, Threads};

use super::bindings::{Linear, MlpBinding};
use super::buffers::{Buf, BufferPool};
use super::weights::MlpWeights;
use crate::spec::Activation;

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

/// `out (+)= mlp(x)`. Returns gate and up `[T, 2F]`, which the backward needs.
pub(super) fn forward(
    cx: &Context,
    at: &MlpBinding,
    weights: &MlpWeights,
    x_td: &[f32],
    rows: usize,
    out_td: &mut [f32],
    add: bool,
) -> Buf {
    let mut gate_up_tf = cx.pool.take(rows * 2 * at.width);
    matmul(cx.threads, x_td, rows, &weights.gate_up.forward, &mut gate_up_tf);
    add_bias(&mut gate_up_tf, weights.gate_up_bias.as_deref());
    let act_tf = activate(cx, at, &gate_up_tf, rows);
    let down = if add { matmul_add } else { matmul };
    down(cx.threads, &act_tf, rows, &weights.down.forward, out_td);
    add_bias(out_td, weights.down_bias.as_deref());
    gate_up_tf
}

fn activate(cx: &Context, at: &MlpBinding, gate_up_tf: &[f32], rows: usize) -> Buf {
    let mut act_tf = cx.pool.take(rows * at.width);
    activation::gated(kernel(at.activation), gate_up_tf, at.width, &mut act_tf);
    act_tf
}

/// Adds the weight gradients and returns the gradient with respect to `x`.
#[expect(clippy::too_many_arguments, reason = "the mirror of forward, plus its gradients")]
pub(super) fn backward(
    cx: &Context,
    at: &MlpBinding,
    weights: &MlpWeights,
    x_td: &[f32],
    gate_up_tf: &[f32],
    dy_td: &[f32],
    rows: usize,
    grads: &mut [f32],
) -> Buf {
    let act_tf = activate(cx, at, gate_up_tf, rows);
    cx.accumulate(cx.precision, &at.down, dy_td, &act_tf, rows, grads);
    add_bias_grad(dy_td, &at.down_bias, grads);
    let mut d_act_tf = act_tf;
    matmul(cx.threads, dy_td, rows, weights.down.transpose(), &mut d_act_tf);
    let mut d_gate_up_tf = cx.pool.take(rows * 2 * at.width);
    activation::gated_backward(kernel(at.activation), gate_up_tf, at.width, &d_act_tf, &mut d_gate_up_tf);
    cx.accumulate(cx.precision, &at.gate_up, &d_gate_up_tf, x_td, rows, grads);
    add_bias_grad(&d_gate_up_tf, &at.gate_up_bias, grads);
    let mut dx_td = cx.pool.take(x_td.len());
    matmul(cx.threads, &d_gate_up_tf, rows, weights.gate_up.transpose(), &mut dx_td);
    dx_td
}
