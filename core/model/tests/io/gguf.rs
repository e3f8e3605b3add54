//! GGUF: a golden checkpoint written as GGUF comes back as it was; every block format; damaged files.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use freewheel_model::{InitRequest, LoadedModel, TokenizerChoice, init_model, load};
use freewheel_types::{CounterRng, WeightsDtype};
use proptest::prelude::*;
use serde_json::Value;

use super::gguf_file::{GgufFile, Meta};
use super::support::{json, logits, model_dir};

/// Rows of q and k as llama.cpp's converter permutes them:
/// `reshape(heads, 2, half, …).swapaxes(1, 2)`.
fn permute(values: &[f32], heads: usize, rows: usize) -> Vec<f32> {
    let (half, width) = (rows / heads / 2, values.len() / rows);
    let mut out = Vec::new();
    for head in 0..heads {
        for i in 0..half {
            for part in 0..2 {
                let row = head * 2 * half + part * half + i;
                out.extend_from_slice(&values[row * width..(row + 1) * width]);
            }
        }
    }
    out
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Tokens, kinds and merges of a golden tokenizer as GGUF metadata.
fn set_tokenizer(file: &mut GgufFile, name: &str, pre: &str) {
    let tokenizer = json(&model_dir(name).join("tokenizer.json"));
    let vocab = tokenizer["model"]["vocab"].as_object().expect("vocab");
    let added = tokenizer["added_tokens"].as_array().expect("added tokens");
    let size = vocab
        .len()
        .max(added.iter().map(|token| token["id"].as_u64().expect("id") as usize + 1).max().unwrap_or(0));
    let (mut tokens, mut kinds) = (vec![String::new(); size], vec![1; size]);
    vocab.iter().for_each(|(token, id)| tokens[id.as_u64().expect("id") as usize] = token.clone());
    for token in added {
        let id = token["id"].as_u64().expect("id") as usize;
        tokens[id] = token["content"].as_str().expect("text").to_owned();
        kinds[id] = if token["special"] == Value::Bool(true) { 3 } else { 4 };
    }
    let merge = |merge: &Value| match merge {
        Value::Array(two) => format!("{} {}", two[0].as_str().expect("text"), two[1].as_str().expect("text")),
        one => one.as_str().expect("text").to_owned(),
    };
    file.set("tokenizer.ggml.model", Meta::Text("gpt2".into()));
    file.set("tokenizer.ggml.pre", Meta::Text(pre.into()));
    file.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
    file.set("tokenizer.ggml.token_type", Meta::Ints(kinds));
    let merges = tokenizer["model"]["merges"].as_array().expect("merges").iter().map(merge).collect();
    file.set("tokenizer.ggml.merges", Meta::Texts(merges));
    let config = json(&model_dir(name).join("config.json"));
    for (key, id) in [
        ("bos", &config["bos_token_id"]),
        ("eos", &config["eos_token_id"]),
        ("padding", &config["pad_token_id"]),
    ] {
        if let Some(id) = id.as_u64() {
            file.set(&format!("tokenizer.ggml.{key}_token_id"), Meta::U32(id as u32));
        }
    }
}

fn set_sizes(file: &mut GgufFile, arch: &str, config: &Value) {
    file.set("general.architecture", Meta::Text(arch.into()));
    for (key, from) in [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
    ] {
        file.set(&format!("{arch}.{key}"), Meta::U32(config[from].as_u64().expect(from) as u32));
    }
    file.set(
        &format!("{arch}.attention.layer_norm_rms_epsilon"),
        Meta::F32(config["rms_norm_eps"].as_f64().expect("eps") as f32),
    );
}

/// GGUF names of the layers' parts.
const PARTS: [(&str, &str); 17] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate", "ffn_gate_inp"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

fn gguf_name(model: &LoadedModel, name: &str) -> String {
    if name == "model.embed_tokens.weight" {
        return "token_embd.weight".into();
    }
    let (module, kind) = name.rsplit_once('.').expect("a module and a kind");
    let (prefix, part) = match module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        Some((layer, part)) => (format!("blk.{layer}."), part),
        None => (String::new(), module),
    };
    let part = PARTS.iter().find(|(ours, _)| *ours == part).unwrap_or_else(|| panic!("{name}")).1;
    if model.model.spec().sandwich_norms && module.ends_with(".post_attention_layernorm") {
        return format!("{prefix}post_attention_norm.{kind}");
    }
    format!("{prefix}{part}.{kind}")
}

