//! Gemma 3 text: norms before and after each block, gains of 1 + weight, scaled embeddings; most layers in a sliding
//! window with a rotary base of their own, every sixth global.

use super::fields::Fields;
use super::llama::{Variant, assemble};
use super::rope::{plain_rope, rope, rope_of_kind};
use crate::error::ModelError;
use crate::spec::{FfnSpec, ModelSpec, QkNorm, RopeStyle, TensorNames};

const GLOBAL_THETA: f64 = 1e6;
const LOCAL_THETA: f64 = 10_000.0;

/// Gemma3ForCausalLM.
pub(super) fn gemma3_text(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = fields.get(key) {
            return Err(fields.unsupported(format!("{key} = {cap}"), "only null is"));
        }
    }
    fields.refuse_flag("use_bidirectional_attention")?;
    let bias = fields.flag_or("attention_bias", false)?;
    let variant = Variant {
        names: TensorNames::LLAMA,
        architecture: "Gemma3ForCausalLM",
        head_dim: Some(256),
        qk_norm: QkNorm::PerHead,
        bias: (bias, bias),
        rope_theta: GLOBAL_THETA,
        norm_eps: 1e-6,
        max_positions: 131_072,
    };
    let ffn = FfnSpec::Dense {
        width: fields.size("intermediate_size")?,
        activation: fields.activation_of("hidden_activation", "gelu_pytorch_tanh")?,
    };
    let period = fields.size_any(&["sliding_window_pattern", "_sliding_window_pattern"], 6)?;
    let sliding = fields.sliding_layers(fields.layers()?, |layer| (layer + 1) % period != 0)?;
    let window = fields.size_or("sliding_window", 4096)?;
    let mut spec =
        assemble(fields, &variant, |layer| Ok(sliding[layer].then_some(window)), |_| Ok(ffn.clone()))?;
    let head_dim = spec.layers[0].0.head_dim;
    let global = match rope_of_kind(fields, "full_attention", head_dim, GLOBAL_THETA, RopeStyle::Half)? {
        Some(global) => global,
        None => rope(fields, head_dim, GLOBAL_THETA, RopeStyle::Half)?,
    };
    let local = match rope_of_kind(fields, "sliding_attention", head_dim, LOCAL_THETA, RopeStyle::Half)? {
        Some(local) => local,
        None => plain_rope(fields.number_or("rope_local_base_freq", LOCAL_THETA)?, head_dim, RopeStyle::Half),
    };
    let scale = fields.number_or("query_pre_attn_scalar", 256.0)?.powf(-0.5) as f32;
    for ((attention, _), sliding) in spec.layers.iter_mut().zip(sliding) {
        attention.rope = Some(if sliding { local.clone() } else { global.clone() });
        attention.scale = scale;
    }
    Ok(ModelSpec {
        norm_offset: 1.0,
        sandwich_norms: true,
        embedding_scale: (spec.hidden as f64).sqrt() as f32,
        tied_embeddings: fields.flag_or("tie_word_embeddings", true)?,
        ..spec
    })
}
