//! Token-level credit: returns with a per-token reward, GAE, whitening.

/// What generalised advantage estimation is done with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gae {
    /// Discount γ; 1 for outcome rewards.
    pub gamma: f64,
    /// λ; 0.95 or 1.
    pub lambda: f64,
}

/// Advantages and value targets of one sequence `[T]`.
#[derive(Clone, Debug, PartialEq)]
pub struct GaeOutput {
    /// Advantages; 0 where masked.
    pub advantages: Vec<f64>,
    /// Advantage + value; 0 where masked.
    pub returns: Vec<f64>,
}

/// Generalised advantage estimation (Schulman et al., arXiv 1506.02438): δ = r + γV' − V, A = δ + γλA'. V after the last token
/// is 0. A masked token carries the value and the advantage of its successor through.
///
/// # Panics
/// If the slices differ in length.
pub fn gae(config: Gae, rewards: &[f64], values: &[f64], loss_mask: &[bool]) -> GaeOutput {
    assert!(rewards.len() == values.len() && rewards.len() == loss_mask.len(), "one length for all fields");
    let mut out = GaeOutput { advantages: vec![0.0; values.len()], returns: vec![0.0; values.len()] };
    let (mut next_value, mut next_advantage) = (0.0, 0.0);
    for t in (0..values.len()).rev().filter(|&t| loss_mask[t]) {
        let delta = rewards[t] + config.gamma * next_value - values[t];
        next_advantage = delta + config.gamma * config.lambda * next_advantage;
        next_value = values[t];
        out.advantages[t] = next_advantage;
        out.returns[t] = next_advantage + values[t];
    }
    out
}

/// Returns-to-go Σ γ^(s−t) r_s over the tokens that count; 0 where masked.
///
/// # Panics
/// If the slices differ in length.
pub fn discounted_returns(gamma: f64, rewards: &[f64], loss_mask: &[bool]) -> Vec<f64> {
    assert_eq!(rewards.len(), loss_mask.len(), "one length for all fields");
    let mut returns = vec![0.0; rewards.len()];
    let mut next = 0.0;
    for t in (0..rewards.len()).rev().filter(|&t| loss_mask[t]) {
        next = rewards[t] + gamma * next;
        returns[t] = next;
    }
    returns
}

/// Shifts and scales the counting values of a whole batch to mean 0 and deviation 1.
///
/// With `sample_deviation`, as PPO does it: (x − mean)/√(var + 1e-8), n − 1 in the variance. Without, as REINFORCE++ does it:
/// (x − mean)/(σ + 1e-8), n in the variance.
pub fn whiten(batch: &mut [Vec<f64>], loss_masks: &[Vec<bool>], sample_deviation: bool) {
    let counting = |batch: &[Vec<f64>]| -> Vec<f64> {
        let tokens = batch.iter().flatten().zip(loss_masks.iter().flatten());
        tokens.filter(|(_, mask)| **mask).map(|(x, _)| *x).collect()
    };
    let values = counting(batch);
    if values.is_empty() {
        return;
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    let scale = match sample_deviation {
        true => (squares / (n - 1.0).max(1.0) + 1e-8).sqrt(),
        false => (squares / n).sqrt() + 1e-8,
    };
    for (x, &mask) in batch.iter_mut().flatten().zip(loss_masks.iter().flatten()) {
        *x = if mask { (*x - mean) / scale } else { 0.0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_gamma_and_lambda_one_the_advantage_is_the_return_minus_the_value() {
        let out = gae(
            Gae { gamma: 1.0, lambda: 1.0 },
            &[0.0, f64::NAN, 1.0],
            &[0.4, f64::NAN, 0.7],
            &[true, false, true],
        );
        assert_eq!(out.returns, [1.0, 0.0, 1.0]);
        assert!((out.advantages[0] - 0.6).abs() <= 1e-12 && (out.advantages[2] - 0.3).abs() <= 1e-12);
    }

    #[test]
    fn returns_skip_masked_tokens() {
        assert_eq!(discounted_returns(0.5, &[1.0, f64::NAN, 2.0], &[true, false, true]), [2.0, 0.0, 2.0]);
    }

    #[test]
    fn whitening_counts_only_what_the_mask_keeps() {
        let mut batch = vec![vec![1.0, 99.0], vec![3.0]];
        whiten(&mut batch, &[vec![true, false], vec![true]], false);
        assert!((batch[0][0] + 1.0).abs() <= 1e-7 && batch[0][1] == 0.0 && (batch[1][0] - 1.0).abs() <= 1e-7);
    }
}
