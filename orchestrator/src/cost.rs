//! What a model costs: parameters and bytes, from its specification alone; and what a run of it holds in memory.

use crate::config::{Loaded, RunConfig};
use crate::run::prepare;
use freewheel_kernels::Precision;
use freewheel_kernels::attention::{KV_BLOCK, kv_words};
use freewheel_learner::optim::{OptimizerConfig, OptimizerKind, StateType};
use freewheel_model::{
    AttentionSpec, FfnSpec, KvCache, ModelSpec, ParamLayout, QkNorm, Tokenizer, Transformer,
    logits_chunk_rows,
};

/// Sizes of one model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// All parameters.
    pub parameters: u64,
    /// Those of the embedding.
    pub table: u64,
    /// Bytes of keys and values of one position, all layers.
    pub kv_bytes: u64,
    /// Bytes of activations per token of a training micro-batch: what every layer keeps for the backward pass, and what the
    /// largest layer needs besides while it is computed.
    pub activation_bytes: u64,
    /// The same where layers are computed again: what enters every layer, and all of the largest one.
    pub recomputed_bytes: u64,
    /// Bytes of activations per token where nothing is kept: what the largest layer needs while it is computed.
    pub passing_bytes: u64,
    /// Bytes of the logits of one row.
    pub logits_bytes: u64,
    /// Bytes of one token in a rollout's envelope: id, log-prob, experts.
    pub rollout_bytes: u64,
}

/// Values of a layer per token.
#[derive(Clone, Copy, Debug, Default)]
struct LayerValues {
    /// Kept from its forward to its backward pass.
    kept: usize,
    /// Needed besides while the backward pass is in it.
    passing: usize,
}

impl LayerValues {
    fn of(attention: &AttentionSpec, ffn: &FfnSpec, spec: &ModelSpec, precision: Precision) -> Self {
        let hidden = spec.hidden;
        let (queries, out) = (attention.query_width(), attention.out_width());
        let (keys, values) = (attention.key_width(), attention.value_width());
        let normed = if attention.qk_norm == QkNorm::None { 0 } else { queries + keys };
        let latent = attention.latent.map_or(0, |_| attention.qkv_width());
        let sandwich = if spec.sandwich_norms { 2 * hidden } else { 0 };
        // Residual before and after attention; queries, output, scores. The last page of a completion is half empty on average, and its
        // first repeats the end of its prompt: with completions of a page and more no more than twice their keys and values.
        let pages = kv_words(precision, 2 * (keys + values));
        let attended = 2 * hidden + queries + out + attention.heads + pages + normed + latent + sandwich;
        let (gated, passing) = match ffn {
            FfnSpec::Dense { width, .. } => (2 * width, 2 * hidden + 3 * width),
            FfnSpec::Moe(moe) => {
                let slots = moe.top_k * (3 * hidden + 3 * moe.width);
                let shared = moe.shared_width.unwrap_or(0);
                let gated = moe.experts + moe.top_k * (2 * moe.width + hidden) + 2 * shared;
                (gated, 2 * hidden + slots.max(hidden + 3 * shared) + 2 * moe.experts)
            }
        };
        let attending = 3 * hidden + out + normed + 2 * (queries + keys + values) + latent;
        Self { kept: attended + gated, passing: passing.max(attending) }
    }
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
        let layers =
            spec.layers.iter().map(|(attention, ffn)| LayerValues::of(attention, ffn, spec, precision));
        let kept: usize = layers.clone().map(|layer| layer.kept).sum();
        let largest = layers.clone().map(|layer| layer.kept).max().unwrap_or(0);
        let passing = layers.map(|layer| layer.passing).max().unwrap_or(0);
        // The last layer's output, and the gradient on its way down.
        let ends = 2 * spec.hidden;
        let recomputed = spec.layers.len() * spec.hidden + largest;
        Self {
            activation_bytes: 4 * (ends + kept + passing) as u64,
            recomputed_bytes: 4 * (ends + recomputed.min(kept) + passing) as u64,
            passing_bytes: 4 * (ends + largest) as u64,
            logits_bytes: 4 * spec.vocab_size as u64,
            rollout_bytes: 8 + expert_id * (spec.moe_layers() * spec.top_k()) as u64,
            parameters: layout.total as u64,
            table: (spec.vocab_size * spec.hidden) as u64,
            kv_bytes: (KvCache::page_bytes(model, precision) / KV_BLOCK) as u64,
        }
    }

    /// Bytes of activations while `tokens` are trained on: those of the layers in buffers that are used again, and the logits and
    /// their gradient in their place, as many rows at once as [`logits_chunk_rows`] says.
    pub fn training_bytes(&self, tokens: u64, recompute: bool) -> u64 {
        let of_token = if recompute { self.recomputed_bytes } else { self.activation_bytes };
        // With the idle ones buffers hold a quarter more than is in use.
        let rows = logits_chunk_rows(self.logits_bytes as usize / size_of::<f32>()) as u64;
        (tokens * of_token + rows.min(tokens) * self.logits_bytes) * 5 / 4
    }

    /// Bytes of weights packed for sampling, `element` bytes each; for training every projection is there a second time, transposed.
    fn packed(&self, element: u64, training: bool) -> u64 {
        // The embedding is looked up as well as multiplied with.
        let projections = if training { 2 * self.parameters } else { self.parameters };
        (projections + self.table) * element
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

/// How long sequences become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Tokens of the longest prompt.
    pub prompt: u64,
    /// Positions of the model.
    pub context: u64,
}

