//! The weights being trained: f32 masters, their working copy, the gradient, and the model that computes with them.

use std::sync::{Arc, mpsc};
use std::time::Instant;

use freewheel_kernels::Threads;
use freewheel_model::{Adapter, Params};
use freewheel_types::{Digest, PolicyVersion};

use crate::lora::Lora;
use crate::optim::{Optimizer, OptimizerSettings, StepOutcome};
use crate::packing::{TrainSequence, pack};
use crate::trainer::{ExpertLoad, PackedBatch, PolicyTrainer, TokenGradients, TokenLogProbs};

/// Optimiser and weights of a policy, lent to whoever writes them down: while this lives they do not move.
pub struct Lent {
    /// Masters and moments.
    pub optimizer: Arc<Optimizer>,
    /// Weights in working precision.
    pub weights: Arc<Params>,
    /// Gone when this is; the fields above go before it.
    _held: mpsc::Sender<()>,
}

/// A policy under training.
pub struct Policy {
    trainer: Box<dyn PolicyTrainer>,
    /// Over the weights, or over adapters to them.
    optimizer: Arc<Optimizer>,
    lora: Option<Lora>,
    /// What corrections of routers move by.
    router_bias_rate: f64,
    /// Of the last update.
    load: Option<ExpertLoad>,
    weights: Arc<Params>,
    /// Ends when what was lent is back.
    lent: Option<mpsc::Receiver<()>>,
    /// Seconds that updates waited for it.
    waited_s: f64,
    grads: Vec<f32>,
    version: PolicyVersion,
    threads: Threads,
}

impl Policy {
    /// A policy at `params` (whose element type is the working precision), update 0.
    pub fn new(
        mut trainer: Box<dyn PolicyTrainer>,
        params: Params,
        settings: OptimizerSettings,
        threads: Threads,
    ) -> Self {
        let version = PolicyVersion::default();
        trainer.load(&params, version);
        let router_bias_rate = settings.config.router_bias_rate;
        let (lora, optimizer) = match Lora::new(&settings.config, &params) {
            Some((lora, start)) => (Some(lora), Optimizer::new(settings, &start)),
            None => (None, Optimizer::new(settings, &params)),
        };
        Self {
            optimizer: Arc::new(optimizer),
            lora,
            router_bias_rate,
            load: None,
            grads: vec![0.0; params.layout.total],
            weights: Arc::new(params),
            lent: None,
            waited_s: 0.0,
            trainer,
            version,
            threads,
        }
    }

    /// Which weights these are.
    pub fn version(&self) -> PolicyVersion {
        self.version
    }

    /// Updates made.
    pub fn step(&self) -> u64 {
        self.version.step
    }

    /// Names the lineage: the epoch of the versions from here on.
    pub fn set_epoch(&mut self, epoch: u64) {
        self.version.epoch = epoch;
    }

    /// The weights in working precision: what is sampled from and published.
    pub fn weights(&self) -> &Params {
        &self.weights
    }

    /// Digest of the working weights.
    pub fn digest(&self) -> Digest {
        self.weights.digest()
    }

    /// The optimiser with its masters.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// Takes back a checkpointed optimiser, as `fill` does it; the working weights follow from its masters.
    ///
    /// # Errors
    /// Those of `fill`; the policy is of no use then.
    pub fn restore<E>(
        &mut self,
        fill: impl FnOnce(&mut Optimizer) -> Result<(), E>,
        step: u64,
    ) -> Result<(), E> {
        self.take_back();
        fill(owned(&mut self.optimizer))?;
        self.version.step = step;
        self.write_weights();
        Ok(())
    }

    /// Lends optimiser and weights. The next update, which is what moves them, waits at its end until they are back.
    pub fn lend(&mut self) -> Lent {
        self.take_back();
        let (held, lent) = mpsc::channel();
        self.lent = Some(lent);
        Lent { optimizer: self.optimizer.clone(), weights: self.weights.clone(), _held: held }
    }

