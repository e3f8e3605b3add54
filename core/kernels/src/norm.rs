//! Root-mean-square normalisation (Zhang and Sennrich 2019), forward and backward, over rows of `width` values.
//!
//! Sums over a row: sixteen lanes (element i in lane i mod 16, ascending), then a fixed tree. Batch-invariant; the
//! gradient of the weight adds rows in ascending order, column by column, whatever the thread count.

use crate::Threads;
use crate::simd::{LANES, Lanes, simd};
use crate::threads::SharedMut;
use std::cell::RefCell;

/// What the normalised row is multiplied by.
#[derive(Clone, Copy, Debug)]
pub enum NormScale<'a> {
    /// Nothing.
    None,
    /// A weight `[width]`.
    Weight(&'a [f32]),
    /// One plus a weight `[width]` (Gemma).
    OnePlus(&'a [f32]),
}

impl NormScale<'_> {
    /// `(weight, offset)`: the factor is `weight + offset`.
    fn parts(&self) -> (Option<&[f32]>, f32) {
        match self {
            NormScale::None => (None, 0.0),
            NormScale::Weight(weight) => (Some(weight), 0.0),
            NormScale::OnePlus(weight) => (Some(weight), 1.0),
        }
    }
}

/// Values worth a thread of their own.
const MIN_VALUES: usize = 1 << 15;

/// Computes `out = x · (1 / sqrt(mean(x²) + eps)) · scale` for each row of `width` values.
///
/// # Panics
/// When a length does not fit `width`.
pub fn rms_norm(threads: &Threads, x: &[f32], width: usize, scale: NormScale, eps: f32, out: &mut [f32]) {
    check(x.len(), width, &scale);
    assert_eq!(x.len(), out.len(), "rms_norm: x and out have one length");
    let (weight, offset) = scale.parts();
    threads.for_each_row_chunk(out, width, MIN_VALUES / width + 1, |first, out| {
        let x = &x[first * width..][..out.len()];
        forward_rows(x, width, weight, offset, eps, out);
    });
}

/// Gradients of [`rms_norm`]: `dx` and `dweight [width]` are added to.
///
/// With r = 1/sqrt(mean(x²)+eps) and g = dy·scale: dx += r·g − x·r³·mean(g·x), dweight += Σ over rows of dy·x·r.
///
/// # Panics
/// When a length does not fit `width`, or `dweight` is asked for where there is no weight.
#[expect(clippy::too_many_arguments, reason = "the operands of one op")]
pub fn rms_norm_backward(
    threads: &Threads,
    x: &[f32],
    width: usize,
    scale: NormScale,
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    dweight: Option<&mut [f32]>,
) {
    check(x.len(), width, &scale);
    assert_eq!(x.len(), dy.len(), "rms_norm_backward: x and dy have one length");
    assert_eq!(x.len(), dx.len(), "rms_norm_backward: x and dx have one length");
    let (weight, offset) = scale.parts();
    let mut inv_rms = INV_RMS.take();
    inv_rms.resize(x.len() / width, 0.0);
    let shared = SharedMut::new(&mut inv_rms);
    threads.for_each_row_chunk(dx, width, MIN_VALUES / width + 1, |first, dx| {
        let rows = dx.len() / width;
        let range = first * width..(first + rows) * width;
        // SAFETY: row chunks are disjoint, and `inv_rms` outlives this call.
        let inv_rms = unsafe { shared.slice(first, rows) };
        backward_rows(&x[range.clone()], width, weight, offset, eps, &dy[range], dx, inv_rms);
    });
    if let Some(dweight) = dweight {
        assert!(weight.is_some(), "rms_norm_backward: a gradient of a weight that there is not");
        assert_eq!(dweight.len(), width, "rms_norm_backward: dweight is [width]");
        // Threads take columns, so that each column's sum keeps its order over rows.
        let min_columns = (MIN_VALUES / inv_rms.len().max(1)).max(4 * LANES);
        threads.for_each_row_chunk(dweight, 1, min_columns, |first, dweight| {
            add_weight_grad(x, width, first, dy, &inv_rms, dweight);
        });
    }
    INV_RMS.set(inv_rms);
}

thread_local!(static INV_RMS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) });

fn check(len: usize, width: usize, scale: &NormScale) {
    assert!(width > 0 && len.is_multiple_of(width), "rms_norm: {len} values are not rows of {width}");
    if let (Some(weight), _) = scale.parts() {
        assert_eq!(weight.len(), width, "rms_norm: the weight is [width]");
    }
}

