//! gpt-oss: attention with sinks, every other layer in a sliding window; biases everywhere; experts with a clamped SwiGLU.

use super::fields::Fields;
use super::llama::{Variant, assemble};
use crate::error::ModelError;
use crate::spec::{Activation, ExpertNames, FfnSpec, ModelSpec, MoeSpec, QkNorm, RouterKind, TensorNames};

/// GptOssForCausalLM.
pub(super) fn gpt_oss(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    if !["rope_parameters", "rope_scaling"].iter().any(|key| fields.map.contains_key(*key)) {
        return Err(fields.invalid(
            "neither rope_parameters nor rope_scaling is there, and gpt-oss has no plain default; write null for none",
        ));
    }
    if fields.activation()? != Activation::Silu {
        return Err(fields.unsupported("hidden_act other than silu", "the experts are a clamped SwiGLU"));
    }
    let moe = MoeSpec {
        experts: fields.size_any(&["num_local_experts", "num_experts"], 128)?,
        top_k: fields.size_any(&["num_experts_per_tok", "experts_per_token"], 4)?,
        width: fields.size("intermediate_size")?,
        // A softmax over the chosen experts alone is the same as one over all, renormalised.
        router: RouterKind::Softmax { renormalise: true },
        shared_width: None,
        activation: Activation::ClampedSwiglu {
            alpha: fields.number_or("swiglu_alpha", 1.702)? as f32,
            limit: fields.number_or("swiglu_limit", 7.0)? as f32,
        },
        bias: true,
    };
    let bias = fields.flag_or("attention_bias", true)?;
    let variant = Variant {
        names: TensorNames { router: "router", experts: ExpertNames::Fused, ..TensorNames::LLAMA },
        architecture: "GptOssForCausalLM",
        head_dim: Some(64),
        qk_norm: QkNorm::None,
        bias: (bias, bias),
        rope_theta: 150_000.0,
        norm_eps: 1e-5,
        max_positions: 131_072,
    };
    let sliding = fields.sliding_layers(fields.layers()?, |layer| layer % 2 == 0)?;
    let window = fields.size_or("sliding_window", 128)?;
    let mut spec = assemble(
        fields,
        &variant,
        |layer| Ok(sliding[layer].then_some(window)),
        |_| Ok(FfnSpec::Moe(moe.clone())),
    )?;
    spec.layers.iter_mut().for_each(|(attention, _)| attention.sinks = true);
    Ok(spec)
}
