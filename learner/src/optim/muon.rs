//! Muon's step (Jordan et al. 2024, "Muon: an optimizer for hidden layers"): momentum, orthogonalised.
//!
//! Momentum and scale as in `torch.optim.Muon`; Newton–Schulz runs in f32 here, there in bfloat16. Not for embeddings, heads,
//! routers, norms and biases: those follow AdamW.

use freewheel_kernels::Threads;
use freewheel_kernels::gemm::{PackedMatrix, Precision, matmul};

use super::config::MuonScale;

/// Coefficients of the quintic iteration, and how often it is done.
const COEFFICIENTS: [f32; 3] = [3.4445, -4.775, 2.0315];
const ITERATIONS: usize = 5;
/// Least norm that a matrix is divided by.
const EPS: f64 = 1e-7;

/// One matrix among the parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub rows: usize,
    pub cols: usize,
    /// Whether it is stored `[in, out]`.
    pub transposed: bool,
}

/// Settings of one step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub lr: f64,
    pub momentum: f32,
    pub nesterov: bool,
    pub weight_decay: f64,
    pub scale: MuonScale,
}

/// p −= lr·wd·p; b += (1−μ)(g−b); p −= lr·scale·orthogonal(g + μ(b−g), or b).
pub(super) fn step(
    threads: &Threads,
    shape: Shape,
    params: &mut [f32],
    momentum: &mut [f32],
    grad: &[f32],
    grad_scale: f32,
    step: &Step,
) {
    let mut update = Vec::with_capacity(grad.len());
    for (moment, &g) in momentum.iter_mut().zip(grad) {
        let g = g * grad_scale;
        *moment += (g - *moment) * (1.0 - step.momentum);
        update.push(if step.nesterov { (*moment - g).mul_add(step.momentum, g) } else { *moment });
    }
    orthogonalise(threads, &mut update, shape.rows, shape.cols);
    let (shrink, length) =
        ((1.0 - step.lr * step.weight_decay) as f32, -(step.lr * factor(shape, step.scale)) as f32);
    for (param, direction) in params.iter_mut().zip(update) {
        *param = direction.mul_add(length, *param * shrink);
    }
}

fn factor(shape: Shape, scale: MuonScale) -> f64 {
    let (rows, cols) = (shape.rows as f64, shape.cols as f64);
    let (outputs, inputs) = if shape.transposed { (cols, rows) } else { (rows, cols) };
    match scale {
        MuonScale::Original => (outputs / inputs).max(1.0).sqrt(),
        MuonScale::MatchRmsAdamw => 0.2 * outputs.max(inputs).sqrt(),
    }
}

/// Replaces `x [rows, cols]` by about the nearest matrix whose singular values are all 1: those end between 0.7 and 1.2.
fn orthogonalise(threads: &Threads, x: &mut Vec<f32>, rows: usize, cols: usize) {
    let norm = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let inverse = (1.0 / norm.max(EPS)) as f32;
    x.iter_mut().for_each(|x| *x *= inverse);
    let tall = rows > cols;
    if tall {
        *x = transposed(x, rows, cols);
    }
    let (r, c) = (rows.min(cols), rows.max(cols));
    let [a, b, c3] = COEFFICIENTS;
    let (mut gram, mut square, mut moved) = (vec![0.0; r * r], vec![0.0; r * r], vec![0.0; r * c]);
    for _ in 0..ITERATIONS {
        matmul(threads, x, r, &PackedMatrix::from_f32(Precision::F32, x, r, c), &mut gram);
        matmul(threads, &gram, r, &PackedMatrix::from_f32(Precision::F32, &gram, r, r), &mut square);
        square.iter_mut().zip(&gram).for_each(|(square, gram)| *square = square.mul_add(c3, b * gram));
        let columns = PackedMatrix::from_f32_transposed(Precision::F32, x, c, r);
        matmul(threads, &square, r, &columns, &mut moved);
        x.iter_mut().zip(&moved).for_each(|(x, moved)| *x = x.mul_add(a, *moved));
    }
    if tall {
        *x = transposed(x, r, c);
    }
}

fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for col in 0..cols {
        out.extend((0..rows).map(|row| x[row * cols + col]));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_nearly_orthonormal_whatever_the_shape() {
        for (rows, cols) in [(5, 9), (9, 5), (6, 6)] {
            let mut x: Vec<f32> = (0..rows * cols).map(|i| ((i * i) as f32 * 0.37).sin() * 3.0).collect();
            orthogonalise(&Threads::single(), &mut x, rows, cols);
            let (r, c) = (rows.min(cols), rows.max(cols));
            let wide = if rows > cols { transposed(&x, rows, cols) } else { x };
            for i in 0..r {
                let length: f32 = wide[i * c..][..c].iter().map(|x| x * x).sum::<f32>().sqrt();
                assert!((0.6..=1.25).contains(&length), "{rows}x{cols}: row {i} has length {length}");
                for j in 0..i {
                    let dot: f32 = (0..c).map(|k| wide[i * c + k] * wide[j * c + k]).sum();
                    assert!(dot.abs() <= 0.4, "{rows}x{cols}: rows {i} and {j} have product {dot}");
                }
            }
        }
    }
}
