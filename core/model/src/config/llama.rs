//! Dense models with Llama's tensor names: Llama 2/3, SmolLM2, Mistral, Qwen2, Qwen3.

use super::fields::Fields;
use super::rope::rope;
use crate::error::ModelError;
use crate::spec::{AttentionSpec, FfnSpec, ModelSpec, OutputHead, QkNorm, RopeStyle, TensorNames};

/// What tells the relatives apart.
pub(super) struct Variant {
    pub(super) names: TensorNames,
    pub(super) architecture: &'static str,
    /// Width of a head where the file gives none; `None` is `hidden / heads`.
    pub(super) head_dim: Option<usize>,
    pub(super) qk_norm: QkNorm,
    /// Bias on q, k, v; and on the output projection.
    pub(super) bias: (bool, bool),
    pub(super) rope_theta: f64,
    pub(super) norm_eps: f64,
    pub(super) max_positions: usize,
}

/// LlamaForCausalLM.
pub(super) fn llama(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    fields.refuse_flag("mlp_bias")?;
    let bias = fields.flag_or("attention_bias", false)?;
    dense(fields, &Variant { bias: (bias, bias), ..variant("LlamaForCausalLM") }, |_| Ok(None))
}

/// MistralForCausalLM: a sliding window on every layer, unless it is null.
pub(super) fn mistral(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let window = fields.size_opt("sliding_window")?;
    dense(fields, &variant("MistralForCausalLM"), |_| Ok(window))
}

/// Qwen2ForCausalLM: bias on q, k, v; a window on the layers from `max_window_layers` on, if switched on.
pub(super) fn qwen2(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let variant = Variant { bias: (true, false), max_positions: 32768, ..variant("Qwen2ForCausalLM") };
    dense(fields, &variant, |layer| qwen_window(fields, layer))
}

/// Qwen3ForCausalLM: normalised heads of width 128 by default.
pub(super) fn qwen3(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let bias = fields.flag_or("attention_bias", false)?;
    let variant = Variant {
        bias: (bias, bias),
        head_dim: Some(128),
        qk_norm: QkNorm::PerHead,
        max_positions: 32768,
        ..variant("Qwen3ForCausalLM")
    };
    dense(fields, &variant, |layer| qwen_window(fields, layer))
}

fn variant(architecture: &'static str) -> Variant {
    Variant {
        names: TensorNames::LLAMA,
        architecture,
        head_dim: None,
        qk_norm: QkNorm::None,
        bias: (false, false),
        rope_theta: 10_000.0,
        norm_eps: 1e-6,
        max_positions: 2048,
    }
}

fn qwen_window(fields: &Fields<'_>, layer: usize) -> Result<Option<usize>, ModelError> {
    if !fields.flag_or("use_sliding_window", false)? {
        return Ok(None);
    }
    let layers = fields.layers()?;
    let sliding = match fields.layer_types(layers)? {
        Some(names) => names[layer] == "sliding_attention",
        None => {
            let from = fields.get("max_window_layers").and_then(serde_json::Value::as_u64).unwrap_or(28);
            layer as u64 >= from
        }
    };
    if sliding { fields.size_opt("sliding_window") } else { Ok(None) }
}

fn dense(
    fields: &Fields<'_>,
    variant: &Variant,
    window: impl Fn(usize) -> Result<Option<usize>, ModelError>,
) -> Result<ModelSpec, ModelError> {
    let ffn = FfnSpec::Dense { width: fields.size("intermediate_size")?, activation: fields.activation()? };
    assemble(fields, variant, window, |_| Ok(ffn.clone()))
}

/// The body all families but Llama 4 share: same attention in every layer, `ffn` and `window` by layer.
pub(super) fn assemble(
    fields: &Fields<'_>,
    variant: &Variant,
    window: impl Fn(usize) -> Result<Option<usize>, ModelError>,
    ffn: impl Fn(usize) -> Result<FfnSpec, ModelError>,
) -> Result<ModelSpec, ModelError> {
    let hidden = fields.size("hidden_size")?;
    let heads = fields.size("num_attention_heads")?;
    let head_dim = match (fields.size_opt("head_dim")?, variant.head_dim) {
        (Some(width), _) | (None, Some(width)) => width,
        (None, None) if hidden % heads == 0 => hidden / heads,
        (None, None) => {
            return Err(fields
                .invalid(format!("hidden_size = {hidden} is not a multiple of {heads} attention heads")));
        }
    };
    let attention = AttentionSpec {
        heads,
        kv_heads: fields.size_or("num_key_value_heads", heads)?,
        head_dim,
        scale: (head_dim as f32).powf(-0.5),
        rope: Some(rope(fields, head_dim, variant.rope_theta, RopeStyle::Half)?),
        qk_norm: variant.qk_norm,
        chunk: None,
        window: None,
        sinks: false,
        temperature: None,
        qkv_bias: variant.bias.0,
        out_bias: variant.bias.1,
        latent: None,
    };
    let max_positions = fields.size_or("max_position_embeddings", variant.max_positions)?;
    let layers = (0..fields.layers()?)
        .map(|layer| {
            // A window that no sequence outgrows is no window.
            let window = window(layer)?.filter(|&width| width < max_positions);
            Ok((AttentionSpec { window, ..attention.clone() }, ffn(layer)?))
        })
        .collect::<Result<_, ModelError>>()?;
    Ok(ModelSpec {
        names: variant.names,
        vocab_size: fields.size("vocab_size")?,
        hidden,
        layers,
        norm_eps: fields.number_or("rms_norm_eps", variant.norm_eps)? as f32,
        norm_offset: 0.0,
        sandwich_norms: false,
        embedding_scale: 1.0,
        tied_embeddings: fields.flag_or("tie_word_embeddings", false)?,
        head: OutputHead::LanguageModel,
        max_positions,
        architecture: variant.architecture.to_owned(),
        vision: None,
    })
}
