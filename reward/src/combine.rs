//! From component values to one reward. Pure: a rollout's reward depends on nothing but its own values.

mod sum;
#[cfg(test)]
mod tests;

use freewheel_types::{CostScore, TierHit, Verdict};

use crate::expr::{Expr, Scope};
use crate::when::When;

/// Normalised values lie within this of 0.
const NORM_MAX: f64 = 3.0;
/// Worth of a tier: more than the whole range of the sum within one.
pub(crate) const TIER_STEP: f32 = 2.5;

/// One component's result as the combination sees it.
#[derive(Clone, Debug)]
pub(crate) struct Part<'a> {
    /// Name from the config.
    pub(crate) name: &'a str,
    /// What it is to the combination.
    pub(crate) part: PartRole,
    /// `None`: does not apply to this prompt. `Err`: could not be scored, and why.
    pub(crate) value: Option<Result<f32, &'a str>>,
    /// The class it chose.
    pub(crate) label: Option<&'a str>,
    /// Natural logarithm of the completion's tokens plus 1.
    pub(crate) log_length: f64,
}

/// How a component takes part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct PartRole {
    /// Signed factor in the sum; a guard's is negative.
    pub(crate) factor: f32,
    /// What becomes of its value before the factor.
    pub(crate) norm: Option<Norm>,
    /// Whether it decides if the answer is right.
    pub(crate) decides: bool,
    /// Set for a gate: what makes it fail.
    pub(crate) gate: Option<Gate>,
}

/// Normalisation of a value in the sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Norm {
    /// Times the logarithm of the length, subtracted first.
    pub(crate) length: f32,
    /// Subtracted next.
    pub(crate) mean: f32,
    /// What the rest is divided by.
    pub(crate) std: f32,
}

impl Norm {
    /// The value of a completion whose length has that logarithm, within 3 deviations.
    fn of(self, value: f32, log_length: f64) -> f64 {
        let rest = f64::from(value) - f64::from(self.length) * log_length - f64::from(self.mean);
        (rest / f64::from(self.std)).clamp(-NORM_MAX, NORM_MAX)
    }
}

/// When a gate fails.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Gate {
    /// Verifiers: the value is below the threshold.
    Below(f32),
    /// Guards: the probability of harm is above the threshold.
    Above(f32),
}

impl Gate {
    fn fails(self, value: f32) -> bool {
        match self {
            Self::Below(threshold) => value < threshold,
            Self::Above(threshold) => value > threshold,
        }
    }
}

/// How values become a reward.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    /// Reward of a rollout that fails a gate.
    pub(crate) floor: f32,
    /// Range of the sum.
    pub(crate) clip: [f32; 2],
    /// Set for the piecewise rule.
    pub(crate) safety: Option<Safety>,
    /// Top down.
    pub(crate) tiers: Vec<Tier>,
    /// What the learner keeps under limits.
    pub(crate) costs: Vec<Cost>,
}

impl Rules {
    /// The components that expressions read.
    pub(crate) fn read(&self) -> Vec<usize> {
        self.expressions().flat_map(Expr::components).collect()
    }

    /// The components whose class expressions ask for.
    pub(crate) fn classes(&self) -> Vec<usize> {
        self.expressions().flat_map(Expr::classes).collect()
    }

    fn expressions(&self) -> impl Iterator<Item = &Expr> {
        let tiers = self.tiers.iter().map(|tier| &tier.condition);
        let costs = self.costs.iter().map(|cost| &cost.expr);
        self.safety.iter().map(|safety| &safety.score).chain(tiers).chain(costs)
    }
}

/// The piecewise rule.
#[derive(Clone, Debug)]
pub(crate) struct Safety {
    pub(crate) score: Expr,
    pub(crate) tags: Vec<String>,
    pub(crate) floor: f32,
}

/// A tier.
#[derive(Clone, Debug)]
pub(crate) struct Tier {
    pub(crate) name: String,
    pub(crate) tier: u8,
    pub(crate) condition: Expr,
}

/// A limited cost.
#[derive(Clone, Debug)]
pub(crate) struct Cost {
    pub(crate) name: String,
    pub(crate) on: When,
    pub(crate) expr: Expr,
}

/// What came of the values.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Combined {
    pub(crate) verdict: Verdict,
    pub(crate) costs: Vec<CostScore>,
    pub(crate) tier: Option<TierHit>,
}

