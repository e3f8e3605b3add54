//! A batch as numbers: its sequences, masks, advantages and totals.

use std::sync::Arc;

use freewheel_model::vision::ImageTile;
use freewheel_types::{RolloutId, ScoredRollout};

use crate::advantage::{CreditRules, CreditSample, credit, overlong_penalty};
use crate::assembly::Group;
use crate::dual::Duals;
use crate::objective::{BatchTotals, ObjectiveConfig, SequenceInput, live_tokens, widen};
use crate::packing::TrainSequence;
use crate::trainer::PromptImages;

/// One sequence with what the loss needs to know of it. Per-token fields `[T]`, T = completion tokens.
#[derive(Clone, Debug)]
pub struct TrainingSample<'a> {
    /// Where it comes from.
    pub scored: &'a ScoredRollout,
    /// Tiles of its prompt's images.
    pub tiles: Arc<[ImageTile]>,
    /// Its reward, shaping included.
    pub reward: f64,
    /// That of its group's greedy completion, where there is one.
    pub greedy: Option<f64>,
    /// Credit of each token `[T]`; empty until [`Batch::assign_credit`].
    pub advantages: Vec<f64>,
    /// What the critic's values are to become `[T]`, where there is a critic.
    pub returns: Option<Vec<f64>>,
    /// True on tokens to train on.
    pub loss_mask: Vec<bool>,
    /// Live tokens of its group.
    pub group_tokens: u64,
    /// Tokens drawn, with everything before them, by exactly the weights being trained; they come first.
    pub same_version_tokens: usize,
}

/// A batch ready for the forward pass.
#[derive(Clone, Debug)]
pub struct Batch<'a> {
    /// Sequences in batch order: groups as formed, samples by index.
    pub samples: Vec<TrainingSample<'a>>,
    /// First sample of each group, and the end.
    pub group_starts: Vec<usize>,
    /// Longest completion the run allows.
    length_max: u64,
    /// What limited costs take from the credit of each sample; empty without limits.
    charges: Vec<f64>,
    /// What the rest is divided by.
    scale: f64,
}

/// What credit takes from models, one entry a sample `[T]` each.
#[derive(Clone, Debug, Default)]
pub struct CreditSources {
    /// What each token pays for its distance from the reference.
    pub penalties: Option<Vec<Vec<f64>>>,
    /// The critic's values.
    pub values: Option<Vec<Vec<f64>>>,
}

impl<'a> Batch<'a> {
    /// Turns groups into samples; `step` is that of the weights being trained, `length_max` the run's longest completion,
    /// `duals` what weighs costs against rewards.
    ///
    /// # Panics
    /// If a prompt's images cannot be read: such rollouts are refused when they are received.
    pub fn new(
        groups: &'a [Group],
        config: &ObjectiveConfig,
        images: &dyn PromptImages,
        step: u64,
        length_max: u64,
        duals: &Duals,
    ) -> Self {
        let mut samples = Vec::new();
        let mut group_starts = vec![0];
        for group in groups {
            let masks: Vec<Vec<bool>> = group.scored().map(|s| loss_mask(s, config)).collect();
            let live =
                |(s, mask): (&ScoredRollout, &Vec<bool>)| live_tokens(mask, &s.rollout.behaviour_logprobs);
            let group_tokens = group.scored().zip(&masks).map(live).sum();
            let greedy = group.baseline().map(|s| shaped_reward(s, config, length_max));
            let mut shown = Shown::default();
            for (scored, loss_mask) in group.scored().zip(masks) {
                samples.push(TrainingSample {
                    scored,
                    tiles: shown.tiles(images, scored),
                    reward: shaped_reward(scored, config, length_max),
                    greedy,
                    advantages: Vec::new(),
                    returns: None,
                    loss_mask,
                    group_tokens,
                    same_version_tokens: same_version_tokens(scored, step),
                });
            }
            group_starts.push(samples.len());
        }
        let charges = groups.iter().flat_map(|group| duals.charges(group)).collect();
        Self { samples, group_starts, length_max, charges, scale: duals.scale() }
    }

    /// Gives every token its credit.
    pub fn assign_credit(&mut self, rules: &CreditRules, sources: &CreditSources) {
        let sample = |index: usize| {
            let sample = &self.samples[index];
            let of = |source: &Option<Vec<Vec<f64>>>| source.as_ref().map(|rows| rows[index].clone());
            CreditSample {
                reward: sample.reward,
                tokens: sample.scored.rollout.len() as u64,
                greedy: sample.greedy,
                components: sample.scored.reward.components.iter().map(|c| c.value.map(f64::from)).collect(),
                live: sample.live(),
                penalties: of(&sources.penalties),
                values: of(&sources.values),
            }
        };
        let groups = self.group_starts.windows(2);
        let groups: Vec<Vec<CreditSample>> =
            groups.map(|bounds| (bounds[0]..bounds[1]).map(sample).collect()).collect();
        let credits = credit(rules, &groups).into_iter().flatten();
        for (sample, credit) in self.samples.iter_mut().zip(credits) {
            (sample.advantages, sample.returns) = (credit.advantages, credit.returns);
        }
        for (sample, charge) in self.samples.iter_mut().zip(&self.charges) {
            sample.advantages.iter_mut().for_each(|credit| *credit = (*credit - charge) / self.scale);
        }
    }

