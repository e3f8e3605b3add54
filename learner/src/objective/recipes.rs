//! The table of objectives: each row is a name, its loss and its defaults.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::PolicyLoss;
use super::aggregate::LossAggregation as A;
use super::config::ObjectiveConfig;
use super::correction::Correction;
use super::losses::{
    CappedSurrogate, CappedWeight, ClippedSurrogate, Dppo, Gmpo, M2po, RatioLevel, Region, Regression,
    Reinforce, ReinforceUnbiased, Sapo, Topr, Vespo,
};
use crate::advantage::Advantage;

/// Names of the objectives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// Truncated importance sampling with a stop-gradient weight, the asynchronous default.
    #[default]
    Aipo,
    /// The surrogate min(w, δ)·A: no gradient above δ.
    AipoSurrogate,
    /// Plain policy gradient.
    Reinforce,
    /// Policy gradient weighted by the sequence's importance weight: unbiased off policy, of high variance.
    ReinforceUnbiased,
    /// Policy gradient with a baseline below the mean reward, for off-policy data.
    AsymmetricReinforce,
    /// Clipped surrogate, token mean, a critic's advantage (GAE).
    Ppo,
    /// Clipped surrogate, sequence means, group-normalised advantage.
    Grpo,
    /// GRPO without length and deviation bias.
    DrGrpo,
    /// GRPO with a higher upper clip and token mean.
    Dapo,
    /// GRPO whose ratio is also capped where the advantage is negative.
    TwoSided,
    /// Sequence-level ratio (geometric mean).
    Gspo,
    /// GSPO without length bias.
    Luspo,
    /// Geometric mean of clipped token ratios.
    Gmpo,
    /// Soft gate instead of a clip.
    Sapo,
    /// Capped stop-gradient weight on every token.
    Cispo,
    /// Sequence-product ratio, clipped, leave-one-out advantage.
    Rloo,
    /// Clip around the proximal policy, weighted by proximal over behaviour.
    DecoupledPpo,
    /// Successes unweighted, failures by a truncated sequence weight.
    Topr,
    /// Smooth sequence weight.
    Vespo,
    /// Trust region on probabilities, one-sided by the sign of the advantage.
    Dppo,
    /// Trust region on probabilities, whatever the sign.
    DppoSymmetric,
    /// Second moment of log-ratios bounded over the batch.
    M2po,
    /// Least squares on the log-ratio, around the soft value.
    Oapl,
    /// Least squares on the log-ratio, around the group mean (Kimi k1.5).
    MirrorDescent,
}

/// One row of the table.
pub struct Recipe {
    /// Which one.
    pub objective: Objective,
    /// Name in the config.
    pub name: &'static str,
    /// Default advantage.
    pub advantage: Advantage,
    /// Default aggregation.
    pub aggregation: A,
    /// Default correction.
    pub correction: Correction,
    /// Default of `advantage_shift`.
    pub shift: f64,
    /// Makes the policy loss from checked settings.
    pub build: fn(&ObjectiveConfig) -> Box<dyn PolicyLoss>,
}

impl Objective {
    /// Its table row.
    pub fn recipe(self) -> &'static Recipe {
        RECIPES.iter().find(|recipe| recipe.objective == self).expect("a test holds every objective to a row")
    }
}

const fn row(
    objective: Objective,
    name: &'static str,
    advantage: Advantage,
    aggregation: A,
    build: fn(&ObjectiveConfig) -> Box<dyn PolicyLoss>,
) -> Recipe {
    Recipe { objective, name, advantage, aggregation, correction: Correction::None, shift: 0.0, build }
}

