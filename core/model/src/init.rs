//! A model with random weights, for tests, examples and training from nothing.

mod tokenizer;

use std::path::Path;
use std::sync::Arc;

use freewheel_types::WeightsDtype;
use serde_json::{Map, Value, json};

use crate::Transformer;
use crate::checkpoint::LoadedModel;
use crate::config::{ARCHITECTURES, spec_from_config, supported_architectures};
use crate::error::ModelError;
use crate::generation::GenerationConfig;
use crate::metap::{MetaP, writes_residual};
use crate::params::{ParamData, ParamLayout, Params, TensorKind, TensorSpec};
use crate::spec::VisionSpec;
use crate::tokenizer::{PREPROCESSOR, Tokenizer};
use crate::upcycle::normal;

pub use tokenizer::{ChatStyle, TokenizerChoice, build_tokenizer};

/// What model to make.
#[derive(Clone, Debug)]
pub struct InitRequest {
    /// Architecture, as in `config.json`: `LlamaForCausalLM`, or its model type `llama`.
    pub arch: String,
    /// Keys of `config.json` to set. Keys that the architecture does not have are refused.
    pub overrides: Vec<(String, Value)>,
    /// Seed of the weights.
    pub seed: u64,
    /// Spread of the weights.
    pub scale: InitScale,
    /// Element type of the weights.
    pub dtype: WeightsDtype,
    /// The tokenizer to go with it.
    pub tokenizer: TokenizerChoice,
}

/// Spread of random weights. Norm gains are 1 and biases 0 in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitScale {
    /// Every matrix with deviation `initializer_range` of the configuration (0.02), as the reference library does.
    InitializerRange,
    /// `1/sqrt(inputs)`, projections into the residual stream divided by `sqrt(2 · layers)`: trains well at any width.
    FanIn,
    /// As [`MetaP`] says: a learning rate found at the base suits this size too.
    MetaP(MetaP),
}

/// Makes the model.
///
/// # Errors
/// [`ModelError::Unsupported`] for an unknown architecture, [`ModelError::Invalid`] for keys it does not have or values
/// that do not fit together (also a `vocab_size` below the tokenizer's).
pub fn init_model(request: &InitRequest) -> Result<LoadedModel, ModelError> {
    let source = Path::new("init-model");
    let row = ARCHITECTURES
        .iter()
        .find(|row| row.name == request.arch || row.model_type == request.arch)
        .ok_or_else(|| ModelError::Unsupported {
            path: source.to_owned(),
            what: format!("architecture `{}`", request.arch),
            hint: format!("; supported are {}", supported_architectures()),
        })?;
    let llama = row.model_type.starts_with("llama");
    let style = match row.model_type {
        "llama4" => ChatStyle::Llama4Images,
        _ if llama => ChatStyle::Llama4,
        _ => ChatStyle::ChatMl,
    };
    let mut tokenizer = build_tokenizer(&request.tokenizer, style)?;
    let mut config = defaults(row.name, row.model_type);
    text_part(&mut config).insert("vocab_size".into(), tokenizer.vocab_size().into());
    text_part(&mut config).insert("initializer_range".into(), 0.02.into());
    config.insert(
        "torch_dtype".into(),
        if request.dtype == WeightsDtype::F32 { "float32" } else { "bfloat16" }.into(),
    );
    for (key, value) in &request.overrides {
        set(&mut config, key, value).map_err(|what| ModelError::Invalid {
            path: source.to_owned(),
            what: format!("{} {what}", row.name),
        })?;
    }
    let ids = GenerationConfig::new(source, Map::new(), &Map::new(), &tokenizer)?;
    let text = text_part(&mut config);
    text.insert("bos_token_id".into(), ids.bos_id.into());
    text.insert("eos_token_id".into(), ids.eos_ids.first().copied().into());
    text.insert("pad_token_id".into(), ids.pad_id.into());
    let range = text["initializer_range"].clone();
    let spec = spec_from_config(source, &config)?;
    tokenizer.check_fits(spec.vocab_size)?;
    if let Some(vision) = &spec.vision {
        if !matches!(request.tokenizer, TokenizerChoice::Folder(_)) {
            tokenizer.add_file(PREPROCESSOR, &preprocessor(vision));
        }
        tokenizer.read_images(source, vision)?;
        for (key, token) in [
            ("boi_token_index", "<|image_start|>"),
            ("eoi_token_index", "<|image_end|>"),
            ("image_token_index", "<|patch|>"),
        ] {
            config.insert(key.into(), tokenizer.token_to_id(token).into());
        }
    }
    let deviation = match range.as_f64() {
        Some(x) if x.is_finite() && x >= 0.0 => x,
        _ => {
            let what = format!("initializer_range = {range}: expected 0 or more");
            return Err(ModelError::Invalid { path: source.to_owned(), what });
        }
    };
    let (layers, norm_offset) = (spec.layers.len(), spec.norm_offset);
    let model = Transformer::new(spec);
    if let InitScale::MetaP(base) = request.scale
        && base.growth(model.layout()).is_none()
    {
        let what = "tie_word_embeddings = true: MetaP needs a head of its own".into();
        return Err(ModelError::Invalid { path: source.to_owned(), what });
    }
    let params = random_params(model.layout(), request, deviation, layers, norm_offset);
    let generation = GenerationConfig::new(source, Map::new(), &config, &tokenizer)?;
    let tokenizer: Arc<Tokenizer> = Arc::new(tokenizer);
    Ok(LoadedModel { model, params, tokenizer, generation, config_json: config, source: source.to_owned() })
}

