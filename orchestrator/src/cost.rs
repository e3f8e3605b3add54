//! What a model costs: parameters and bytes, from its specification alone; and what a run of it holds in memory.

use crate::config::RunConfig;
use freewheel_kernels::Precision;
use freewheel_learner::optim::{OptimizerConfig, OptimizerKind, StateType};
use freewheel_model::{AttentionSpec, FfnSpec, KvCache, ParamLayout, Transformer};

/// Sizes of one model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// All parameters.
    pub parameters: u64,
    /// Bytes of keys and values of one position, all layers.
    pub kv_bytes: u64,
    /// Bytes of activations per token of a training micro-batch: what every layer keeps for the backward pass, and what the
    /// largest layer needs besides while it is computed.
    pub activation_bytes: u64,
    /// The same where layers are computed again: what enters every layer, and all of the largest one.
    pub recomputed_bytes: u64,
    /// Bytes of the logits of one row.
    pub logits_bytes: u64,
    /// Bytes of one token in a rollout's envelope: id, log-prob, experts.
    pub rollout_bytes: u64,
}

/// Values a layer keeps per token for its backward pass.
fn saved_values(attention: &AttentionSpec, ffn: &FfnSpec, hidden: usize) -> usize {
    let (queries, keys) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
    // Residual before and after attention; queries with their input to the norm, output and scores; keys and values.
    let attended = 2 * hidden + 3 * queries + attention.heads + 3 * keys;
    let gated = match ffn {
        FfnSpec::Dense { width, .. } => 2 * width,
        FfnSpec::Moe(moe) => {
            moe.experts + moe.top_k * (2 * moe.width + hidden) + moe.shared_width.map_or(0, |width| 2 * width)
        }
    };
    attended + gated
}

impl Cost {
    /// The sizes of `model` with `element` bytes a weight; keys and values are kept in numbers of that size.
    pub fn of(model: &Transformer, element: u64) -> Self {
        let (layout, spec): (&ParamLayout, _) = (model.layout(), model.spec());
        let most_experts = spec.layers.iter().map(|(_, ffn)| match ffn {
            FfnSpec::Moe(moe) => moe.experts,
            FfnSpec::Dense { .. } => 0,
        });
        let precision = if element == 2 { Precision::Bf16 } else { Precision::F32 };
        let expert_id = if most_experts.max().unwrap_or(0) <= 256 { 1 } else { 2 };
        let saved = spec.layers.iter().map(|(attention, ffn)| saved_values(attention, ffn, spec.hidden));
        // While a layer is computed, forward or backward, its inputs and gradients are about as large as what it keeps.
        let largest = saved.clone().max().unwrap_or(0);
        let values = saved.sum::<usize>() + 2 * largest + 2 * spec.hidden;
        let recomputed = (spec.layers.len() + 2) * spec.hidden + 3 * largest;
        Self {
            activation_bytes: 4 * values as u64,
            recomputed_bytes: 4 * recomputed.min(values) as u64,
            logits_bytes: 4 * spec.vocab_size as u64,
            rollout_bytes: 8 + expert_id * (spec.moe_layers() * spec.top_k()) as u64,
            parameters: layout.total as u64,
            kv_bytes: (KvCache::page_bytes(model, precision) / freewheel_kernels::attention::KV_BLOCK) as u64,
        }
    }
}

/// Memory of a run in one process at its peak, bytes, by what holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Parameters of the model.
    pub parameters: u64,
    /// All actors: packed weights in use and being filled, their plain copy; keys and values; logits.
    pub actor: u64,
    /// Weights plain, packed both ways and as published; masters, moments, gradient; the reference; the critic.
    pub learner: u64,
    /// Activations of one micro-batch.
    pub activations: u64,
    /// An engine of its own.
    pub evaluation: u64,
    /// Rollouts on their way and in hand; published versions.
    pub queue: u64,
    /// All of it, and the program.
    pub total: u64,
}

/// The program itself, tokenizer, journal buffers, allocator.
const PROGRAM: u64 = 128 << 20;

