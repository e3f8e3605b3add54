//! Baselines over prompt groups and batches, one advantage a sample.

use super::shaping::soft_value;
use super::{Advantage, AdvantageConfig, Scored};

/// Advantages of the scored samples, group by group.
pub(super) fn evaluate(config: &AdvantageConfig, groups: &[Vec<Scored>]) -> Vec<Vec<f64>> {
    let eps = config.std_eps;
    let each = |f: &dyn Fn(&[Scored]) -> Vec<f64>| groups.iter().map(|group| f(group)).collect::<Vec<_>>();
    match config.kind {
        Advantage::DrGrpo => each(&centred),
        Advantage::Grpo => each(&|group| divided(centred(group), deviation(group) + eps)),
        Advantage::BatchStd => {
            let all: Vec<Scored> = groups.iter().flatten().copied().collect();
            let scale = deviation(&all) + eps;
            each(&|group| divided(centred(group), scale))
        }
        Advantage::Rloo => each(&leave_one_out),
        Advantage::Remax => {
            let over =
                |s: &Scored| s.reward - s.greedy.expect("remax needs a greedy completion of every group");
            each(&|group| group.iter().map(over).collect())
        }
        Advantage::Opo => each(&|group| minus(group, weighted_mean(group))),
        Advantage::Maxrl => each(&|group| match mean(group) {
            baseline if baseline > 0.0 => divided(minus(group, baseline), baseline),
            _ => vec![0.0; group.len()],
        }),
        Advantage::PassK => each(&|group| best_only(group, eps)),
        Advantage::ReinforcePp => {
            whitened_by_token(each(&|group| group.iter().map(|s| s.reward).collect()), groups)
        }
        Advantage::ReinforcePpBaseline => whitened_by_token(each(&centred), groups),
        Advantage::Magistral => {
            let centred = each(&centred);
            let all: Vec<Scored> = centred
                .iter()
                .flatten()
                .map(|&reward| Scored { reward, tokens: 1.0, greedy: None })
                .collect();
            let (centre, scale) = (if all.is_empty() { 0.0 } else { mean(&all) }, deviation(&all) + eps);
            centred.into_iter().map(|group| group.iter().map(|x| (x - centre) / scale).collect()).collect()
        }
        Advantage::Ema => {
            let all: Vec<Scored> = groups.iter().flatten().copied().collect();
            let baseline = config.reward_ema.unwrap_or_else(|| if all.is_empty() { 0.0 } else { mean(&all) });
            each(&|group| minus(group, baseline))
        }
        Advantage::Gdpo | Advantage::Gae => panic!("{:?} is credited token by token", config.kind),
        Advantage::SoftValue => each(&|group| {
            let rewards: Vec<f64> = group.iter().map(|s| s.reward).collect();
            soft_value(&rewards, config.beta).map_or_else(Vec::new, |value| minus(group, value))
        }),
    }
}

fn mean(group: &[Scored]) -> f64 {
    group.iter().map(|s| s.reward).sum::<f64>() / group.len() as f64
}

fn weighted_mean(group: &[Scored]) -> f64 {
    let tokens: f64 = group.iter().map(|s| s.tokens).sum();
    match tokens > 0.0 {
        true => group.iter().map(|s| s.tokens * s.reward).sum::<f64>() / tokens,
        false => mean(group),
    }
}

/// Standard deviation, n − 1 below; 0 for a single sample.
fn deviation(group: &[Scored]) -> f64 {
    if group.len() < 2 {
        return 0.0;
    }
    let centre = mean(group);
    let squares: f64 = group.iter().map(|s| (s.reward - centre).powi(2)).sum();
    (squares / (group.len() - 1) as f64).sqrt()
}

fn minus(group: &[Scored], baseline: f64) -> Vec<f64> {
    group.iter().map(|s| s.reward - baseline).collect()
}

/// Exactly 0 when all are equal, whatever the mean rounds to.
fn centred(group: &[Scored]) -> Vec<f64> {
    match group {
        [first, rest @ ..] if rest.iter().all(|s| s.reward == first.reward) => vec![0.0; group.len()],
        _ => minus(group, mean(group)),
    }
}

fn divided(mut values: Vec<f64>, scale: f64) -> Vec<f64> {
    values.iter_mut().for_each(|x| *x /= scale);
    values
}

/// R − mean of the others; a sample alone in its group has no baseline and gets 0.
fn leave_one_out(group: &[Scored]) -> Vec<f64> {
    let others = group.len() as f64 - 1.0;
    if others < 1.0 {
        return vec![0.0; group.len()];
    }
    let sum: f64 = group.iter().map(|s| s.reward).sum();
    group.iter().map(|s| s.reward - (sum - s.reward) / others).collect()
}

/// The first of the best ones gets the gap to the second, the rest nothing.
fn best_only(group: &[Scored], eps: f64) -> Vec<f64> {
    let mut values = vec![0.0; group.len()];
    let best = (0..group.len()).reduce(|a, b| if group[b].reward > group[a].reward { b } else { a });
    let Some(best) = best.filter(|_| group.len() > 1) else { return values };
    let second =
        (0..group.len()).filter(|&i| i != best).map(|i| group[i].reward).fold(f64::NEG_INFINITY, f64::max);
    values[best] = (group[best].reward - second) / (deviation(group) + eps);
    values
}

