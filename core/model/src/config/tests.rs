//! Configurations: derived values, both spellings, refusals.

use serde_json::{Value, json};

use super::*;
use crate::spec::{RopeScaling, RouterKind};

fn parse(config: Value) -> Result<ModelSpec, ModelError> {
    let Value::Object(map) = config else { panic!("test configurations are objects") };
    spec_from_config(Path::new("config.json"), &map)
}

fn llama(extra: Value) -> Result<ModelSpec, ModelError> {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100
    });
    for (key, value) in extra.as_object().expect("an object") {
        config[key] = value.clone();
    }
    parse(config)
}

#[test]
fn both_spellings_of_rope_mean_the_same() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    let mut modern = scaling.clone();
    modern["rope_theta"] = json!(500000.0);
    let old = llama(json!({"rope_theta": 500000.0, "rope_scaling": scaling})).expect("old spelling");
    let new = llama(json!({"rope_parameters": modern})).expect("new spelling");
    assert_eq!(old, new);
    let plain = llama(json!({"rope_theta": 500000.0})).expect("plain");
    let frequencies = |spec: &ModelSpec| spec.layers[0].0.rope.as_ref().expect("rotary").inv_freq.clone();
    assert_eq!(frequencies(&plain)[0], 1.0);
    assert_eq!(frequencies(&old)[0], 1.0, "high frequencies stay");
    assert_eq!(frequencies(&old)[7], frequencies(&plain)[7] / 8.0, "low frequencies are divided");
}

#[test]
fn linear_scaling_divides_every_frequency() {
    let plain = rope::inverse_frequencies(10_000.0, 16, &RopeScaling::None);
    let scaled = rope::inverse_frequencies(10_000.0, 16, &RopeScaling::Linear { factor: 4.0 });
    for (i, (a, b)) in plain.iter().zip(&scaled).enumerate() {
        assert_eq!(a / 4.0, *b);
        let exact = 10_000f64.powf(-(i as f64) / 8.0);
        assert!((f64::from(*a) - exact).abs() <= exact * 2e-7, "{a} is not {exact}");
    }
}

#[test]
fn llama4_layers_follow_from_intervals() {
    let spec = parse(json!({
        "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "hidden_size": 64, "head_dim": 16,
        "intermediate_size": 32, "intermediate_size_mlp": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 8, "vocab_size": 100, "interleave_moe_layer_step": 2, "num_local_experts": 4,
        "attn_temperature_tuning": 4, "attention_chunk_size": 16
    }))
    .expect("a Llama 4");
    for (layer, (attention, ffn)) in spec.layers.iter().enumerate() {
        let rotary = layer % 4 != 3;
        assert_eq!(attention.rope.is_some(), rotary, "layer {layer}");
        assert_eq!(attention.chunk, rotary.then_some(16), "layer {layer}");
        assert_eq!(attention.temperature.is_some(), !rotary, "layer {layer}");
        match ffn {
            FfnSpec::Dense { width, .. } => assert!(layer % 2 == 0 && *width == 96, "layer {layer}"),
            FfnSpec::Moe(moe) => {
                assert!(layer % 2 == 1 && moe.width == 32 && moe.shared_width == Some(32), "layer {layer}");
                assert_eq!(moe.router, RouterKind::SigmoidOnInput);
            }
        }
    }
}

#[test]
fn qwen3_moe_keeps_dense_layers_dense() {
    let spec = parse(json!({
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
        "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": true,
        "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 100, "mlp_only_layers": [3],
        "decoder_sparse_step": 2
    }))
    .expect("a Qwen3-MoE");
    let sparse: Vec<bool> = spec.layers.iter().map(|(_, ffn)| matches!(ffn, FfnSpec::Moe(_))).collect();
    assert_eq!(sparse, [false, true, false, false]);
}