/// The tensors of `model` as llama.cpp's converter writes them: q and k of Llama and Mixtral permuted, norms of Gemma as
/// gains, experts of a layer in one tensor.
fn put_tensors(file: &mut GgufFile, model: &LoadedModel) {
    let spec = model.model.spec();
    let attention = &spec.layers[0].0;
    let permuted = ["LlamaForCausalLM", "MixtralForCausalLM"].contains(&spec.architecture.as_str());
    let mut fused: std::collections::BTreeMap<String, (Vec<usize>, Vec<u8>)> = Default::default();
    for tensor in &model.params.layout.tensors {
        let mut values = model.params.range_f32(tensor.range());
        if tensor.name.contains("q_proj") && permuted {
            values = permute(&values, attention.heads, tensor.shape[0]);
        }
        if tensor.name.contains("k_proj") && permuted {
            values = permute(&values, attention.kv_heads, tensor.shape[0]);
        }
        if tensor.name.ends_with("norm.weight") {
            values.iter_mut().for_each(|x| *x += spec.norm_offset);
        }
        let Some((layer, expert)) = tensor.name.split_once(".experts.") else {
            file.tensors.push((gguf_name(model, &tensor.name), tensor.shape.clone(), 0, bytes(&values)));
            continue;
        };
        let layer = layer.trim_start_matches("model.layers.").split('.').next().expect("a number");
        let part = match expert.split_once('.').expect("an expert").1.trim_end_matches(".weight") {
            "gate_proj" | "w1" => "gate",
            "up_proj" | "w3" => "up",
            _ => "down",
        };
        let entry = fused.entry(format!("blk.{layer}.ffn_{part}_exps.weight")).or_default();
        let so_far = entry.0.first().copied().unwrap_or(0);
        entry.0 = [&[so_far + 1], tensor.shape.as_slice()].concat();
        entry.1.extend(bytes(&values));
    }
    file.tensors.extend(fused.into_iter().map(|(name, (shape, data))| (name, shape, 0, data)));
}

/// The golden `llama3` as GGUF, without rope scaling.
pub fn llama_file(model: &LoadedModel) -> GgufFile {
    let config = json(&model_dir("llama3").join("config.json"));
    let mut file = GgufFile::default();
    set_sizes(&mut file, "llama", &config);
    file.set("llama.rope.freq_base", Meta::F32(500_000.0));
    set_tokenizer(&mut file, "llama3", "llama-bpe");
    file.set("tokenizer.chat_template", Meta::Text("{{ bos_token }}{{ messages[0].content }}".into()));
    put_tensors(&mut file, model);
    file
}

fn load_bytes(bytes: &[u8]) -> Result<LoadedModel, freewheel_model::ModelError> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).expect("write");
    load(&path, None)
}

#[test]
fn a_llama_comes_back_as_it_was() {
    let original = load(&model_dir("llama3"), None).expect("golden checkpoint");
    let loaded = load_bytes(&llama_file(&original).bytes()).expect("GGUF");
    assert_eq!(loaded.params, original.params);
    assert_eq!(loaded.generation.eos_ids, original.generation.eos_ids);
    assert_eq!(loaded.generation.pad_id, original.generation.pad_id);
    let (spec, expected) = (loaded.model.spec(), original.model.spec());
    assert_eq!((spec.norm_eps, spec.max_positions), (expected.norm_eps, expected.max_positions));
    for text in ["Hello world, it's 12345!", "  naïve\n\n 你好 🙂", "x = 3.14159; // <|eot_id|>"] {
        let ids = original.tokenizer.encode(text).expect("ids");
        assert_eq!(loaded.tokenizer.encode(text).expect("ids"), ids);
        assert_eq!(
            loaded.tokenizer.encode_trusted(text).expect("ids"),
            original.tokenizer.encode_trusted(text).expect("ids")
        );
        let prompt = freewheel_types::PromptBody::Text(text.into());
        assert_eq!(
            loaded.tokenizer.encode_prompt(&prompt).expect("ids"),
            original.tokenizer.encode_prompt(&prompt).expect("ids")
        );
        assert_eq!(loaded.tokenizer.decode(&ids), text);
    }
    assert!(loaded.tokenizer.has_template());
}

