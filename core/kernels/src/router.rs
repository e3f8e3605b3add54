//! Mixture-of-experts routers: which K of E experts a token goes to and with what weight, and the gradient.
//!
//! Batch-invariant. Chosen experts are ordered by falling score, ties to the lower id; a NaN ranks below everything.
//! The `_given` forms take the choice from elsewhere (a rollout's recorded routing, "router replay") and give its
//! weights, with the same operations in the same order, so replaying the router's own choice gives the same bits.

use crate::simd::{LANES, simd};
use crate::{math, softmax};

/// Softmax over all experts, then the top `k` (Qwen3-MoE, Mixtral, OLMoE): `logits [T,E]` to `ids [T,K]`, `weights
/// [T,K]`, the weights divided by their sum when `renormalise`.
///
/// # Panics
/// When a length does not fit, or `k` is 0 or more than E.
pub fn softmax_top_k(
    logits: &[f32],
    experts: usize,
    k: usize,
    renormalise: bool,
    ids: &mut [u16],
    weights: &mut [f32],
) {
    top_k(logits, experts, k, ids);
    softmax_given(logits, experts, k, renormalise, ids, weights);
}

/// Weights of [`softmax_top_k`] for the experts in `ids [T,K]`.
///
/// # Panics
/// When a length does not fit, or an id is not below E.
pub fn softmax_given(
    logits: &[f32],
    experts: usize,
    k: usize,
    renormalise: bool,
    ids: &[u16],
    weights: &mut [f32],
) {
    check(logits.len(), experts, k, ids.len(), weights.len());
    for ((logits, ids), weights) in rows(logits, experts, ids, k).zip(weights.chunks_exact_mut(k)) {
        let stats = softmax::row_stats(logits, 1.0);
        for (weight, &id) in weights.iter_mut().zip(ids) {
            *weight = exp_one(softmax::log_prob(&stats, logits[usize::from(id)], 1.0));
        }
        if renormalise {
            let sum: f32 = weights.iter().fold(0.0, |sum, w| sum + w);
            for weight in weights {
                *weight /= sum;
            }
        }
    }
}

/// Gradient of [`softmax_top_k`] with the choice fixed: `d_logits [T,E]` is overwritten.
///
/// # Panics
/// When a length does not fit, or an id is not below E.
#[allow(clippy::too_many_arguments)]
pub fn softmax_top_k_backward(
    logits: &[f32],
    experts: usize,
    k: usize,
    renormalise: bool,
    ids: &[u16],
    weights: &[f32],
    d_weights: &[f32],
    d_logits: &mut [f32],
) {
    check(logits.len(), experts, k, ids.len(), weights.len());
    assert_eq!(weights.len(), d_weights.len(), "router: d_weights is [T,K]");
    assert_eq!(logits.len(), d_logits.len(), "router: d_logits is [T,E]");
    let given = weights.chunks_exact(k).zip(d_weights.chunks_exact(k));
    let tokens = rows(logits, experts, ids, k).zip(given).zip(d_logits.chunks_exact_mut(experts));
    for (((logits, ids), (weights, d_weights)), d_logits) in tokens {
        let inner = weights.iter().zip(d_weights).fold(0.0, |sum, (&w, &d)| w.mul_add(d, sum));
        if renormalise {
            // The weights are a softmax over the chosen experts alone.
            d_logits.fill(0.0);
            for ((&id, &weight), &d_weight) in ids.iter().zip(weights).zip(d_weights) {
                d_logits[usize::from(id)] += weight * (d_weight - inner);
            }
        } else {
            let stats = softmax::row_stats(logits, 1.0);
            for (d_logit, &logit) in d_logits.iter_mut().zip(logits) {
                *d_logit = -inner * exp_one(softmax::log_prob(&stats, logit, 1.0));
            }
            for ((&id, &weight), &d_weight) in ids.iter().zip(weights).zip(d_weights) {
                d_logits[usize::from(id)] += weight * d_weight;
            }
        }
    }
}