#[test]
fn a_window_wider_than_the_context_is_none() {
    let mistral = |window: Value| {
        parse(json!({"architectures": ["MistralForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 100, "max_position_embeddings": 512,
            "sliding_window": window}))
        .expect("a Mistral")
        .layers[0]
            .0
            .window
    };
    assert_eq!(mistral(json!(128)), Some(128));
    assert_eq!(mistral(json!(512)), None);
    assert_eq!(mistral(Value::Null), None);
}

#[test]
fn refusals_name_what_they_refuse() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
    let yarn_without_rotation = json!({"rope_scaling": yarn, "rope_theta": 1.0});
    let cases = [
        (json!({"architectures": ["GPT2LMHeadModel"]}), "GPT2LMHeadModel"),
        (json!({"architectures": ["GPT2LMHeadModel"]}), "Qwen3MoeForCausalLM"),
        (json!({"quantization_config": {"quant_method": "fp8"}}), "fp8"),
        (json!({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}), "longrope"),
        (yarn_without_rotation, "rope_theta = 1"),
        (json!({"mlp_bias": true}), "mlp_bias"),
        (json!({"hidden_act": "relu2"}), "relu2"),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads = 3"),
        (json!({"hidden_size": -1}), "hidden_size = -1"),
        (json!({"hidden_size": 1u64 << 60}), "hidden_size = 1152921504606846976"),
        (json!({"num_hidden_layers": 0}), "num_hidden_layers"),
        (json!({"vocab_size": "many"}), "vocab_size"),
        (json!({"rms_norm_eps": 0}), "rms_norm_eps"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (json!({"head_dim": 15}), "head_dim = 15"),
    ];
    for (extra, needle) in cases {
        let error = llama(extra.clone()).expect_err(&extra.to_string()).to_string();
        assert!(error.contains(needle) && error.contains("config.json"), "{extra}: {error}");
    }
}

#[test]
fn yarn_keeps_fast_pairs_and_divides_slow_ones() {
    let yarn = |truncate, attention_factor| RopeScaling::Yarn {
        factor: 8.0,
        original_max_positions: 64,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate,
        attention_factor,
    };
    let plain = rope::inverse_frequencies(150_000.0, 16, &RopeScaling::None);
    let scaled = rope::inverse_frequencies(150_000.0, 16, &yarn(false, 1.0));
    // The ramp falls from pair 0 to pair 8·ln(64/2π)/ln(150000) = 1.558: half of pair 1 and a bit is kept.
    let kept = 1.0 - 1.0 / 1.557_932_5f32;
    assert_eq!(scaled[0], plain[0]);
    assert!((scaled[1] / plain[1] - (kept + (1.0 - kept) / 8.0)).abs() < 1e-5, "{scaled:?}");
    for (a, b) in plain[2..].iter().zip(&scaled[2..]) {
        assert!((a / b - 8.0).abs() < 1e-5, "{a} {b}");
    }
    let whole = rope::inverse_frequencies(150_000.0, 16, &yarn(true, 1.0));
    assert!((whole[1] / plain[1] - (0.5 + 0.5 / 8.0)).abs() < 1e-5, "{whole:?}");

    let factor_of = |extra: Value| {
        let mut scaling = json!({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64});
        scaling.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        let spec = llama(json!({"rope_scaling": scaling})).expect("a yarn");
        spec.layers[0].0.rope.as_ref().expect("rotary").attention_factor
    };
    assert_eq!(factor_of(json!({})), 0.1 * 8f32.ln() + 1.0);
    assert_eq!(factor_of(json!({"attention_factor": 1.5})), 1.5);
    assert_eq!(factor_of(json!({"mscale": 1.0, "mscale_all_dim": 1.0})), 1.0);
}

fn gpt_oss(extra: Value) -> Result<ModelSpec, ModelError> {
    let mut config = json!({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 48,
        "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4,
        "vocab_size": 100, "num_local_experts": 4, "experts_per_token": 2, "sliding_window": 8,
        "rope_scaling": null
    });
    for (key, value) in extra.as_object().expect("an object") {
        config[key] = value.clone();
    }
    parse(config)
}

#[test]
fn gpt_oss_layers_alternate_and_defaults_hold() {
    let spec = gpt_oss(json!({})).expect("a gpt-oss");
    let windows: Vec<_> = spec.layers.iter().map(|(attention, _)| attention.window).collect();
    assert_eq!(windows, [Some(8), None, Some(8), None]);
    assert!(spec.layers.iter().all(|(a, _)| a.sinks && a.qkv_bias && a.out_bias));
    let FfnSpec::Moe(moe) = &spec.layers[0].1 else { panic!("a mixture") };
    assert_eq!((moe.experts, moe.top_k, moe.bias), (4, 2, true));
    assert_eq!(moe.activation, crate::spec::Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 });

    let types = json!(["full_attention", "sliding_attention", "full_attention", "full_attention"]);
    let named = gpt_oss(json!({"layer_types": types, "swiglu_limit": 5.0})).expect("a gpt-oss");
    let windows: Vec<_> = named.layers.iter().map(|(attention, _)| attention.window).collect();
    assert_eq!(windows, [None, Some(8), None, None]);

    let mut bare = json!({"architectures": ["GptOssForCausalLM"], "hidden_size": 64, "intermediate_size": 48,
        "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 100});
    let error = parse(bare.clone()).expect_err("no rope").to_string();
    assert!(error.contains("rope_scaling"), "{error}");
    bare["rope_scaling"] = Value::Null;
    parse(bare).expect("null is an answer");
    let error =
        gpt_oss(json!({"layer_types": vec!["chunked_attention"; 4]})).expect_err("not a kind").to_string();
    assert!(error.contains("chunked_attention"), "{error}");
}

fn gemma3(extra: Value) -> Result<ModelSpec, ModelError> {
    let mut config = json!({
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 64,
        "intermediate_size": 96, "head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 7, "vocab_size": 100, "query_pre_attn_scalar": 16, "sliding_window": 32
    });
    for (key, value) in extra.as_object().expect("an object") {
        config[key] = value.clone();
    }
    parse(config)
}

#[test]
fn gemma3_in_both_spellings() {
    let old = gemma3(json!({"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}}))
    .expect("4.x");
    let kinds: Vec<&str> = (0..7)
        .map(|layer| if matches!(layer, 2 | 5) { "full_attention" } else { "sliding_attention" })
        .collect();
    let new = gemma3(json!({"layer_types": kinds, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}))
    .expect("5.x");
    assert_eq!(old, new);
    for (layer, (attention, _)) in old.layers.iter().enumerate() {
        let global = matches!(layer, 2 | 5);
        assert_eq!(attention.window, (!global).then_some(32), "layer {layer}");
        let (theta, factor) = if global { (1e6f64, 8.0) } else { (1e4, 1.0) };
        let second = (theta.powf(-1.0 / 12.0) / factor) as f32;
        let found = attention.rope.as_ref().expect("rotary").inv_freq[1];
        assert!((found - second).abs() <= 1e-6 * second, "layer {layer}: {found}, not {second}");
        assert_eq!(attention.scale, 0.25);
    }
    assert!(old.tied_embeddings && old.sandwich_norms);
    assert_eq!((old.embedding_scale, old.norm_offset), (8.0, 1.0));
    let plain = gemma3(json!({})).expect("defaults");
    let global: Vec<usize> = (0..7).filter(|layer| plain.layers[*layer].0.window.is_none()).collect();
    assert_eq!(global, [5]);
    for (key, value) in [
        ("final_logit_softcapping", json!(30.0)),
        ("attn_logit_softcapping", json!(50.0)),
        ("use_bidirectional_attention", json!(true)),
        ("hidden_activation", json!("relu")),
    ] {
        let error = gemma3(json!({key: value})).expect_err(key).to_string();
        assert!(error.contains(key), "{key}: {error}");
    }
}
