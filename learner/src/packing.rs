//! Micro-batches: whole sequences, side by side, within a token budget, without padding.
//!
//! Sequences are taken in the order given, so the split is a function of the batch alone. A sequence is never cut:
//! sequence-level objectives see all of it. One longer than the budget gets a micro-batch of its own.

use freewheel_types::SamplingParams;

use crate::trainer::{PackedBatch, PackedSequence, PackedTarget};

/// One sequence to train on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainSequence<'a> {
    /// Prompt tokens, at least 1.
    pub prompt_ids: &'a [u32],
    /// Completion tokens, at least 1.
    pub output_ids: &'a [u32],
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

/// Splits `sequences` into micro-batches of at most `budget` tokens (or one sequence). Sequences drawn with another
/// transform, or with and without recorded experts, do not share a micro-batch.
pub fn pack(sequences: &[TrainSequence<'_>], budget: usize) -> Vec<PackedBatch> {
    let mut batches: Vec<PackedBatch> = Vec::new();
    for (index, sequence) in sequences.iter().enumerate() {
        let fits = batches.last().is_some_and(|batch| {
            batch.tokens.len() + sequence.rows() <= budget
                && batch.sampling == sequence.sampling
                && batch.replay.is_some() == sequence.experts.is_some()
        });
        if !fits {
            batches.push(PackedBatch {
                tokens: Vec::new(),
                lengths: Vec::new(),
                replay: sequence.experts.map(|_| Vec::new()),
                targets: Vec::new(),
                sampling: sequence.sampling,
                sequences: Vec::new(),
            });
        }
        push(batches.last_mut().expect("one was just added"), index, sequence);
    }
    batches
}

fn push(batch: &mut PackedBatch, index: usize, sequence: &TrainSequence<'_>) {
    assert!(
        !sequence.prompt_ids.is_empty() && !sequence.output_ids.is_empty(),
        "checked when it was received"
    );
    let first_row = batch.tokens.len();
    let first_target = batch.targets.len();
    let inputs = &sequence.output_ids[..sequence.output_ids.len() - 1];
    batch.tokens.extend(sequence.prompt_ids.iter().chain(inputs));
    batch.lengths.push(sequence.rows());
    if let (Some(replay), Some(experts)) = (&mut batch.replay, sequence.experts) {
        replay.extend(experts);
    }
    let first = first_row + sequence.prompt_ids.len() - 1;
    batch.targets.extend(
        sequence.output_ids.iter().enumerate().map(|(t, &token)| PackedTarget { row: first + t, token }),
    );
    batch.sequences.push(PackedSequence { index, targets: first_target..batch.targets.len() });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_token_is_predicted_once_by_the_row_before_it(
            shapes in prop::collection::vec((1usize..9, 1usize..9, any::<bool>()), 1..20),
            budget in 1usize..40,
        ) {
            let ids: Vec<u32> = (0..20).collect();
            let sequences: Vec<TrainSequence> = shapes.iter().map(|&(p, t, hot)| TrainSequence {
                prompt_ids: &ids[..p],
                output_ids: &ids[p..p + t],
                experts: None,
                sampling: SamplingParams { temperature: if hot { 1.0 } else { 0.5 }, ..Default::default() },
            }).collect();
            let batches = pack(&sequences, budget);
            let mut seen = 0;
            for batch in &batches {
                prop_assert!(batch.tokens.len() <= budget || batch.sequences.len() == 1);
                prop_assert_eq!(batch.lengths.iter().sum::<usize>(), batch.tokens.len());
                let mut first_row = 0;
                for (packed, &rows) in batch.sequences.iter().zip(&batch.lengths) {
                    prop_assert_eq!(packed.index, seen, "order is kept");
                    let source = &sequences[packed.index];
                    prop_assert_eq!(batch.sampling, source.sampling);
                    let targets = &batch.targets[packed.targets.clone()];
                    prop_assert_eq!(targets.len(), source.output_ids.len());
                    for target in targets {
                        // In this data every token is its predecessor plus one.
                        prop_assert_eq!(batch.tokens[target.row] + 1, target.token);
                        prop_assert!((first_row..first_row + rows).contains(&target.row));
                    }
                    first_row += rows;
                    seen += 1;
                }
            }
            prop_assert_eq!(seen, sequences.len());
        }
    }
}