/// What the expressions read.
struct Seen<'a> {
    parts: &'a [Part<'a>],
    tags: &'a [String],
}

impl Scope for Seen<'_> {
    fn component(&self, index: usize) -> Option<Result<(f32, Option<&str>), String>> {
        let part = &self.parts[index];
        let failed = |why: &str| format!("{}: {why}", part.name);
        part.value.map(|value| value.map(|value| (value, part.label)).map_err(failed))
    }

    fn tags(&self) -> &[String] {
        self.tags
    }
}

/// The outcome of one rollout on a prompt with `tags`.
///
/// A gate without a value leaves the rollout unscored; a failed gate gives `floor` whatever the rest says; otherwise every part
/// with a non-zero factor must have a finite value, and every tier and cost that applies must be known, else the rollout is
/// unscored. The piecewise rule is Llama 2's (arXiv 2307.09288, section 3.2.4) with one departure: below the floor the reward
/// is the *smaller* of both scores, so that more harm never pays.
pub(crate) fn combine(parts: &[Part<'_>], tags: &[String], rules: &Rules) -> Combined {
    match judge(parts, tags, rules) {
        Ok(combined) => combined,
        Err(reason) => Combined { verdict: Verdict::Unscored { reason }, costs: Vec::new(), tier: None },
    }
}

fn judge(parts: &[Part<'_>], tags: &[String], rules: &Rules) -> Result<Combined, String> {
    let gated_by = sum::failed_gate(parts)?;
    let correct = sum::correctness(parts);
    let scored = |reward: f32, gated_by: Option<&str>| Verdict::Scored {
        // -0 and 0 are the same reward and must be the same bytes.
        reward: reward + 0.0,
        correct,
        gated_by: gated_by.map(str::to_owned),
    };
    if gated_by.is_some() {
        return Ok(Combined { verdict: scored(rules.floor, gated_by), costs: Vec::new(), tier: None });
    }
    if parts.iter().all(|part| part.value.is_none()) {
        return Err("no component applies to the tags of this prompt".into());
    }
    let seen = Seen { parts, tags };
    let tier = fallen(&rules.tiers, &seen)?;
    let mut reward = sum::weighted(parts)?.clamp(rules.clip[0], rules.clip[1]);
    if reward.is_nan() {
        return Err("the weighted sum is not a number".into());
    }
    if let Some(safety) = &rules.safety {
        reward = piecewise(reward, safety, &seen)?;
    }
    if !rules.tiers.is_empty() {
        let step = tier.as_ref().map_or(0.0, |hit| TIER_STEP * f32::from(hit.tier));
        reward = reward.clamp(-1.0, 1.0) - step;
    }
    let costs = rules.costs.iter().map(|cost| cost.of(&seen)).collect::<Result<_, _>>()?;
    Ok(Combined { verdict: scored(reward, None), costs, tier })
}

fn fallen(tiers: &[Tier], seen: &Seen<'_>) -> Result<Option<TierHit>, String> {
    for tier in tiers {
        if tier.condition.holds(seen).map_err(|why| format!("tier {}: {why}", tier.name))? {
            return Ok(Some(TierHit { name: tier.name.clone(), tier: tier.tier }));
        }
    }
    Ok(None)
}

fn piecewise(helpful: f32, safety: &Safety, seen: &Seen<'_>) -> Result<f32, String> {
    let score = safety.score.value(seen).map_err(|why| format!("safety: {why}"))?;
    let at_stake = safety.tags.iter().any(|tag| seen.tags.contains(tag));
    match score.map(|score| score as f32) {
        Some(score) if at_stake => Ok(score),
        Some(score) if score < safety.floor => Ok(score.min(helpful)),
        Some(_) => Ok(helpful),
        None if at_stake => {
            Err("safety: the score does not apply to a prompt where safety is at stake".into())
        }
        None => Ok(helpful),
    }
}

impl Cost {
    fn of(&self, seen: &Seen<'_>) -> Result<CostScore, String> {
        let name = self.name.clone();
        if !self.on.applies(seen.tags) {
            return Ok(CostScore { name, value: None });
        }
        let value = self.expr.value(seen).map_err(|why| format!("cost {}: {why}", self.name))?;
        match value {
            Some(value) if value < 0.0 => Err(format!("cost {}: {value} is negative", self.name)),
            value => Ok(CostScore { name, value: value.map(|value| value as f32 + 0.0) }),
        }
    }
}
