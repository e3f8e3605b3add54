//! Softmax statistics of a row of logits, log-probabilities and entropy from them, and their gradient.
//!
//! Sums and maxima over a row: sixteen lanes (element i in lane i mod 16, ascending), then a fixed tree. A logit of −∞
//! is an excluded token: probability 0, no gradient. Batch-invariant: one row at a time.

use crate::math::{exp, ln};
use crate::simd::{LANES, Lanes, simd};

/// What a log-probability needs to know of a row of logits z, tempered: z / temperature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowStats {
    /// Largest tempered logit.
    pub max: f32,
    /// ln Σ e^(z − max): at least 0.
    pub log_sum: f32,
    /// max + log_sum.
    pub log_sum_exp: f32,
}

simd! {
    /// `out = e^x`
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn exp_slice<S>(x: &[f32], out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "exp_slice: lengths");
        for (x, out) in x.chunks(LANES).zip(out.chunks_mut(LANES)) {
            exp(S::read(x, 0.0)).write(out);
        }
    }
}

simd! {
    /// `out` = the probabilities of a row of logits.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn probabilities<S>(logits: &[f32], stats: &RowStats, inv_temperature: f32, out: &mut [f32]) {
        assert_eq!(logits.len(), out.len(), "probabilities: lengths");
        let (max, log_sum) = (S::splat(stats.max), S::splat(stats.log_sum));
        for (logits, out) in logits.chunks(LANES).zip(out.chunks_mut(LANES)) {
            let z = S::read(logits, f32::NEG_INFINITY).mul(S::splat(inv_temperature));
            exp(z.sub(max).sub(log_sum)).write(out);
        }
    }
}

simd! {
    /// Sum in f64 of a few values: eight lanes (value i in lane i mod 8, ascending), then the lanes in order.
    pub fn sum_of_block<S>(x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 8];
        let (whole, rest) = x.as_chunks::<8>();
        for x in whole {
            for i in 0..8 {
                lanes[i] += f64::from(x[i]);
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(x);
        }
        lanes.iter().sum()
    }
}

/// Statistics of one row of `logits · inv_temperature`. NaN in a row gives NaN; a row of −∞ gives NaN.
///
/// # Panics
/// When the row is empty.
pub fn row_stats(logits: &[f32], inv_temperature: f32) -> RowStats {
    assert!(!logits.is_empty(), "row_stats: an empty row");
    let (max, sum) = max_and_sum(logits, inv_temperature);
    let log_sum = ln(sum);
    RowStats { max, log_sum, log_sum_exp: max + log_sum }
}

/// Log-probability, in nats, of the token whose logit is `logit`.
pub fn log_prob(stats: &RowStats, logit: f32, inv_temperature: f32) -> f32 {
    (logit * inv_temperature - stats.max) - stats.log_sum
}

simd! {
    /// Entropy of the row's distribution, in nats.
    pub fn entropy_of<S>(logits: &[f32], stats: &RowStats, inv_temperature: f32) -> f32 {
        let mut sum = S::splat(0.0);
        for logits in logits.chunks(LANES) {
            let log_p = log_probs::<S>(logits, stats, inv_temperature);
            sum = exp(log_p).fma(log_p, sum);
        }
        -sum.sum()
    }
}

/// Replaces a row of raw logits by the gradient, with respect to them, of `d_logprob · logprob[target] + d_entropy · entropy`.
///
/// # Panics
/// When `target` is not in the row.
pub fn log_prob_backward(
    row: &mut [f32],
    stats: &RowStats,
    inv_temperature: f32,
    target: usize,
    d_logprob: f32,
    d_entropy: f32,
) {
    assert!(target < row.len(), "log_prob_backward: target {target} of {}", row.len());
    let entropy = if d_entropy == 0.0 { 0.0 } else { entropy_of(row, stats, inv_temperature) };
    backward_row(row, stats, inv_temperature, d_logprob, d_entropy, entropy);
    row[target] = d_logprob.mul_add(inv_temperature, row[target]);
}

/// Replaces a row of scores by its softmax.
///
/// # Panics
/// When the row is empty.
pub fn softmax_row(scores: &mut [f32]) {
    assert!(!scores.is_empty(), "softmax_row: an empty row");
    let (max, sum) = max_and_sum(scores, 1.0);
    normalise_row(scores, max, sum);
}

simd! {
    fn normalise_row<S>(scores: &mut [f32], max: f32, sum: f32) {
        for scores in scores.chunks_mut(LANES) {
            exp(S::read(scores, 0.0).sub(S::splat(max))).div(S::splat(sum)).write(scores);
        }
    }
}

