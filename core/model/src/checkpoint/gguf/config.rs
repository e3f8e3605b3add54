//! Metadata → `config.json` and `generation_config.json`, as the original checkpoint would have had them.

use serde_json::{Map, Value, json};

use super::File;
use super::header::Meta;
use crate::config::inverse_frequencies;
use crate::error::ModelError;
use crate::spec::RopeScaling;

/// GGUF architecture, and what it is here.
const ARCHITECTURES: [(&str, &str, &str); 5] = [
    ("llama", "LlamaForCausalLM", "llama"),
    ("qwen2", "Qwen2ForCausalLM", "qwen2"),
    ("qwen3", "Qwen3ForCausalLM", "qwen3"),
    ("qwen3moe", "Qwen3MoeForCausalLM", "qwen3_moe"),
    ("gemma3", "Gemma3ForCausalLM", "gemma3_text"),
];

/// The one released Gemma 3 whose scores are not scaled by the width of a head (27B, as llama.cpp knows it too).
const GEMMA3_27B_LAYERS: i64 = 62;

/// The configuration of the model in `file`.
pub(super) fn config_json(file: &File<'_>) -> Result<Map<String, Value>, ModelError> {
    let name =
        text(file, "general.architecture").ok_or_else(|| file.invalid("general.architecture is missing"))?;
    let Some((_, mut architecture, mut model_type)) =
        ARCHITECTURES.iter().copied().find(|(gguf, ..)| *gguf == name)
    else {
        return Err(file.unsupported(
            format!("GGUF architecture `{name}`"),
            "; supported are llama (Mixtral included), qwen2, qwen3, qwen3moe and gemma3",
        ));
    };
    let experts = int(file, &format!("{name}.expert_count")).filter(|n| *n > 0);
    if name == "llama" && experts.is_some() {
        (architecture, model_type) = ("MixtralForCausalLM", "mixtral");
    }
    let required = |key: &str| {
        int(file, &format!("{name}.{key}"))
            .ok_or_else(|| file.invalid(format!("{name}.{key} is missing or not a whole number")))
    };
    let optional = |key: &str| int(file, &format!("{name}.{key}"));
    let number = |key: &str| float(file, &format!("{name}.{key}"));
    let embedding = file.info("token_embd.weight")?;
    let heads = required("attention.head_count")?;
    let mut config = json!({
        "architectures": [architecture], "model_type": model_type,
        "vocab_size": embedding.shape.first().copied().unwrap_or_default(),
        "hidden_size": required("embedding_length")?,
        "intermediate_size": required("feed_forward_length")?,
        "num_hidden_layers": required("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": optional("attention.head_count_kv").unwrap_or(heads),
        "max_position_embeddings": required("context_length")?,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon").unwrap_or(1e-5),
        "rope_theta": number("rope.freq_base").unwrap_or(10_000.0),
        "tie_word_embeddings": !file.header.tensors.contains_key("output.weight"),
        "hidden_act": "silu",
    });
    let head_dim = match optional("attention.key_length") {
        Some(width) => width,
        None if heads > 0 => required("embedding_length")? / heads,
        None => return Err(file.invalid("attention.head_count is 0")),
    };
    config["head_dim"] = head_dim.into();
    if let Some(experts) = experts {
        config["num_experts_per_tok"] = required("expert_used_count")?.into();
        config[if model_type == "mixtral" { "num_local_experts" } else { "num_experts" }] = experts.into();
        if model_type == "qwen3_moe" {
            config["moe_intermediate_size"] = required("expert_feed_forward_length")?.into();
            config["norm_topk_prob"] = true.into();
        }
    }
    if model_type == "gemma3_text" {
        config["hidden_activation"] = "gelu_pytorch_tanh".into();
        config["sliding_window"] = required("attention.sliding_window")?.into();
        if let Some(Meta::List(local)) = file.header.meta.get("gemma3.attention.sliding_window_pattern") {
            let kind = |flag: &Meta| match flag {
                Meta::Bool(true) => "sliding_attention",
                _ => "full_attention",
            };
            config["layer_types"] = local.iter().map(kind).collect();
        }
        let plain = required("block_count")? != GEMMA3_27B_LAYERS;
        config["query_pre_attn_scalar"] =
            if plain { head_dim } else { required("embedding_length")? / heads.max(1) }.into();
    }
    if model_type == "llama" {
        config["attention_bias"] = file.header.tensors.contains_key("blk.0.attn_q.bias").into();
    }
    config["rope_scaling"] =
        rope_scaling(file, name, head_dim, config["rope_theta"].as_f64().unwrap_or(10_000.0))?;
    for (ours, theirs) in [("bos_token_id", "bos"), ("eos_token_id", "eos")] {
        config[ours] = int(file, &format!("tokenizer.ggml.{theirs}_token_id")).into();
    }
    match config {
        Value::Object(map) => Ok(map),
        _ => Ok(Map::new()),
    }
}

/// Scaling is named in the metadata, or baked into a tensor of factors: then the parameters that give these factors are
/// looked for among those of released models.
fn rope_scaling(file: &File<'_>, name: &str, head_dim: i64, theta: f64) -> Result<Value, ModelError> {
    match text(file, &format!("{name}.rope.scaling.type")) {
        None | Some("none") => {}
        Some("linear") => {
            let factor = float(file, &format!("{name}.rope.scaling.factor"));
            return Ok(json!({"rope_type": "linear", "factor": factor}));
        }
        Some(other) => return Err(file.unsupported(format!("rope scaling `{other}`"), "")),
    }
    let Some(info) = file.header.tensors.get("rope_freqs.weight") else { return Ok(Value::Null) };
    let factors = super::Elements::F32(file.tensor_bytes("rope_freqs.weight", info)?).to_f32();
    let head_dim =
        usize::try_from(head_dim).ok().filter(|width| *width == 2 * factors.len() && info.kind == 0);
    let head_dim =
        head_dim.ok_or_else(|| file.invalid("rope_freqs.weight: expected half a head of F32 factors"))?;
    let plain = inverse_frequencies(theta, head_dim, &RopeScaling::None);
    for factor in [8.0, 32.0] {
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: 8192,
        };
        let scaled = inverse_frequencies(theta, head_dim, &scaling);
        let same = |i: usize| (plain[i] / scaled[i] / factors[i] - 1.0).abs() <= 1e-3;
        if (0..factors.len()).all(same) {
            return Ok(
                json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}),
            );
        }
    }
    Err(file
        .unsupported("the rope scaling in rope_freqs.weight", "; only that of Llama 3.1 and 3.2 is known"))
}

