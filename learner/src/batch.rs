//! A batch as numbers: its sequences, masks, advantages and totals.

use std::sync::Arc;

use freewheel_model::vision::ImageTile;
use freewheel_types::{RolloutId, ScoredRollout};

use crate::advantage::{Sample, advantages, overlong_penalty};
use crate::assembly::Group;
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
    /// Credit of each of its tokens.
    pub advantage: f64,
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
}

impl<'a> Batch<'a> {
    /// Turns groups into samples; `step` is that of the weights being trained, `length_max` the run's longest completion.
    ///
    /// # Panics
    /// If a prompt's images cannot be read: such rollouts are refused when they are received.
    pub fn new(
        groups: &'a [Group],
        config: &ObjectiveConfig,
        images: &dyn PromptImages,
        step: u64,
        length_max: u64,
    ) -> Self {
        let mut samples = Vec::new();
        let mut group_starts = vec![0];
        let credits = advantages(&config.advantage_config(), &shaped_rewards(groups, config, length_max));
        for (group, credits) in groups.iter().zip(credits) {
            let masks: Vec<Vec<bool>> = group.scored().map(|s| loss_mask(s, config)).collect();
            let live =
                |(s, mask): (&ScoredRollout, &Vec<bool>)| live_tokens(mask, &s.rollout.behaviour_logprobs);
            let group_tokens = group.scored().zip(&masks).map(live).sum();
            let mut shown = Shown::default();
            for ((scored, loss_mask), advantage) in group.scored().zip(masks).zip(credits) {
                samples.push(TrainingSample {
                    scored,
                    tiles: shown.tiles(images, scored),
                    advantage: advantage.expect("unscored samples were left out"),
                    loss_mask,
                    group_tokens,
                    same_version_tokens: same_version_tokens(scored, step),
                });
            }
            group_starts.push(samples.len());
        }
        Self { samples, group_starts, length_max }
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
            advantages: vec![self.advantage; policy.len()],
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

/// Rewards of the scored samples of each group, soft overlong punishment included.
fn shaped_rewards(groups: &[Group], config: &ObjectiveConfig, length_max: u64) -> Vec<Vec<Sample>> {
    let sample = |scored: &ScoredRollout| {
        let tokens = scored.rollout.len() as u64;
        let penalty =
            config.overlong_buffer.map_or(0.0, |buffer| overlong_penalty(tokens, length_max, buffer.into()));
        Sample { reward: scored.reward.reward().map(|reward| f64::from(reward) + penalty), tokens }
    };
    groups.iter().map(|group| group.scored().map(sample).collect()).collect()
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
