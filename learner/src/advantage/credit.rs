//! From the rewards of a batch to the credit of its tokens.
//!
//! ```text
//! rewards (− Σ token divergence) ─► one advantage a sample ─► every token of it          most kinds
//! −divergence by token, reward on the last ─► returns ─► whitened                        reinforce_pp with γ or divergence
//! −divergence by token, reward on the last ─► GAE with the critic's values ─► whitened   gae
//! ```

use super::{
    Advantage, AdvantageConfig, Gae, GaeOutput, Sample, advantages, combine_normalised, discounted_returns,
    gae, whiten,
};

/// Settings, defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct CreditRules {
    /// Baseline.
    pub advantage: AdvantageConfig,
    /// Discount γ and λ, for kinds that credit token by token.
    pub gae: Gae,
    /// Whether `gae` whitens over the batch.
    pub whiten: bool,
    /// Weights of the reward components for `gdpo`, in config order; those beyond the list weigh 1.
    pub component_weights: Vec<f64>,
}

/// A scored sample. Per-token fields are `[T]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CreditSample {
    /// Its reward, shaping included.
    pub reward: f64,
    /// Its tokens, masked ones too: what length-weighted baselines count.
    pub tokens: u64,
    /// Reward of its group's greedy completion, where there is one.
    pub greedy: Option<f64>,
    /// Raw values of its reward components.
    pub components: Vec<Option<f64>>,
    /// True on tokens that count.
    pub live: Vec<bool>,
    /// What each token pays for its distance from the reference, where the divergence is in the reward.
    pub penalties: Option<Vec<f64>>,
    /// The critic's values before each token, where there is a critic.
    pub values: Option<Vec<f64>>,
}

/// What one sample's tokens are credited with `[T]`.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenCredit {
    /// Advantages.
    pub advantages: Vec<f64>,
    /// What the critic's values are to become, where there is a critic; 0 where masked.
    pub returns: Option<Vec<f64>>,
}

/// Credit of every sample of every group of a batch.
///
/// # Panics
/// If `gae` gets no values: a bug of the caller.
pub fn credit(rules: &CreditRules, groups: &[Vec<CreditSample>]) -> Vec<Vec<TokenCredit>> {
    let kind = rules.advantage.kind;
    let penalised = groups.iter().flatten().any(|sample| sample.penalties.is_some());
    let by_token = match kind {
        Advantage::Gae => true,
        Advantage::ReinforcePp | Advantage::ReinforcePpBaseline => penalised || rules.gae.gamma != 1.0,
        _ => false,
    };
    let flat = match (by_token, kind) {
        (true, Advantage::Gae) => estimated(rules, groups),
        (true, _) => returned(rules, groups),
        (false, _) => broadcast(rules, groups),
    };
    let mut flat = flat.into_iter();
    groups.iter().map(|group| flat.by_ref().take(group.len()).collect()).collect()
}

/// One advantage a sample; a divergence in the reward is summed over its tokens.
fn broadcast(rules: &CreditRules, groups: &[Vec<CreditSample>]) -> Vec<TokenCredit> {
    let config = &rules.advantage;
    let values: Vec<f64> = match config.kind {
        Advantage::Gdpo => {
            let weight = |i: usize| rules.component_weights.get(i).copied().unwrap_or(1.0);
            let count = groups.iter().flatten().map(|s| s.components.len()).max().unwrap_or(0);
            let components: Vec<Vec<_>> =
                groups.iter().map(|group| group.iter().map(|s| s.components.clone()).collect()).collect();
            let weights: Vec<f64> = (0..count).map(weight).collect();
            let sums = combine_normalised(&components, &weights, config.std_eps);
            sums.into_iter().flatten().map(|sum| sum.unwrap_or(0.0) - config.shift).collect()
        }
        _ => {
            // The greedy completion pays no divergence: it is no draw, and no model is asked about it.
            let sample = |s: &CreditSample| Sample {
                reward: Some(s.reward - penalty(s)),
                tokens: s.tokens,
                greedy: s.greedy,
            };
            let samples: Vec<Vec<Sample>> = groups.iter().map(|g| g.iter().map(sample).collect()).collect();
            advantages(config, &samples).into_iter().flatten().map(|a| a.expect("all are scored")).collect()
        }
    };
    let samples = groups.iter().flatten();
    let each = |(sample, value): (&CreditSample, f64)| TokenCredit {
        advantages: vec![value; sample.live.len()],
        returns: None,
    };
    samples.zip(values).map(each).collect()
}

