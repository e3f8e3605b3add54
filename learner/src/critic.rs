//! The critic of PPO: a value before every token, from a model of its own that is trained beside the policy.
//!
//! It is the policy's transformer at the policy's first weights with a score head of zeros in place of the output head, so every
//! value is 0 at first; its router chooses freely. Trunk and optimiser are its own: the policy's log-probs keep their bits,
//! for one more model in memory. To the learner it is a [`Policy`] that answers with a value where a policy answers with a
//! log-prob.

use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_model::{
    LoadedModel, OutputHead, ParamData, ParamLayout, Params, PolicyWeights, Purpose, Tape, TileRows,
    TrainBatch, Transformer,
};
use freewheel_types::PolicyVersion;

use crate::objective::value_loss;
use crate::policy::Policy;
use crate::trainer::{PackedBatch, PolicyTrainer, TokenGradients, TokenLogProbs};

/// A critic under training.
pub struct Critic {
    /// Its weights, gradient and optimiser; `logprobs` are values here.
    pub model: Policy,
    /// Values move at most this far from those before the batch; `None`: as far as they like.
    pub clip: Option<f64>,
}

/// What the critic of one sequence is to learn. Per-token fields are `[T]`.
#[derive(Clone, Copy, Debug)]
pub struct ValueTargets<'a> {
    /// Values before the batch.
    pub before: &'a [f64],
    /// Returns.
    pub returns: &'a [f64],
    /// True on tokens that count.
    pub live: &'a [bool],
}

impl Critic {
    /// Value before each target of `batch`.
    pub fn values(&self, batch: &PackedBatch) -> TokenLogProbs {
        self.model.log_probs(batch)
    }

    /// Adds the gradient of the packed sequences' loss, a mean over `tokens`; `targets` gives those of a sequence by its index in
    /// the packed list. Returns their part of the loss.
    pub fn accumulate<'a>(
        &mut self,
        batch: &PackedBatch,
        tokens: u64,
        targets: &dyn Fn(usize) -> ValueTargets<'a>,
    ) -> f64 {
        let (clip, mut sum) = (self.clip, 0.0);
        self.model.accumulate(batch, &mut |found| {
            let mut gradients = TokenGradients::default();
            for sequence in &batch.sequences {
                let wanted = targets(sequence.index);
                for (t, &value) in found.logprobs[sequence.targets.clone()].iter().enumerate() {
                    if !wanted.live[t] {
                        gradients.d_logprobs.push(0.0);
                        continue;
                    }
                    let (loss, slope) = value_loss(value.into(), wanted.before[t], wanted.returns[t], clip);
                    sum += loss / tokens as f64;
                    gradients.d_logprobs.push((slope / tokens as f64) as f32);
                }
            }
            gradients
        });
        sum
    }
}

/// The transformer of a critic.
pub struct TransformerCritic {
    weights: PolicyWeights,
    threads: Threads,
}

impl TransformerCritic {
    /// The critic that begins at the weights of `model`, and those weights.
    pub fn new(model: &LoadedModel, threads: Threads) -> (Self, Params) {
        let mut spec = model.model.spec().clone();
        spec.head = OutputHead::Classifier { labels: 1 };
        let critic = Transformer::new(spec);
        let params = start(critic.layout(), &model.params);
        let weights =
            PolicyWeights::pack(&critic, &params, PolicyVersion::default(), Purpose::Training, &threads);
        (Self { weights, threads }, params)
    }

    fn forward(&self, batch: &PackedBatch) -> (Tape, Vec<usize>, Vec<f32>) {
        let tiles: Vec<TileRows> =
            batch.tiles.iter().filter_map(|tile| tile.rows_in(0, batch.tokens.len())).collect();
        let train = TrainBatch { tokens: &batch.tokens, seqs: &batch.seqs, replay: None, tiles: &tiles };
        let tape = self.weights.forward_train(&self.threads, &train);
        // The rollouts of a group share the row before their first token.
        let mut rows: Vec<usize> = batch.targets.iter().map(|target| target.row).collect();
        rows.sort_unstable();
        rows.dedup();
        let values = tape.logits(&self.threads, &self.weights, &rows);
        (tape, rows, values)
    }
}

/// Tensors of the same name as in `policy`, zeros for the rest.
fn start(layout: &Arc<ParamLayout>, policy: &Params) -> Params {
    let mut values = vec![0.0; layout.total];
    for tensor in &layout.tensors {
        if let Some(source) = policy.layout.get(&tensor.name) {
            values[tensor.range()].copy_from_slice(&policy.range_f32(source.range()));
        }
    }
    Params { layout: layout.clone(), data: ParamData::F32(values) }.cast(policy.dtype())
}

impl PolicyTrainer for TransformerCritic {
    fn layout(&self) -> &Arc<ParamLayout> {
        self.weights.model().layout()
    }

    fn load(&mut self, params: &Params, version: PolicyVersion) {
        self.weights.repack(params, version, &self.threads);
    }

    fn log_probs(&self, batch: &PackedBatch) -> TokenLogProbs {
        let (_, rows, values) = self.forward(batch);
        spread(batch, &rows, &values)
    }

    fn accumulate(
        &self,
        batch: &PackedBatch,
        loss: &mut dyn FnMut(&TokenLogProbs) -> TokenGradients,
        grads: &mut [f32],
    ) {
        let (tape, rows, values) = self.forward(batch);
        let gradients = loss(&spread(batch, &rows, &values));
        let mut d_values = vec![0.0; rows.len()];
        for (target, d) in batch.targets.iter().zip(&gradients.d_logprobs) {
            let at = rows.binary_search(&target.row).expect("rows are those of the targets");
            d_values[at] += d;
        }
        tape.backward_logits(&self.threads, &self.weights, &rows, &d_values, grads);
    }
}

/// The value of each target, from those of the rows.
fn spread(batch: &PackedBatch, rows: &[usize], values: &[f32]) -> TokenLogProbs {
    let of = |row: usize| values[rows.binary_search(&row).expect("rows are those of the targets")];
    TokenLogProbs {
        logprobs: batch.targets.iter().map(|target| of(target.row)).collect(),
        entropies: vec![0.0; batch.targets.len()],
    }
}