/// Every objective with its defaults.
pub const RECIPES: &[Recipe] = &[
    row(Objective::Aipo, "aipo", Advantage::DrGrpo, A::TokenMean, |c| {
        Box::new(CappedWeight { cap: c.is_cap.unwrap_or(4.0), floor: 0.0 })
    }),
    row(Objective::AipoSurrogate, "aipo_surrogate", Advantage::DrGrpo, A::TokenMean, |c| {
        Box::new(CappedSurrogate { cap: c.is_cap.unwrap_or(4.0) })
    }),
    row(Objective::Reinforce, "reinforce", Advantage::DrGrpo, A::TokenMean, |_| Box::new(Reinforce)),
    row(Objective::ReinforceUnbiased, "reinforce_unbiased", Advantage::DrGrpo, A::TokenMean, |c| {
        Box::new(ReinforceUnbiased { cap: c.is_cap })
    }),
    Recipe {
        shift: -0.1,
        ..row(Objective::AsymmetricReinforce, "asymmetric_reinforce", Advantage::DrGrpo, A::TokenMean, |_| {
            Box::new(Reinforce)
        })
    },
    row(Objective::Ppo, "ppo", Advantage::Gae, A::TokenMean, |c| clip(c, 0.2, 0.2, RatioLevel::Token)),
    row(Objective::Grpo, "grpo", Advantage::Grpo, A::SeqMeanTokenMean, |c| {
        clip(c, 0.2, 0.2, RatioLevel::Token)
    }),
    row(Objective::DrGrpo, "dr_grpo", Advantage::DrGrpo, A::FixedLength, |c| {
        clip(c, 0.2, 0.2, RatioLevel::Token)
    }),
    row(Objective::Dapo, "dapo", Advantage::Grpo, A::TokenMean, |c| clip(c, 0.2, 0.28, RatioLevel::Token)),
    row(Objective::TwoSided, "two_sided", Advantage::Grpo, A::SeqMeanTokenMean, |c| {
        let surrogate = clipped(c, 0.2, 0.2, RatioLevel::Token);
        Box::new(ClippedSurrogate { cap: Some(c.is_cap.unwrap_or(4.0)), ..surrogate })
    }),
    row(Objective::Gspo, "gspo", Advantage::Grpo, A::SeqMeanTokenMean, |c| {
        clip(c, 3e-4, 4e-4, RatioLevel::SequenceMean)
    }),
    row(Objective::Luspo, "luspo", Advantage::Grpo, A::SeqMeanTokenSum, |c| {
        clip(c, 2e-3, 2.5e-3, RatioLevel::SequenceMean)
    }),
    row(Objective::Gmpo, "gmpo", Advantage::Grpo, A::SeqMeanTokenMean, |c| {
        Box::new(Gmpo { low: c.clip_low.unwrap_or(0.4), high: c.clip_high.unwrap_or(0.4) })
    }),
    row(Objective::Sapo, "sapo", Advantage::Grpo, A::SeqMeanTokenMean, |_| {
        Box::new(Sapo { tau_positive: 1.0, tau_negative: 1.05 })
    }),
    row(Objective::Cispo, "cispo", Advantage::Grpo, A::TokenMean, |c| {
        let floor = c.clip_low.map_or(0.0, |low| (1.0 - low).max(0.0));
        Box::new(CappedWeight { cap: c.is_cap.or(c.clip_high.map(|high| 1.0 + high)).unwrap_or(5.0), floor })
    }),
    row(Objective::Rloo, "rloo", Advantage::Rloo, A::SeqMeanTokenMean, |c| {
        clip(c, 0.2, 0.2, RatioLevel::SequenceProduct)
    }),
    Recipe {
        correction: Correction::Full,
        ..row(Objective::DecoupledPpo, "decoupled_ppo", Advantage::Grpo, A::TokenMean, |c| {
            clip(c, 0.2, 0.2, RatioLevel::Token)
        })
    },
    row(Objective::Topr, "topr", Advantage::DrGrpo, A::TokenMean, |c| {
        Box::new(Topr { cap: c.is_cap.unwrap_or(1.0) })
    }),
    row(Objective::Vespo, "vespo", Advantage::Grpo, A::TokenMean, |_| Box::new(Vespo)),
    row(Objective::Dppo, "dppo", Advantage::DrGrpo, A::TokenMean, |c| {
        let (low, high) = (c.clip_low.unwrap_or(0.2), c.clip_high.unwrap_or(0.2));
        Box::new(Dppo { region: Region::Binary { low, high }, cap: c.is_cap.unwrap_or(20.0) })
    }),
    row(Objective::DppoSymmetric, "dppo_symmetric", Advantage::DrGrpo, A::TokenMean, |c| {
        let (low, high) = (c.clip_low.unwrap_or(0.1), c.clip_high.unwrap_or(0.1));
        Box::new(Dppo { region: Region::Symmetric { low, high }, cap: c.is_cap.unwrap_or(20.0) })
    }),
    row(Objective::M2po, "m2po", Advantage::Grpo, A::TokenMean, |_| Box::new(M2po)),
    row(Objective::Oapl, "oapl", Advantage::SoftValue, A::SeqMeanTokenMean, |c| {
        Box::new(Regression { beta: c.regression_beta.unwrap_or(1.0) })
    }),
    row(Objective::MirrorDescent, "mirror_descent", Advantage::DrGrpo, A::SeqMeanTokenMean, |c| {
        Box::new(Regression { beta: c.regression_beta.unwrap_or(1.0) })
    }),
];

fn clip(config: &ObjectiveConfig, low: f64, high: f64, level: RatioLevel) -> Box<dyn PolicyLoss> {
    Box::new(clipped(config, low, high, level))
}

fn clipped(config: &ObjectiveConfig, low: f64, high: f64, level: RatioLevel) -> ClippedSurrogate {
    ClippedSurrogate {
        low: config.clip_low.unwrap_or(low),
        high: config.clip_high.unwrap_or(high),
        dual: config.dual_clip,
        cap: None,
        level,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_found_under_its_name() {
        for recipe in RECIPES {
            let named: Objective = serde_json::from_value(recipe.name.into()).expect(recipe.name);
            assert_eq!(named, recipe.objective);
            assert_eq!(named.recipe().name, recipe.name, "one row each");
        }
        let schema = serde_json::to_value(schemars::schema_for!(Objective)).unwrap();
        let names = schema["oneOf"].as_array().expect("an enum").len();
        assert_eq!(names, RECIPES.len(), "an objective without a row");
    }
}