/// Factors of Llama 3.1's rotary frequencies, as llama.cpp's converter bakes them into a tensor.
fn rope_factors(factor: f64) -> Vec<f32> {
    let (low, high, original) = (1.0, 4.0, 8192.0);
    (0..8)
        .map(|i| {
            let wavelength = std::f64::consts::TAU * 500_000f64.powf(f64::from(i) / 8.0);
            let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
        })
        .collect()
}

#[test]
fn baked_rope_scaling_is_recognised() {
    let original = load(&model_dir("llama3"), None).expect("golden checkpoint");
    let with = |factors: Vec<f32>| {
        let mut file = llama_file(&original);
        file.tensors.push(("rope_freqs.weight".into(), vec![factors.len()], 0, bytes(&factors)));
        load_bytes(&file.bytes())
    };
    for factor in [8.0, 32.0] {
        let factors = rope_factors(factor);
        assert!(factors.iter().any(|x| *x > 1.5), "this head has low frequencies");
        let loaded = with(factors.clone()).expect("GGUF");
        assert_eq!(loaded.config_json["rope_scaling"]["factor"].as_f64(), Some(factor));
        let rope = loaded.model.spec().layers[0].0.rope.as_ref().expect("rotary").inv_freq.clone();
        for (i, (ours, divisor)) in rope.iter().zip(&factors).enumerate() {
            let expected = 500_000f64.powf(-(i as f64) / 8.0) / f64::from(*divisor);
            assert!((f64::from(*ours) / expected - 1.0).abs() <= 1e-4, "pair {i}: {ours}, not {expected}");
        }
    }
    assert!(
        with(vec![3.0; 8]).is_err_and(|e| e.to_string().contains("rope_freqs")),
        "unknown scaling is refused"
    );
    assert!(with(vec![1.0; 3]).is_err(), "of another width");
}

#[test]
fn fused_experts_are_taken_apart() {
    let original = load(&model_dir("qwen3_moe_bf16"), Some(WeightsDtype::F32)).expect("golden checkpoint");
    let config = json(&model_dir("qwen3_moe_bf16").join("config.json"));
    let mut file = GgufFile::default();
    set_sizes(&mut file, "qwen3moe", &config);
    for (key, from) in [
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
    ] {
        file.set(&format!("qwen3moe.{key}"), Meta::U32(config[from].as_u64().expect(from) as u32));
    }
    file.set("qwen3moe.rope.freq_base", Meta::F32(1_000_000.0));
    set_tokenizer(&mut file, "qwen3_moe_bf16", "qwen2");
    put_tensors(&mut file, &original);
    let loaded = load_bytes(&file.bytes()).expect("GGUF");
    assert_eq!(loaded.params, original.params);
    assert_eq!(loaded.model.spec(), original.model.spec());
}

