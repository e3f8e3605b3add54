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
    let cases = [
        (json!({"architectures": ["GPT2LMHeadModel"]}), "GPT2LMHeadModel"),
        (json!({"architectures": ["GPT2LMHeadModel"]}), "Qwen3MoeForCausalLM"),
        (json!({"quantization_config": {"quant_method": "fp8"}}), "fp8"),
        (json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), "yarn"),
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
