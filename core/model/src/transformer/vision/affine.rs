//! Linear maps with a bias and layer norms: the two blocks the image encoder is made of.

use std::ops::Range;

use freewheel_kernels::gemm::{matmul, matmul_add};
use freewheel_kernels::layer_norm::{self, layer_norm, layer_norm_backward};

use super::super::bindings::{Index, Linear};
use super::super::buffers::Buf;
use super::super::mlp::{Context, add_bias, add_bias_grad};
use super::super::weights::{PackedLinear, Packer};
use super::like;

/// `y = x·Wᵀ + b`, somewhere in the arena.
#[derive(Clone, Debug)]
pub(in crate::transformer) struct AffineBinding {
    linear: Linear,
    bias: Option<Range<usize>>,
}

#[derive(Debug)]
pub(in crate::transformer) struct AffineWeights {
    packed: PackedLinear,
    bias: Option<Vec<f32>>,
}

/// A map with its weights.
#[derive(Clone, Copy)]
pub(super) struct Affine<'a> {
    pub at: &'a AffineBinding,
    pub weights: &'a AffineWeights,
}

impl AffineBinding {
    /// The maps called `names`, which lie side by side, as one.
    pub fn fused(index: &Index<'_>, names: &[String], k: usize, biased: bool) -> Self {
        let named = |end: &str| names.iter().map(|name| format!("{name}.{end}")).collect::<Vec<_>>();
        Self {
            linear: index.fused(&named("weight"), k),
            bias: biased.then(|| index.fused(&named("bias"), 1).range()),
        }
    }

    pub fn new(index: &Index<'_>, name: &str, k: usize, biased: bool) -> Self {
        Self::fused(index, &[name.to_owned()], k, biased)
    }

    pub fn empty(&self, packer: &Packer<'_>) -> AffineWeights {
        AffineWeights { packed: packer.empty(&self.linear), bias: None }
    }

    pub fn fill(&self, weights: &mut AffineWeights, packer: &Packer<'_>) {
        packer.fill(&mut weights.packed, &self.linear);
        weights.bias = self.bias.clone().map(|range| packer.params.range_f32(range));
    }
}

impl Affine<'_> {
    /// `x·Wᵀ + b`, `[rows, n]`.
    pub fn forward(&self, cx: &Context, x: &[f32], rows: usize) -> Buf {
        let mut out = cx.pool.take(rows * self.at.linear.n);
        matmul(cx.threads, x, rows, &self.weights.packed.forward, &mut out);
        add_bias(&mut out, self.weights.bias.as_deref());
        out
    }

    /// `out += x·Wᵀ + b`
    pub fn forward_add(&self, cx: &Context, x: &[f32], rows: usize, out: &mut [f32]) {
        matmul_add(cx.threads, x, rows, &self.weights.packed.forward, out);
        add_bias(out, self.weights.bias.as_deref());
    }

    /// Adds the gradients of weight and bias.
    pub fn accumulate(&self, cx: &Context, dy: &[f32], x: &[f32], rows: usize, grads: &mut [f32]) {
        cx.accumulate(cx.precision, &self.at.linear, dy, x, rows, grads);
        add_bias_grad(dy, &self.at.bias, grads);
    }

    /// Adds the gradients of weight and bias; returns that of `x`.
    pub fn backward(&self, cx: &Context, dy: &[f32], x: &[f32], rows: usize, grads: &mut [f32]) -> Buf {
        self.accumulate(cx, dy, x, rows, grads);
        let mut dx = like(cx, x);
        matmul(cx.threads, dy, rows, self.weights.packed.transpose(), &mut dx);
        dx
    }
}

/// Gain and, behind it, bias of a layer norm in the arena.
#[derive(Clone, Debug)]
pub(in crate::transformer) struct NormBinding {
    range: Range<usize>,
}

#[derive(Debug, Default)]
pub(in crate::transformer) struct NormWeights {
    gain: Vec<f32>,
    bias: Vec<f32>,
}

/// A layer norm with its weights.
#[derive(Clone, Copy)]
pub(super) struct Norm<'a> {
    pub at: &'a NormBinding,
    pub weights: &'a NormWeights,
    pub eps: f32,
}

impl NormBinding {
    pub fn new(index: &Index<'_>, name: &str) -> Self {
        let (gain, bias) = (index.range(&format!("{name}.weight")), index.range(&format!("{name}.bias")));
        assert_eq!(gain.end, bias.start, "{name}: gain and bias do not lie side by side");
        Self { range: gain.start..bias.end }
    }

    pub fn fill(&self, weights: &mut NormWeights, packer: &Packer<'_>) {
        let mut gain = packer.params.range_f32(self.range.clone());
        weights.bias = gain.split_off(gain.len() / 2);
        weights.gain = gain;
    }
}

impl Norm<'_> {
    pub fn forward(&self, cx: &Context, x: &[f32]) -> Buf {
        let mut out = like(cx, x);
        layer_norm(cx.threads, x, self.affine(), self.eps, &mut out);
        out
    }

    /// Adds the gradients of gain and bias; returns that of `x`.
    pub fn backward(&self, cx: &Context, x: &[f32], dy: &[f32], grads: &mut [f32]) -> Buf {
        let (d_gain, d_bias) = grads[self.at.range.clone()].split_at_mut(self.weights.gain.len());
        let mut dx = like(cx, x);
        layer_norm_backward(cx.threads, x, self.affine(), self.eps, dy, &mut dx, d_gain, d_bias);
        dx
    }

    fn affine(&self) -> layer_norm::Affine<'_> {
        layer_norm::Affine { weight: &self.weights.gain, bias: &self.weights.bias }
    }
}