/// Pieces and scores that give the merges of a golden tokenizer in their order.
fn set_sentencepiece(file: &mut GgufFile, name: &str) {
    let tokenizer = json(&model_dir(name).join("tokenizer.json"));
    set_tokenizer(file, name, "default");
    file.set("tokenizer.ggml.model", Meta::Text("llama".into()));
    let vocab = tokenizer["model"]["vocab"].as_object().expect("vocab");
    let (mut scores, mut kinds) = (vec![-1e6f32; vocab.len()], vec![1; vocab.len()]);
    for (token, id) in vocab {
        let id = id.as_u64().expect("id") as usize;
        if token.starts_with("<0x") {
            kinds[id] = 6;
        }
    }
    for token in tokenizer["added_tokens"].as_array().expect("added tokens") {
        kinds[token["id"].as_u64().expect("id") as usize] = if token["content"] == "<unk>" { 2 } else { 3 };
    }
    for (rank, merge) in tokenizer["model"]["merges"].as_array().expect("merges").iter().enumerate() {
        let piece: String = merge.as_array().expect("two").iter().filter_map(Value::as_str).collect();
        scores[vocab[&piece].as_u64().expect("id") as usize] = -(rank as f32);
    }
    file.set("tokenizer.ggml.scores", Meta::Floats(scores));
    file.set("tokenizer.ggml.token_type", Meta::Ints(kinds));
    let unknown = vocab["<unk>"].as_u64().expect("id") as u32;
    file.set("tokenizer.ggml.unknown_token_id", Meta::U32(unknown));
    let prefixed = tokenizer["normalizer"]["type"] == "Sequence";
    file.set("tokenizer.ggml.add_space_prefix", Meta::Bool(prefixed));
}

/// The ids of the golden texts, by a tokenizer out of a GGUF file.
fn check_golden_ids(loaded: &LoadedModel, name: &str) {
    let golden = json(&model_dir(name).join("golden.json"));
    for case in golden["tokenizer"]["cases"].as_array().expect("cases") {
        let text = case["text"].as_str().expect("text");
        let ids = super::support::ids(&case["ids_no_special"]);
        assert_eq!(loaded.tokenizer.encode_trusted(text).expect("ids"), ids, "{name}: {text:?}");
        let all = super::support::ids(&case["ids"]);
        let decoded = case["decoded"].as_str().expect("text");
        assert_eq!(loaded.tokenizer.decode_all(&all), decoded, "{name}: {text:?}");
    }
}

#[test]
fn a_gemma_comes_back_with_its_norms_and_its_pieces() {
    let dir = super::support::copy_of("gemma3_text");
    let path = dir.path().join("config.json");
    let mut config = json(&path);
    // GGUF has no key for a scale of its own.
    config["query_pre_attn_scalar"] = config["head_dim"].clone();
    std::fs::write(&path, config.to_string()).expect("write");
    let original = load(dir.path(), None).expect("golden checkpoint");

    let mut file = GgufFile::default();
    set_sizes(&mut file, "gemma3", &config);
    file.set("gemma3.attention.sliding_window", Meta::U32(8));
    let local =
        config["layer_types"].as_array().expect("types").iter().map(|kind| kind == "sliding_attention");
    file.set("gemma3.attention.sliding_window_pattern", Meta::Bools(local.collect()));
    file.set("gemma3.rope.freq_base", Meta::F32(1e6));
    file.set("gemma3.rope.scaling.type", Meta::Text("linear".into()));
    file.set("gemma3.rope.scaling.factor", Meta::F32(8.0));
    set_sentencepiece(&mut file, "gemma3_text");
    put_tensors(&mut file, &original);
    let loaded = load_bytes(&file.bytes()).expect("GGUF");
    assert_eq!(loaded.model.spec(), original.model.spec());
    let worst = super::support::largest_difference(&loaded.params.to_f32(), &original.params.to_f32());
    assert!(worst <= 5e-7, "1 + weight - 1 is off by {worst}");
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 250).collect();
    let worst = super::support::largest_difference(&logits(&loaded, &tokens), &logits(&original, &tokens));
    assert!(worst <= 1e-4, "logits are off by {worst}");
    check_golden_ids(&loaded, "gemma3_text");
}

