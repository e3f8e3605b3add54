//! Micro-batches: whole sequences, side by side, within a token budget, without padding.
//!
//! The prompt of a group is computed once a micro-batch: rollouts that follow another one of the same prompt are packed
//! as branches of it.
//!
//! Sequences are taken in the order given, so the split is a function of the batch alone. A sequence is never cut:
//! sequence-level objectives see all of it. One longer than the budget gets a micro-batch of its own.

use freewheel_model::vision::ImageTile;
use freewheel_model::{TrainSeq, UpdatePart};
use freewheel_types::SamplingParams;

use crate::trainer::{PackedBatch, PackedSequence, PackedTarget};

/// One sequence to train on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainSequence<'a> {
    /// Prompt tokens, at least 1.
    pub prompt_ids: &'a [u32],
    /// Completion tokens, at least 1.
    pub output_ids: &'a [u32],
    /// Tiles of the prompt's images, at their positions.
    pub tiles: &'a [ImageTile],
    /// Recorded experts, `[prompt + output - 1, moe_layers, top_k]`.
    pub experts: Option<&'a [u16]>,
    /// How the tokens were drawn.
    pub sampling: SamplingParams,
}

impl TrainSequence<'_> {
    /// Input tokens: all but the last.
    pub fn rows(&self) -> usize {
        self.prompt_ids.len() + self.output_ids.len() - 1
    }
}

/// Splits `sequences` into micro-batches of at most `budget` rows (or one sequence). Sequences drawn with another
/// transform, or with and without recorded experts, do not share a micro-batch.
pub fn pack(sequences: &[TrainSequence<'_>], budget: usize) -> Vec<PackedBatch> {
    let mut batches: Vec<PackedBatch> = Vec::new();
    let mut trunk: Option<Trunk> = None;
    for (index, sequence) in sequences.iter().enumerate() {
        let shared = trunk.filter(|trunk| shares_prompt(&sequences[trunk.index], sequence));
        let rows = sequence.rows() - shared.map_or(0, |_| sequence.prompt_ids.len());
        let fits = batches.last().is_some_and(|batch| {
            batch.tokens.len() + rows <= budget
                && batch.sampling == sequence.sampling
                && batch.replay.is_some() == sequence.experts.is_some()
        });
        if !fits {
            batches.push(PackedBatch {
                tokens: Vec::new(),
                seqs: Vec::new(),
                replay: sequence.experts.map(|_| Vec::new()),
                tiles: Vec::new(),
                targets: Vec::new(),
                soft: false,
                sampling: sequence.sampling,
                sequences: Vec::new(),
                part: UpdatePart::default(),
            });
        }
        let batch = batches.last_mut().expect("one was just added");
        match shared.filter(|_| fits) {
            Some(trunk) => push_branch(batch, index, sequence, trunk),
            None => {
                let whole = push_whole(batch, index, sequence);
                // The trunk could have lent the prompt: its rows count there.
                let prompt = whole.first_row..whole.first_row + sequence.prompt_ids.len();
                batch.part.repeats.extend(shared.map(|_| prompt));
                trunk = Some(whole);
            }
        }
    }
    let repeated = |batch: &PackedBatch| batch.part.repeats.iter().map(|rows| rows.len()).sum::<usize>();
    let rows: usize = batches.iter().map(|batch| batch.tokens.len() - repeated(batch)).sum();
    batches.iter_mut().for_each(|batch| batch.part.rows = rows);
    batches
}

/// The sequence of a micro-batch that others may branch off from.
#[derive(Clone, Copy)]
struct Trunk {
    /// Its place in the list that is packed.
    index: usize,
    first_row: usize,
}

/// Whether the prompt's rows of `trunk` are also those of `sequence`.
fn shares_prompt(trunk: &TrainSequence<'_>, sequence: &TrainSequence<'_>) -> bool {
    let prompt = sequence.prompt_ids;
    let prompt_experts = |of: &TrainSequence<'_>| -> Option<Vec<u16>> {
        let experts = of.experts?;
        Some(experts[..experts.len() / of.rows() * prompt.len()].to_vec())
    };
    let same_tiles = || {
        let tiles = trunk.tiles.iter().zip(sequence.tiles);
        trunk.tiles.len() == sequence.tiles.len() && tiles.into_iter().all(|(a, b)| a.shows_the_same(b))
    };
    trunk.prompt_ids == prompt && same_tiles() && prompt_experts(trunk) == prompt_experts(sequence)
}

fn push_whole(batch: &mut PackedBatch, index: usize, sequence: &TrainSequence<'_>) -> Trunk {
    let first_row = batch.tokens.len();
    let prompt = sequence.prompt_ids.len();
    let placed = |tile: &ImageTile| ImageTile { position: first_row + tile.position, ..tile.clone() };
    batch.tiles.extend(sequence.tiles.iter().map(placed));
    batch.tokens.extend(sequence.prompt_ids);
    push_rows(batch, index, sequence, 0, first_row + prompt - 1);
    Trunk { index, first_row }
}

fn push_branch(batch: &mut PackedBatch, index: usize, sequence: &TrainSequence<'_>, trunk: Trunk) {
    let prompt = sequence.prompt_ids.len();
    push_rows(batch, index, sequence, prompt, trunk.first_row + prompt - 1);
}

