//! Layer normalisation (Ba, Kiros and Hinton 2016), forward and backward, over rows of `width` values.
//!
//! Mean, then variance around it, each a sum of sixteen lanes (element i in lane i mod 16, ascending) and a fixed tree.
//! Batch-invariant; the gradients of weight and bias add rows in ascending order, column by column, whatever the
//! thread count.

use crate::Threads;
use crate::simd::{LANES, Lanes, simd};
use crate::threads::SharedMut;

/// Weight and bias of a layer norm, each `[width]`.
#[derive(Clone, Copy, Debug)]
pub struct Affine<'a> {
    /// Factor of the normalised row.
    pub weight: &'a [f32],
    /// Added to it.
    pub bias: &'a [f32],
}

/// Values worth a thread of their own.
const MIN_VALUES: usize = 1 << 15;

/// Computes `out = (x − mean) / sqrt(variance + eps) · weight + bias` for each row; the variance is the population's.
///
/// # Panics
/// When a length does not fit the width of `affine`.
pub fn layer_norm(threads: &Threads, x: &[f32], affine: Affine, eps: f32, out: &mut [f32]) {
    let width = check(x, &affine);
    assert_eq!(x.len(), out.len(), "layer_norm: x and out have one length");
    threads.for_each_row_chunk(out, width, MIN_VALUES / width + 1, |first, out| {
        forward_rows(&x[first * width..][..out.len()], affine.weight, affine.bias, eps, out);
    });
}

/// Gradients of [`layer_norm`]: `dx` is overwritten, `dweight` and `dbias` `[width]` are added to.
///
/// With r = 1/sqrt(variance+eps), n = (x−mean)·r and g = dy·weight: dx = r·(g − mean(g) − n·mean(g·n)),
/// dweight += Σ over rows of dy·n, dbias += Σ over rows of dy.
///
/// # Panics
/// When a length does not fit the width of `affine`.
#[expect(clippy::too_many_arguments, reason = "the operands of one op")]
pub fn layer_norm_backward(
    threads: &Threads,
    x: &[f32],
    affine: Affine,
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
) {
    let width = check(x, &affine);
    assert!(x.len() == dy.len() && x.len() == dx.len(), "layer_norm_backward: x, dy and dx have one length");
    assert!(
        dweight.len() == width && dbias.len() == width,
        "layer_norm_backward: dweight, dbias are [width]"
    );
    let rows = x.len() / width;
    // Mean and 1/sqrt(variance + eps) of every row, for the columns' pass.
    let mut moments = vec![0.0; 2 * rows];
    let shared = SharedMut::new(&mut moments);
    threads.for_each_row_chunk(dx, width, MIN_VALUES / width + 1, |first, dx| {
        let range = first * width..first * width + dx.len();
        // SAFETY: row chunks are disjoint, and `moments` outlives this call.
        let moments = unsafe { shared.slice(2 * first, 2 * (dx.len() / width)) };
        backward_rows(&x[range.clone()], affine.weight, eps, &dy[range], dx, moments);
    });
    // Threads take columns, so that each column's sum keeps its order over rows.
    let min_columns = (MIN_VALUES / rows.max(1)).max(4 * LANES);
    threads.for_each_row_chunk(dweight, 1, min_columns, |first, dweight| {
        add_weight_grad(x, width, first, dy, &moments, dweight);
    });
    threads.for_each_row_chunk(dbias, 1, min_columns, |first, dbias| {
        add_columns(dy, width, first, dbias);
    });
}

fn check(x: &[f32], affine: &Affine) -> usize {
    let width = affine.weight.len();
    assert!(width > 0 && x.len().is_multiple_of(width), "layer_norm: {} values, rows of {width}", x.len());
    assert_eq!(affine.bias.len(), width, "layer_norm: weight and bias are [width]");
    width
}

/// (mean, 1 / sqrt(variance + eps))
#[inline(always)]
fn moments<S: Lanes>(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mut sum = S::splat(0.0);
    for at in (0..x.len()).step_by(LANES) {
        sum = sum.add(S::read(&x[at..], 0.0));
    }
    let mean = sum.sum() / n;
    let mut squares = S::splat(0.0);
    for at in (0..x.len()).step_by(LANES) {
        // Lanes past the end hold the mean: they add nothing.
        let d = S::read(&x[at..], mean).sub(S::splat(mean));
        squares = d.fma(d, squares);
    }
    (mean, 1.0 / (squares.sum() / n + eps).sqrt())
}