/// Random models of the architectures that no golden checkpoint stands for here.
#[test]
fn random_models_come_back_as_they_were() {
    for (arch, gguf) in [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("mixtral", "llama")] {
        let request = InitRequest {
            arch: arch.into(),
            overrides: vec![("hidden_size".into(), 64.into()), ("head_dim".into(), 16.into())],
            seed: 3,
            scale: freewheel_model::InitScale::FanIn,
            dtype: WeightsDtype::F32,
            tokenizer: TokenizerChoice::Bytes,
        };
        let original = init_model(&request).unwrap_or_else(|e| panic!("{arch}: {e}"));
        let config = Value::Object(original.config_json.clone());
        let mut file = GgufFile::default();
        set_sizes(&mut file, gguf, &config);
        for (key, from) in
            [("expert_count", "num_local_experts"), ("expert_used_count", "num_experts_per_tok")]
        {
            if let Some(count) = config[from].as_u64() {
                file.set(&format!("{gguf}.{key}"), Meta::U32(count as u32));
            }
        }
        let theta = config["rope_theta"].as_f64().or(config["rope_parameters"]["rope_theta"].as_f64());
        file.set(&format!("{gguf}.rope.freq_base"), Meta::F32(theta.expect("a base") as f32));
        // Any tokens will do, as many as the embedding has.
        set_tokenizer(&mut file, "llama3", "llama-bpe");
        let tokens: Vec<String> = (0..original.model.spec().vocab_size).map(|id| format!("t{id}")).collect();
        file.set("tokenizer.ggml.token_type", Meta::Ints(vec![1; tokens.len()]));
        file.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
        file.set("tokenizer.ggml.merges", Meta::Texts(Vec::new()));
        file.meta.retain(|(name, _)| !name.ends_with("_token_id"));
        put_tensors(&mut file, &original);
        let loaded = load_bytes(&file.bytes()).unwrap_or_else(|e| panic!("{arch}: {e}"));
        assert!(loaded.params == original.params, "{arch}");
        assert_eq!(loaded.model.spec(), original.model.spec(), "{arch}");
    }
}

/// Every golden tokenizer of SentencePiece's kind, a space before the text or not.
#[test]
fn sentencepiece_vocabularies_give_the_golden_ids() {
    let mut checked = 0;
    for name in super::support::model_names() {
        let tokenizer = json(&model_dir(&name).join("tokenizer.json"));
        if tokenizer["model"]["byte_fallback"] != Value::Bool(true) {
            continue;
        }
        let size = tokenizer["model"]["vocab"].as_object().expect("vocab").len();
        let mut file = one_block(0, &[256, 256], vec![0; 4 * 256 * 256]);
        set_sentencepiece(&mut file, &name);
        file.tensors[0] = ("token_embd.weight".into(), vec![size, 256], 0, vec![0; 4 * size * 256]);
        check_golden_ids(&load_bytes(&file.bytes()).expect("GGUF"), &name);
        checked += 1;
    }
    assert!(checked > 0, "no golden tokenizer falls back to bytes");
}

