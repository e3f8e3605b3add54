//! From logits to a token, and back: the one transform that the sampler draws with and the learner differentiates.
//!
//! Order: temperature, top-k, top-p, min-p, renormalise (the order of transformers' warpers). Without truncation the
//! log-prob is a plain log-softmax. With truncation it is renormalised over the kept tokens; the learner applies the same rule to
//! its own logits, and keeps the sampled token in the support even if its own rule would cut it ("keep sampling mask").

use freewheel_kernels::softmax::{self, RowStats};
use freewheel_types::SamplingParams;

/// Working memory of the functions here.
#[derive(Debug, Default)]
pub struct SampleScratch {
    kept: Vec<u32>,
    values: Vec<f32>,
    probs: Vec<f32>,
}

/// A drawn token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// The token.
    pub token: u32,
    /// Its log-prob under the distribution it was drawn from, nats. For greedy decoding (temperature 0), that of the untempered
    /// distribution.
    pub logprob: f32,
}

/// What the learner wants to know of one position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenStats {
    /// Log-prob of the token, nats; the same bits as [`sample`] reports for the same logits.
    pub logprob: f32,
    /// Entropy of the (transformed) distribution, nats.
    pub entropy: f32,
}

/// Draws a token with `uniform` in `[0, 1)` by inverting the cumulative distribution in token order.
///
/// # Panics
/// If `logits` is empty.
pub fn sample(logits: &[f32], params: &SamplingParams, uniform: f64, scratch: &mut SampleScratch) -> Drawn {
    if params.temperature == 0.0 {
        let token = softmax::argmax(logits).unwrap_or(0);
        let stats = softmax::row_stats(logits, 1.0);
        return Drawn { token: token as u32, logprob: softmax::log_prob(&stats, logits[token], 1.0) };
    }
    let inv_t = 1.0 / params.temperature;
    let SampleScratch { kept, values, probs } = scratch;
    if !params.truncates() {
        let stats = softmax::row_stats(logits, inv_t);
        let token = invert(logits, &stats, inv_t, uniform, probs);
        return Drawn { token: token as u32, logprob: softmax::log_prob(&stats, logits[token], inv_t) };
    }
    support(logits, params, None, kept, probs);
    values.clear();
    values.extend(kept.iter().map(|&id| logits[id as usize]));
    let stats = softmax::row_stats(values, inv_t);
    let at = invert(values, &stats, inv_t, uniform, probs);
    Drawn { token: kept[at], logprob: softmax::log_prob(&stats, values[at], inv_t) }
}

/// Log-prob of `token` and the entropy, under the same transform as [`sample`].
pub fn log_prob_of(
    logits: &[f32],
    params: &SamplingParams,
    token: u32,
    scratch: &mut SampleScratch,
) -> TokenStats {
    let inv_t = inverse_temperature(params);
    if !params.truncates() {
        let stats = softmax::row_stats(logits, inv_t);
        return TokenStats {
            logprob: softmax::log_prob(&stats, logits[token as usize], inv_t),
            entropy: softmax::entropy_of(logits, &stats, inv_t),
        };
    }
    let SampleScratch { kept, values, probs } = scratch;
    support(logits, params, Some(token), kept, probs);
    values.clear();
    values.extend(kept.iter().map(|&id| logits[id as usize]));
    let stats = softmax::row_stats(values, inv_t);
    TokenStats {
        logprob: softmax::log_prob(&stats, logits[token as usize], inv_t),
        entropy: softmax::entropy_of(values, &stats, inv_t),
    }
}

/// Replaces a row of logits by the gradient, with respect to them, of `d_logprob · log p(token) + d_entropy · H`. The support
/// counts as fixed.
pub(crate) fn backward(
    row: &mut [f32],
    params: &SamplingParams,
    token: u32,
    d_logprob: f32,
    d_entropy: f32,
    scratch: &mut SampleScratch,
) {
    let inv_t = inverse_temperature(params);
    if !params.truncates() {
        let stats = softmax::row_stats(row, inv_t);
        softmax::log_prob_backward(row, &stats, inv_t, token as usize, d_logprob, d_entropy);
        return;
    }
    let SampleScratch { kept, values, probs } = scratch;
    support(row, params, Some(token), kept, probs);
    values.clear();
    values.extend(kept.iter().map(|&id| row[id as usize]));
    let stats = softmax::row_stats(values, inv_t);
    let at = kept.binary_search(&token).expect("the sampled token is always kept");
    softmax::log_prob_backward(values, &stats, inv_t, at, d_logprob, d_entropy);
    row.fill(0.0);
    for (&id, &d) in kept.iter().zip(values.iter()) {
        row[id as usize] = d;
    }
}

/// Greedy tokens are judged by the untempered distribution.
fn inverse_temperature(params: &SamplingParams) -> f32 {
    if params.temperature == 0.0 { 1.0 } else { 1.0 / params.temperature }
}

/// Values whose probabilities are added up before they join the cumulative sum.
const BLOCK: usize = 64;

/// First index whose cumulative probability exceeds `uniform`. Sums are in f64: over blocks of 64 by
/// [`softmax::sum_of_block`], over blocks in order, and within the block that holds the index in order.
fn invert(logits: &[f32], stats: &RowStats, inv_t: f32, uniform: f64, probs: &mut Vec<f32>) -> usize {
    probs.resize(logits.len(), 0.0);
    softmax::probabilities(logits, stats, inv_t, probs);
    let sums: Vec<f64> = probs.chunks(BLOCK).map(softmax::sum_of_block).collect();
    let mut left = uniform * sums.iter().sum::<f64>();
    let mut last = 0;
    for (block, (probs, sum)) in probs.chunks(BLOCK).zip(sums).enumerate() {
        if let Some(at) = probs.iter().rposition(|&p| p > 0.0) {
            last = block * BLOCK + at;
        }
        if left < sum {
            for (at, &p) in probs.iter().enumerate() {
                left -= f64::from(p);
                if p > 0.0 && left < 0.0 {
                    return block * BLOCK + at;
                }
            }
            // Rounding apart, the sum of the block was more than what was left.
            return last;
        }
        left -= sum;
    }
    last
}

