//! The real model behind [`PolicyTrainer`]: the transformer that also samples.

use std::sync::{Arc, Mutex};

use freewheel_kernels::Threads;
use freewheel_kernels::softmax::{self, RowStats};
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

impl TransformerTrainer {
    /// Says of what update `batch` is a part, and counts where its tokens went.
    fn note(&self, batch: &PackedBatch, tape: &mut Tape) {
        tape.set_part(batch.part.clone());
        if let Some(load) = &self.load {
            let spec = self.weights.model().spec();
            let mut load = load.lock().expect("no holder of the lock panics");
            load.add(batch, tape.experts(), spec.moe_layers(), spec.experts());
        }
    }

    /// `accumulate` for several targets a row: each row's logits are computed once, and become their own gradient in place:
    /// Σ d · ∂ log p(token) = Σ d · onehot(token) − (Σ d) · p.
    fn accumulate_soft(
        &self,
        batch: &PackedBatch,
        loss: &mut dyn FnMut(&TokenLogProbs) -> TokenGradients,
        grads: &mut [f32],
    ) {
        let (threads, v) = (&self.threads, self.weights.model().spec().vocab_size);
        let mut tape = self.tape(batch);
        self.note(batch, &mut tape);
        let mut rows: Vec<usize> = batch.targets.iter().map(|target| target.row).collect();
        rows.sort_unstable();
        rows.dedup();
        let mut logits = tape.logits(threads, &self.weights, &rows);
        let mut stats = vec![RowStats { max: 0.0, log_sum: 0.0, log_sum_exp: 0.0 }; rows.len()];
        threads.for_each_row_chunk(&mut stats, 1, 1, |first, stats| {
            let rows = logits[first * v..].chunks_exact(v);
            stats.iter_mut().zip(rows).for_each(|(stats, logits)| *stats = softmax::row_stats(logits, 1.0));
        });
        let places: Vec<(usize, usize)> = batch
            .targets
            .iter()
            .map(|target| (rows.binary_search(&target.row).expect("made of them"), target.token as usize))
            .collect();
        let log_prob =
            |&(row, token): &(usize, usize)| softmax::log_prob(&stats[row], logits[row * v + token], 1.0);
        let logprobs = places.iter().map(log_prob).collect();
        let TokenGradients { d_logprobs, .. } = loss(&TokenLogProbs { logprobs, entropies: Vec::new() });
        let mut sums = vec![0.0f32; rows.len()];
        places.iter().zip(&d_logprobs).for_each(|((row, _), d)| sums[*row] += d);
        threads.for_each_row_chunk(&mut logits, v, 1, |first, logits| {
            let mut p = vec![0.0; v];
            for (row, logits) in (first..).zip(logits.chunks_exact_mut(v)) {
                softmax::probabilities(logits, &stats[row], 1.0, &mut p);
                logits.iter_mut().zip(&p).for_each(|(d, p)| *d = -sums[row] * p);
            }
        });
        places.iter().zip(&d_logprobs).for_each(|((row, token), d)| logits[row * v + token] += d);
        tape.backward_logits(threads, &self.weights, &rows, &logits, grads);
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
        if batch.soft {
            return self.accumulate_soft(batch, loss, grads);
        }
        let (mut tape, targets, found) = self.forward(batch);
        self.note(batch, &mut tape);
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

#[cfg(test)]
mod tests {
    use freewheel_model::{InitRequest, InitScale, TokenizerChoice, init_model};
    use freewheel_types::{SamplingParams, WeightsDtype};
    use serde_json::json;

    use super::*;
    use crate::packing::{TrainSequence, pack};
    use crate::trainer::PackedTarget;

    /// A small model, and two answers to one question with three targets a token.
    fn given() -> (TransformerTrainer, PackedBatch) {
        let overrides = [("hidden_size", 32), ("num_hidden_layers", 1), ("num_attention_heads", 2)];
        let more = [("num_key_value_heads", 2), ("head_dim", 16), ("intermediate_size", 32)];
        let sizes = overrides.into_iter().chain(more);
        let request = InitRequest {
            arch: "llama".into(),
            overrides: sizes.map(|(key, value)| (key.to_owned(), json!(value))).collect(),
            seed: 1,
            scale: InitScale::FanIn,
            dtype: WeightsDtype::F32,
            tokenizer: TokenizerChoice::Bytes,
        };
        let model = init_model(&request).unwrap();
        let trainer = TransformerTrainer::new(&model.model, &model.params, Threads::new(2));
        let answers = [vec![7u32, 9, 11], vec![8, 2]];
        let sequence = |output_ids| TrainSequence {
            prompt_ids: &[3, 4, 5],
            output_ids,
            tiles: &[],
            experts: None,
            sampling: SamplingParams::default(),
        };
        let mut batch = pack(&answers.each_ref().map(|ids| sequence(ids)), 100).remove(0);
        let three = |target: &PackedTarget| {
            [0, 20, 40].map(|more| PackedTarget { token: target.token + more, ..*target })
        };
        batch.targets = batch.targets.iter().flat_map(three).collect();
        (trainer, batch)
    }

    #[test]
    fn several_targets_of_a_row_cost_one_product_and_give_the_same() {
        let (trainer, batch) = given();
        let run = |soft: bool| {
            let batch = PackedBatch { soft, ..batch.clone() };
            let mut grads = vec![0.0; trainer.layout().total];
            let mut logprobs = Vec::new();
            let mut loss = |found: &TokenLogProbs| {
                logprobs.clone_from(&found.logprobs);
                let d_logprobs = (0..found.logprobs.len()).map(|i| 0.3 - 0.1 * i as f32).collect();
                TokenGradients { d_logprobs, d_entropies: None }
            };
            trainer.accumulate(&batch, &mut loss, &mut grads);
            (logprobs, grads)
        };
        let ((apart, expected), (together, grads)) = (run(false), run(true));
        assert_eq!(together, apart, "log-probs, to the bit");
        let largest = expected.iter().fold(0.0f32, |most, g| most.max(g.abs()));
        let gap = expected.iter().zip(&grads).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(largest > 0.1 && gap <= 1e-5 * largest, "{gap} of {largest}");
    }
}