/// A llama of one layer whose matrices are 256 wide, one of them stored as `kind`.
fn one_block(kind: u32, shape: &[usize], data: Vec<u8>) -> GgufFile {
    let mut file = GgufFile::default();
    let config = serde_json::json!({"num_hidden_layers": 1, "max_position_embeddings": 64, "hidden_size": 256,
        "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "rms_norm_eps": 1e-5});
    set_sizes(&mut file, "llama", &config);
    set_tokenizer(&mut file, "llama3", "llama-bpe");
    file.set("tokenizer.ggml.eos_token_id", Meta::U32(510));
    let zeros = |n: usize| vec![0u8; 4 * n];
    file.tensors.push(("token_embd.weight".into(), vec![512, 256], 0, zeros(512 * 256)));
    file.tensors.push(("output_norm.weight".into(), vec![256], 0, zeros(256)));
    for part in ["attn_norm", "ffn_norm"] {
        file.tensors.push((format!("blk.0.{part}.weight"), vec![256], 0, zeros(256)));
    }
    for part in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"] {
        file.tensors.push((format!("blk.0.{part}.weight"), vec![256, 256], 0, zeros(256 * 256)));
    }
    file.tensors.push(("blk.0.ffn_down.weight".into(), shape.to_vec(), kind, data));
    file
}

fn down(file: &GgufFile) -> Vec<f32> {
    let loaded = load_bytes(&file.bytes()).expect("GGUF");
    assert!(loaded.model.spec().tied_embeddings, "no output.weight: the head is the embedding");
    let tensor = loaded.params.layout.get("model.layers.0.mlp.down_proj.weight").expect("tensor").clone();
    loaded.params.range_f32(tensor.range())
}

#[test]
fn every_block_format_decodes() {
    let random = CounterRng::new(7, 0);
    let values: Vec<f32> = (0..256 * 256).map(|i| random.normal(i) as f32).collect();
    let tensor = Tensor::from_slice(&values, (256, 256), &Device::Cpu).expect("tensor");
    // Half a step of the quantiser on values up to about 4.5, with room for the scales' own rounding.
    let kinds = [
        (1, GgmlDType::F16, 2e-3),
        (2, GgmlDType::Q4_0, 0.7),
        (3, GgmlDType::Q4_1, 0.35),
        (6, GgmlDType::Q5_0, 0.4),
        (7, GgmlDType::Q5_1, 0.2),
        (8, GgmlDType::Q8_0, 0.03),
        (12, GgmlDType::Q4K, 0.45),
        (13, GgmlDType::Q5K, 0.25),
        (14, GgmlDType::Q6K, 0.2),
        (30, GgmlDType::BF16, 2e-2),
    ];
    for (number, kind, tolerance) in kinds {
        let stored = QTensor::quantize(&tensor, kind).expect("quantised").data().expect("bytes").to_vec();
        let decoded = down(&one_block(number, &[256, 256], stored));
        let worst = super::support::largest_difference(&values, &decoded);
        assert!(worst <= tolerance, "{kind:?}: off by {worst}");
        assert!(worst > 0.0, "{kind:?} stores less than f32");
    }
}

#[test]
fn simple_blocks_decode_to_the_bit() {
    // One block of 32, worked out by hand from the format: d = 0.5, quants by index.
    let half = half_bytes(0.5);
    let q8: Vec<u8> = [half.as_slice(), &(0..32).map(|i| (i as i8 - 16) as u8).collect::<Vec<_>>()].concat();
    let nibbles: Vec<u8> = (0..16).map(|i| i as u8 | (15 - i as u8) << 4).collect();
    let q4_0 = [half.as_slice(), &nibbles].concat();
    let q4_1 = [half.as_slice(), &half_bytes(-2.0), &nibbles].concat();
    let quant = |i: usize| if i < 16 { i as f32 } else { (15 - (i - 16)) as f32 };
    type Expected = Box<dyn Fn(usize) -> f32>;
    let cases: [(u32, Vec<u8>, Expected); 3] = [
        (8, q8, Box::new(|i| 0.5 * (i as f32 - 16.0))),
        (2, q4_0, Box::new(move |i| 0.5 * (quant(i) - 8.0))),
        (3, q4_1, Box::new(move |i| 0.5 * quant(i) - 2.0)),
    ];
    for (kind, block, value) in cases {
        let decoded = down(&one_block(kind, &[256, 256], block.repeat(256 * 256 / 32)));
        for (i, x) in decoded.iter().enumerate() {
            assert_eq!(*x, value(i % 32), "type {kind}, element {i}");
        }
    }
}

/// IEEE half precision of a few powers of two.
fn half_bytes(x: f32) -> [u8; 2] {
    let bits: u16 = match x {
        0.5 => 0x3800,
        -2.0 => 0xC000,
        _ => panic!("{x} is not in the table"),
    };
    bits.to_le_bytes()
}

#[test]
fn damaged_files_are_refused_by_name() {
    let original = load(&model_dir("llama3"), None).expect("golden checkpoint");
    let refused = |change: &dyn Fn(&mut GgufFile), needles: &[&str]| {
        let mut file = llama_file(&original);
        change(&mut file);
        let error = match load_bytes(&file.bytes()) {
            Ok(_) => panic!("loaded, though it should be refused for {needles:?}"),
            Err(error) => error.to_string(),
        };
        for needle in needles {
            assert!(error.contains(needle) && error.contains("model.gguf"), "{needle:?} is not in: {error}");
        }
    };
    refused(&|f| f.set("general.architecture", Meta::Text("mamba".into())), &["mamba", "qwen3moe"]);
    refused(&|f| f.set("general.alignment", Meta::U32(0)), &["general.alignment"]);
    refused(&|f| f.set("tokenizer.ggml.pre", Meta::Text("mystery".into())), &["mystery", "smollm"]);
    refused(&|f| f.set("tokenizer.ggml.model", Meta::Text("bert".into())), &["bert", "gpt2"]);
    refused(&|f| f.set("tokenizer.ggml.model", Meta::Text("llama".into())), &["tokenizer.ggml.scores"]);
    refused(&|f| f.set("llama.rope.scaling.type", Meta::Text("yarn".into())), &["yarn"]);
    refused(&|f| f.set("llama.attention.head_count", Meta::Bool(true)), &["llama.attention.head_count"]);
    refused(&|f| f.set("tokenizer.ggml.token_type", Meta::Ints(vec![1])), &["token_type"]);
    refused(&|f| drop(f.tensors.remove(3)), &["is missing", "blk.0.attn"]);
    refused(&|f| f.tensors[3].1 = vec![1, 4096], &["[1, 4096]"]);
    refused(&|f| f.tensors[3].2 = 99, &["GGML type 99", "Q8_0"]);
    let mut twice = llama_file(&original);
    let again = Meta::Text("again".into());
    twice.meta.push(("general.architecture".into(), again));
    assert!(
        load_bytes(&twice.bytes())
            .is_err_and(|e| e.to_string().contains("general.architecture is there twice"))
    );
    let good = llama_file(&original).bytes();
    for length in [0, 3, 4, 8, 20, 30, 200, 5000, good.len() / 2, good.len() - 64] {
        assert!(load_bytes(&good[..length]).is_err(), "{length} bytes of {}", good.len());
    }
    let mut version = good.clone();
    version[4] = 9;
    assert!(load_bytes(&version).is_err_and(|e| e.to_string().contains("version 9")));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn flipped_bytes_never_panic(at in 0usize..6000, value: u8) {
        use std::sync::OnceLock;
        static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
        let mut bytes = GOOD.get_or_init(|| {
            llama_file(&load(&model_dir("llama3"), None).expect("golden checkpoint")).bytes()
        }).clone();
        bytes[at] = value;
        if let Err(e) = load_bytes(&bytes) {
            prop_assert!(!e.to_string().is_empty());
        }
    }
}

/// SmolLM2-135M-Instruct (Q4_1) reads English: perplexity 6.968 over 26 tokens, as llama.cpp computes it.
#[test]
#[ignore = "needs the file named by FREEWHEEL_SMOLLM2 (100 MB)"]
fn smollm2_reads_english() {
    let path = std::env::var_os("FREEWHEEL_SMOLLM2").expect("FREEWHEEL_SMOLLM2 names the GGUF file");
    let model = load(path.as_ref(), None).expect("GGUF");
    let text = "The capital of France is Paris. Water boils at 100 degrees Celsius at sea level, and freezes at 0 degrees.";
    let ids = model.tokenizer.encode(text).expect("ids");
    assert_eq!(ids.len(), 27);
    let vocab = model.model.spec().vocab_size;
    let logits = logits(&model, &ids);
    let nll: f64 = (0..26)
        .map(|i| {
            let row = &logits[i * vocab..(i + 1) * vocab];
            let top = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = row.iter().map(|x| f64::from(x - top).exp()).sum();
            sum.ln() - f64::from(row[ids[i + 1] as usize] - top)
        })
        .sum();
    let perplexity = (nll / 26.0).exp();
    assert!((perplexity - 6.968).abs() <= 0.005, "perplexity {perplexity}");
}