/// Kept token ids in ascending order.
fn support(
    logits: &[f32],
    params: &SamplingParams,
    always: Option<u32>,
    kept: &mut Vec<u32>,
    probs: &mut Vec<f32>,
) {
    let inv_t = inverse_temperature(params);
    let falling = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    kept.clear();
    kept.extend(0..logits.len() as u32);
    let k = params.top_k as usize;
    if k > 0 && k < kept.len() {
        kept.select_nth_unstable_by(k - 1, falling);
        kept.truncate(k);
    }
    if params.top_p < 1.0 || params.min_p > 0.0 {
        kept.sort_unstable_by(falling);
        probs.clear();
        probs.extend(kept.iter().map(|&id| logits[id as usize]));
        let stats = softmax::row_stats(probs, inv_t);
        probs.iter_mut().for_each(|x| *x = softmax::log_prob(&stats, *x, inv_t));
        let log_probs = std::mem::take(probs);
        probs.resize(log_probs.len(), 0.0);
        softmax::exp_slice(&log_probs, probs);
        kept.truncate(cut(probs, params));
    }
    if let Some(token) = always
        && !kept.contains(&token)
    {
        kept.push(token);
    }
    kept.sort_unstable();
}

/// How many of the falling `probs` stay after top-p, then min-p; at least one.
fn cut(probs: &[f32], params: &SamplingParams) -> usize {
    let mut mass = 0.0f64;
    let nucleus = probs
        .iter()
        .take_while(|&&p| {
            let before = mass;
            mass += f64::from(p);
            params.top_p >= 1.0 || before < f64::from(params.top_p)
        })
        .count();
    let floor = probs[0] * params.min_p;
    probs[..nucleus].iter().take_while(|&&p| p >= floor).count().max(1)
}

#[cfg(test)]
mod tests {
    use freewheel_types::CounterRng;

    use super::*;

    fn logits(seed: u64, n: u64) -> Vec<f32> {
        let rng = CounterRng::new(seed, 0);
        (0..n).map(|i| rng.normal(i) as f32 * 2.0).collect()
    }

    const CASES: [SamplingParams; 5] = [
        SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 },
        SamplingParams { temperature: 0.7, top_k: 0, top_p: 1.0, min_p: 0.0 },
        SamplingParams { temperature: 1.3, top_k: 7, top_p: 1.0, min_p: 0.0 },
        SamplingParams { temperature: 1.0, top_k: 0, top_p: 0.8, min_p: 0.0 },
        SamplingParams { temperature: 0.9, top_k: 20, top_p: 0.9, min_p: 0.1 },
    ];

    #[test]
    fn the_learner_sees_the_very_bits_the_sampler_reported() {
        let mut scratch = SampleScratch::default();
        for (seed, params) in (0..40).flat_map(|seed| CASES.map(|params| (seed, params))) {
            let row = logits(seed, 101);
            let drawn = sample(&row, &params, CounterRng::new(seed, 1).uniform(0), &mut scratch);
            let stats = log_prob_of(&row, &params, drawn.token, &mut scratch);
            assert_eq!(stats.logprob.to_bits(), drawn.logprob.to_bits(), "{params:?}");
        }
    }

    #[test]
    fn frequencies_follow_the_reported_log_probs() {
        let mut scratch = SampleScratch::default();
        let row = logits(3, 12);
        let n = 20_000;
        for params in CASES {
            let mut counts = [0u32; 12];
            for i in 0..n {
                counts
                    [sample(&row, &params, CounterRng::new(9, 9).uniform(i), &mut scratch).token as usize] +=
                    1;
            }
            for (token, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
                let p = f64::from(log_prob_of(&row, &params, token as u32, &mut scratch).logprob).exp();
                let seen = f64::from(count) / n as f64;
                assert!((seen - p).abs() <= 0.015, "{params:?} token {token}: {seen} against {p}");
            }
        }
    }

    #[test]
    fn truncation_keeps_what_it_should() {
        let mut scratch = SampleScratch::default();
        let row = [0.0, 3.0, 1.0, 2.0];
        let greedy = sample(&row, &SamplingParams::GREEDY, 0.99, &mut scratch);
        assert_eq!(greedy.token, 1);
        let top_2 = SamplingParams { top_k: 2, ..SamplingParams::default() };
        let last = sample(&row, &top_2, 0.9999, &mut scratch);
        assert_eq!(last.token, 3);
        assert!((last.logprob - (-(1.0f32 + 1.0f32.exp()).ln())).abs() <= 1e-6);
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let mut scratch = SampleScratch::default();
        for params in CASES {
            let row = logits(5, 23);
            let token = sample(&row, &params, 0.4, &mut scratch).token;
            let mut d = row.clone();
            backward(&mut d, &params, token, 0.7, -0.3, &mut scratch);
            for at in 0..row.len() {
                let value = |delta: f32| {
                    let mut moved = row.clone();
                    moved[at] += delta;
                    let s = log_prob_of(&moved, &params, token, &mut SampleScratch::default());
                    0.7 * f64::from(s.logprob) - 0.3 * f64::from(s.entropy)
                };
                let numeric = (value(1e-2) - value(-1e-2)) / 2e-2;
                assert!((numeric - f64::from(d[at])).abs() <= 2e-3, "{params:?} {at}: {numeric} {}", d[at]);
            }
        }
    }
}
