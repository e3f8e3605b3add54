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
#[expect(clippy::too_many_arguments, reason = "the operands of one op")]
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

/// Rules of DeepSeek-V3's router (arXiv 2412.19437, 2.1.2): scores are sigmoid(logit); experts are ranked by score +
/// correction; only those of the best groups may be chosen; weights come from the plain scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grouped {
    /// Equal groups of neighbouring experts. A group is as good as its two best experts together.
    pub groups: usize,
    /// Groups a token may choose from.
    pub groups_kept: usize,
    /// Divide the weights by their sum.
    pub renormalise: bool,
    /// Factor on the weights.
    pub scale: f32,
}

/// Keeps the sum of weights away from 0, as the reference does.
const WEIGHT_SUM_EPS: f32 = 1e-20;

/// The top `k` by score + `correction [E]` among the best groups: `logits [T,E]` to `ids [T,K]`, best first, and
/// `weights [T,K]`.
///
/// # Panics
/// When a length does not fit, groups are not equal or of one expert, or the kept ones hold fewer than `k` experts.
pub fn grouped_top_k(
    logits: &[f32],
    correction: &[f32],
    rules: &Grouped,
    k: usize,
    ids: &mut [u16],
    weights: &mut [f32],
) {
    let experts = correction.len();
    check(logits.len(), experts, k, ids.len(), weights.len());
    let (groups, kept) = (rules.groups, rules.groups_kept);
    assert!(
        groups > 0 && experts.is_multiple_of(groups) && (1..=groups).contains(&kept),
        "router: {rules:?}"
    );
    let size = experts / groups;
    assert!(size > 1 && k <= kept * size, "router: {k} experts from {kept} groups of {size}");
    let (mut ranks, mut group_ranks, mut group_ids) = (vec![0.0; experts], vec![0.0; groups], vec![0; kept]);
    for (logits, ids) in logits.chunks_exact(experts).zip(ids.chunks_exact_mut(k)) {
        for ((rank, &logit), &correction) in ranks.iter_mut().zip(logits).zip(correction) {
            *rank = sigmoid_one(logit) + correction;
        }
        for (rank, members) in group_ranks.iter_mut().zip(ranks.chunks_exact(size)) {
            let mut best = [0; 2];
            top_k(members, size, 2, &mut best);
            *rank = members[usize::from(best[0])] + members[usize::from(best[1])];
        }
        top_k(&group_ranks, groups, kept, &mut group_ids);
        let allowed = |e: usize| group_ids.contains(&((e / size) as u16));
        best_of(&ranks, allowed, ids);
    }
    grouped_given(logits, experts, rules, k, ids, weights);
}

/// Weights of [`grouped_top_k`] for the experts in `ids [T,K]`.
///
/// # Panics
/// When a length does not fit, or an id is not below E.
pub fn grouped_given(
    logits: &[f32],
    experts: usize,
    rules: &Grouped,
    k: usize,
    ids: &[u16],
    weights: &mut [f32],
) {
    sigmoid_given(logits, experts, k, ids, weights);
    for weights in weights.chunks_exact_mut(k) {
        let sum = if rules.renormalise { score_sum(weights) } else { 1.0 };
        for weight in weights {
            *weight = *weight / sum * rules.scale;
        }
    }
}

/// Gradient of [`grouped_top_k`] with the choice fixed: `d_logits [T,E]` is overwritten. The correction has none.
///
/// # Panics
/// When a length does not fit, or an id is not below E.
#[expect(clippy::too_many_arguments, reason = "the operands of one op")]
pub fn grouped_top_k_backward(
    logits: &[f32],
    experts: usize,
    rules: &Grouped,
    k: usize,
    ids: &[u16],
    weights: &[f32],
    d_weights: &[f32],
    d_logits: &mut [f32],
) {
    check(logits.len(), experts, k, ids.len(), weights.len());
    assert_eq!(weights.len(), d_weights.len(), "router: d_weights is [T,K]");
    assert_eq!(logits.len(), d_logits.len(), "router: d_logits is [T,E]");
    d_logits.fill(0.0);
    let mut scores = vec![0.0; k];
    let given = weights.chunks_exact(k).zip(d_weights.chunks_exact(k));
    let tokens = rows(logits, experts, ids, k).zip(given).zip(d_logits.chunks_exact_mut(experts));
    for (((logits, ids), (weights, d_weights)), d_logits) in tokens {
        sigmoid_given(logits, experts, k, ids, &mut scores);
        // weight_i = scale · s_i / Σ s, so d s_i = (scale · d_i − Σ_j d_j · weight_j) / Σ s.
        let (sum, inner) = if rules.renormalise {
            (score_sum(&scores), weights.iter().zip(d_weights).fold(0.0, |sum, (&w, &d)| w.mul_add(d, sum)))
        } else {
            (1.0, 0.0)
        };
        for ((&id, &score), &d_weight) in ids.iter().zip(&scores).zip(d_weights) {
            let d_score = rules.scale.mul_add(d_weight, -inner) / sum;
            d_logits[usize::from(id)] += d_score * score * (1.0 - score);
        }
    }
}

fn score_sum(scores: &[f32]) -> f32 {
    scores.iter().fold(0.0, |sum, s| sum + s) + WEIGHT_SUM_EPS
}

