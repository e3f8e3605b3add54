//! A projection and a layer norm with their weights, forward and backward.

use freewheel_kernels::gemm::{matmul, weight_grad};
use freewheel_kernels::layer_norm::{Affine, layer_norm, layer_norm_backward};
use freewheel_kernels::optim::add_assign;
use freewheel_kernels::{PackedMatrix, Precision, Threads};

use super::layout::{LinearAt, NormAt};
use crate::params::Params;
use crate::transformer::Purpose;

/// `x·Wᵀ + b`.
#[derive(Debug)]
pub(super) struct Linear {
    forward: PackedMatrix,
    backward: Option<PackedMatrix>,
    bias: Vec<f32>,
}

impl Linear {
    pub fn pack(params: &Params, at: &LinearAt, purpose: Purpose, threads: &Threads) -> Self {
        let weight = params.range_f32(at.weight.clone());
        let mut forward = PackedMatrix::zeros(Precision::F32, at.n, at.k);
        forward.repack_from_f32(threads, &weight);
        let backward = (purpose == Purpose::Training).then(|| {
            let mut transposed = PackedMatrix::zeros(Precision::F32, at.k, at.n);
            transposed.repack_from_f32_transposed(threads, &weight);
            transposed
        });
        Self { forward, backward, bias: params.range_f32(at.bias.clone()) }
    }

    /// `[rows, n]` from `x [rows, k]`.
    pub fn forward(&self, threads: &Threads, x: &[f32]) -> Vec<f32> {
        let (n, k) = (self.forward.rows(), self.forward.inner());
        let rows = x.len() / k;
        let mut y = vec![0.0; rows * n];
        matmul(threads, x, rows, &self.forward, &mut y);
        y.chunks_exact_mut(n).for_each(|row| add_assign(row, &self.bias));
        y
    }

    /// Adds the gradients of weight and bias; returns that of `x`.
    pub fn backward(
        &self,
        threads: &Threads,
        at: &LinearAt,
        x: &[f32],
        dy: &[f32],
        grads: &mut [f32],
    ) -> Vec<f32> {
        let rows = dy.len() / at.n;
        weight_grad(threads, Precision::F32, dy, x, rows, at.n, at.k, &mut grads[at.weight.clone()]);
        let d_bias = &mut grads[at.bias.clone()];
        dy.chunks_exact(at.n).for_each(|row| add_assign(d_bias, row));
        let transposed =
            self.backward.as_ref().expect("these weights were packed for scoring, not for training");
        let mut dx = vec![0.0; rows * at.k];
        matmul(threads, dy, rows, transposed, &mut dx);
        dx
    }
}

/// A layer norm.
#[derive(Debug)]
pub(super) struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

impl Norm {
    pub fn pack(params: &Params, at: &NormAt, eps: f32) -> Self {
        Self { weight: params.range_f32(at.weight.clone()), bias: params.range_f32(at.bias.clone()), eps }
    }

    pub fn forward(&self, threads: &Threads, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        layer_norm(threads, x, self.affine(), self.eps, &mut y);
        y
    }

    /// Adds the gradients of weight and bias; returns that of `x`.
    pub fn backward(
        &self,
        threads: &Threads,
        at: &NormAt,
        x: &[f32],
        dy: &[f32],
        grads: &mut [f32],
    ) -> Vec<f32> {
        let mut dx = vec![0.0; x.len()];
        let (mut d_weight, mut d_bias) = (vec![0.0; self.weight.len()], vec![0.0; self.bias.len()]);
        let affine = self.affine();
        layer_norm_backward(threads, x, affine, self.eps, dy, &mut dx, &mut d_weight, &mut d_bias);
        add_assign(&mut grads[at.weight.clone()], &d_weight);
        add_assign(&mut grads[at.bias.clone()], &d_bias);
        dx
    }

    fn affine(&self) -> Affine<'_> {
        Affine { weight: &self.weight, bias: &self.bias }
    }
}