simd! {
    /// Turns the gradient `d` of a softmax row `p` into that of the scores: p·(d − Σ p·d).
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn softmax_row_backward<S>(p: &[f32], d: &mut [f32]) {
        assert_eq!(p.len(), d.len(), "softmax_row_backward: lengths");
        let mut dot = S::splat(0.0);
        for (p, d) in p.chunks(LANES).zip(d.chunks(LANES)) {
            dot = S::read(p, 0.0).fma(S::read(d, 0.0), dot);
        }
        let dot = S::splat(dot.sum());
        for (p, d) in p.chunks(LANES).zip(d.chunks_mut(LANES)) {
            S::read(p, 0.0).mul(S::read(d, 0.0).sub(dot)).write(d);
        }
    }
}

/// Index of the largest value; of equals, the lowest. NaN is never the largest; `None` when there is no other value.
pub fn argmax(x: &[f32]) -> Option<usize> {
    let max = max_of(x);
    x.iter().position(|&value| value == max)
}

/// Log-probabilities of up to sixteen logits; at least −1000, so that an excluded token gives 0·(−1000), not 0·∞.
#[inline(always)]
fn log_probs<S: Lanes>(logits: &[f32], stats: &RowStats, inv_temperature: f32) -> S {
    let z = S::read(logits, f32::NEG_INFINITY).mul(S::splat(inv_temperature));
    let log_p = z.sub(S::splat(stats.max)).sub(S::splat(stats.log_sum));
    S::splat(-1000.0).max(log_p)
}

simd! {
    fn max_of<S>(x: &[f32]) -> f32 {
        let mut max = S::splat(f32::NEG_INFINITY);
        for x in x.chunks(LANES) {
            max = S::read(x, f32::NEG_INFINITY).max(max);
        }
        max.max_lane()
    }
}

simd! {
    fn max_and_sum<S>(logits: &[f32], inv_temperature: f32) -> (f32, f32) {
        let scale = S::splat(inv_temperature);
        let mut max = S::splat(f32::NEG_INFINITY);
        for logits in logits.chunks(LANES) {
            // A NaN is passed over here; the sum below brings it to light.
            max = S::read(logits, f32::NEG_INFINITY).mul(scale).max(max);
        }
        let max = max.max_lane();
        let mut sum = S::splat(0.0);
        for logits in logits.chunks(LANES) {
            let z = S::read(logits, f32::NEG_INFINITY).mul(scale);
            sum = sum.add(exp(z.sub(S::splat(max))));
        }
        (max, sum.sum())
    }
}