/// The top `k` by logit, each with weight sigmoid(logit) (Llama 4): `logits [T,E]` to `ids [T,K]`, `weights [T,K]`.
///
/// # Panics
/// When a length does not fit, or `k` is 0 or more than E.
pub fn sigmoid_top_k(logits: &[f32], experts: usize, k: usize, ids: &mut [u16], weights: &mut [f32]) {
    top_k(logits, experts, k, ids);
    sigmoid_given(logits, experts, k, ids, weights);
}

/// Weights of [`sigmoid_top_k`] for the experts in `ids [T,K]`.
///
/// # Panics
/// When a length does not fit, or an id is not below E.
pub fn sigmoid_given(logits: &[f32], experts: usize, k: usize, ids: &[u16], weights: &mut [f32]) {
    check(logits.len(), experts, k, ids.len(), weights.len());
    for ((logits, ids), weights) in rows(logits, experts, ids, k).zip(weights.chunks_exact_mut(k)) {
        for (weight, &id) in weights.iter_mut().zip(ids) {
            *weight = sigmoid_one(logits[usize::from(id)]);
        }
    }
}

/// Gradient of [`sigmoid_top_k`] with the choice fixed: `d_logits [T,E]` is overwritten.
///
/// # Panics
/// When a length does not fit, or an id is not below E.
pub fn sigmoid_top_k_backward(
    experts: usize,
    k: usize,
    ids: &[u16],
    weights: &[f32],
    d_weights: &[f32],
    d_logits: &mut [f32],
) {
    check(d_logits.len(), experts, k, ids.len(), weights.len());
    assert_eq!(weights.len(), d_weights.len(), "router: d_weights is [T,K]");
    d_logits.fill(0.0);
    let given = weights.chunks_exact(k).zip(d_weights.chunks_exact(k));
    for ((d_logits, ids), (weights, d_weights)) in
        d_logits.chunks_exact_mut(experts).zip(ids.chunks_exact(k)).zip(given)
    {
        for ((&id, &weight), &d_weight) in ids.iter().zip(weights).zip(d_weights) {
            d_logits[usize::from(id)] += d_weight * weight * (1.0 - weight);
        }
    }
}

/// The `k` largest of each row, by falling value, ties to the lower id.
fn top_k(logits: &[f32], experts: usize, k: usize, ids: &mut [u16]) {
    check(logits.len(), experts, k, ids.len(), ids.len());
    for (logits, ids) in logits.chunks_exact(experts).zip(ids.chunks_exact_mut(k)) {
        for chosen in 0..k {
            let (before, rest) = ids.split_at_mut(chosen);
            let left = (0..experts).filter(|&e| !before.contains(&(e as u16)));
            let best = left.reduce(|best, e| if above(logits[e], logits[best]) { e } else { best });
            rest[0] = best.expect("k is at most the number of experts") as u16;
        }
    }
}

/// Whether `a` ranks above `b`: larger, or a number where `b` is none.
fn above(a: f32, b: f32) -> bool {
    a > b || (b.is_nan() && !a.is_nan())
}

fn rows<'a>(
    logits: &'a [f32],
    experts: usize,
    ids: &'a [u16],
    k: usize,
) -> impl Iterator<Item = (&'a [f32], &'a [u16])> {
    logits.chunks_exact(experts).zip(ids.chunks_exact(k))
}

fn check(logits: usize, experts: usize, k: usize, ids: usize, weights: usize) {
    assert!((1..=experts).contains(&k) && experts <= 1 << 16, "router: {k} of {experts} experts");
    assert!(logits.is_multiple_of(experts), "router: logits is [T,E], E = {experts}, not {logits} long");
    assert_eq!(ids, logits / experts * k, "router: ids is [T,K]");
    assert_eq!(weights, ids, "router: weights is [T,K]");
}

/// e^x by the lanes' polynomial.
fn exp_one(x: f32) -> f32 {
    let mut out = [0.0];
    softmax::exp_slice(&[x], &mut out);
    out[0]
}

