//! What a run's loss keeps beside the policy, from batch to batch: the reference, the critic, the weight of the entropy bonus, the
//! running mean of the rewards.
//!
//! All of it changes with a step and only then, as a function of the batch, so that it is where it was after a restart: in the
//! checkpoint, and repeated from the journal.

use std::sync::Arc;

use freewheel_model::{ParamData, Params};
use freewheel_types::PolicyVersion;
use half::bf16;
use serde::{Deserialize, Serialize};

use crate::LearnerError;
use crate::batch::Batch;
use crate::checkpoint::Loaded;
use crate::critic::Critic;
use crate::objective::{AdaptiveEntropy, EntropyWeight, ObjectiveConfig};
use crate::policy::Policy;
use crate::trainer::PolicyTrainer;
use crate::update::{Helpers, Updated};

/// The companions of one policy.
pub struct Companions {
    reference: Option<Box<dyn PolicyTrainer>>,
    /// Weights of a reference that moves, and how often.
    moving: Option<(Arc<Params>, u64)>,
    critic: Option<Critic>,
    entropy: Option<AdaptiveEntropy>,
    weight: EntropyWeight,
    ema_decay: f64,
    reward_ema: Option<f64>,
}

/// What of it goes into `state.json`. Floats as their bits: JSON would round them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CompanionState {
    /// Weight of the adaptive entropy bonus, and whether it is applied.
    entropy: Option<(u64, bool)>,
    /// Running mean of the rewards.
    reward_ema: Option<u64>,
    /// Updates of the critic.
    critic_steps: u64,
}

impl Companions {
    /// Those that `config` asks for, at the start of a run. A reference that moves starts at the weights of `policy`.
    pub fn new(
        config: &ObjectiveConfig,
        policy: &Policy,
        reference: Option<Box<dyn PolicyTrainer>>,
        critic: Option<Critic>,
    ) -> Self {
        let every = config.reference_every.filter(|_| reference.is_some());
        Self {
            reference,
            moving: every.map(|every| (Arc::new(policy.weights().clone()), every)),
            critic,
            entropy: config.adaptive_entropy(),
            weight: EntropyWeight { coef: config.entropy_coef, active: false },
            ema_decay: config.reward_ema_decay.unwrap_or(0.9),
            reward_ema: None,
        }
    }

    /// What an update computes with.
    pub fn helpers(&mut self) -> Helpers<'_> {
        Helpers { reference: self.reference.as_deref(), critic: self.critic.as_mut() }
    }

    /// Weight of the entropy bonus of the next batch, where it adapts.
    pub fn entropy_coef(&self) -> Option<f64> {
        self.entropy.map(|_| self.weight.value())
    }

    /// Running mean of the rewards of the batches before.
    pub fn reward_ema(&self) -> Option<f64> {
        self.reward_ema
    }

    /// Takes note of a step that was made; `policy` is after it.
    pub fn after(&mut self, batch: &Batch<'_>, updated: &Updated, policy: &Policy) {
        if let (Some(rule), Some(mean)) = (self.entropy, updated.diagnostics.entropy()) {
            self.weight = rule.next(self.weight, mean);
        }
        if let Some(mean) = batch.reward_mean() {
            let decay = self.ema_decay;
            self.reward_ema = Some(self.reward_ema.map_or(mean, |old| decay * old + (1.0 - decay) * mean));
        }
        if let (Some((weights, every)), Some(reference)) = (&mut self.moving, &mut self.reference)
            && policy.step().is_multiple_of(*every)
        {
            // A checkpoint may still be writing the old ones.
            *weights = Arc::new(policy.weights().clone());
            reference.load(weights, policy.version());
        }
    }

    // --- the checkpoint ----------------------------------------------------------------------------

    /// What goes into `state.json`.
    pub fn state(&self) -> CompanionState {
        CompanionState {
            entropy: self.entropy.map(|_| (self.weight.coef.to_bits(), self.weight.active)),
            reward_ema: self.reward_ema.map(f64::to_bits),
            critic_steps: self.critic.as_ref().map_or(0, |critic| critic.model.optimizer().steps()),
        }
    }

    /// The critic, whose optimiser is a file of its own.
    pub fn critic_mut(&mut self) -> Option<&mut Critic> {
        self.critic.as_mut()
    }

    /// The weights of a reference that moves: a file of their own.
    pub fn moving_reference(&self) -> Option<Arc<Params>> {
        self.moving.as_ref().map(|(weights, _)| weights.clone())
    }

    /// Takes back what a checkpoint holds.
    ///
    /// # Errors
    /// If it holds less than this run keeps, or something else.
    pub fn restore(&mut self, loaded: &Loaded) -> Result<(), LearnerError> {
        let state = &loaded.state.companions;
        if let Some((bits, active)) = state.entropy {
            self.weight = EntropyWeight { coef: f64::from_bits(bits), active };
        }
        self.reward_ema = state.reward_ema.map(f64::from_bits);
        if let Some(critic) = &mut self.critic {
            critic.model.restore(|optimizer| loaded.restore_critic(optimizer, state.critic_steps), 0)?;
        }
        if let (Some((weights, _)), Some(reference)) = (&mut self.moving, &mut self.reference) {
            let bytes = loaded.reference()?;
            fill(Arc::make_mut(weights), &bytes)
                .map_err(|what| LearnerError::Checkpoint { path: loaded.path.clone(), what })?;
            reference.load(weights, PolicyVersion::default());
        }
        Ok(())
    }
}

/// Puts `bytes`, as `Params::as_bytes` gave them, into `weights`.
fn fill(weights: &mut Params, bytes: &[u8]) -> Result<(), String> {
    if bytes.len() != weights.as_bytes().len() {
        return Err(format!(
            "the reference has {} bytes, the model needs {}",
            bytes.len(),
            weights.as_bytes().len()
        ));
    }
    match &mut weights.data {
        ParamData::F32(values) => {
            values.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, b)| *x = f32::from_le_bytes(*b));
        }
        ParamData::Bf16(values) => {
            values.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, b)| *x = bf16::from_le_bytes(*b));
        }
    }
    Ok(())
}