    /// Mean reward of its samples.
    pub fn reward_mean(&self) -> Option<f64> {
        let sum: f64 = self.samples.iter().map(|sample| sample.reward).sum();
        (!self.samples.is_empty()).then(|| sum / self.samples.len() as f64)
    }

    /// Splits into `parts` runs of whole groups, as even as can be.
    pub fn parts(&self, parts: usize) -> Vec<std::ops::Range<usize>> {
        let groups = self.group_starts.len() - 1;
        let bound = |part: usize| self.group_starts[groups * part / parts];
        (0..parts).map(|part| bound(part)..bound(part + 1)).filter(|range| !range.is_empty()).collect()
    }

    /// Constants of the samples in `range`, which holds whole groups.
    pub fn totals(&self, range: std::ops::Range<usize>) -> BatchTotals {
        let live = |s: &TrainingSample| live_tokens(&s.loss_mask, &s.scored.rollout.behaviour_logprobs);
        BatchTotals {
            tokens: self.samples[range.clone()].iter().map(live).sum(),
            sequences: range.len() as u64,
            prompts: self.group_starts.iter().filter(|start| range.contains(start)).count() as u64,
            length_max: self.length_max,
        }
    }

    /// Rollout ids in order.
    pub fn rollouts(&self) -> Vec<RolloutId> {
        self.samples.iter().map(|sample| sample.scored.rollout.id).collect()
    }
}

impl<'a> TrainingSample<'a> {
    /// As the packer takes it.
    pub fn sequence(&self, router_replay: bool) -> TrainSequence<'_> {
        let rollout = &self.scored.rollout;
        TrainSequence {
            prompt_ids: &rollout.prompt_ids,
            output_ids: &rollout.output_ids,
            tiles: &self.tiles,
            experts: (router_replay && !rollout.experts.ids.is_empty()).then_some(&rollout.experts.ids[..]),
            sampling: rollout.sampling,
        }
    }

    /// True on tokens that count: kept by the mask, drawn with a finite log-prob.
    pub fn live(&self) -> Vec<bool> {
        let behaviour = &self.scored.rollout.behaviour_logprobs;
        self.loss_mask.iter().zip(behaviour).map(|(&mask, logprob)| mask && logprob.is_finite()).collect()
    }

    /// Version that drew each token `[T]`.
    pub fn versions(&self) -> Vec<f64> {
        self.scored.rollout.token_versions().map(|version| version.step as f64).collect()
    }

    /// As the loss takes it.
    pub fn input(
        &self,
        policy: &[f32],
        proximal: Option<&[f32]>,
        reference: Option<&[f32]>,
        entropies: &[f32],
    ) -> SequenceInput {
        SequenceInput {
            id: self.scored.rollout.id.0,
            policy_logprobs: widen(policy),
            behaviour_logprobs: widen(&self.scored.rollout.behaviour_logprobs),
            proximal_logprobs: proximal.map(widen),
            ref_logprobs: reference.map(widen),
            entropies: Some(widen(entropies)),
            advantages: self.advantages.clone(),
            loss_mask: self.loss_mask.clone(),
            group_tokens: self.group_tokens,
        }
    }
}

/// Tiles of the prompt read last: the samples of a group have one prompt, whose images are cut up once.
#[derive(Default)]
struct Shown<'a> {
    last: Option<(&'a ScoredRollout, Arc<[ImageTile]>)>,
}

impl<'a> Shown<'a> {
    fn tiles(&mut self, images: &dyn PromptImages, scored: &'a ScoredRollout) -> Arc<[ImageTile]> {
        let rollout = &scored.rollout;
        if let Some((other, tiles)) = &self.last
            && other.rollout.prompt.body == rollout.prompt.body
            && other.rollout.prompt_ids == rollout.prompt_ids
        {
            return tiles.clone();
        }
        let tiles = images.tiles_of(&rollout.prompt.body, &rollout.prompt_ids);
        let tiles: Arc<[ImageTile]> = tiles.expect("checked when it was received").into();
        self.last = Some((scored, tiles.clone()));
        tiles
    }
}

/// The reward, soft overlong punishment included.
fn shaped_reward(scored: &ScoredRollout, config: &ObjectiveConfig, length_max: u64) -> f64 {
    let tokens = scored.rollout.len() as u64;
    let penalty =
        config.overlong_buffer.map_or(0.0, |buffer| overlong_penalty(tokens, length_max, buffer.into()));
    f64::from(scored.reward.reward().expect("unscored samples were left out")) + penalty
}

fn loss_mask(scored: &ScoredRollout, config: &ObjectiveConfig) -> Vec<bool> {
    let kept = !(config.overlong_filter && scored.rollout.truncated());
    vec![kept; scored.rollout.len()]
}

/// A span of no tokens at the front names the version that prefilled the prompt, if it was another.
fn same_version_tokens(scored: &ScoredRollout, step: u64) -> usize {
    let same = scored.rollout.versions.iter().take_while(|span| span.version.step == step);
    same.map(|span| span.tokens as usize).sum()
}
