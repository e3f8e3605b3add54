//! The real model behind [`PolicyTrainer`]: the transformer that also samples.

use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_model::{
    LogProbs, ParamLayout, Params, PolicyWeights, Purpose, Tape, Target, TileRows, TrainBatch, Transformer,
};
use freewheel_types::PolicyVersion;

use crate::trainer::{PackedBatch, PolicyTrainer, TokenGradients, TokenLogProbs};

/// A transformer packed for training.
pub struct TransformerTrainer {
    weights: PolicyWeights,
    threads: Threads,
}

impl TransformerTrainer {
    /// Packs `params`.
    pub fn new(model: &Arc<Transformer>, params: &Params, threads: Threads) -> Self {
        let version = PolicyVersion::default();
        Self { weights: PolicyWeights::pack(model, params, version, Purpose::Training, &threads), threads }
    }

    /// Leaves the image encoder out of training if `frozen`; its gradient is zero then.
    pub fn freeze_vision(mut self, frozen: bool) -> Self {
        self.weights.freeze_vision(frozen);
        self
    }

    fn forward(&self, batch: &PackedBatch) -> (Tape, Vec<Target>, TokenLogProbs) {
        let tiles: Vec<TileRows> =
            batch.tiles.iter().filter_map(|tile| tile.rows_in(0, batch.tokens.len())).collect();
        let train = TrainBatch {
            tokens: &batch.tokens,
            seqs: &batch.seqs,
            replay: batch.replay.as_deref(),
            tiles: &tiles,
        };
        let tape = self.weights.forward_train(&self.threads, &train);
        let targets: Vec<Target> =
            batch.targets.iter().map(|t| Target { row: t.row, token: t.token }).collect();
        let LogProbs { logprobs, entropies } =
            tape.log_probs(&self.threads, &self.weights, &targets, &batch.sampling);
        (tape, targets, TokenLogProbs { logprobs, entropies })
    }
}

impl PolicyTrainer for TransformerTrainer {
    fn layout(&self) -> &Arc<ParamLayout> {
        self.weights.model().layout()
    }

    fn load(&mut self, params: &Params, version: PolicyVersion) {
        self.weights.repack(params, version, &self.threads);
    }

    fn log_probs(&self, batch: &PackedBatch) -> TokenLogProbs {
        self.forward(batch).2
    }

    fn accumulate(
        &self,
        batch: &PackedBatch,
        loss: &mut dyn FnMut(&TokenLogProbs) -> TokenGradients,
        grads: &mut [f32],
    ) {
        let (tape, targets, found) = self.forward(batch);
        let TokenGradients { d_logprobs, d_entropies } = loss(&found);
        let sampling = &batch.sampling;
        tape.backward(
            &self.threads,
            &self.weights,
            &targets,
            sampling,
            &d_logprobs,
            d_entropies.as_deref(),
            grads,
        );
    }
}
