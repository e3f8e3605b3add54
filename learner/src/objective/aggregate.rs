//! From per-token terms to one number: the aggregations A1 to A5.
//!
//! Each is a weight per sequence that depends on batch-wide constants only. The constants are known before the first
//! micro-batch (they come from masks and lengths), so any split of a batch gives the same objective.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How per-token terms become the loss. N = sequences, T = live tokens of a sequence, P = prompts in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossAggregation {
    /// A1, DAPO: sum over all tokens / all tokens of the batch.
    TokenMean,
    /// A2, GRPO: mean over sequences of the mean over tokens.
    SeqMeanTokenMean,
    /// A3: mean over sequences of the sum over tokens.
    SeqMeanTokenSum,
    /// A4, Dr. GRPO: sum over all tokens / (N · the run's longest completion), no length bias.
    FixedLength,
    /// A5, ScaleRL: mean over prompts of the token mean over the prompt's group.
    PromptMean,
}

/// Constants of the whole batch, all micro-batches together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchTotals {
    /// Live tokens; see [`live_tokens`](super::live_tokens). Filters that come later (clipping, rejection) do not shrink it.
    pub tokens: u64,
    /// Sequences.
    pub sequences: u64,
    /// Prompt groups.
    pub prompts: u64,
    /// Longest completion the run allows (`max_new_tokens`), a constant of the run.
    pub length_max: u64,
}

impl LossAggregation {
    /// Weight of every token term of a sequence with `tokens` live tokens in a group with `group_tokens`.
    pub fn weight(self, totals: &BatchTotals, tokens: u64, group_tokens: u64) -> f64 {
        let count = match self {
            Self::TokenMean => totals.tokens as f64,
            Self::SeqMeanTokenMean => totals.sequences as f64 * tokens as f64,
            Self::SeqMeanTokenSum => totals.sequences as f64,
            Self::FixedLength => totals.sequences as f64 * totals.length_max as f64,
            Self::PromptMean => totals.prompts as f64 * group_tokens as f64,
        };
        assert!(
            count > 0.0,
            "batch totals are counted before the loss: {totals:?}, group tokens {group_tokens}"
        );
        1.0 / count
    }
}