/// Adds the rows of the completion, after those of the prompt if `position` is 0; `before` is the prompt's last row.
fn push_rows(
    batch: &mut PackedBatch,
    index: usize,
    sequence: &TrainSequence<'_>,
    position: usize,
    before: usize,
) {
    let output = sequence.output_ids;
    let (first, first_target) = (batch.tokens.len(), batch.targets.len());
    batch.tokens.extend(&output[..output.len() - 1]);
    if sequence.rows() > position {
        batch.seqs.push(TrainSeq { position, rows: sequence.rows() - position });
    }
    if let (Some(replay), Some(experts)) = (&mut batch.replay, sequence.experts) {
        replay.extend(&experts[experts.len() / sequence.rows() * position..]);
    }
    let rows = std::iter::once(before).chain(first..);
    batch.targets.extend(output.iter().zip(rows).map(|(&token, row)| PackedTarget { row, token }));
    batch.sequences.push(PackedSequence { index, targets: first_target..batch.targets.len() });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sequence<'a>(
        ids: &'a [u32],
        first: usize,
        prompt: usize,
        output: usize,
        hot: bool,
    ) -> TrainSequence<'a> {
        TrainSequence {
            prompt_ids: &ids[first..first + prompt],
            output_ids: &ids[first + prompt..first + prompt + output],
            tiles: &[],
            experts: None,
            sampling: SamplingParams { temperature: if hot { 1.0 } else { 0.5 }, ..Default::default() },
        }
    }

    proptest! {
        #[test]
        fn every_token_is_predicted_once_from_its_own_prefix(
            shapes in prop::collection::vec((0usize..3, 1usize..4, 1usize..9, any::<bool>()), 1..20),
            budget in 1usize..40,
        ) {
            let ids: Vec<u32> = (0..20).collect();
            let sequences: Vec<TrainSequence> =
                shapes.iter().map(|&(first, p, t, hot)| sequence(&ids, first, p, t, hot)).collect();
            let batches = pack(&sequences, budget);
            let mut seen = 0;
            for batch in &batches {
                prop_assert!(batch.tokens.len() <= budget || batch.sequences.len() == 1);
                // What every row of the batch has before it, branches included.
                let mut prefixes: Vec<Vec<u32>> = Vec::new();
                let mut trunk = 0;
                for seq in &batch.seqs {
                    let first = prefixes.len();
                    if seq.position == 0 { trunk = first }
                    for i in 0..seq.rows {
                        let before = match (i, seq.position) {
                            (0, 0) => Vec::new(),
                            (0, position) => prefixes[trunk + position - 1].clone(),
                            _ => prefixes[first + i - 1].clone(),
                        };
                        prefixes.push([before, vec![batch.tokens[first + i]]].concat());
                    }
                }
                prop_assert_eq!(prefixes.len(), batch.tokens.len());
                for packed in &batch.sequences {
                    prop_assert_eq!(packed.index, seen, "order is kept");
                    let source = &sequences[packed.index];
                    prop_assert_eq!(batch.sampling, source.sampling);
                    let targets = &batch.targets[packed.targets.clone()];
                    prop_assert_eq!(targets.len(), source.output_ids.len());
                    for (i, target) in targets.iter().enumerate() {
                        prop_assert_eq!(target.token, source.output_ids[i]);
                        let prefix = [source.prompt_ids, &source.output_ids[..i]].concat();
                        prop_assert_eq!(&prefixes[target.row], &prefix);
                    }
                    seen += 1;
                }
            }
            prop_assert_eq!(seen, sequences.len());
        }
    }

    #[test]
    fn a_group_computes_its_prompt_once() {
        let ids: Vec<u32> = (0..20).collect();
        let group: Vec<_> = [4, 1, 6].map(|output| sequence(&ids, 0, 5, output, true)).to_vec();
        let [batch] = &pack(&group, 100)[..] else { panic!("one micro-batch") };
        assert_eq!(batch.tokens.len(), 5 + 3 + 5, "a completion's last token is no input");
        let branch = TrainSeq { position: 5, rows: 5 };
        assert_eq!(batch.seqs, [TrainSeq::whole(8), branch], "one token is predicted from the prompt alone");
    }

    #[test]
    fn a_prompt_counts_once_however_the_list_is_split() {
        let ids: Vec<u32> = (0..20).collect();
        let group: Vec<_> = [4, 1, 6].map(|output| sequence(&ids, 0, 5, output, true)).to_vec();
        for budget in [1, 9, 13, 100] {
            let batches = pack(&group, budget);
            assert!(batches.iter().all(|batch| batch.part.rows == 13), "budget {budget}");
            let repeats: Vec<_> = batches.iter().flat_map(|batch| &batch.part.repeats).cloned().collect();
            assert_eq!(repeats, vec![0..5; batches.len() - 1], "budget {budget}");
        }
    }

    #[test]
    fn prompts_routed_otherwise_are_not_shared() {
        let ids: Vec<u32> = (0..20).collect();
        let (one, other) = (vec![1u16; 8], [vec![1; 4], vec![2; 4]].concat());
        let with = |experts| TrainSequence { experts, ..sequence(&ids, 0, 5, 4, true) };
        let rows = |a, b| pack(&[with(Some(a)), with(Some(b))], 100)[0].tokens.len();
        assert_eq!(rows(&one, &one), 8 + 3);
        assert_eq!(rows(&one, &other), 8 + 8);
    }
}
