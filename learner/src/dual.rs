//! Costs under limits: one multiplier a cost, moved by how far its mean is from its limit.
//!
//! With rewards R, costs C_j and multipliers λ_j the credit of a sample is `(A_R − Σ λ_j A_Cj) / (1 + Σ λ_j)`, A_R the credit
//! of each token whatever its kind, A_Cj the cost less its mean within the group (Safe RLHF, arXiv 2310.12773, its PPO-Lag code). After an update, with J_j the moving mean of the cost over
//! all samples of groups that ended, trained or dropped: `ln λ_j ← clip(ln λ_j + lr (J_j − d_j) / max(d_j, 0.005), ln 0.001, ln max)`.
//! Departures: the step is relative to the limit, so that one rate serves limits of every size; groups that were dropped count, since
//! dropping those whose samples are all alike would make the rare cost look frequent. Only the learner moves multipliers; nobody else
//! reads them. What moved them is in the journal and the checkpoint, so a repeated run has the same ones to the bit.

use freewheel_types::ScoredRollout;
use serde::{Deserialize, Serialize};

use crate::assembly::Group;

/// Smallest multiplier.
const LAMBDA_MIN: f64 = 1e-3;
/// Limits below this are treated as this where a violation is made relative.
const LIMIT_MIN: f64 = 0.005;
/// Sums are kept in whole millionths, so that adding and taking away is exact.
const UNIT: f64 = 1e6;
/// A cost above this counts as this.
const COST_MAX: f64 = 1e6;

/// How multipliers move. No limits: there are none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DualConfig {
    /// Rate. Above 0.
    pub lr: f64,
    /// Multipliers at the start.
    pub init: f64,
    /// Largest multiplier.
    pub max: f64,
    /// How much of the moving mean is left after an update, 0 to below 1.
    pub ema: f64,
    /// Samples a cost must have been seen on before its multiplier moves.
    pub min_samples: u64,
    /// Costs, as the reward records name them, with their limits.
    pub limits: Vec<(String, f64)>,
}

/// A sum of costs, in millionths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CostSum {
    /// Millionths.
    pub micros: u64,
    /// Samples.
    pub count: u64,
}

/// One multiplier with its memory; in the checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DualState {
    /// The cost.
    pub name: String,
    /// The multiplier.
    pub lambda: f64,
    /// Moving mean of the cost; `None` before the first sample.
    pub mean: Option<f64>,
    /// Samples seen.
    pub seen: u64,
    /// Samples of groups that ended since the last update.
    pub pending: CostSum,
}

/// All multipliers.
#[derive(Clone, Debug, Default)]
pub struct Duals {
    config: DualConfig,
    states: Vec<DualState>,
}

impl Duals {
    /// Multipliers at the start.
    pub fn new(config: DualConfig) -> Self {
        let state = |(name, _): &(String, f64)| DualState {
            name: name.clone(),
            lambda: config.init,
            mean: None,
            seen: 0,
            pending: CostSum::default(),
        };
        Self { states: config.limits.iter().map(state).collect(), config }
    }

    /// Takes up saved states by name; a cost that is new starts anew, one that is gone is forgotten.
    pub fn restore(&mut self, saved: &[DualState]) {
        for state in &mut self.states {
            if let Some(before) = saved.iter().find(|before| before.name == state.name) {
                state.clone_from(before);
                state.lambda = state.lambda.clamp(LAMBDA_MIN, self.config.max);
            }
        }
    }

    /// For the checkpoint and the metrics.
    pub fn states(&self) -> &[DualState] {
        &self.states
    }

    /// Counts the samples of a group that ended.
    pub fn ended(&mut self, group: &Group) {
        for state in &mut self.states {
            for cost in group.scored().filter_map(|scored| cost(scored, &state.name)) {
                state.pending.micros += (cost.clamp(0.0, COST_MAX) * UNIT).round() as u64;
                state.pending.count += 1;
            }
        }
    }