/// 1 / sqrt(mean(x²) + eps)
#[inline(always)]
fn inverse_rms<S: Lanes>(x: &[f32], eps: f32) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut sum = S::splat(0.0);
    for chunk in chunks {
        let v = S::load(chunk);
        sum = v.fma(v, sum);
    }
    if !tail.is_empty() {
        let v = S::read(tail, 0.0);
        sum = v.fma(v, sum);
    }
    1.0 / (sum.sum() / x.len() as f32 + eps).sqrt()
}

/// Lanes `at..` of the factor, all ones where there is no weight.
#[inline(always)]
fn factor<S: Lanes>(weight: Option<&[f32]>, offset: f32, at: usize) -> S {
    match weight {
        None => S::splat(1.0),
        Some(weight) => S::read(&weight[at..], 0.0).add(S::splat(offset)),
    }
}

simd! {
    fn forward_rows<S>(x: &[f32], width: usize, weight: Option<&[f32]>, offset: f32, eps: f32, out: &mut [f32]) {
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let inv_rms = S::splat(inverse_rms::<S>(x, eps));
            for at in (0..width).step_by(LANES) {
                let normal = S::read(&x[at..], 0.0).mul(inv_rms);
                let scaled = if weight.is_some() { normal.mul(factor(weight, offset, at)) } else { normal };
                scaled.write(&mut out[at..]);
            }
        }
    }
}