simd! {
    fn sigmoid_one<S>(x: f32) -> f32 {
        math::sigmoid(S::splat(x)).to_array()[LANES - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn chooses_by_falling_score_ties_to_the_lower_id() {
        let logits = [1.0, 3.0, 3.0, 2.0, 0.0, f32::NAN, -1.0, 5.0];
        let (mut ids, mut weights) = ([9u16; 4], [0.0; 4]);
        sigmoid_top_k(&logits, 8, 4, &mut ids, &mut weights);
        assert_eq!(ids, [7, 1, 2, 3]);
        let want = [5.0f64, 3.0, 3.0, 2.0].map(|x| 1.0 / (1.0 + (-x).exp()));
        assert_close(&weights, &want, 1e-6, "sigmoid weights");
        let mut all = [0u16; 8];
        top_k(&logits, 8, 8, &mut all);
        assert_eq!(all, [7, 1, 2, 3, 0, 4, 6, 5]);
    }

    fn softmax_weights_f64(logits: &[f64], ids: &[u16], renormalise: bool) -> Vec<f64> {
        let total: f64 = logits.iter().map(|l| l.exp()).sum();
        let p: Vec<f64> = ids.iter().map(|&id| logits[usize::from(id)].exp() / total).collect();
        let sum = if renormalise { p.iter().sum() } else { 1.0 };
        p.iter().map(|p| p / sum).collect()
    }

    #[test]
    fn softmax_weights_and_gradients() {
        let mut random = Random(1);
        for (experts, k) in [(1, 1), (4, 2), (16, 3), (40, 8)] {
            for renormalise in [false, true] {
                let tokens = 5;
                let logits: Vec<f32> = random.vec(tokens * experts).iter().map(|x| 3.0 * x).collect();
                let d_weights = random.vec(tokens * k);
                let (mut ids, mut weights) = (vec![0u16; tokens * k], vec![0.0; tokens * k]);
                let got = assert_all_agree("router", || {
                    softmax_top_k(&logits, experts, k, renormalise, &mut ids, &mut weights);
                    let mut given = vec![f32::NAN; weights.len()];
                    softmax_given(&logits, experts, k, renormalise, &ids, &mut given);
                    assert_same_bits(&given, &weights, "replayed");
                    let mut d = vec![f32::NAN; logits.len()];
                    softmax_top_k_backward(
                        &logits,
                        experts,
                        k,
                        renormalise,
                        &ids,
                        &weights,
                        &d_weights,
                        &mut d,
                    );
                    [weights.clone(), d].concat()
                });
                for t in 0..tokens {
                    let (ids, d_weights) = (&ids[t * k..][..k], &d_weights[t * k..][..k]);
                    let logits = wide(&logits[t * experts..][..experts]);
                    assert!(weights[t * k..][..k].is_sorted_by(|a, b| a >= b));
                    let want = softmax_weights_f64(&logits, ids, renormalise);
                    assert_close(&got[t * k..][..k], &want, 1e-6, "weights");
                    let loss = |l: &[f64]| -> f64 {
                        let weights = softmax_weights_f64(l, ids, renormalise);
                        weights.iter().zip(d_weights).map(|(w, d)| w * f64::from(*d)).sum()
                    };
                    let d_logits = &got[tokens * k + t * experts..][..experts];
                    assert_close(d_logits, &gradient(&logits, loss), 1e-6, "d_logits");
                }
            }
        }
    }

    #[test]
    fn sigmoid_gradient_is_the_derivative() {
        let mut random = Random(2);
        let (logits, d_weights) = (random.vec(2 * 6), random.vec(2 * 2));
        let (mut ids, mut weights, mut d) = ([0u16; 4], [0.0; 4], [f32::NAN; 12]);
        sigmoid_top_k(&logits, 6, 2, &mut ids, &mut weights);
        sigmoid_top_k_backward(6, 2, &ids, &weights, &d_weights, &mut d);
        let loss = |l: &[f64]| -> f64 {
            let of = |i: usize| 1.0 / (1.0 + (-l[i / 2 * 6 + usize::from(ids[i])]).exp());
            (0..4).map(|i| of(i) * f64::from(d_weights[i])).sum()
        };
        assert_close(&d, &gradient(&wide(&logits), loss), 1e-6, "d_logits");
    }
}