/// Whitened returns (REINFORCE++, arXiv 2501.03262, eq. 6), of rewards centred in their group in the variant with a baseline.
fn returned(rules: &CreditRules, groups: &[Vec<CreditSample>]) -> Vec<TokenCredit> {
    let centred = rules.advantage.kind == Advantage::ReinforcePpBaseline;
    let mut returns = Vec::new();
    for group in groups {
        let mean = group.iter().map(|s| s.reward).sum::<f64>() / group.len() as f64;
        let baseline = if centred { mean } else { 0.0 };
        let of = |s: &CreditSample| {
            discounted_returns(rules.gae.gamma, &token_rewards(s, s.reward - baseline), &s.live)
        };
        returns.extend(group.iter().map(of));
    }
    whiten(&mut returns, &masks(groups), false);
    let shifted = |mut advantages: Vec<f64>| {
        advantages.iter_mut().for_each(|x| *x -= rules.advantage.shift);
        TokenCredit { advantages, returns: None }
    };
    returns.into_iter().map(shifted).collect()
}

fn estimated(rules: &CreditRules, groups: &[Vec<CreditSample>]) -> Vec<TokenCredit> {
    let estimate = |s: &CreditSample| {
        let values = s.values.as_ref().expect("gae needs the critic's values");
        gae(rules.gae, &token_rewards(s, s.reward), values, &s.live)
    };
    let outputs = groups.iter().flatten().map(estimate);
    let (mut advantages, returns): (Vec<_>, Vec<_>) =
        outputs.map(|GaeOutput { advantages, returns }| (advantages, returns)).unzip();
    if rules.whiten {
        whiten(&mut advantages, &masks(groups), true);
    }
    advantages.iter_mut().flatten().for_each(|x| *x -= rules.advantage.shift);
    let pair = |(advantages, returns)| TokenCredit { advantages, returns: Some(returns) };
    advantages.into_iter().zip(returns).map(pair).collect()
}

fn masks(groups: &[Vec<CreditSample>]) -> Vec<Vec<bool>> {
    groups.iter().flatten().map(|s| s.live.clone()).collect()
}

/// The sum of what its live tokens pay.
fn penalty(sample: &CreditSample) -> f64 {
    let penalties = sample.penalties.iter().flatten().zip(&sample.live);
    penalties.filter(|(_, live)| **live).map(|(penalty, _)| penalty).sum()
}