simd! {
    fn backward_rows<S>(
        x: &[f32],
        width: usize,
        weight: Option<&[f32]>,
        offset: f32,
        eps: f32,
        dy: &[f32],
        dx: &mut [f32],
        inv_rms: &mut [f32],
    ) {
        for (row, inv_rms) in inv_rms.iter_mut().enumerate() {
            let range = row * width..(row + 1) * width;
            let (x, dy, dx) = (&x[range.clone()], &dy[range.clone()], &mut dx[range]);
            *inv_rms = inverse_rms::<S>(x, eps);
            let mut sum = S::splat(0.0);
            for at in (0..width).step_by(LANES) {
                let g = S::read(&dy[at..], 0.0).mul(factor(weight, offset, at));
                sum = g.fma(S::read(&x[at..], 0.0), sum);
            }
            let mean = sum.sum() / width as f32;
            let r = S::splat(*inv_rms);
            let back = S::splat(-(*inv_rms * *inv_rms * *inv_rms * mean));
            for at in (0..width).step_by(LANES) {
                let g = S::read(&dy[at..], 0.0).mul(factor(weight, offset, at));
                let d = S::read(&x[at..], 0.0).fma(back, g.mul(r));
                S::read(&dx[at..], 0.0).add(d).write(&mut dx[at..]);
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
        inv_rms: &[f32],
        dweight: &mut [f32],
    ) {
        // Several registers of columns at a time: a row is read in longer runs.
        let (wide, rest) = dweight.as_chunks_mut::<{ 4 * LANES }>();
        let mut column = first;
        for out in wide {
            add_columns::<S, 4>(x, width, column, dy, inv_rms, out);
            column += out.len();
        }
        for out in rest.chunks_mut(LANES) {
            add_columns::<S, 1>(x, width, column, dy, inv_rms, out);
            column += out.len();
        }
    }
}

/// `N` registers of columns from `column` on.
#[inline(always)]
fn add_columns<S: Lanes, const N: usize>(
    x: &[f32],
    width: usize,
    column: usize,
    dy: &[f32],
    inv_rms: &[f32],
    out: &mut [f32],
) {
    let columns = column..column + out.len();
    let mut sums = [S::splat(0.0); N];
    for (row, &inv_rms) in inv_rms.iter().enumerate() {
        let (x, dy) = (&x[row * width..][columns.clone()], &dy[row * width..][columns.clone()]);
        for (i, sum) in sums.iter_mut().enumerate() {
            let normal = S::read(&x[i * LANES..], 0.0).mul(S::splat(inv_rms));
            *sum = S::read(&dy[i * LANES..], 0.0).fma(normal, *sum);
        }
    }
    for (sum, out) in sums.into_iter().zip(out.chunks_mut(LANES)) {
        S::read(out, 0.0).add(sum).write(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    fn norm_f64(x: &[f64], weight: Option<&[f64]>, offset: f64, eps: f64) -> Vec<f64> {
        let r = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + eps).sqrt();
        (0..x.len()).map(|i| x[i] * r * weight.map_or(1.0, |w| w[i] + offset)).collect()
    }

    fn scales(weight: &[f32]) -> [NormScale<'_>; 3] {
        [NormScale::None, NormScale::Weight(weight), NormScale::OnePlus(weight)]
    }

    #[test]
    fn forward_is_the_formula_and_the_same_everywhere() {
        let mut random = Random(1);
        for width in (1..=50).chain([128, 200]) {
            let (x, weight) = (random.vec(3 * width), random.vec(width));
            for scale in scales(&weight) {
                let out = assert_all_agree("rms_norm", || {
                    let mut out = vec![f32::NAN; x.len()];
                    rms_norm(&Threads::single(), &x, width, scale, 1e-6, &mut out);
                    out
                });
                let (weight, offset) = scale.parts();
                let weight = weight.map(wide);
                let rows = wide(&x);
                let want: Vec<f64> = rows
                    .chunks(width)
                    .flat_map(|x| norm_f64(x, weight.as_deref(), f64::from(offset), 1e-6))
                    .collect();
                assert_close(&out, &want, 2e-6, &format!("rms_norm {width}"));
            }
        }
    }

    #[test]
    fn awkward_values_stay_in_their_row() {
        let mut random = Random(2);
        let (width, weight) = (37, random.vec(37));
        let x = awkward_vec(&mut random, 4 * width);
        let out = assert_all_agree("rms_norm", || {
            let mut out = vec![0.0; x.len()];
            rms_norm(&Threads::single(), &x, width, NormScale::Weight(&weight), 1e-6, &mut out);
            out
        });
        let mut alone = vec![0.0; width];
        rms_norm(
            &Threads::single(),
            &x[width..2 * width],
            width,
            NormScale::Weight(&weight),
            1e-6,
            &mut alone,
        );
        assert_same_bits(&out[width..2 * width], &alone, "a row alone");
        assert!(out[..width].iter().any(|x| x.is_nan()), "a NaN in a row shows");
    }

    #[test]
    fn backward_is_the_derivative() {
        let mut random = Random(3);
        for width in [1, 5, 16, 33] {
            let rows = 3;
            let (x, dy, weight) = (random.vec(rows * width), random.vec(rows * width), random.vec(width));
            for scale in scales(&weight) {
                let (w, offset) = scale.parts();
                let has_weight = w.is_some();
                let before = 0.25;
                let got = assert_all_agree("rms_norm_backward", || {
                    let (mut dx, mut dweight) = (vec![0.0; x.len()], vec![before; width]);
                    let dw = has_weight.then_some(&mut dweight[..]);
                    rms_norm_backward(&Threads::single(), &x, width, scale, 1e-2, &dy, &mut dx, dw);
                    dx.extend(dweight);
                    dx
                });
                let loss = |x: &[f64], weight: &[f64]| -> f64 {
                    let weight = has_weight.then_some(weight);
                    let out = x.chunks(width).flat_map(|x| norm_f64(x, weight, f64::from(offset), 1e-2));
                    out.zip(&dy).map(|(out, dy)| out * f64::from(*dy)).sum()
                };
                let (x64, w64) = (wide(&x), wide(&weight));
                assert_close(&got[..x.len()], &gradient(&x64, |x| loss(x, &w64)), 1e-5, "dx");
                let dweight: Vec<f64> = gradient(&w64, |w| loss(&x64, w)).iter().map(|d| d + 0.25).collect();
                assert_close(&got[x.len()..], &dweight, 1e-5, "dweight");
            }
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let mut random = Random(4);
        let (rows, width) = (700, 200);
        let (x, dy, weight) = (random.vec(rows * width), random.vec(rows * width), random.vec(width));
        let run = |threads: &Threads| {
            let (mut dx, mut dweight, mut out) = (vec![0.0; x.len()], vec![0.0; width], vec![0.0; x.len()]);
            let scale = NormScale::Weight(&weight);
            rms_norm(threads, &x, width, scale, 1e-6, &mut out);
            rms_norm_backward(threads, &x, width, scale, 1e-6, &dy, &mut dx, Some(&mut dweight));
            [out, dx, dweight].concat()
        };
        assert_same_bits(&run(&Threads::new(3)), &run(&Threads::single()), "three threads");
    }
}