simd! {
    /// −p·inv_temperature·(d_logprob + d_entropy·(log p + entropy))
    fn backward_row<S>(
        row: &mut [f32],
        stats: &RowStats,
        inv_temperature: f32,
        d_logprob: f32,
        d_entropy: f32,
        entropy: f32,
    ) {
        let scale = S::splat(-inv_temperature);
        let constant = S::splat(d_entropy.mul_add(entropy, d_logprob));
        let slope = S::splat(d_entropy);
        for logits in row.chunks_mut(LANES) {
            let log_p = log_probs::<S>(logits, stats, inv_temperature);
            let inner = log_p.fma(slope, constant);
            exp(log_p).mul(scale).mul(inner).write(logits);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    fn log_probs_f64(logits: &[f64], inv_temperature: f64) -> Vec<f64> {
        let z: Vec<f64> = logits.iter().map(|l| l * inv_temperature).collect();
        let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
        z.iter().map(|z| z - lse).collect()
    }

    fn entropy_f64(logits: &[f64], inv_temperature: f64) -> f64 {
        -log_probs_f64(logits, inv_temperature)
            .iter()
            .map(|l| if *l > -700.0 { l.exp() * l } else { 0.0 })
            .sum::<f64>()
    }

    #[test]
    fn probabilities_and_their_sums_agree() {
        let mut random = Random(19);
        for len in [1, 7, 16, 63, 64, 100] {
            let logits = random.vec(len);
            let stats = row_stats(&logits, 0.7);
            let p = assert_all_agree("probabilities", || {
                let mut p = vec![f32::NAN; len];
                probabilities(&logits, &stats, 0.7, &mut p);
                p.push(sum_of_block(&p) as f32);
                p
            });
            assert!((p[len] - 1.0).abs() <= 1e-5, "{len}: {}", p[len]);
            for (p, logit) in p.iter().zip(&logits) {
                assert!((p - log_prob(&stats, *logit, 0.7).exp()).abs() <= 1e-6);
            }
        }
    }

    #[test]
    fn log_probs_entropy_and_gradient_at_every_length() {
        let mut random = Random(1);
        for len in (1..=50).chain([1000]) {
            let logits: Vec<f32> = random.vec(len).iter().map(|x| 10.0 * x).collect();
            let (inv_temperature, target) = (1.25, len / 2);
            let (d_logprob, d_entropy) = (0.7, -0.3);
            let got = assert_all_agree("softmax", || {
                let stats = row_stats(&logits, inv_temperature);
                let mut out = logits.clone();
                log_prob_backward(&mut out, &stats, inv_temperature, target, d_logprob, d_entropy);
                out.push(log_prob(&stats, logits[target], inv_temperature));
                out.push(entropy_of(&logits, &stats, inv_temperature));
                out.push(stats.log_sum_exp);
                out
            });
            let logits = wide(&logits);
            let loss = |l: &[f64]| 0.7 * log_probs_f64(l, 1.25)[target] - 0.3 * entropy_f64(l, 1.25);
            assert_close(&got[..len], &gradient(&logits, loss), 2e-6, "gradient");
            let log_prob = log_probs_f64(&logits, 1.25)[target];
            let want = [log_prob, entropy_f64(&logits, 1.25), logits[target] * 1.25 - log_prob];
            assert_close(&got[len..], &want, 2e-6, "log-prob, entropy, log-sum-exp");
        }
    }

    #[test]
    fn rows_and_their_gradient_at_every_length() {
        let mut random = Random(7);
        for len in (1..=50).chain([300]) {
            let (x, dy) = (random.vec(len), random.vec(len));
            let got = assert_all_agree("softmax_row", || {
                let (mut p, mut d) = (x.clone(), dy.clone());
                softmax_row(&mut p);
                softmax_row_backward(&p, &mut d);
                [p, d].concat()
            });
            let softmax = |x: &[f64]| -> Vec<f64> { log_probs_f64(x, 1.0).iter().map(|l| l.exp()).collect() };
            let loss = |x: &[f64]| softmax(x).iter().zip(&dy).map(|(p, d)| p * f64::from(*d)).sum();
            assert_close(&got[..len], &softmax(&wide(&x)), 1e-6, "softmax_row");
            assert_close(&got[len..], &gradient(&wide(&x), loss), 1e-6, "softmax_row_backward");
        }
        let mut awkward = [1.0, f32::NAN, 2.0];
        softmax_row(&mut awkward);
        assert!(awkward.iter().all(|p| p.is_nan()), "a NaN shows");
    }

    #[test]
    fn excluded_tokens_have_no_part() {
        let inf = f32::NEG_INFINITY;
        let logits = [inf, 1.0, inf, 2.0, inf];
        let (full, kept) = (row_stats(&logits, 0.5), row_stats(&[1.0, 2.0], 0.5));
        assert_eq!(full.max, kept.max);
        assert!((full.log_sum - kept.log_sum).abs() <= 1e-6);
        assert!((entropy_of(&logits, &full, 0.5) - entropy_of(&[1.0, 2.0], &kept, 0.5)).abs() <= 1e-6);
        let mut gradient = logits;
        log_prob_backward(&mut gradient, &full, 0.5, 3, 1.0, 1.0);
        assert_eq!([gradient[0], gradient[2], gradient[4]], [0.0; 3]);
        assert!(gradient[1] != 0.0 && gradient[3] != 0.0);
        assert_eq!(log_prob(&full, inf, 0.5), inf);
    }

    #[test]
    fn large_logits_lose_no_precision() {
        let stats = row_stats(&[1e6, 1e6], 1.0);
        assert_eq!(log_prob(&stats, 1e6, 1.0), -std::f32::consts::LN_2);
    }

    #[test]
    fn a_nan_shows() {
        let stats = row_stats(&[1.0, f32::NAN, 2.0], 1.0);
        assert!(log_prob(&stats, 1.0, 1.0).is_nan() && stats.log_sum_exp.is_nan());
        assert!(row_stats(&[f32::NEG_INFINITY; 3], 1.0).log_sum_exp.is_nan());
    }

    #[test]
    fn argmax_takes_the_lowest_of_equals() {
        let mut x = vec![0.5; 40];
        assert_eq!(argmax(&x), Some(0));
        (x[17], x[33], x[2]) = (3.0, 3.0, f32::NAN);
        assert_eq!(argmax(&x), Some(17));
        assert_eq!(argmax(&[f32::NEG_INFINITY; 3]), Some(0));
        assert_eq!(argmax(&[f32::NAN; 20]), None);
        assert_eq!(argmax(&[]), None);
    }
}
