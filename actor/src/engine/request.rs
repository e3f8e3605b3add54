//! What goes into the engine and what comes out.

use std::sync::Arc;

use freewheel_model::vision::ImageTile;
use freewheel_types::{ExpertTrace, FinishReason, RolloutId, SamplingParams, VersionSpan};

/// One prompt, one or more samples.
#[derive(Clone, Debug)]
pub struct Request {
    /// The caller's number for it, for [`Engine::cancel`](super::Engine::cancel) and in [`Finished`].
    pub id: u64,
    /// Prompt token ids, at least one.
    pub prompt_ids: Vec<u32>,
    /// Tiles of images that some of the prompt's tokens stand for.
    pub tiles: Vec<ImageTile>,
    /// Samples to draw, at least one.
    pub samples: Vec<SampleSpec>,
    /// Seed of the draws: token `t` of a sample uses draw `t` of stream `(seed, rollout id)`.
    pub seed: u64,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Most tokens to draw, at least one; cut to what the context leaves.
    pub max_new_tokens: usize,
    /// What ends a sample early.
    pub stop: StopSpec,
}

/// One sample of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleSpec {
    /// Its identity, which keys its random numbers.
    pub rollout: RolloutId,
}

/// What ends a sample before `max_new_tokens`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopSpec {
    /// Token ids; the one drawn stays in the output.
    pub ids: Arc<[u32]>,
    /// Strings; the text is cut before the first that appears, the tokens stay as drawn.
    pub strings: Arc<[String]>,
}

/// A sample that is over.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// [`Request::id`].
    pub request: u64,
    /// Which sample.
    pub rollout: RolloutId,
    /// The prompt, shared by the samples of a request.
    pub prompt_ids: Arc<[u32]>,
    /// Drawn tokens `[T]`.
    pub output_ids: Vec<u32>,
    /// Log-prob of each as drawn `[T]`, nats.
    pub behaviour_logprobs: Vec<f32>,
    /// Which version drew which tokens. Starts with a span of no tokens if an older version computed (part of) the
    /// prompt than the one that drew the first token.
    pub versions: Vec<VersionSpan>,
    /// Experts chosen for prompt and drawn tokens but the last, as they were when the next token was drawn.
    pub experts: ExpertTrace,
    /// Text without special tokens, cut before a stop string.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Seconds from the first draw to the last.
    pub generation_s: f32,
}
