//! Qwen3-MoE and OLMoE: the same tensor names; they differ in normalisation of heads and defaults.

use super::fields::Fields;
use super::llama::{Variant, assemble};
use crate::error::ModelError;
use crate::spec::{FfnSpec, ModelSpec, MoeSpec, QkNorm, RouterKind, TensorNames};

/// Qwen3MoeForCausalLM: dense layers where `mlp_only_layers` or `decoder_sparse_step` say so.
pub(super) fn qwen3_moe(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let moe = MoeSpec {
        experts: fields.size_any(&["num_experts", "num_local_experts"], 128)?,
        top_k: fields.size_or("num_experts_per_tok", 8)?,
        width: fields.size_or("moe_intermediate_size", 768)?,
        router: RouterKind::Softmax { renormalise: fields.flag_or("norm_topk_prob", false)? },
        shared_width: None,
        activation: fields.activation()?,
        bias: false,
    };
    let dense = FfnSpec::Dense { width: fields.size("intermediate_size")?, activation: fields.activation()? };
    let dense_layers = fields.list("mlp_only_layers")?.unwrap_or_default();
    let step = fields.size_or("decoder_sparse_step", 1)?;
    let bias = fields.flag_or("attention_bias", false)?;
    let variant = Variant {
        names: TensorNames::LLAMA,
        architecture: "Qwen3MoeForCausalLM",
        head_dim: None,
        qk_norm: QkNorm::PerHead,
        bias: (bias, bias),
        rope_theta: 10_000.0,
        norm_eps: 1e-6,
        max_positions: 32768,
    };
    // Unlike in the dense Qwen3, the window applies to every layer.
    let window =
        if fields.flag_or("use_sliding_window", false)? { fields.size_opt("sliding_window")? } else { None };
    assemble(
        fields,
        &variant,
        |_| Ok(window),
        |layer| {
            let sparse = !dense_layers.contains(&layer) && (layer + 1) % step == 0;
            Ok(if sparse { FfnSpec::Moe(moe.clone()) } else { dense.clone() })
        },
    )
}

/// OlmoeForCausalLM: queries and keys are normalised over the whole projection.
pub(super) fn olmoe(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    if let Some(clip) = fields.get("clip_qkv") {
        return Err(fields.unsupported(format!("clip_qkv = {clip}"), "only null is"));
    }
    let moe = MoeSpec {
        experts: fields.size_any(&["num_experts", "num_local_experts"], 64)?,
        top_k: fields.size_or("num_experts_per_tok", 8)?,
        width: fields.size("intermediate_size")?,
        router: RouterKind::Softmax { renormalise: fields.flag_or("norm_topk_prob", false)? },
        shared_width: None,
        activation: fields.activation()?,
        bias: false,
    };
    let bias = fields.flag_or("attention_bias", false)?;
    let variant = Variant {
        names: TensorNames::LLAMA,
        architecture: "OlmoeForCausalLM",
        head_dim: None,
        qk_norm: QkNorm::WholeProjection,
        bias: (bias, bias),
        rope_theta: 10_000.0,
        norm_eps: 1e-5,
        max_positions: 4096,
    };
    assemble(fields, &variant, |_| Ok(None), |_| Ok(FfnSpec::Moe(moe.clone())))
}