    /// Moves the multipliers after an update; `recorded` are the sums of the first time, when an update is repeated. Returns the sums used.
    pub fn update(&mut self, recorded: Option<&[CostSum]>) -> Vec<CostSum> {
        let config = &self.config;
        let mut used = Vec::with_capacity(self.states.len());
        for (i, (state, (_, limit))) in self.states.iter_mut().zip(&config.limits).enumerate() {
            let sum = recorded.map_or(state.pending, |sums| sums.get(i).copied().unwrap_or_default());
            state.pending.micros = state.pending.micros.saturating_sub(sum.micros);
            state.pending.count = state.pending.count.saturating_sub(sum.count);
            used.push(sum);
            if sum.count == 0 {
                continue;
            }
            let mean = sum.micros as f64 / UNIT / sum.count as f64;
            let moving = state.mean.map_or(mean, |old| config.ema * old + (1.0 - config.ema) * mean);
            state.mean = Some(moving);
            state.seen += sum.count;
            if state.seen >= config.min_samples {
                let violation = (moving - limit) / limit.max(LIMIT_MIN);
                let lambda = state.lambda * (config.lr * violation).exp();
                state.lambda = lambda.clamp(LAMBDA_MIN, config.max);
            }
        }
        used
    }

    /// What credit is divided by once the charges are taken off: 1 + Σ λ_j.
    pub fn scale(&self) -> f64 {
        1.0 + self.states.iter().map(|state| state.lambda).sum::<f64>()
    }

    /// What costs take from the credit of each scored sample of a group, Σ λ_j A_Cj; empty without limits.
    pub fn charges(&self, group: &Group) -> Vec<f64> {
        if self.states.is_empty() {
            return Vec::new();
        }
        let mut charges = vec![0.0; group.scored().count()];
        for state in &self.states {
            let costs: Vec<Option<f64>> = group.scored().map(|scored| cost(scored, &state.name)).collect();
            let known = costs.iter().flatten().count();
            let mean = costs.iter().flatten().sum::<f64>() / known.max(1) as f64;
            for (charge, cost) in charges.iter_mut().zip(costs) {
                *charge += cost.map_or(0.0, |cost| state.lambda * (cost - mean));
            }
        }
        charges
    }
}

fn cost(scored: &ScoredRollout, name: &str) -> Option<f64> {
    let cost = scored.reward.costs.iter().find(|cost| cost.name == name)?;
    cost.value.filter(|value| value.is_finite()).map(f64::from)
}

#[cfg(test)]
mod tests {
    use freewheel_types::{CostScore, PolicyVersion, TaskId};
    use proptest::prelude::*;

    use super::*;
    use crate::assembly::{Arrival, Assembly, GroupRules};
    use crate::testing::scored;

    fn config(limits: &[(&str, f64)]) -> DualConfig {
        let limits = limits.iter().map(|(name, limit)| ((*name).to_owned(), *limit)).collect();
        DualConfig { lr: 0.1, init: 0.1, max: 20.0, ema: 0.5, min_samples: 4, limits }
    }

    /// A group whose members have these rewards and costs `unsafe`.
    fn group(task: u64, members: &[(f32, Option<f32>)]) -> Group {
        let rules = GroupRules { min_valid: 2, group_size: 3, needs_contrast: true, greedy_baseline: false };
        let mut assembly = Assembly::new(rules);
        for (i, (reward, cost)) in members.iter().enumerate() {
            let mut sample = scored(task, i as u32, PolicyVersion::default(), *reward);
            sample.reward.costs = vec![CostScore { name: "unsafe".into(), value: *cost }];
            assert!(
                assembly.insert(Arrival::Scored(Box::new(sample))).is_none(),
                "the group can be trained on"
            );
        }
        assembly.take(&[TaskId(task)]).remove(0)
    }

