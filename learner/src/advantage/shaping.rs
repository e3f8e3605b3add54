//! Rewards before they become advantages: length, several components, soft values.

/// Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13), added to the reward: 0 up to `length_max − buffer` tokens, then linearly
/// down to −1 at `length_max`, −1 beyond.
pub fn overlong_penalty(tokens: u64, length_max: u64, buffer: u64) -> f64 {
    let soft = length_max.saturating_sub(buffer);
    match tokens {
        t if t <= soft => 0.0,
        t if t <= length_max => -((t - soft) as f64) / (length_max - soft) as f64,
        _ => -1.0,
    }
}

/// β·log mean exp(R/β): the value of a prompt under the KL-regularised optimum. `None` for no rewards.
pub fn soft_value(rewards: &[f64], beta: f64) -> Option<f64> {
    let top = rewards.iter().copied().reduce(f64::max)?;
    let mean = rewards.iter().map(|r| ((r - top) / beta).exp()).sum::<f64>() / rewards.len() as f64;
    Some(top + beta * mean.ln())
}

/// Several reward components, each z-scored within its group, summed by weight, and z-scored over the batch (GDPO; TRL's
/// `normalize_then_sum`). `components[group][sample][component]`; `None` where a component did not score. A sample that no
/// component scored gets `None`.
pub fn combine_normalised(
    components: &[Vec<Vec<Option<f64>>>],
    weights: &[f64],
    eps: f64,
) -> Vec<Vec<Option<f64>>> {
    let mut sums: Vec<Vec<Option<f64>>> =
        components.iter().map(|group| weighted_sums(group, weights, eps)).collect();
    let scored: Vec<f64> = sums.iter().flatten().copied().flatten().collect();
    let Some((mean, deviation)) = moments(&scored) else { return sums };
    for sum in sums.iter_mut().flatten().flatten() {
        *sum = (*sum - mean) / (deviation + eps);
    }
    sums
}

fn weighted_sums(group: &[Vec<Option<f64>>], weights: &[f64], eps: f64) -> Vec<Option<f64>> {
    let column = |f: usize| -> Vec<f64> { group.iter().filter_map(|sample| sample[f]).collect() };
    let scales: Vec<Option<(f64, f64)>> = (0..weights.len()).map(|f| moments(&column(f))).collect();
    let sum = |sample: &Vec<Option<f64>>| {
        let parts = sample.iter().zip(&scales).zip(weights);
        let scored =
            parts.filter_map(|((value, scale), weight)| Some(weight * z_score((*value)?, (*scale)?, eps)));
        scored.reduce(|a, b| a + b)
    };
    group.iter().map(sum).collect()
}

fn z_score(value: f64, (mean, deviation): (f64, f64), eps: f64) -> f64 {
    (value - mean) / (deviation + eps)
}

/// Mean and standard deviation (n − 1 below; 0 for one value).
fn moments(values: &[f64]) -> Option<(f64, f64)> {
    let n = values.len() as f64;
    let mean = (n > 0.0).then(|| values.iter().sum::<f64>() / n)?;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    Some((mean, (squares / (n - 1.0).max(1.0)).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_tokens_cost_up_to_one() {
        let penalty = |tokens| overlong_penalty(tokens, 100, 20);
        assert_eq!(
            [penalty(0), penalty(80), penalty(90), penalty(100), penalty(101)],
            [0.0, 0.0, -0.5, -1.0, -1.0]
        );
        assert_eq!(overlong_penalty(10, 10, 0), 0.0, "no buffer, no division by zero");
    }

    #[test]
    fn the_soft_value_lies_between_mean_and_best_and_does_not_overflow() {
        let value = soft_value(&[0.0, 1.0], 0.5).unwrap();
        assert!(0.5 < value && value < 1.0);
        assert_eq!(soft_value(&[5e5, 5e5], 1e-3), Some(5e5));
        assert_eq!(soft_value(&[], 1.0), None);
    }
}
