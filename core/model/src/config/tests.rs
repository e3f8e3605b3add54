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

#[test]
fn yarn_frequencies_are_those_of_the_paper() {
    // Computed in f64 from the formulas: base 10000, 8 pairs, 256 positions stretched eightfold.
    let yarn = |truncate| RopeScaling::Yarn {
        factor: 8.0,
        original_max_positions: 256,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate,
        attention_factor: 1.0,
    };
    let whole = [1.0, 0.247_052_942, 0.05625, 0.010_870_329_5];
    let broken = [1.0, 0.243_596_405, 0.047_965_076_1, 0.005_976_137_23];
    let slow = [0.00125, 0.000_395_284_708, 0.000_125, 3.952_847_08e-5];
    for (truncate, fast) in [(true, whole), (false, broken)] {
        let found = rope::inverse_frequencies(10_000.0, 16, &yarn(truncate));
        for (found, wanted) in found.iter().zip(fast.into_iter().chain(slow)) {
            assert!((f64::from(*found) - wanted).abs() <= 1e-6 * wanted, "{found} is not {wanted}");
        }
    }
}

#[test]
fn dynamic_scaling_is_plain_within_the_context() {
    let dynamic = json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}});
    assert_eq!(llama(dynamic).expect("dynamic"), llama(json!({})).expect("plain"));
    let error = llama(json!({"rope_scaling": {"type": "dynamic"}})).expect_err("no factor").to_string();
    assert!(error.contains("factor is missing"), "{error}");
}

fn deepseek(extra: Value) -> Result<ModelSpec, ModelError> {
    let mut config = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 64, "vocab_size": 100,
        "intermediate_size": 112, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3,
        "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
        "n_shared_experts": 2, "q_lora_rank": 40, "kv_lora_rank": 24, "qk_nope_head_dim": 15, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "routed_scaling_factor": 2.5
    });
    for (key, value) in extra.as_object().expect("an object") {
        config[key] = value.clone();
    }
    parse(config)
}

#[test]
fn deepseek_layers_follow_from_the_configuration() {
    let yarn = json!({"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
        "mscale_all_dim": 0.707});
    let spec =
        deepseek(json!({"rope_scaling": yarn, "head_dim": 8, "q_lora_rank": null})).expect("a DeepSeek");
    let sparse: Vec<bool> = spec.layers.iter().map(|(_, ffn)| matches!(ffn, FfnSpec::Moe(_))).collect();
    assert_eq!(sparse, [false, true, true]);
    let (attention, FfnSpec::Moe(moe)) = &spec.layers[1] else { panic!("layer 1 has experts") };
    assert_eq!((moe.shared_width, moe.top_k), (Some(64), 3));
    let router = RouterKind::SigmoidGrouped { groups: 4, groups_kept: 2, renormalise: true, scale: 2.5 };
    assert_eq!(moe.router, router);
    assert_eq!((attention.head_dim, attention.value_dim(), attention.kv_heads), (23, 16, 4));
    assert_eq!(attention.projected_widths(), [4 * 23, 24, 8]);
    let rope = attention.rope.as_ref().expect("rotary");
    assert_eq!((rope.inv_freq.len(), rope.style), (4, crate::spec::RopeStyle::Interleaved));
    // 0.1 · ln 40 + 1 and 0.0707 · ln 40 + 1.
    let (one, all) = (1.368_887_945_411_393_6f64, 1.260_803_777_405_855_4f64);
    assert!((f64::from(rope.attention_factor) - one / all).abs() < 1e-6);
    assert!((f64::from(attention.scale) - all * all / 23f64.sqrt()).abs() < 1e-6);
    let plain = deepseek(json!({})).expect("a DeepSeek without scaling");
    assert_eq!(plain.layers[0].0.scale, (1.0 / 23f64.sqrt()) as f32);
    assert_eq!(plain.layers[0].0.projected_widths(), [40, 24, 8]);
}

#[test]
fn deepseek_refusals_name_what_they_refuse() {
    let cases = [
        (json!({"head_dim": 16}), "head_dim = 16"),
        (json!({"num_key_value_heads": 2}), "num_key_value_heads = 2"),
        (json!({"qk_rope_head_dim": 7}), "qk_rope_head_dim = 7"),
        (json!({"n_group": 3}), "n_group = 3"),
        (json!({"n_group": 8}), "n_group = 8"),
        (json!({"topk_group": 5}), "topk_group = 5"),
        (json!({"num_experts_per_tok": 5}), "num_experts_per_tok = 5"),
        (json!({"scoring_func": "softmax"}), "softmax"),
        (json!({"moe_layer_freq": 2}), "moe_layer_freq = 2"),
        (json!({"first_k_dense_replace": -1}), "first_k_dense_replace = -1"),
        (json!({"attention_bias": true, "q_lora_rank": null}), "attention_bias"),
        (
            json!({"kv_lora_rank": 1 << 24, "v_head_dim": 1 << 24, "num_attention_heads": 1 << 24}),
            "parameters",
        ),
    ];
    for (extra, needle) in cases {
        let error = deepseek(extra.clone()).expect_err(&extra.to_string()).to_string();
        assert!(error.contains(needle) && error.contains("config.json"), "{extra}: {error}");
    }
}