    fn take_back(&mut self) {
        if let Some(lent) = self.lent.take() {
            let began = Instant::now();
            // Nobody ever sends: what comes is the end of the channel.
            lent.recv().ok();
            self.waited_s += began.elapsed().as_secs_f64();
        }
    }

    /// Seconds that updates since the last call waited for what was lent.
    pub fn take_waited(&mut self) -> f64 {
        std::mem::take(&mut self.waited_s)
    }

    /// Forward only.
    pub fn log_probs(&self, batch: &PackedBatch) -> TokenLogProbs {
        self.trainer.log_probs(batch)
    }

    /// The micro-batches of one update on `sequences`, of at most `budget` rows each: see [`pack`]. Losses of routers are over the whole
    /// update, however it is split; where the experts are not recorded, that of balance costs one more forward pass.
    pub fn micro_batches(&self, sequences: &[TrainSequence<'_>], budget: usize) -> Vec<PackedBatch> {
        let mut batches = pack(sequences, budget);
        if let Some(load) = self.trainer.foresee_experts(&batches) {
            let choices: Arc<[u64]> = load.counts.into();
            batches.iter_mut().for_each(|batch| batch.part.choices = choices.clone());
        }
        batches
    }

    /// Forward, loss, backward; the gradient adds up until [`update`](Self::update).
    pub fn accumulate(
        &mut self,
        batch: &PackedBatch,
        loss: &mut dyn FnMut(&TokenLogProbs) -> TokenGradients,
    ) {
        self.trainer.accumulate(batch, loss, &mut self.grads);
    }

    /// One optimiser update with the gradient gathered, which is zero afterwards. If it is not finite nothing changes.
    /// The version stays: [`advance`](Self::advance) ends a step.
    pub fn update(&mut self, learning_rate: f64) -> StepOutcome {
        self.take_back();
        let outcome = match &self.lora {
            Some(lora) => {
                let mut grads = lora.project(&self.threads, self.optimizer.masters(), &self.grads);
                let optimizer = owned(&mut self.optimizer);
                let outcome = optimizer.step(&self.threads, &mut grads, learning_rate);
                self.discard_gradient();
                outcome
            }
            None => {
                let (optimizer, weights) = (owned(&mut self.optimizer), owned(&mut self.weights));
                optimizer.update(&self.threads, &mut self.grads, learning_rate, weights)
            }
        };
        self.load = self.trainer.take_expert_load();
        if matches!(outcome, StepOutcome::Refused { .. }) {
            return outcome;
        }
        let balanced = self.load.as_ref().filter(|_| self.router_bias_rate > 0.0);
        if let Some(load) = balanced {
            owned(&mut self.optimizer).balance(load, self.router_bias_rate);
        }
        match balanced.is_some() || self.lora.is_some() {
            true => self.write_weights(),
            // They were written as the masters moved.
            false => self.trainer.load(&self.weights, self.version),
        }
        outcome
    }

    /// The working weights follow from the masters.
    fn write_weights(&mut self) {
        let weights = owned(&mut self.weights);
        match &self.lora {
            Some(lora) => lora.merge(&self.threads, self.optimizer.masters(), weights),
            None => self.optimizer.write_weights(&self.threads, weights),
        }
        self.trainer.load(&self.weights, self.version);
    }

    /// Where the tokens of the last update went; `None` for a model without experts.
    pub fn expert_load(&self) -> Option<&ExpertLoad> {
        self.load.as_ref()
    }

    /// The adapters, where adapters are trained and PEFT has a place for all of them.
    pub fn adapter(&self) -> Option<Adapter> {
        self.lora.as_ref()?.export(self.optimizer.masters())
    }

    /// Counts the updates made since the last call as one step of the policy.
    pub fn advance(&mut self) {
        self.version.step += 1;
    }

    /// Forgets the gradient gathered.
    pub fn discard_gradient(&mut self) {
        self.grads.fill(0.0);
    }
}

/// What nobody else holds.
fn owned<T>(shared: &mut Arc<T>) -> &mut T {
    Arc::get_mut(shared).expect("what was lent is back")
}
