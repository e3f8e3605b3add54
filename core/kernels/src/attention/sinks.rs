//! Attention sinks (Xiao et al. 2023, as in gpt-oss): a learned logit of each head that takes part in the softmax and
//! has no value.
//!
//! With l the log-sum-exp of a query's scores and s its head's sink: l' = ln(e^l + e^s), out' = out·e^(l − l') =
//! out·sigmoid(l − s). So a sink is added after the pass over the keys, and [`super::attention_backward`] needs none:
//! given out' and l', its probabilities e^(score − l') and Σ dout·out' are those of the softmax with the sink. What is
//! left is ∂/∂s = −Σ over queries e^(s − l')·(dout·out'). Batch-invariant; the gradient adds rows in ascending order.

use super::backward::dot;
use crate::math::{exp, ln, sigmoid};
use crate::simd::{LANES, simd};

/// Turns `out [T, heads·width]` and `lse [T, heads]` of [`super::attention`] into those of a softmax with `sinks [heads]`.
///
/// # Panics
/// When a length does not fit the shapes.
pub fn add_sinks(sinks: &[f32], out: &mut [f32], lse: &mut [f32]) {
    let width = value_width(sinks, out.len(), lse.len());
    if width > 0 {
        add_rows(sinks, width, out, lse);
    }
}

/// Adds the gradient of the sinks to `d_sinks [heads]`; `out` and `lse` are as [`add_sinks`] left them.
///
/// # Panics
/// When a length does not fit the shapes.
pub fn sinks_backward(sinks: &[f32], out: &[f32], lse: &[f32], dout: &[f32], d_sinks: &mut [f32]) {
    let width = value_width(sinks, out.len(), lse.len());
    assert!(dout.len() == out.len() && d_sinks.len() == sinks.len(), "sinks_backward: lengths");
    if width > 0 {
        backward_rows(sinks, width, out, lse, dout, d_sinks);
    }
}

/// Width of a head's values; 0 where there are no rows.
fn value_width(sinks: &[f32], out: usize, lse: usize) -> usize {
    assert!(!sinks.is_empty() && lse.is_multiple_of(sinks.len()), "sinks: lse is [T, heads]");
    let width = out.checked_div(lse).unwrap_or(0);
    assert!(out == lse * width && (width > 0 || lse == 0), "sinks: out is [T, heads*width]");
    width
}

simd! {
    fn add_rows<S>(sinks: &[f32], width: usize, out: &mut [f32], lse: &mut [f32]) {
        let heads = sinks.len();
        for (lse, out) in lse.chunks_exact_mut(heads).zip(out.chunks_exact_mut(heads * width)) {
            let blocks = lse.chunks_mut(LANES).zip(sinks.chunks(LANES)).zip(out.chunks_mut(LANES * width));
            for ((lse, sinks), out) in blocks {
                let (l, s) = (S::read(lse, 0.0), S::read(sinks, 0.0));
                let gap = l.sub(s);
                let kept = sigmoid(gap).to_array();
                // ln(e^l + e^s) = max(l, s) + ln(1 + e^−|l − s|)
                let larger = l.max(s).to_array();
                let smaller = exp(gap.min(S::splat(0.0).sub(gap))).to_array();
                for (i, (lse, out)) in lse.iter_mut().zip(out.chunks_exact_mut(width)).enumerate() {
                    *lse = larger[i] + ln(1.0 + smaller[i]);
                    for out in out.chunks_mut(LANES) {
                        S::read(out, 0.0).mul(S::splat(kept[i])).write(out);
                    }
                }
            }
        }
    }
}

simd! {
    fn backward_rows<S>(
        sinks: &[f32],
        width: usize,
        out: &[f32],
        lse: &[f32],
        dout: &[f32],
        d_sinks: &mut [f32],
    ) {
        let heads = sinks.len();
        let rows = out.chunks_exact(heads * width).zip(dout.chunks_exact(heads * width));
        for (lse, (out, dout)) in lse.chunks_exact(heads).zip(rows) {
            for (block, d_sinks) in d_sinks.chunks_mut(LANES).enumerate() {
                let first = block * LANES;
                let l = S::read(&lse[first..], 0.0);
                let p = exp(S::read(&sinks[first..], 0.0).sub(l)).to_array();
                for (i, d_sink) in d_sinks.iter_mut().enumerate() {
                    let range = (first + i) * width..(first + i + 1) * width;
                    *d_sink = (-p[i]).mul_add(dot::<S>(&dout[range.clone()], &out[range]), *d_sink);
                }
            }
        }
    }
}
