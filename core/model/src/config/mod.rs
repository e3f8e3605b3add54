//! `config.json` → [`ModelSpec`].
//!
//! One row of [`ARCHITECTURES`] and one builder per family; both spellings of the configuration are read (transformers
//! 4.x: `rope_theta` + `rope_scaling`, `torch_dtype`, `num_experts`; 5.x: `rope_parameters`, `dtype`,
//! `num_local_experts`). What a checkpoint asks for and this build does not do is refused here, by name, rather than
//! ignored: a model that runs with a feature left out is wrong in ways nobody notices.

mod classifier;
mod deepseek;
mod encoder;
mod fields;
mod gemma3;
mod gpt_oss;
mod llama;
mod llama4;
mod mixtral;
mod qwen3_moe;
mod rope;

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::spec::{FfnSpec, ModelSpec};
pub(crate) use classifier::labels_of;
pub use encoder::{ENCODERS, encoder_spec_from_config};
use fields::Fields;
pub(crate) use rope::inverse_frequencies;

/// One supported architecture.
pub struct Architecture {
    /// Entry of `architectures` in `config.json`.
    pub name: &'static str,
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    build: fn(&Fields<'_>) -> Result<ModelSpec, ModelError>,
}

/// Every architecture that can be loaded, trained and saved.
pub const ARCHITECTURES: &[Architecture] = &[
    Architecture { name: "LlamaForCausalLM", model_type: "llama", build: llama::llama },
    Architecture { name: "MistralForCausalLM", model_type: "mistral", build: llama::mistral },
    Architecture { name: "Qwen2ForCausalLM", model_type: "qwen2", build: llama::qwen2 },
    Architecture { name: "Qwen3ForCausalLM", model_type: "qwen3", build: llama::qwen3 },
    Architecture { name: "MixtralForCausalLM", model_type: "mixtral", build: mixtral::mixtral },
    Architecture { name: "Qwen3MoeForCausalLM", model_type: "qwen3_moe", build: qwen3_moe::qwen3_moe },
    Architecture { name: "OlmoeForCausalLM", model_type: "olmoe", build: qwen3_moe::olmoe },
    Architecture { name: "Llama4ForCausalLM", model_type: "llama4_text", build: llama4::llama4_text },
    Architecture { name: "GptOssForCausalLM", model_type: "gpt_oss", build: gpt_oss::gpt_oss },
    Architecture { name: "Gemma3ForCausalLM", model_type: "gemma3_text", build: gemma3::gemma3_text },
    Architecture { name: "Llama4ForConditionalGeneration", model_type: "llama4", build: llama4::llama4 },
    Architecture { name: "DeepseekV3ForCausalLM", model_type: "deepseek_v3", build: deepseek::deepseek_v3 },
];

/// Heads that score a text instead of going on with it, on bodies of [`ARCHITECTURES`].
pub const CLASSIFIERS: &[Architecture] = &[
    Architecture { name: "LlamaForSequenceClassification", model_type: "llama", build: classifier::llama },
    Architecture {
        name: "MistralForSequenceClassification",
        model_type: "mistral",
        build: classifier::mistral,
    },
    Architecture { name: "Qwen2ForSequenceClassification", model_type: "qwen2", build: classifier::qwen2 },
    Architecture { name: "Qwen3ForSequenceClassification", model_type: "qwen3", build: classifier::qwen3 },
    Architecture {
        name: "MixtralForSequenceClassification",
        model_type: "mixtral",
        build: classifier::mixtral,
    },
    Architecture {
        name: "Qwen3MoeForSequenceClassification",
        model_type: "qwen3_moe",
        build: classifier::qwen3_moe,
    },
];

/// The names in [`ARCHITECTURES`], for messages.
pub fn supported_architectures() -> String {
    ARCHITECTURES.iter().map(|row| row.name).collect::<Vec<_>>().join(", ")
}

/// The model that `config` (the content of the file `path`) describes, checked.
///
/// # Errors
/// [`ModelError::Unsupported`] for an architecture or feature this build lacks, [`ModelError::Invalid`] for keys that
/// are missing, of the wrong type or contradictory.
pub fn spec_from_config(path: &Path, config: &Map<String, Value>) -> Result<ModelSpec, ModelError> {
    let fields = Fields::new(path, config);
    let architecture = find(&fields)?;
    refuse_quantised(&fields, architecture.model_type)?;
    let spec = (architecture.build)(&fields)?;
    check(&fields, &spec)?;
    Ok(spec)
}

/// Refuses a quantised checkpoint, except gpt-oss in MXFP4: what it is released in, and decoded from.
fn refuse_quantised(fields: &Fields<'_>, model_type: &str) -> Result<(), ModelError> {
    let Some(quantisation) = fields.object("quantization_config")? else { return Ok(()) };
    let method = quantisation.map.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
    if (model_type, method) == ("gpt_oss", "mxfp4") {
        return Ok(());
    }
    Err(fields.unsupported(
        format!("a quantised checkpoint (quantization_config, method `{method}`)"),
        "use the checkpoint in bf16, f16 or f32, or a GGUF file",
    ))
}

fn find(fields: &Fields<'_>) -> Result<&'static Architecture, ModelError> {
    let declared = match fields.get("architectures") {
        None => None,
        Some(Value::Array(names)) => names.first().and_then(Value::as_str),
        Some(_) => return Err(fields.invalid("architectures: expected a list of names")),
    };
    let model_type = fields.text("model_type")?;
    let row = match (declared, model_type) {
        (Some(name), _) => ARCHITECTURES.iter().chain(CLASSIFIERS).find(|row| row.name == name),
        (None, Some(kind)) => ARCHITECTURES.iter().find(|row| row.model_type == kind),
        (None, None) => return Err(fields.invalid("neither `architectures` nor `model_type` is given")),
    };
    row.ok_or_else(|| {
        let asked = declared.or(model_type).unwrap_or_default();
        fields.unsupported(
            format!("architecture `{asked}`"),
            &format!("supported are {}", supported_architectures()),
        )
    })
}

/// Keeps the table of tensor names of a hostile configuration small; the largest released models have 25,000.
const MAX_EXPERTS: usize = 1 << 17;

/// No model comes near 2^48 parameters; more would overflow sizes in bytes.
const MAX_PARAMETERS: f64 = (1u64 << 48) as f64;

/// What holds for every family. Sizes are bounded so that products of them cannot overflow.
fn check(fields: &Fields<'_>, spec: &ModelSpec) -> Result<(), ModelError> {
    if spec.layers.is_empty() {
        return Err(fields.invalid("num_hidden_layers: a model needs at least one layer"));
    }
    if parameters(spec) > MAX_PARAMETERS {
        return Err(
            fields.invalid(format!("a model of {:e} parameters; the limit is 2^48", parameters(spec)))
        );
    }
    let mut experts = 0;
    for (index, (attention, ffn)) in spec.layers.iter().enumerate() {
        if attention.heads % attention.kv_heads != 0 {
            return Err(fields.invalid(format!(
                "num_key_value_heads = {} does not divide num_attention_heads = {}",
                attention.kv_heads, attention.heads
            )));
        }
        if attention.rope.is_some() && attention.latent.is_none() && attention.head_dim % 2 != 0 {
            return Err(fields
                .invalid(format!("head_dim = {} is odd, rotary pairs need it even", attention.head_dim)));
        }
        let FfnSpec::Moe(moe) = ffn else { continue };
        experts += moe.experts;
        if experts > MAX_EXPERTS {
            return Err(fields.invalid(format!("more than {MAX_EXPERTS} experts in all layers together")));
        }
        if moe.top_k > moe.experts || moe.experts > usize::from(u16::MAX) {
            return Err(fields.invalid(format!(
                "layer {index}: num_experts_per_tok = {} of {} experts (at most 65535)",
                moe.top_k, moe.experts
            )));
        }
    }
    Ok(())
}

/// At least as many parameters as the model has, in numbers that do not overflow.
fn parameters(spec: &ModelSpec) -> f64 {
    let product = |sizes: &[usize]| sizes.iter().map(|&size| size as f64).product::<f64>();
    let layers = spec.layers.iter().map(|(attention, ffn)| {
        let heads = [attention.heads, attention.head_dim + attention.value_dim()];
        let inputs = attention.latent.map_or(0, |latent| latent.q_rank.unwrap_or(0) + latent.kv_rank);
        let attention = product(&heads) * (2 * spec.hidden + inputs) as f64 + product(&[inputs, spec.hidden]);
        attention
            + match ffn {
                FfnSpec::Dense { width, .. } => product(&[3, spec.hidden, *width]),
                FfnSpec::Moe(moe) => {
                    let widths =
                        product(&[moe.experts, moe.width + 1]) + moe.shared_width.unwrap_or(0) as f64;
                    3.0 * widths * spec.hidden as f64
                }
            }
    });
    layers.sum::<f64>() + product(&[2, spec.vocab_size, spec.hidden])
}

#[cfg(test)]
mod tests;