impl Reach {
    /// Of the prompts of a run; where they cannot be read or encoded yet, prompts may fill the model's context.
    pub fn of(loaded: &Loaded, tokenizer: Option<&Tokenizer>, spec: &ModelSpec) -> Self {
        let longest = |tokenizer| -> anyhow::Result<u64> {
            let mut prompts = prepare::training_prompts(loaded)?;
            prompts.extend(prepare::held_out_prompts(loaded)?);
            Ok(prepare::longest_prompt(tokenizer, &prompts)? as u64)
        };
        let context = spec.max_positions as u64;
        let prompt = tokenizer.and_then(|tokenizer| longest(tokenizer).ok());
        Self { prompt: prompt.unwrap_or(context), context }
    }
}

/// The program itself, tokenizer, journal buffers, allocator.
const PROGRAM: u64 = 128 << 20;

impl Plan {
    /// The plan of a run: `element` bytes a weight.
    pub fn of(config: &RunConfig, cost: &Cost, element: u64, reach: Reach) -> Self {
        let (actor, learner) = (&config.actor, &config.learner);
        let weights = cost.parameters * element;
        let drawn = (actor.max_new_tokens as u64).min(reach.context);
        let positions = reach.context.min(reach.prompt + drawn);
        let slots = actor.max_live as u64;
        // Pages beyond what all slots can hold are never touched.
        let kv = actor.kv_bytes.min((slots + 1) * (positions + 16) * cost.kv_bytes);
        let passing = (actor.prefill_tokens as u64 + slots) * cost.passing_bytes;
        let engine = 2 * cost.packed(element, false) + weights + kv + slots * cost.logits_bytes + passing;
        let group = u64::from(config.prompts.group_size);
        let batch = (learner.groups_per_step as u64).saturating_mul(group);
        // No batch has more tokens than its rollouts can; a group's prompt is computed once.
        let all = batch.saturating_mul(drawn) + learner.groups_per_step as u64 * reach.prompt;
        let tokens = (learner.micro_batch_tokens as u64).max(positions).min(all);
        let activations = cost.training_bytes(tokens, learner.optimizer.recompute_layers);
        let packed = cost.packed(element, true);
        // Packed, and plain too where it moves.
        let reference = match (learner.loss.kl_coef > 0.0, learner.loss.reference_every) {
            (false, _) => 0,
            (true, None) => packed,
            (true, Some(_)) => packed + weights,
        };
        // Plain, packed both ways; masters, moments, gradient.
        let critic = if learner.loss.needs_critic() { weights + packed + 16 * cost.parameters } else { 0 };
        let outstanding = batch.saturating_mul(learner.max_staleness + 1);
        // Encoded in the queue, decoded at the learner.
        let rollouts = outstanding.saturating_mul(2 * positions * cost.rollout_bytes);
        let published = u64::from(config.queue.keep_versions) * weights;
        let mut plan = Self {
            parameters: cost.parameters,
            actor: engine * actor.processes as u64,
            // Plain: as they were, as they are, and twice on their way out.
            learner: 4 * weights
                + packed
                + trainer_bytes(&learner.optimizer) * cost.parameters
                + reference
                + critic,
            activations,
            evaluation: engine,
            queue: rollouts.min(2 * config.queue.max_bytes) + published,
            total: PROGRAM,
        };
        plan.total += plan.actor + plan.learner + plan.activations + plan.evaluation + plan.queue;
        plan
    }
}

/// Most bytes that updates of a model need by themselves, with no run around them: weights as they were read and as they are, `element`
/// bytes each, packed both ways; gradient, masters, two moments; activations of `tokens`.
pub fn update_bytes(cost: &Cost, element: u64, tokens: u64) -> u64 {
    let state = trainer_bytes(&OptimizerConfig::default()) * cost.parameters;
    PROGRAM
        + 2 * cost.parameters * element
        + cost.packed(element, true)
        + state
        + cost.training_bytes(tokens, false)
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
        let reach = Reach::of(&loaded, Some(&model.tokenizer), model.model.spec());
        Plan::of(&loaded.config, &Cost::of(&model.model, 2), 2, reach)
    }

    #[test]
    fn the_quickstarts_plan_covers_what_it_was_measured_to_need() {
        let whole = plan(&[]);
        // 1.1 GB at most, as the README says; a plan of several times that would frighten for nothing.
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
