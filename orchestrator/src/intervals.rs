//! How sure a measured share or mean is.

use freewheel_types::CounterRng;

/// Wilson's score interval of a share `p` of `n`, 95 %.
pub fn wilson(p: f64, n: usize) -> (f64, f64) {
    let (n, z) = (n as f64, 1.959_964);
    let z2n = z * z / n;
    let middle = (p + z2n / 2.0) / (1.0 + z2n);
    let half = z / (1.0 + z2n) * (p * (1.0 - p) / n + z2n / (4.0 * n)).sqrt();
    ((middle - half).max(0.0), (middle + half).min(1.0))
}

/// Percentiles of 1,000 means over values drawn with replacement, 95 %; the same values give the same interval.
///
/// # Panics
/// If there are no values.
pub fn bootstrap(values: &[f64]) -> (f64, f64) {
    const DRAWS: u64 = 1000;
    let n = values.len() as u64;
    let mut means: Vec<f64> = (0..DRAWS)
        .map(|draw| {
            let rng = CounterRng::new(0x0062_6f6f_7473, draw);
            (0..n).map(|i| values[rng.below(i, n) as usize]).sum::<f64>() / n as f64
        })
        .collect();
    means.sort_by(f64::total_cmp);
    (means[25], means[974])
}

/// One-sided upper bound of a rate after `events` in `n` independent trials (Clopper and Pearson 1934): the largest rate at which so
/// few events still happen with a probability of 1 − `confidence`. Exact, so it errs on the safe side; 1 without trials.
pub fn upper_bound(events: usize, n: usize, confidence: f64) -> f64 {
    if events >= n {
        return 1.0;
    }
    let (mut low, mut high) = (events as f64 / n as f64, 1.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if at_most(events, n, middle) > 1.0 - confidence { low = middle } else { high = middle }
    }
    high
}

/// Probability of at most `events` in `n` trials of rate `p`, within 0 and 1.
fn at_most(events: usize, n: usize, p: f64) -> f64 {
    if p >= 1.0 {
        return 0.0;
    }
    let (log_p, log_q) = (p.ln(), (-p).ln_1p());
    let (mut sum, mut log_choose) = (0.0, 0.0_f64);
    for k in 0..=events {
        if k > 0 {
            log_choose += ((n - k + 1) as f64).ln() - (k as f64).ln();
        }
        let log_mass = log_choose + if k > 0 { k as f64 * log_p } else { 0.0 } + (n - k) as f64 * log_q;
        sum += log_mass.exp();
    }
    sum.min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_matches_the_textbook() {
        // 15 of 20: Wilson 95 % = (0.5313, 0.8881) (R: prop.test(15, 20, correct = FALSE)).
        let (low, high) = wilson(0.75, 20);
        assert!((low - 0.5313).abs() <= 1e-4 && (high - 0.8881).abs() <= 1e-4, "{low} {high}");
    }

    #[test]
    fn the_upper_bound_is_the_exact_one() {
        // No event in n: 1 - 0.05^(1/n). 5 of 100 and 3 of 1000: R, binom.test(x, n, alternative = "less")$conf.int[2].
        for n in [1, 59, 300, 100_000] {
            let expected = 1.0 - 0.05_f64.powf(1.0 / n as f64);
            assert!((upper_bound(0, n, 0.95) - expected).abs() <= 1e-9, "{n}");
        }
        assert!((upper_bound(5, 100, 0.95) - 0.102_253_4).abs() <= 1e-6, "{}", upper_bound(5, 100, 0.95));
        assert_eq!((upper_bound(4, 4, 0.95), upper_bound(0, 0, 0.95)), (1.0, 1.0));
        assert!(upper_bound(30_000, 100_000, 0.95) < 0.303);
    }

    #[test]
    fn the_bootstrap_holds_the_mean_and_repeats() {
        let values: Vec<f64> = (0..40).map(|i| f64::from(i % 4) / 3.0).collect();
        let (low, high) = bootstrap(&values);
        assert!(low < 0.5 && 0.5 < high && high - low < 0.35, "{low} {high}");
        assert_eq!(bootstrap(&values), (low, high));
    }
}
