//! Dense → mixture of experts ("Sparse Upcycling", Komatsuzaki et al. 2022).
//!
//! Every expert starts as a copy of the dense MLP. The chosen experts' weights sum to 1, so at first the model computes
//! what the dense one did, whatever the router says; training then tells the experts apart.

use std::sync::Arc;

use freewheel_types::{CounterRng, Digest, WeightsDtype};
use serde_json::{Map, Value, json};

use crate::Transformer;
use crate::checkpoint::LoadedModel;
use crate::config::spec_from_config;
use crate::error::ModelError;
use crate::params::{ParamData, ParamLayout, Params, TensorKind, TensorSpec};
use crate::spec::{FfnSpec, ModelSpec};

/// How to upcycle.
#[derive(Clone, Debug, PartialEq)]
pub struct UpcycleOptions {
    /// Experts per layer, 2 or more.
    pub experts: usize,
    /// Experts per token, 1 to `experts`.
    pub top_k: usize,
    /// Standard deviation of the router's weights. 0 sends every token to the same experts.
    pub router_std: f64,
    /// Noise on the experts, relative to the deviation of each matrix; experts 2i and 2i+1 get it with opposite signs.
    /// 0 keeps the model exactly what it was.
    pub noise: f64,
    /// Seed of router and noise.
    pub seed: u64,
}

impl Default for UpcycleOptions {
    fn default() -> Self {
        Self { experts: 4, top_k: 2, router_std: 0.02, noise: 0.0, seed: 0 }
    }
}

/// The mixture of experts made from `dense`: Mixtral from Llama and Mistral, Qwen3-MoE from Qwen3.
///
/// # Errors
/// [`ModelError::Unsupported`] if `dense` is of another architecture or has what the target has no place for (biases,
/// windows on some layers); [`ModelError::Invalid`] for impossible options.
pub fn upcycle(dense: &LoadedModel, options: &UpcycleOptions) -> Result<LoadedModel, ModelError> {
    check(dense, options)?;
    let config_json = target_config(dense, options)?;
    let spec = spec_from_config(&dense.source, &config_json)?;
    let model = Transformer::new(spec);
    let params = expand(&dense.params, model.layout(), options);
    Ok(LoadedModel {
        model,
        params,
        tokenizer: dense.tokenizer.clone(),
        generation: dense.generation.clone(),
        config_json,
        source: dense.source.clone(),
    })
}

fn unsupported(dense: &LoadedModel, what: String, hint: &str) -> ModelError {
    ModelError::Unsupported { path: dense.source.clone(), what, hint: hint.to_owned() }
}

fn check(dense: &LoadedModel, options: &UpcycleOptions) -> Result<(), ModelError> {
    let invalid = |what: String| ModelError::Invalid { path: dense.source.clone(), what };
    if options.experts < 2 || options.top_k < 1 || options.top_k > options.experts {
        return Err(invalid(format!(
            "{} experts with {} per token: expected at least 2, and between 1 and all of them per token",
            options.experts, options.top_k
        )));
    }
    for (name, value) in [("router_std", options.router_std), ("noise", options.noise)] {
        if !(value.is_finite() && value >= 0.0) {
            return Err(invalid(format!("{name} = {value}: expected 0 or more")));
        }
    }
    let attention = &dense.model.spec().layers[0].0;
    if attention.qkv_bias || attention.out_bias {
        return Err(unsupported(dense, "upcycling a model with attention biases".into(), ""));
    }
    Ok(())
}

