//! What the step loop needs of a model: log-probs of packed sequences, and their gradient.
//!
//! The seam between training logic and transformer: tests put a bigram table behind it, a GPU may come behind it later.

use std::sync::Arc;

use freewheel_model::vision::ImageTile;
use freewheel_model::{ParamLayout, Params, Tokenizer, TrainSeq, UpdatePart};
use freewheel_types::{PolicyVersion, PromptBody, SamplingParams};

/// Sequences of one micro-batch, packed without padding.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedBatch {
    /// Input tokens of all sequences, one after the other. A sequence's last sampled token is not among them: nothing
    /// is predicted from it.
    pub tokens: Vec<u32>,
    /// Rows of each sequence; a branch leaves out the prompt, which it shares with the sequence it branches off from.
    pub seqs: Vec<TrainSeq>,
    /// Experts to use, `[tokens, moe_layers, top_k]`; `None` lets the router choose.
    pub replay: Option<Vec<u16>>,
    /// Tiles of images; a tile's position is its first row in `tokens`.
    pub tiles: Vec<ImageTile>,
    /// What is predicted: for each sequence in order, its completion tokens in order; where `soft`, several tokens for each.
    pub targets: Vec<PackedTarget>,
    /// Whether rows have several targets, whose log-probs (without entropies) and gradients are then had from one product with the
    /// head. All logits of the batch are held at once, and nothing but the softmax at temperature 1 is known.
    pub soft: bool,
    /// The transform all its tokens were drawn with.
    pub sampling: SamplingParams,
    /// Which sequence of the caller's list each packed sequence is, and where its targets lie.
    pub sequences: Vec<PackedSequence>,
    /// Its part in the update that the whole list makes.
    pub part: UpdatePart,
}

/// How many tokens went to each expert.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExpertLoad {
    /// Experts of a layer.
    pub experts: usize,
    /// Choices `[MoE layers, experts]`.
    pub counts: Vec<u64>,
}

impl ExpertLoad {
    /// Adds the choices `ids [T, layers, top_k]` of the rows of `batch` that count in it.
    pub fn add(&mut self, batch: &PackedBatch, ids: &[u16], layers: usize, experts: usize) {
        self.experts = experts;
        self.counts.resize(layers * experts, 0);
        let (per_row, top_k) = (ids.len() / batch.tokens.len(), ids.len() / batch.tokens.len() / layers);
        let repeats = |row: &usize| batch.part.repeats.iter().any(|repeat| repeat.contains(row));
        for row in (0..batch.tokens.len()).filter(|row| !repeats(row)) {
            for (i, &id) in ids[row * per_row..][..per_row].iter().enumerate() {
                self.counts[i / top_k * experts + usize::from(id)] += 1;
            }
        }
    }

    /// MaxVio of the worst layer: the largest load over the mean one, less 1; 0 is balanced. `None` if nothing was counted.
    pub fn max_violation(&self) -> Option<f64> {
        let layers = self.counts.chunks_exact(self.experts.max(1)).filter_map(|layer| {
            let (most, sum) = (layer.iter().max()?, layer.iter().sum::<u64>());
            (sum > 0).then(|| *most as f64 * layer.len() as f64 / sum as f64 - 1.0)
        });
        layers.max_by(f64::total_cmp)
    }
}

/// One predicted token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedTarget {
    /// Row of `tokens` whose logits predict it.
    pub row: usize,
    /// The token.
    pub token: u32,
}

/// One sequence in a micro-batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedSequence {
    /// Its place in the list that was packed.
    pub index: usize,
    /// Its targets.
    pub targets: std::ops::Range<usize>,
}

/// Log-prob and entropy at each target.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogProbs {
    /// Log-prob of each target, nats.
    pub logprobs: Vec<f32>,
    /// Entropy of the distribution each target was predicted from, nats.
    pub entropies: Vec<f32>,
}

/// Gradient of the loss at each target.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenGradients {
    /// d loss / d log-prob.
    pub d_logprobs: Vec<f32>,
    /// d loss / d entropy, where the loss has an entropy term.
    pub d_entropies: Option<Vec<f32>>,
}

/// What the prompts of a model show beside their tokens.
pub trait PromptImages: Send + Sync {
    /// Tiles of the images in `prompt`, at their places in `ids`, which it was encoded to.
    ///
    /// # Errors
    /// What is wrong with them, in words.
    fn tiles_of(&self, prompt: &PromptBody, ids: &[u32]) -> Result<Vec<ImageTile>, String>;
}

impl PromptImages for Tokenizer {
    fn tiles_of(&self, prompt: &PromptBody, ids: &[u32]) -> Result<Vec<ImageTile>, String> {
        Tokenizer::tiles_of(self, prompt, ids).map_err(|error| error.to_string())
    }
}

/// A model that can be trained. Results depend on nothing but weights and batch: same bits on every call.
pub trait PolicyTrainer: Send {
    /// Names and places of the parameters.
    fn layout(&self) -> &Arc<ParamLayout>;

    /// Takes new weights.
    fn load(&mut self, params: &Params, version: PolicyVersion);

    /// Forward only.
    fn log_probs(&self, batch: &PackedBatch) -> TokenLogProbs;

    /// Forward, `loss` on its result, backward; adds to `grads`, an arena of [`layout`](Self::layout).
    fn accumulate(
        &self,
        batch: &PackedBatch,
        loss: &mut dyn FnMut(&TokenLogProbs) -> TokenGradients,
        grads: &mut [f32],
    );

    /// Where the rows of `batches` that count go, where a loss over a whole update asks for it before the first gradient: see
    /// [`UpdatePart::choices`]. `None` where none does.
    fn foresee_experts(&self, _batches: &[PackedBatch]) -> Option<ExpertLoad> {
        None
    }

    /// Where the tokens of all calls of [`accumulate`](Self::accumulate) since the last call went; `None` for a model without experts.
    fn take_expert_load(&mut self) -> Option<ExpertLoad> {
        None
    }
}