/// The generation defaults of the model in `file`.
pub(super) fn generation_json(file: &File<'_>) -> Map<String, Value> {
    let id = |name: &str| int(file, &format!("tokenizer.ggml.{name}_token_id"));
    let mut ends: Vec<i64> = ["eos", "eot", "eom"].iter().filter_map(|name| id(name)).collect();
    ends.sort_unstable();
    ends.dedup();
    let mut map = Map::new();
    map.extend(id("bos").map(|id| ("bos_token_id".to_owned(), id.into())));
    match ends.as_slice() {
        [] => {}
        [one] => drop(map.insert("eos_token_id".into(), (*one).into())),
        more => drop(map.insert("eos_token_id".into(), more.into())),
    }
    map.extend(id("padding").map(|id| ("pad_token_id".to_owned(), id.into())));
    map
}

pub(super) fn text<'f>(file: &'f File<'_>, key: &str) -> Option<&'f str> {
    file.header.meta.get(key)?.text()
}

pub(super) fn int(file: &File<'_>, key: &str) -> Option<i64> {
    i64::try_from(file.header.meta.get(key)?.int()?).ok()
}

fn float(file: &File<'_>, key: &str) -> Option<f64> {
    match file.header.meta.get(key)? {
        Meta::Float(x) => Some(*x),
        Meta::Int(n) => Some(*n as f64),
        _ => None,
    }
}