/// Whitening over all tokens of the batch: every token carries its sample's value, so samples weigh by their length.
/// Population deviation, +1e-8.
fn whitened_by_token(values: Vec<Vec<f64>>, groups: &[Vec<Scored>]) -> Vec<Vec<f64>> {
    let pairs = || values.iter().flatten().zip(groups.iter().flatten());
    let tokens: f64 = pairs().map(|(_, s)| s.tokens).sum();
    if tokens == 0.0 {
        return values.iter().map(|group| vec![0.0; group.len()]).collect();
    }
    let centre = pairs().map(|(x, s)| s.tokens * x).sum::<f64>() / tokens;
    let spread = (pairs().map(|(x, s)| s.tokens * (x - centre).powi(2)).sum::<f64>() / tokens).sqrt();
    let whiten = |x: f64| (x - centre) / (spread + 1e-8);
    values.into_iter().map(|group| group.into_iter().map(whiten).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Sample, advantages, is_informative};
    use super::*;

    fn samples(rewards: &[f64]) -> Vec<Sample> {
        rewards
            .iter()
            .zip(1..)
            .map(|(&reward, tokens)| Sample { reward: Some(reward), tokens, greedy: None })
            .collect()
    }

    fn one(kind: Advantage, rewards: &[f64]) -> Vec<f64> {
        let config = AdvantageConfig { kind, std_eps: 0.0, ..Default::default() };
        advantages(&config, &[samples(rewards)]).remove(0).into_iter().map(Option::unwrap).collect()
    }

    fn close(got: &[f64], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        got.iter().zip(want).for_each(|(a, b)| assert!((a - b).abs() <= 1e-12, "{got:?}, expected {want:?}"));
    }

    #[test]
    fn small_groups_by_hand() {
        let rewards = [1.0, 0.0, 0.0, 0.0];
        close(&one(Advantage::DrGrpo, &rewards), &[0.75, -0.25, -0.25, -0.25]);
        close(&one(Advantage::Grpo, &rewards), &[1.5, -0.5, -0.5, -0.5]);
        close(&one(Advantage::Rloo, &rewards), &[1.0, -1.0 / 3.0, -1.0 / 3.0, -1.0 / 3.0]);
        // Lengths 1, 2, 3, 4: baseline 0.1.
        close(&one(Advantage::Opo, &rewards), &[0.9, -0.1, -0.1, -0.1]);
        close(&one(Advantage::Maxrl, &rewards), &[3.0, -1.0, -1.0, -1.0]);
        close(&one(Advantage::PassK, &rewards), &[2.0, 0.0, 0.0, 0.0]);
        // Token mean 0.1, token deviation 0.3.
        close(&one(Advantage::ReinforcePp, &rewards)[..1], &[0.9 / (0.3 + 1e-8)]);
        let value = ((1f64.exp() + 3.0) / 4.0).ln();
        close(&one(Advantage::SoftValue, &rewards), &[1.0 - value, -value, -value, -value]);
    }

    #[test]
    fn a_greedy_completion_is_a_baseline_of_its_own_group() {
        let config = AdvantageConfig { kind: Advantage::Remax, ..Default::default() };
        let group =
            |greedy: f64| samples(&[1.0, 0.0]).into_iter().map(move |s| Sample { greedy: Some(greedy), ..s });
        let got = advantages(&config, &[group(1.0).collect(), group(0.25).collect()]);
        assert_eq!(got, [[Some(0.0), Some(-1.0)], [Some(0.75), Some(-0.25)]]);
    }

    #[test]
    fn leave_one_out_is_the_centred_one_scaled() {
        let rewards = [0.3, 0.9, -0.4, 0.1, 0.1];
        let scaled: Vec<f64> = one(Advantage::DrGrpo, &rewards).iter().map(|x| x * 5.0 / 4.0).collect();
        close(&one(Advantage::Rloo, &rewards), &scaled);
    }

    #[test]
    fn unscored_is_left_out_and_not_zero() {
        let mut group = samples(&[1.0, 0.5]);
        group.insert(1, Sample { reward: None, tokens: 9, greedy: None });
        for kind in
            [Advantage::DrGrpo, Advantage::Grpo, Advantage::Rloo, Advantage::Opo, Advantage::ReinforcePp]
        {
            let config = AdvantageConfig { kind, ..Default::default() };
            let with = advantages(&config, &[group.clone()]).remove(0);
            let lengths = [
                Sample { reward: Some(1.0), tokens: 1, greedy: None },
                Sample { reward: Some(0.5), tokens: 2, greedy: None },
            ];
            let without = advantages(&config, &[lengths.to_vec()]).remove(0);
            assert_eq!(with, [without[0], None, without[1]], "{kind:?}");
        }
    }

    #[test]
    fn equal_rewards_give_exactly_nothing() {
        // 0.1 three times: the mean is not 0.1 in binary.
        for kind in [Advantage::DrGrpo, Advantage::Grpo, Advantage::BatchStd, Advantage::PassK] {
            assert_eq!(one(kind, &[0.1; 3]), [0.0; 3], "{kind:?}");
        }
        assert!(!is_informative([Some(0.1), None, Some(0.1)]));
        assert!(!is_informative([Some(0.1), None]));
        assert!(is_informative([Some(0.1), Some(0.2)]));
    }

    #[test]
    fn a_baseline_below_the_mean_favours_successes() {
        let config = AdvantageConfig { shift: -0.1, ..Default::default() };
        assert_eq!(advantages(&config, &[samples(&[1.0, 0.0])]), [[Some(0.6), Some(-0.4)]]);
    }
}