    #[test]
    fn charges_are_weighted_costs_less_the_mean_of_those_that_have_one() {
        let duals = Duals::new(DualConfig { init: 3.0, ..config(&[("unsafe", 0.1), ("other", 0.1)]) });
        let group = group(0, &[(1.0, Some(1.0)), (0.0, Some(0.0)), (0.5, None)]);
        assert_eq!(duals.charges(&group), [1.5, -1.5, 0.0]);
        assert_eq!(duals.scale(), 7.0);
        let none = Duals::default();
        assert_eq!((none.charges(&group).len(), none.scale()), (0, 1.0));
    }

    #[test]
    fn rewards_alike_with_costs_apart_still_teach() {
        let group = group(0, &[(1.0, Some(1.0)), (1.0, Some(0.0)), (1.0, Some(0.0))]);
        assert_eq!(group.scored().count(), 3);
    }

    #[test]
    fn a_multiplier_waits_for_samples_and_then_follows_the_violation() {
        let mut duals = Duals::new(config(&[("unsafe", 0.1)]));
        let group = group(0, &[(1.0, Some(1.0)), (0.0, Some(0.0)), (0.0, Some(0.5))]);
        duals.ended(&group);
        assert_eq!(duals.update(None), [CostSum { micros: 1_500_000, count: 3 }]);
        assert_eq!(duals.states()[0].lambda, 0.1, "3 samples are fewer than 4");
        duals.ended(&group);
        duals.update(None);
        let expected = 0.1 * (0.1_f64 * (0.5 - 0.1) / 0.1).exp();
        assert!((duals.states()[0].lambda - expected).abs() <= 1e-12);
        let before = duals.states().to_vec();
        duals.update(None);
        assert_eq!(duals.states(), before, "no samples, no move");
    }

    #[test]
    fn a_repeated_update_uses_what_was_recorded_and_keeps_the_rest_for_the_next() {
        let first = group(0, &[(1.0, Some(1.0)), (0.0, Some(0.0)), (0.0, None)]);
        let second = group(1, &[(1.0, Some(1.0)), (0.0, Some(1.0)), (0.0, Some(0.0))]);
        let mut live = Duals::new(config(&[("unsafe", 0.1)]));
        live.ended(&first);
        let recorded = live.update(None);
        live.ended(&second);
        let saved = live.states().to_vec();
        // The repeat sees both groups end before the first update.
        let mut again = Duals::new(config(&[("unsafe", 0.1)]));
        again.ended(&first);
        again.ended(&second);
        again.update(Some(&recorded));
        assert_eq!(again.states(), saved);
        let mut restored = Duals::new(config(&[("new", 0.2), ("unsafe", 0.1)]));
        restored.restore(&saved);
        assert_eq!(restored.states()[1], saved[0]);
        assert_eq!(restored.states()[0].seen, 0);
    }

    proptest! {
        /// Multipliers stay above 0 and bounded, and a larger violation never gives a smaller one.
        #[test]
        fn multipliers_are_bounded_and_monotone(
            costs in prop::collection::vec(0.0_f32..1.0, 1..60), more in 0.0_f32..1.0, limit in 0.0_f64..0.5, lr in 0.01_f64..10.0,
        ) {
            let config = DualConfig { lr, min_samples: 0, ..config(&[("unsafe", limit)]) };
            let (mut low, mut high) = (Duals::new(config.clone()), Duals::new(config));
            for cost in costs {
                let sum = |cost: f32| CostSum { micros: (f64::from(cost) * UNIT) as u64, count: 1 };
                low.update(Some(&[sum(cost)]));
                high.update(Some(&[sum(cost + more)]));
                let (low, high) = (low.states()[0].lambda, high.states()[0].lambda);
                prop_assert!((LAMBDA_MIN..=20.0).contains(&low) && (LAMBDA_MIN..=20.0).contains(&high), "{} {}", low, high);
                prop_assert!(high >= low, "{} below {}", high, low);
            }
        }
    }
}