simd! {
    fn forward_rows<S>(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        let width = weight.len();
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let (mean, r) = moments::<S>(x, eps);
            for at in (0..width).step_by(LANES) {
                let normal = S::read(&x[at..], 0.0).sub(S::splat(mean)).mul(S::splat(r));
                normal.fma(S::read(&weight[at..], 0.0), S::read(&bias[at..], 0.0)).write(&mut out[at..]);
            }
        }
    }
}

simd! {
    fn backward_rows<S>(
        x: &[f32],
        weight: &[f32],
        eps: f32,
        dy: &[f32],
        dx: &mut [f32],
        all_moments: &mut [f32],
    ) {
        let width = weight.len();
        for (row, saved) in all_moments.chunks_exact_mut(2).enumerate() {
            let range = row * width..(row + 1) * width;
            let (x, dy, dx) = (&x[range.clone()], &dy[range.clone()], &mut dx[range]);
            let (mean, r) = moments::<S>(x, eps);
            (saved[0], saved[1]) = (mean, r);
            let (mut sum, mut dot) = (S::splat(0.0), S::splat(0.0));
            for at in (0..width).step_by(LANES) {
                let g = S::read(&dy[at..], 0.0).mul(S::read(&weight[at..], 0.0));
                let normal = S::read(&x[at..], mean).sub(S::splat(mean)).mul(S::splat(r));
                sum = sum.add(g);
                dot = g.fma(normal, dot);
            }
            let (mean_g, mean_dot) = (sum.sum() / width as f32, dot.sum() / width as f32);
            for at in (0..width).step_by(LANES) {
                let g = S::read(&dy[at..], 0.0).mul(S::read(&weight[at..], 0.0));
                let normal = S::read(&x[at..], mean).sub(S::splat(mean)).mul(S::splat(r));
                let centred = normal.fma(S::splat(-mean_dot), g.sub(S::splat(mean_g)));
                centred.mul(S::splat(r)).write(&mut dx[at..]);
            }
        }
    }
}

simd! {
    /// Adds the gradient of the weight's columns `first..first + dweight.len()`.
    fn add_weight_grad<S>(
        x: &[f32],
        width: usize,
        first: usize,
        dy: &[f32],
        all_moments: &[f32],
        dweight: &mut [f32],
    ) {
        let columns = first..first + dweight.len();
        for (block, out) in dweight.chunks_mut(LANES).enumerate() {
            let at = block * LANES;
            let mut sum = S::splat(0.0);
            for (row, saved) in all_moments.chunks_exact(2).enumerate() {
                let (x, dy) = (&x[row * width..][columns.clone()], &dy[row * width..][columns.clone()]);
                let normal = S::read(&x[at..], 0.0).sub(S::splat(saved[0])).mul(S::splat(saved[1]));
                sum = S::read(&dy[at..], 0.0).fma(normal, sum);
            }
            let total = S::read(out, 0.0).add(sum);
            total.write(out);
        }
    }
}

