//! MetaP's coordinate check: how large activations are at each width, at the start and after some updates, with and without it.
//!
//! After Yang et al., *Tensor Programs V* (arXiv 2203.03466), appendix D.1. A mixture of experts of two layers learns a few random
//! tokens; nothing but its width changes.

use freewheel_kernels::Threads;
use freewheel_model::{
    InitRequest, InitScale, LoadedModel, MetaP, PolicyWeights, Purpose, Target, TokenizerChoice, TrainBatch,
    TrainSeq, init_model,
};
use freewheel_types::{CounterRng, PolicyVersion, SamplingParams, WeightsDtype};
use serde_json::json;

use crate::LearnerError;
use crate::fit::FitConfig;
use crate::optim::{Optimizer, OptimizerConfig, StepOutcome};

/// The model that rates would be found on.
const BASE: MetaP = MetaP { width: 64, layers: 2 };
/// Width of a head; widths are multiples of it.
const HEAD: usize = 16;
/// Widths that fit into a few GiB.
const WIDEST: usize = 4096;
/// Tokens of each of the two sequences.
const LENGTH: usize = 24;

/// What is checked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CoordinateCheck {
    /// Width of the residual stream: a multiple of 16, at most 4096.
    pub width: usize,
    /// Whether initial scales and rates are MetaP's, from a base of width 64.
    pub metap: bool,
    /// Updates of AdamW. 1 or more.
    pub updates: usize,
    /// Their learning rate.
    pub learning_rate: f64,
}

/// Root mean squares of activations.
#[derive(Clone, Debug, PartialEq)]
pub struct Coordinates {
    /// Of the residual stream as it enters each layer and as it leaves the last, then of the logits, before any update.
    pub first: Vec<f64>,
    /// The same after the updates; of the logits how far they have moved.
    pub last: Vec<f64>,
}

impl CoordinateCheck {
    /// Trains and looks.
    ///
    /// # Errors
    /// If the width is none that a model can have, there is no update to make, or the gradient stops being finite.
    pub fn run(&self, threads: &Threads) -> Result<Coordinates, LearnerError> {
        let refused = |what: String| LearnerError::Config(what);
        if !(HEAD..=WIDEST).contains(&self.width) || !self.width.is_multiple_of(HEAD) || self.updates == 0 {
            let given = format!("width {} and {} updates", self.width, self.updates);
            return Err(refused(format!(
                "{given}: widths are multiples of {HEAD} up to {WIDEST}, updates 1 or more"
            )));
        }
        let loaded = self.model()?;
        let (model, mut params) = (&loaded.model, loaded.params.clone());
        let mut optimizer = self.optimizer(&loaded);
        let rng = CounterRng::new(1, 1);
        let tokens: Vec<u32> = (0..2 * LENGTH as u64).map(|i| rng.below(i, 200) as u32).collect();
        let seqs = [TrainSeq::whole(LENGTH), TrainSeq::whole(LENGTH)];
        let rows: Vec<usize> = (0..tokens.len()).collect();
        let inner = rows.iter().filter(|row| (*row + 1) % LENGTH != 0);
        let targets: Vec<Target> = inner.map(|&row| Target { row, token: tokens[row + 1] }).collect();
        let slope = vec![-1.0 / targets.len() as f32; targets.len()];
        let mut grads = vec![0.0; params.layout.total];
        let (mut first, mut start) = (Vec::new(), Vec::new());
        for update in 0..=self.updates {
            let version = PolicyVersion::default();
            let weights = PolicyWeights::pack(model, &params, version, Purpose::Training, threads);
            let batch = TrainBatch { tokens: &tokens, seqs: &seqs, replay: None, tiles: &[] };
            let tape = weights.forward_train(threads, &batch);
            let logits = tape.logits(threads, &weights, &rows);
            if update == 0 {
                first = [tape.residual_rms(), vec![rms(logits.iter().map(|&x| f64::from(x)))]].concat();
                start = logits;
            } else if update == self.updates {
                let moved = logits.iter().zip(&start).map(|(now, then)| f64::from(*now) - f64::from(*then));
                return Ok(Coordinates { first, last: [tape.residual_rms(), vec![rms(moved)]].concat() });
            }
            let sampling = SamplingParams::default();
            tape.backward(threads, &weights, &targets, &sampling, &slope, None, &mut grads);
            if let StepOutcome::Refused { .. } = optimizer.step(threads, &mut grads, self.learning_rate) {
                return Err(refused(format!(
                    "update {}: the gradient is not finite; lower the rate",
                    update + 1
                )));
            }
            optimizer.write_weights(threads, &mut params);
        }
        unreachable!("the last update returns")
    }

    /// The model at its start.
    ///
    /// # Errors
    /// If there is none of this width.
    pub fn model(&self) -> Result<LoadedModel, LearnerError> {
        let overrides = [
            ("hidden_size", self.width),
            ("num_hidden_layers", BASE.layers),
            ("head_dim", HEAD),
            ("num_attention_heads", self.width / HEAD),
            ("num_key_value_heads", self.width / HEAD),
            ("moe_intermediate_size", self.width / 2),
            ("num_experts", 4),
        ];
        let request = InitRequest {
            arch: "qwen3_moe".into(),
            overrides: overrides.map(|(key, value)| (key.to_owned(), json!(value))).to_vec(),
            seed: 5,
            scale: if self.metap { InitScale::MetaP(BASE) } else { InitScale::FanIn },
            dtype: WeightsDtype::F32,
            tokenizer: TokenizerChoice::Bytes,
        };
        init_model(&request).map_err(|error| LearnerError::Config(format!("width {}: {error}", self.width)))
    }

    fn optimizer(&self, loaded: &LoadedModel) -> Optimizer {
        let config = OptimizerConfig {
            metap_base_width: self.metap.then_some(BASE.width),
            metap_base_layers: self.metap.then_some(BASE.layers),
            ..Default::default()
        };
        let fit = FitConfig { weight_decay: 0.0, ..Default::default() };
        Optimizer::new(fit.optimizer_settings(&config), &loaded.params)
    }
}

fn rms(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1) as f64;
    (values.map(|x| x * x).sum::<f64>() / count).sqrt()
}