fn target_config(dense: &LoadedModel, options: &UpcycleOptions) -> Result<Map<String, Value>, ModelError> {
    let spec: &ModelSpec = dense.model.spec();
    let mut config = dense.config_json.clone();
    let windows = spec.layers.iter().any(|(attention, _)| attention.window.is_some());
    let additions = match spec.architecture.as_str() {
        // Llama has no windows; Mistral's and Mixtral's mean the same.
        "LlamaForCausalLM" | "MistralForCausalLM" => {
            if spec.architecture == "LlamaForCausalLM" {
                config.insert("sliding_window".into(), Value::Null);
            }
            json!({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": options.experts,
                "router_jitter_noise": 0.0})
        }
        "Qwen3ForCausalLM" if windows => {
            return Err(unsupported(dense, "upcycling a Qwen3 with sliding windows".into(), ""));
        }
        "Qwen3ForCausalLM" => {
            config.remove("layer_types");
            let FfnSpec::Dense { width, .. } = spec.layers[0].1 else {
                return Err(unsupported(dense, "upcycling a mixture of experts".into(), ""));
            };
            json!({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": options.experts,
                "moe_intermediate_size": width, "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": []})
        }
        other => {
            let hint = "; supported are LlamaForCausalLM, MistralForCausalLM and Qwen3ForCausalLM";
            return Err(unsupported(dense, format!("upcycling {other}"), hint));
        }
    };
    // Written out, because the families' defaults differ.
    let attention = &spec.layers[0].0;
    let shared = json!({"num_experts_per_tok": options.top_k, "head_dim": attention.head_dim,
        "num_key_value_heads": attention.kv_heads, "rms_norm_eps": shortest(spec.norm_eps),
        "max_position_embeddings": spec.max_positions, "tie_word_embeddings": spec.tied_embeddings,
        "output_router_logits": false, "router_aux_loss_coef": 0.001});
    if !config.contains_key("rope_theta") && !config.contains_key("rope_parameters") {
        config.insert("rope_theta".into(), 10_000.0.into());
    }
    for part in [additions, shared] {
        if let Value::Object(map) = part {
            config.extend(map);
        }
    }
    Ok(config)
}

/// An f32 as the decimal a person would have written.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or_else(|_| f64::from(x))
}

fn expand(dense: &Params, layout: &Arc<ParamLayout>, options: &UpcycleOptions) -> Params {
    let mut values = Vec::with_capacity(layout.total);
    for tensor in &layout.tensors {
        match tensor.kind {
            TensorKind::Router => {
                values.extend(normal(options.seed, &tensor.name, tensor.len(), options.router_std))
            }
            TensorKind::Expert => values.extend(expert(dense, tensor, options)),
            _ => values.extend(dense.range_f32(source(dense, &tensor.name).range())),
        }
    }
    let wide = Params { layout: layout.clone(), data: ParamData::F32(values) };
    if dense.dtype() == WeightsDtype::F32 { wide } else { wide.cast(dense.dtype()) }
}

/// The dense tensor of that name. Layouts come from the same configuration, so it is there.
fn source<'d>(dense: &'d Params, name: &str) -> &'d TensorSpec {
    match dense.layout.get(name) {
        Some(tensor) => tensor,
        None => unreachable!("{name} is in the mixture but not in the dense model"),
    }
}

fn expert(dense: &Params, tensor: &TensorSpec, options: &UpcycleOptions) -> Vec<f32> {
    let (layer, rest) = tensor.name.split_once(".experts.").unwrap_or_default();
    let layer = layer.trim_end_matches(".block_sparse_moe").trim_end_matches(".mlp");
    let (number, part) = rest.split_once('.').unwrap_or_default();
    let part = match part {
        "w1.weight" => "gate_proj.weight",
        "w3.weight" => "up_proj.weight",
        "w2.weight" => "down_proj.weight",
        same => same,
    };
    let from = format!("{layer}.mlp.{part}");
    let mut values = dense.range_f32(source(dense, &from).range());
    if options.noise > 0.0 {
        let number: u64 = number.parse().unwrap_or_default();
        let energy: f64 = values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let deviation = (energy / values.len() as f64).sqrt() * options.noise;
        let sign = if number.is_multiple_of(2) { 1.0 } else { -1.0 };
        let noise = normal(options.seed, &format!("{from}#{}", number / 2), values.len(), deviation);
        values.iter_mut().zip(noise).for_each(|(x, noise)| *x += sign * noise);
    }
    values
}

/// `n` normal numbers that depend on seed and name only.
pub(crate) fn normal(seed: u64, name: &str, n: usize, deviation: f64) -> impl Iterator<Item = f32> + use<> {
    let Digest(digest) = Digest::of(name.as_bytes());
    let stream = digest.iter().take(8).fold(0, |stream, byte| stream << 8 | u64::from(*byte));
    let random = CounterRng::new(seed, stream);
    (0..n as u64).map(move |i| (random.normal(i) * deviation) as f32)
}