simd! {
    /// Adds the sums of the columns `first..first + sums.len()` of `x`.
    fn add_columns<S>(x: &[f32], width: usize, first: usize, sums: &mut [f32]) {
        let columns = first..first + sums.len();
        for (block, out) in sums.chunks_mut(LANES).enumerate() {
            let at = block * LANES;
            let mut sum = S::splat(0.0);
            for x in x.chunks_exact(width) {
                sum = sum.add(S::read(&x[columns.clone()][at..], 0.0));
            }
            let total = S::read(out, 0.0).add(sum);
            total.write(out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    fn norm_f64(x: &[f64], weight: &[f64], bias: &[f64], eps: f64) -> Vec<f64> {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let r = 1.0 / (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + eps).sqrt();
        (0..x.len()).map(|i| (x[i] - mean) * r * weight[i] + bias[i]).collect()
    }

    #[test]
    fn forward_is_the_formula_and_the_same_everywhere() {
        let mut random = Random(1);
        for width in (1..=50).chain([128, 200]) {
            // Far from zero, where a variance as a difference of squares would lose its digits.
            let x: Vec<f32> = random.vec(3 * width).iter().map(|x| x + 30.0).collect();
            let (weight, bias) = (random.vec(width), random.vec(width));
            let out = assert_all_agree("layer_norm", || {
                let mut out = vec![f32::NAN; x.len()];
                let affine = Affine { weight: &weight, bias: &bias };
                layer_norm(&Threads::single(), &x, affine, 1e-3, &mut out);
                out
            });
            let (w, b) = (wide(&weight), wide(&bias));
            let want: Vec<f64> = wide(&x).chunks(width).flat_map(|x| norm_f64(x, &w, &b, 1e-3)).collect();
            assert_close(&out, &want, 2e-5, &format!("layer_norm {width}"));
        }
    }

    #[test]
    fn awkward_values_stay_in_their_row() {
        let mut random = Random(2);
        let (width, weight, bias) = (37, random.vec(37), random.vec(37));
        let x = awkward_vec(&mut random, 4 * width);
        let affine = Affine { weight: &weight, bias: &bias };
        let out = assert_all_agree("layer_norm", || {
            let mut out = vec![0.0; x.len()];
            layer_norm(&Threads::single(), &x, affine, 1e-6, &mut out);
            out
        });
        let mut alone = vec![0.0; width];
        layer_norm(&Threads::single(), &x[width..2 * width], affine, 1e-6, &mut alone);
        assert_same_bits(&out[width..2 * width], &alone, "a row alone");
        assert!(out[..width].iter().any(|x| x.is_nan()), "a NaN in a row shows");
    }

    #[test]
    fn backward_is_the_derivative() {
        let mut random = Random(3);
        for width in [2, 5, 16, 33] {
            let rows = 3;
            let (x, dy) = (random.vec(rows * width), random.vec(rows * width));
            let (weight, bias) = (random.vec(width), random.vec(width));
            let got = assert_all_agree("layer_norm_backward", || {
                let (mut dx, mut dweight, mut dbias) =
                    (vec![f32::NAN; x.len()], vec![0.25; width], vec![0.5; width]);
                let affine = Affine { weight: &weight, bias: &bias };
                layer_norm_backward(
                    &Threads::single(),
                    &x,
                    affine,
                    1e-2,
                    &dy,
                    &mut dx,
                    &mut dweight,
                    &mut dbias,
                );
                [dx, dweight, dbias].concat()
            });
            let loss = |x: &[f64], w: &[f64], b: &[f64]| -> f64 {
                let out = x.chunks(width).flat_map(|x| norm_f64(x, w, b, 1e-2));
                out.zip(&dy).map(|(out, dy)| out * f64::from(*dy)).sum()
            };
            let (x64, w64, b64) = (wide(&x), wide(&weight), wide(&bias));
            let shifted = |gradient: Vec<f64>, by: f64| gradient.into_iter().map(move |d| d + by);
            let want: Vec<f64> = gradient(&x64, |x| loss(x, &w64, &b64))
                .into_iter()
                .chain(shifted(gradient(&w64, |w| loss(&x64, w, &b64)), 0.25))
                .chain(shifted(gradient(&b64, |b| loss(&x64, &w64, b)), 0.5))
                .collect();
            assert_close(&got, &want, 2e-5, "dx, dweight, dbias");
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let mut random = Random(4);
        let (rows, width) = (700, 200);
        let (x, dy) = (random.vec(rows * width), random.vec(rows * width));
        let (weight, bias) = (random.vec(width), random.vec(width));
        let run = |threads: &Threads| {
            let (mut out, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            let (mut dweight, mut dbias) = (vec![0.0; width], vec![0.0; width]);
            let affine = Affine { weight: &weight, bias: &bias };
            layer_norm(threads, &x, affine, 1e-6, &mut out);
            layer_norm_backward(threads, &x, affine, 1e-6, &dy, &mut dx, &mut dweight, &mut dbias);
            [out, dx, dweight, dbias].concat()
        };
        assert_same_bits(&run(&Threads::new(3)), &run(&Threads::single()), "three threads");
    }
}
