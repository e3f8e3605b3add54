//! The real model behind [`PolicyTrainer`]: the transformer that also samples.

use std::sync::{Arc, Mutex};

use freewheel_kernels::Threads;
use freewheel_model::{
    LogProbs, ParamLayout, Params, PolicyWeights, Purpose, Tape, Target, TileRows, TrainBatch, Transformer,
};
use freewheel_types::PolicyVersion;

use crate::optim::OptimizerConfig;
use crate::trainer::{ExpertLoad, PackedBatch, PolicyTrainer, TokenGradients, TokenLogProbs};

/// A transformer packed for training.
pub struct TransformerTrainer {
    weights: PolicyWeights,
    threads: Threads,
    /// Filled by every backward pass; a model without experts has none.
    load: Option<Mutex<ExpertLoad>>,
    /// Whether the load-balancing loss is on.
    balances: bool,
}

impl TransformerTrainer {
    /// Packs `params`.
    pub fn new(model: &Arc<Transformer>, params: &Params, threads: Threads) -> Self {
        let version = PolicyVersion::default();
        let load = (model.spec().moe_layers() > 0).then(Mutex::default);
        Self {
            weights: PolicyWeights::pack(model, params, version, Purpose::Training, &threads),
            threads,
            load,
            balances: false,
        }
    }

    /// Trains as `config` asks: losses of routers, recomputation, what is frozen.
    pub fn configured(mut self, config: &OptimizerConfig) -> Self {
        self.weights.set_train_options(config.train_options());
        self.balances = config.balance_coef > 0.0;
        self.freeze_vision(config.freeze_vision)
    }

    /// Leaves the image encoder out of training if `frozen`; its gradient is zero then.
    fn freeze_vision(mut self, frozen: bool) -> Self {
        self.weights.freeze_vision(frozen);
        self
    }

    fn tape(&self, batch: &PackedBatch) -> Tape {
        let tiles: Vec<TileRows> =
            batch.tiles.iter().filter_map(|tile| tile.rows_in(0, batch.tokens.len())).collect();
        let train = TrainBatch {
            tokens: &batch.tokens,
            seqs: &batch.seqs,
            replay: batch.replay.as_deref(),
            tiles: &tiles,
        };
        self.weights.forward_train(&self.threads, &train)
    }

    fn forward(&self, batch: &PackedBatch) -> (Tape, Vec<Target>, TokenLogProbs) {
        let tape = self.tape(batch);
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
        let (mut tape, targets, found) = self.forward(batch);
        tape.set_part(batch.part.clone());
        if let Some(load) = &self.load {
            let spec = self.weights.model().spec();
            let mut load = load.lock().expect("no holder of the lock panics");
            load.add(batch, tape.experts(), spec.moe_layers(), spec.experts());
        }
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

    fn foresee_experts(&self, batches: &[PackedBatch]) -> Option<ExpertLoad> {
        let ask = self.balances && self.load.is_some() && batches.len() > 1;
        ask.then(|| expert_load(&self.weights, batches, |batch| self.tape(batch)))
    }

    fn take_expert_load(&mut self) -> Option<ExpertLoad> {
        let load = self.load.as_mut()?.get_mut().expect("no holder of the lock panics");
        Some(std::mem::take(load))
    }
}

/// Where the rows of `batches` that count go: as recorded where that is replayed, else as a forward pass routes them.
pub(crate) fn expert_load(
    weights: &PolicyWeights,
    batches: &[PackedBatch],
    forward: impl Fn(&PackedBatch) -> Tape,
) -> ExpertLoad {
    let spec = weights.model().spec();
    let mut load = ExpertLoad::default();
    for batch in batches {
        match &batch.replay {
            Some(ids) => load.add(batch, ids, spec.moe_layers(), spec.experts()),
            None => load.add(batch, forward(batch).experts(), spec.moe_layers(), spec.experts()),
        }
    }
    load
}