/// Where the keys of the text model are.
fn text_part(config: &mut Map<String, Value>) -> &mut Map<String, Value> {
    let nested = config.get("text_config").is_some_and(Value::is_object);
    if !nested {
        return config;
    }
    match config.get_mut("text_config") {
        Some(Value::Object(text)) => text,
        _ => unreachable!("just looked"),
    }
}

/// Sets a key of the configuration, or of the text model in it; `vision_config.key`, or a table `vision_config`, those
/// of the image encoder.
fn set(config: &mut Map<String, Value>, key: &str, value: &Value) -> Result<(), String> {
    if let (Some(Value::Object(_)), Value::Object(table)) = (config.get(key), value) {
        return table.iter().try_for_each(|(inner, value)| set(config, &format!("{key}.{inner}"), value));
    }
    let (part, inner) = match key.split_once('.') {
        Some((outer, inner)) => match config.get_mut(outer) {
            Some(Value::Object(part)) => (part, inner),
            _ => return Err(format!("has no part `{outer}`")),
        },
        None => (text_part(config), key),
    };
    if !part.contains_key(inner) {
        let known: Vec<&str> = part.keys().map(String::as_str).collect();
        return Err(format!("has no key `{key}`; it has {}", known.join(", ")));
    }
    part.insert(inner.to_owned(), value.clone());
    // What stands at the top too (tied embeddings) means the same there.
    if config.contains_key(inner) && !key.contains('.') {
        config.insert(inner.to_owned(), value.clone());
    }
    Ok(())
}

/// Images on up to four tiles.
fn preprocessor(vision: &VisionSpec) -> Value {
    json!({
        "image_processor_type": "Llama4ImageProcessorFast", "do_convert_rgb": true, "do_normalize": true,
        "do_rescale": true, "do_resize": true, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "max_patches": 4, "resample": 2, "rescale_factor": 1.0 / 255.0, "resize_to_max_canvas": false,
        "size": {"height": vision.image_size, "width": vision.image_size},
    })
}

fn random_params(
    layout: &Arc<ParamLayout>,
    request: &InitRequest,
    deviation: f64,
    layers: usize,
    norm_offset: f32,
) -> Params {
    let growth = match request.scale {
        InitScale::MetaP(base) => base.growth(layout),
        InitScale::InitializerRange | InitScale::FanIn => None,
    };
    let mut values = Vec::with_capacity(layout.total);
    for tensor in &layout.tensors {
        match tensor.kind {
            TensorKind::Norm => values.extend(std::iter::repeat_n(1.0 - norm_offset, tensor.len())),
            TensorKind::Bias | TensorKind::RouterBias => {
                values.extend(std::iter::repeat_n(0.0f32, tensor.len()))
            }
            TensorKind::Position => {
                let width = tensor.shape.last().copied().unwrap_or(1) as f64;
                values.extend(normal(request.seed, &tensor.name, tensor.len(), width.sqrt().recip()));
            }
            _ => {
                let deviation = match request.scale {
                    InitScale::InitializerRange => deviation,
                    InitScale::FanIn => fan_in(tensor, layers),
                    InitScale::MetaP(_) => {
                        let metap = growth.as_ref().and_then(|growth| growth.deviation(tensor));
                        metap.unwrap_or_else(|| fan_in(tensor, layers))
                    }
                };
                values.extend(normal(request.seed, &tensor.name, tensor.len(), deviation));
            }
        }
    }
    let wide = Params { layout: layout.clone(), data: ParamData::F32(values) };
    if request.dtype == WeightsDtype::F32 { wide } else { wide.cast(request.dtype) }
}