impl Plan {
    /// The plan of a run: `element` bytes a weight, `context` positions.
    pub fn of(config: &RunConfig, cost: &Cost, element: u64, context: u64) -> Self {
        let (actor, learner) = (&config.actor, &config.learner);
        let weights = cost.parameters * element;
        let slots = actor.max_live as u64;
        // Pages beyond what all slots can hold are never made.
        let kv = actor.kv_bytes.min((slots + 1) * (context + 16) * cost.kv_bytes);
        let engine = 3 * weights + kv + slots * cost.logits_bytes;
        let group = u64::from(config.prompts.group_size);
        let batch = (learner.groups_per_step as u64).saturating_mul(group);
        // No batch has more tokens than its rollouts can.
        let tokens = (learner.micro_batch_tokens as u64).min(batch.saturating_mul(context)).max(context);
        // Logits and their gradient, in chunks of 256 rows.
        let of_token = match learner.optimizer.recompute_layers {
            true => cost.recomputed_bytes,
            false => cost.activation_bytes,
        };
        let activations = tokens * of_token + 2 * 256 * cost.logits_bytes;
        // Packed, and plain too where it moves.
        let reference = match (learner.loss.kl_coef > 0.0, learner.loss.reference_every) {
            (false, _) => 0,
            (true, None) => 2 * weights,
            (true, Some(_)) => 3 * weights,
        };
        // Plain, packed both ways; masters, moments, gradient.
        let critic = if learner.loss.needs_critic() { 3 * weights + 16 * cost.parameters } else { 0 };
        let outstanding = batch.saturating_mul(learner.max_staleness + 1);
        // Encoded in the queue, decoded at the learner.
        let rollouts = outstanding.saturating_mul(2 * context * cost.rollout_bytes);
        let published = u64::from(config.queue.keep_versions) * weights;
        let mut plan = Self {
            parameters: cost.parameters,
            actor: engine * actor.processes as u64,
            learner: 5 * weights + trainer_bytes(&learner.optimizer) * cost.parameters + reference + critic,
            activations,
            evaluation: engine,
            queue: rollouts.min(2 * config.queue.max_bytes) + published,
            total: PROGRAM,
        };
        plan.total += plan.actor + plan.learner + plan.activations + plan.evaluation + plan.queue;
        plan
    }
}

/// Bytes of gradient, master and moments for a parameter; with adapters the base in their stead, and little else.
fn trainer_bytes(optimizer: &OptimizerConfig) -> u64 {
    if optimizer.lora_rank > 0 {
        return 8;
    }
    let moments = match optimizer.optimizer {
        OptimizerKind::Adamw => 2,
        OptimizerKind::Muon | OptimizerKind::Lion => 1,
        OptimizerKind::Sgd => u64::from(optimizer.momentum.is_some_and(|momentum| momentum > 0.0)),
    };
    let each = match optimizer.optimizer_state {
        StateType::F32 => 4,
        StateType::Bf16 => 2,
        StateType::EightBit => 1,
    };
    8 + moments * each
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn plan(overrides: &[&str]) -> Plan {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let sets: Vec<String> = overrides.iter().map(|set| (*set).to_owned()).collect();
        let loaded = crate::config::load(&root.join("configs/quickstart.toml"), &sets).unwrap();
        let model = freewheel_model::load(&root.join("assets/sprout"), None).unwrap();
        Plan::of(&loaded.config, &Cost::of(&model.model, 2), 2, model.model.spec().max_positions as u64)
    }

    #[test]
    fn the_quickstarts_plan_covers_what_it_was_measured_to_need() {
        let whole = plan(&[]);
        // 1.2 GB at most, as the README says; a plan of several times that would frighten for nothing.
        assert!((1.0e9..2.0e9).contains(&(whole.total as f64)), "{whole:?}");
        assert!(whole.activations > whole.total / 3, "activations are what matters here: {whole:?}");
        let half = plan(&["learner.micro_batch_tokens=8192"]);
        assert!(half.activations < whole.activations * 11 / 20, "{half:?}");
        let again = plan(&["learner.recompute_layers=true", "learner.optimizer_state=8bit"]);
        assert!(again.activations < whole.activations && again.learner < whole.learner, "{again:?}");
        assert_eq!(plan(&["actor.processes=2"]).actor, 2 * whole.actor);
        let critic = plan(&["learner.objective=\"ppo\""]);
        assert!(
            critic.learner > whole.learner + 20 * whole.parameters,
            "a second model under training: {critic:?}"
        );
    }
}