/// The `k` largest of each row, by falling value, ties to the lower id.
fn top_k(logits: &[f32], experts: usize, k: usize, ids: &mut [u16]) {
    check(logits.len(), experts, k, ids.len(), ids.len());
    for (logits, ids) in logits.chunks_exact(experts).zip(ids.chunks_exact_mut(k)) {
        best_of(logits, |_| true, ids);
    }
}

/// Fills `ids` with the `allowed` experts of the largest `values`, of which there must be enough.
fn best_of(values: &[f32], allowed: impl Fn(usize) -> bool, ids: &mut [u16]) {
    for chosen in 0..ids.len() {
        let (before, rest) = ids.split_at_mut(chosen);
        let left = (0..values.len()).filter(|&e| allowed(e) && !before.contains(&(e as u16)));
        let best = left.reduce(|best, e| if above(values[e], values[best]) { e } else { best });
        rest[0] = best.expect("k is at most the number of experts") as u16;
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

    const RULES: Grouped = Grouped { groups: 4, groups_kept: 2, renormalise: true, scale: 2.5 };

    #[test]
    fn only_the_best_groups_are_chosen_from_and_the_correction_only_ranks() {
        let logit = |p: f64| (p / (1.0 - p)).ln() as f32;
        // Groups of two with scores .9 .15 | .6 .55 | .5 .5 | .2 .3: the first two win.
        let logits = [0.9, 0.15, 0.6, 0.55, 0.5, 0.5, 0.2, 0.3].map(logit);
        let (mut ids, mut weights) = ([9u16; 3], [0.0; 3]);
        grouped_top_k(&logits, &[0.0; 8], &RULES, 3, &mut ids, &mut weights);
        assert_eq!(ids, [0, 2, 3]);
        let sum = 0.9 + 0.6 + 0.55;
        assert_close(&weights, &[0.9, 0.6, 0.55].map(|s| 2.5 * s / sum), 1e-6, "weights");
        // The correction moves groups and members in the ranking; weights stay those of the scores.
        let correction = [-0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.4, 0.0];
        grouped_top_k(&logits, &correction, &RULES, 3, &mut ids, &mut weights);
        assert_eq!(ids, [2, 3, 4]);
        let correction = [-0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.8, 0.0];
        let rules = Grouped { renormalise: false, ..RULES };
        grouped_top_k(&logits, &correction, &rules, 3, &mut ids, &mut weights);
        assert_eq!(ids, [6, 2, 3]);
        assert_close(&weights, &[0.2, 0.6, 0.55].map(|s| 2.5 * s), 1e-6, "plain weights");
        // An excluded group is out even where every rank left is negative.
        grouped_top_k(
            &logits,
            &[-3.0; 8],
            &Grouped { groups_kept: 1, ..RULES },
            2,
            &mut ids[..2],
            &mut weights[..2],
        );
        assert_eq!(ids[..2], [2, 3]);
    }

    #[test]
    fn grouped_weights_and_gradients() {
        let mut random = Random(3);
        for (experts, k, groups, kept) in [(2, 1, 1, 1), (8, 3, 4, 2), (16, 8, 4, 2), (40, 6, 8, 3)] {
            for renormalise in [false, true] {
                let rules = Grouped { groups, groups_kept: kept, renormalise, scale: 1.8 };
                let tokens = 5;
                let logits: Vec<f32> = random.vec(tokens * experts).iter().map(|x| 3.0 * x).collect();
                let (correction, d_weights) = (random.vec(experts), random.vec(tokens * k));
                let (mut ids, mut weights) = (vec![0u16; tokens * k], vec![0.0; tokens * k]);
                let got = assert_all_agree("grouped router", || {
                    grouped_top_k(&logits, &correction, &rules, k, &mut ids, &mut weights);
                    let mut given = vec![f32::NAN; weights.len()];
                    grouped_given(&logits, experts, &rules, k, &ids, &mut given);
                    assert_same_bits(&given, &weights, "replayed");
                    let mut d = vec![f32::NAN; logits.len()];
                    grouped_top_k_backward(&logits, experts, &rules, k, &ids, &weights, &d_weights, &mut d);
                    [weights.clone(), d].concat()
                });
                for t in 0..tokens {
                    let (ids, d_weights) = (&ids[t * k..][..k], &d_weights[t * k..][..k]);
                    let logits = wide(&logits[t * experts..][..experts]);
                    let weights_of = |logits: &[f64]| -> Vec<f64> {
                        let scores: Vec<f64> =
                            ids.iter().map(|&id| 1.0 / (1.0 + (-logits[usize::from(id)]).exp())).collect();
                        let sum = if renormalise { scores.iter().sum() } else { 1.0 };
                        scores.iter().map(|s| 1.8 * s / sum).collect()
                    };
                    assert_close(&got[t * k..][..k], &weights_of(&logits), 1e-6, "weights");
                    let loss = |l: &[f64]| -> f64 {
                        weights_of(l).iter().zip(d_weights).map(|(w, d)| w * f64::from(*d)).sum()
                    };
                    let d_logits = &got[tokens * k + t * experts..][..experts];
                    assert_close(d_logits, &gradient(&logits, loss), 1e-6, "d_logits");
                }
            }
        }
    }
}
