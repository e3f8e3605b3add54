//! Rewards that are not yes or no.
//!
//! A sample counts as right where its reward is above what the prompt's tags get on average, so that skill, difficulty and the band mean something. A group
//! teaches by how far its rewards lie apart and not by their mean: prompts are chosen and retired by that.

use serde::{Deserialize, Serialize};

use super::{PromptPool, SUCCESS_OVER};

/// Rewards nearer than this are the same; as where the learner drops a group.
const SAME: f64 = 1e-6;
/// Groups over which a prompt's deviation is averaged.
const SPREAD_OVER: f64 = 4.0;

/// How far the rewards of a prompt's groups lie apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Spread {
    /// Moving mean of the deviation within a group.
    pub(super) std: f64,
    /// Samples since a group's rewards last differed.
    pub(super) alike: u64,
}

/// What the groups of a tag get.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Grade {
    /// Moving mean of the reward.
    mean: f64,
    /// Moving mean of the deviation within a group.
    std: f64,
}

/// Whether rewards are all the same.
pub(super) fn alike(rewards: &[f32]) -> bool {
    let (low, high) = rewards.iter().fold((f32::MAX, f32::MIN), |(low, high), r| (low.min(*r), high.max(*r)));
    f64::from(high) - f64::from(low) <= SAME
}

impl PromptPool {
    /// Takes in the rewards of a group of prompt `i`; how many are above what its tags get (before the first: above their own mean).
    pub(super) fn grade(&mut self, i: usize, rewards: &[f32]) -> u32 {
        let n = rewards.len() as f64;
        let mean = rewards.iter().map(|r| f64::from(*r)).sum::<f64>() / n;
        let std = (rewards.iter().map(|r| (f64::from(*r) - mean).powi(2)).sum::<f64>() / n).sqrt();
        let reference = self.usual(i, |grade| grade.mean).unwrap_or(mean);
        for tag in &self.prompts[i].tags {
            let grade = self.grades.entry(tag.clone()).or_insert(Grade { mean, std });
            grade.mean += (mean - grade.mean) / SUCCESS_OVER;
            grade.std += (std - grade.std) / SUCCESS_OVER;
        }
        let spread = self.states[i].spread.get_or_insert(Spread { std, alike: 0 });
        spread.std += (std - spread.std) / SPREAD_OVER;
        spread.alike = if alike(rewards) { spread.alike + rewards.len() as u64 } else { 0 };
        rewards.iter().filter(|r| f64::from(**r) > reference).count() as u32
    }

    /// How far the rewards of prompt `i` lie apart beside what is usual for its tags, 0 to 1; `None` where rewards are yes or no, or nothing is known.
    pub(super) fn contrast(&self, i: usize) -> Option<f64> {
        let spread = self.states[i].spread?;
        let usual = self.usual(i, |grade| grade.std).unwrap_or(spread.std);
        Some((spread.std / usual.max(SAME)).min(1.0))
    }

    /// The mean of what the tags of prompt `i` get.
    fn usual(&self, i: usize, of: impl Fn(&Grade) -> f64) -> Option<f64> {
        let known: Vec<f64> =
            self.prompts[i].tags.iter().filter_map(|tag| self.grades.get(tag)).map(of).collect();
        (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
    }
}
