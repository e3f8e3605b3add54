//! One sampled completion with everything the learner needs to trust it.

use serde::{Deserialize, Serialize};

use crate::{ActorId, MAX_GROUP_SIZE, PolicyVersion, Prompt, RolloutId, SamplingParams, TypesError};

/// One sampled completion. All per-token fields have the length of `output_ids`, `[T]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    /// Identity.
    pub id: RolloutId,
    /// Rollouts in its group, so that the learner knows when the group is whole.
    pub group_size: u32,
    /// The prompt it answers.
    pub prompt: Prompt,
    /// Prompt token ids, exactly as the model saw them.
    pub prompt_ids: Vec<u32>,
    /// Sampled token ids `[T]`, the stop token included if one was drawn.
    pub output_ids: Vec<u32>,
    /// Log-prob of each sampled token under the distribution it was drawn from `[T]`, nats.
    pub behaviour_logprobs: Vec<f32>,
    /// Which policy version drew which tokens, in order; the lengths add up to T.
    pub versions: Vec<VersionSpan>,
    /// Experts chosen per token and MoE layer, for router replay; empty for dense models.
    pub experts: ExpertTrace,
    /// Completion text, decoded without special tokens; for verifiers and people, never re-tokenised.
    pub text: String,
    /// Why sampling ended.
    pub finish_reason: FinishReason,
    /// The transform the tokens were drawn with.
    pub sampling: SamplingParams,
    /// Which actor drew it.
    pub actor: ActorId,
    /// Seconds from admission to the last token.
    pub generation_s: f32,
}

/// A run of tokens drawn by one policy version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionSpan {
    /// The version.
    pub version: PolicyVersion,
    /// How many consecutive tokens it drew.
    pub tokens: u32,
}

/// Expert ids, `[tokens, layers, top_k]`, over prompt and completion tokens but the last
/// (whose successor was never asked for). Empty when the model has no router.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertTrace {
    /// MoE layers recorded.
    pub layers: u16,
    /// Experts per token.
    pub top_k: u16,
    /// Row-major ids; models of up to 65,536 experts.
    pub ids: Vec<u16>,
}

/// Why sampling ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-sequence or stop token.
    Stop,
    /// A stop string.
    StopString,
    /// `max_new_tokens` or the context was reached: the answer is truncated.
    Length,
    /// The request was cancelled.
    Cancelled,
}

impl Rollout {
    /// Completion tokens T.
    pub fn len(&self) -> usize {
        self.output_ids.len()
    }

    /// Whether nothing was sampled.
    pub fn is_empty(&self) -> bool {
        self.output_ids.is_empty()
    }

    /// Oldest version that drew a token, `None` for an empty completion.
    pub fn version_oldest(&self) -> Option<PolicyVersion> {
        self.versions.iter().map(|span| span.version).min()
    }

    /// Newest version that drew a token, `None` for an empty completion.
    pub fn version_newest(&self) -> Option<PolicyVersion> {
        self.versions.iter().map(|span| span.version).max()
    }

    /// The version of every token `[T]`.
    pub fn token_versions(&self) -> impl Iterator<Item = PolicyVersion> + '_ {
        self.versions.iter().flat_map(|span| std::iter::repeat_n(span.version, span.tokens as usize))
    }

    /// Whether the answer was cut off.
    pub fn truncated(&self) -> bool {
        self.finish_reason == FinishReason::Length
    }

    /// Checks what a hostile or broken sender could have got wrong.
    ///
    /// # Errors
    /// The first field that is out of range or of the wrong length.
    pub fn validate(&self, vocab_size: u32) -> Result<(), TypesError> {
        let t = self.output_ids.len();
        if !(1..=MAX_GROUP_SIZE).contains(&self.group_size) || self.id.index() >= self.group_size {
            return Err(TypesError::OutOfRange {
                field: "group_size",
                value: format!("{} for sample {}", self.group_size, self.id.index()),
                limit: format!("1 to {MAX_GROUP_SIZE}, above the sample index"),
            });
        }
        let mismatch =
            |what, got: usize| TypesError::Mismatch { what, expected: t.to_string(), got: got.to_string() };
        if self.behaviour_logprobs.len() != t {
            return Err(mismatch("length of behaviour_logprobs", self.behaviour_logprobs.len()));
        }
        let spanned: usize = self.versions.iter().map(|span| span.tokens as usize).sum();
        if spanned != t {
            return Err(mismatch("tokens covered by versions", spanned));
        }
        if t == 0 || self.prompt_ids.is_empty() {
            return Err(TypesError::OutOfRange {
                field: "tokens",
                value: format!("{} prompt, {t} sampled", self.prompt_ids.len()),
                limit: "at least 1 each".to_owned(),
            });
        }
        if let Some(id) = self.prompt_ids.iter().chain(&self.output_ids).find(|id| **id >= vocab_size) {
            return Err(TypesError::OutOfRange {
                field: "token id",
                value: id.to_string(),
                limit: format!("0 to {}", vocab_size - 1),
            });
        }
        // A log-prob is at most 0; rounding may put it a hair above.
        if let Some(x) = self.behaviour_logprobs.iter().find(|x| !(x.is_finite() && **x <= 1e-4)) {
            return Err(TypesError::OutOfRange {
                field: "behaviour_logprobs",
                value: x.to_string(),
                limit: "finite and at most 0".to_owned(),
            });
        }
        self.sampling.validate()
    }
}