fn fan_in(tensor: &TensorSpec, layers: usize) -> f64 {
    // `[out, in]`, and `[experts, in, out]` where experts are fused: the second dimension in both.
    let inputs = tensor.shape.get(1).copied().unwrap_or(1) as f64;
    let vision = tensor.name.starts_with("vision_model.model.layers") && tensor.name.ends_with("fc2.weight");
    let residual = if vision || writes_residual(tensor) { 2.0 * layers as f64 } else { 1.0 };
    (inputs * residual).sqrt().recip()
}

/// A small configuration of every architecture, with all the keys that may be set.
fn defaults(architecture: &str, model_type: &str) -> Map<String, Value> {
    if model_type == "llama4" {
        return vision_defaults(architecture);
    }
    let mut config = json!({
        "architectures": [architecture], "model_type": model_type, "hidden_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 384,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "rope_scaling": null,
        "hidden_act": "silu", "tie_word_embeddings": false, "use_cache": true, "attention_dropout": 0.0,
        "bos_token_id": null, "eos_token_id": null, "pad_token_id": null,
    });
    let more = match model_type {
        "llama" => json!({"attention_bias": false, "mlp_bias": false}),
        "mistral" => json!({"sliding_window": null}),
        "qwen2" => json!({"use_sliding_window": false, "sliding_window": null, "max_window_layers": 28}),
        "qwen3" => {
            json!({"attention_bias": false, "use_sliding_window": false, "sliding_window": null, "max_window_layers": 28})
        }
        "mixtral" => json!({"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": null,
            "intermediate_size": 192, "output_router_logits": false, "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0}),
        "qwen3_moe" => json!({"attention_bias": false, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 192, "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "use_sliding_window": false, "sliding_window": null, "output_router_logits": false,
            "router_aux_loss_coef": 0.001}),
        "olmoe" => {
            json!({"attention_bias": false, "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 192,
            "num_key_value_heads": 4, "norm_topk_prob": false, "clip_qkv": null, "output_router_logits": false,
            "router_aux_loss_coef": 0.01})
        }
        "gpt_oss" => json!({"attention_bias": true, "num_local_experts": 8, "num_experts_per_tok": 2,
            "intermediate_size": 192, "layer_types": null, "sliding_window": 128, "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0, "rope_theta": 150_000.0, "output_router_logits": false, "router_aux_loss_coef": 0.001}),
        "gemma3_text" => {
            json!({"attention_bias": false, "hidden_activation": "gelu_pytorch_tanh", "layer_types": null,
            "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 32,
            "rope_local_base_freq": 10_000.0, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": true, "attn_logit_softcapping": null, "final_logit_softcapping": null,
            "use_bidirectional_attention": false})
        }
        "deepseek_v3" => {
            json!({"attention_bias": false, "num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32,
            "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "rope_interleave": true,
            "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "norm_topk_prob": true,
            "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0})
        }
        _ => json!({"attention_bias": false, "intermediate_size": 192, "intermediate_size_mlp": 384,
            "num_local_experts": 8, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "moe_layers": null,
            "no_rope_layer_interval": 4, "no_rope_layers": null, "attention_chunk_size": 1024, "use_qk_norm": true,
            "attn_temperature_tuning": true, "floor_scale": 8192, "attn_scale": 0.1, "rope_theta": 500_000.0,
            "output_router_logits": false, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
            "for_llm_compressor": false}),
    };
    if let (Value::Object(config), Value::Object(more)) = (&mut config, more) {
        config.extend(more);
    }
    match config {
        Value::Object(mut map) => {
            if model_type == "deepseek_v3" {
                map.remove("head_dim"); // It follows from the parts of a head.
            }
            map
        }
        _ => Map::new(),
    }
}

/// A small Llama 4 that reads images.
fn vision_defaults(architecture: &str) -> Map<String, Value> {
    let text = defaults("Llama4ForCausalLM", "llama4_text");
    let config = json!({
        "architectures": [architecture], "model_type": "llama4", "tie_word_embeddings": false,
        "text_config": text,
        "vision_config": {
            "model_type": "llama4_vision_model", "hidden_act": "gelu", "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_channels": 3, "intermediate_size": 256, "vision_output_dim": 128,
            "image_size": 32, "patch_size": 8, "norm_eps": 1e-5, "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 128, "projector_output_dim": 128, "multi_modal_projector_bias": false,
            "projector_dropout": 0.0, "attention_dropout": 0.0, "vision_feature_select_strategy": "default",
            "rope_theta": 10_000.0, "initializer_range": 0.02,
        },
    });
    match config {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