/// Rewards token by token: minus what each pays, `score` on the last live one.
fn token_rewards(sample: &CreditSample, score: f64) -> Vec<f64> {
    let mut rewards = vec![0.0; sample.live.len()];
    if let Some(penalties) = &sample.penalties {
        rewards.iter_mut().zip(penalties).for_each(|(reward, penalty)| *reward = -penalty);
    }
    if let Some(last) = sample.live.iter().rposition(|&live| live) {
        rewards[last] += score;
    }
    rewards
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(reward: f64, len: usize) -> CreditSample {
        CreditSample { reward, tokens: len as u64, live: vec![true; len], ..Default::default() }
    }

    fn rules(kind: Advantage) -> CreditRules {
        CreditRules {
            advantage: AdvantageConfig { kind, std_eps: 0.0, ..Default::default() },
            gae: Gae { gamma: 1.0, lambda: 1.0 },
            whiten: false,
            component_weights: vec![],
        }
    }

    fn rows(rules: &CreditRules, groups: &[Vec<CreditSample>]) -> Vec<Vec<f64>> {
        credit(rules, groups).into_iter().flatten().map(|credit| credit.advantages).collect()
    }

    fn close(got: &[Vec<f64>], want: &[Vec<f64>]) {
        let pairs = got.iter().flatten().zip(want.iter().flatten());
        assert_eq!(got.concat().len(), want.concat().len());
        pairs.for_each(|(a, b)| assert!((a - b).abs() <= 1e-7, "{got:?}, expected {want:?}"));
    }

    #[test]
    fn a_divergence_in_the_reward_is_paid_by_the_sample() {
        let paying = CreditSample {
            penalties: Some(vec![0.25, f64::NAN, 0.25]),
            live: vec![true, false, true],
            ..sample(1.0, 3)
        };
        let free = CreditSample { penalties: Some(vec![0.0]), ..sample(0.0, 1) };
        close(&rows(&rules(Advantage::DrGrpo), &[vec![paying, free]]), &[vec![0.25; 3], vec![-0.25]]);
    }

    #[test]
    fn returns_by_token_agree_with_the_form_by_sample_and_carry_the_divergence() {
        let groups = vec![vec![sample(1.0, 2), sample(0.0, 3)]];
        let by_sample = rows(&rules(Advantage::ReinforcePp), &groups);
        let free =
            groups[0].iter().map(|s| CreditSample { penalties: Some(vec![0.0; s.live.len()]), ..s.clone() });
        close(&rows(&rules(Advantage::ReinforcePp), &[free.collect()]), &by_sample);
        // Returns 0.5·1 − 0.1 and 1 − 0.2; the other sample has 0: mean 0.24, deviation over five tokens.
        let paying = CreditSample { penalties: Some(vec![0.0, 0.2]), ..sample(1.0, 2) };
        let discounted =
            CreditRules { gae: Gae { gamma: 0.5, lambda: 1.0 }, ..rules(Advantage::ReinforcePp) };
        let spread = ((0.16f64.powi(2) + 0.56f64.powi(2) + 3.0 * 0.24f64.powi(2)) / 5.0).sqrt();
        let want = [vec![0.16 / spread, 0.56 / spread], vec![-0.24 / spread; 3]];
        close(&rows(&discounted, &[vec![paying, sample(0.0, 3)]]), &want);
    }

    #[test]
    fn a_critic_gives_each_token_its_own_credit_and_its_target() {
        let judged = CreditSample { values: Some(vec![0.5, 0.75]), ..sample(1.0, 2) };
        let got = credit(&rules(Advantage::Gae), &[vec![judged]]).remove(0).remove(0);
        assert_eq!(got, TokenCredit { advantages: vec![0.5, 0.25], returns: Some(vec![1.0, 1.0]) });
    }

    #[test]
    fn components_are_weighed_after_each_is_normalised() {
        // The second component is a hundred times the first in scale and must not count for more.
        let with = |a: f64, b: f64| CreditSample { components: vec![Some(a), Some(b)], ..sample(a + b, 1) };
        let group = [with(1.0, 0.0), with(0.0, 100.0), with(1.0, 100.0), with(0.0, 0.0)];
        let mut even = rules(Advantage::Gdpo);
        even.advantage.std_eps = 1e-9;
        let got = rows(&even, &[group.to_vec()]).concat();
        assert!(got[0].abs() <= 1e-6 && got[1].abs() <= 1e-6, "one success each is worth the same: {got:?}");
        assert!(got[2] > 1.0 && (got[2] + got[3]).abs() <= 1e-6, "{got:?}");
        let second_only = CreditRules { component_weights: vec![0.0], ..even };
        let got = rows(&second_only, &[group.to_vec()]).concat();
        assert!(got[1] > 0.5 && (got[1] - got[2]).abs() <= 1e-6 && got[0] < -0.5, "{got:?}");
    }

    #[test]
    fn a_running_mean_is_a_baseline_across_batches() {
        let mut rules = rules(Advantage::Ema);
        rules.advantage.reward_ema = Some(0.25);
        close(&rows(&rules, &[vec![sample(1.0, 1), sample(1.0, 1)]]), &[vec![0.75], vec![0.75]]);
        rules.advantage.reward_ema = None;
        close(&rows(&rules, &[vec![sample(1.0, 1), sample(0.0, 1)]]), &[vec![0.5], vec![-0.5]]);
    }

    #[test]
    fn magistral_is_normalised_over_the_batch() {
        let groups = vec![vec![sample(1.0, 1), sample(0.0, 1)], vec![sample(3.0, 1), sample(0.0, 1)]];
        let got = rows(&rules(Advantage::Magistral), &groups).concat();
        let (mean, square) = (got.iter().sum::<f64>(), got.iter().map(|x| x * x).sum::<f64>() / 3.0);
        assert!(mean.abs() <= 1e-12 && (square - 1.0).abs() <= 1e-12, "{got:?}");
        assert!((got[2] / got[0] - 3.0).abs() <= 1e-12);
    }

    #[test]
    fn a_sample_without_a_live_token_is_credited_and_harms_nobody() {
        let dead = CreditSample { live: vec![false; 2], values: Some(vec![f64::NAN; 2]), ..sample(1.0, 2) };
        let alive = CreditSample { values: Some(vec![0.5]), ..sample(1.0, 1) };
        let got = credit(&rules(Advantage::Gae), &[vec![dead, alive]]).remove(0);
        assert_eq!((&got[0].advantages[..], &got[1].advantages[..]), (&[0.0, 0.0][..], &[0.5][..]));
    }
}
