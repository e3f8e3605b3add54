//! Damaged checkpoints: refused with the name of what is wrong, without panic.

use std::path::Path;

use freewheel_model::load;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::support::copy_of;

/// A safetensors file with this header and so many bytes of zeros.
fn weights(header: &Value, data: usize) -> Vec<u8> {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// Header and data of a safetensors file.
pub fn parts(bytes: &[u8]) -> (Value, Vec<u8>) {
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).expect("header"), bytes[8 + length..].to_vec())
}

/// A safetensors file of this header and data.
pub fn join(header: &Value, data: &[u8]) -> Vec<u8> {
    let mut bytes = weights(header, 0);
    bytes.extend_from_slice(data);
    bytes
}

fn refused(dir: &Path, needles: &[&str]) {
    let error = match load(dir, None) {
        Ok(_) => panic!("loaded, though it should be refused for {needles:?}"),
        Err(error) => error.to_string(),
    };
    for needle in needles {
        assert!(error.contains(needle), "{needle:?} is not in: {error}");
    }
}

#[test]
fn damaged_weights_are_refused_by_name() {
    let dir = copy_of("llama3");
    let file = dir.path().join("model.safetensors");
    let good = std::fs::read(&file).expect("weights");
    let (header, data) = parts(&good);
    let check = |bytes: &[u8], needles: &[&str]| {
        std::fs::write(&file, bytes).expect("write");
        refused(dir.path(), needles);
    };
    check(&good[..good.len() - 4], &["model.safetensors", "header"]);
    check(&good[..5], &["5 bytes"]);
    check(&[], &["model.safetensors"]);
    let huge = [&u64::MAX.to_le_bytes(), &good[8..]].concat();
    check(&huge, &["18446744073709551615", "8388608"]);
    let long = [&(9u64 << 20).to_le_bytes(), &vec![b' '; 10 << 20][..]].concat();
    check(&long, &["limit"]);

    let mut overlap = header.clone();
    overlap["model.norm.weight"]["data_offsets"] = json!([0, 256]);
    check(&join(&overlap, &data), &["header"]);
    let mut kind = header.clone();
    kind["model.norm.weight"]["dtype"] = json!("I32");
    check(&join(&kind, &data), &["model.norm.weight", "I32", "BF16"]);
    let mut shape = header.clone();
    shape["model.norm.weight"]["shape"] = json!([8, 8]);
    check(&join(&shape, &data), &["model.norm.weight", "[8, 8]", "[64]"]);
    let mut renamed = header.clone();
    let moved = renamed.as_object_mut().expect("object").remove("model.norm.weight").expect("tensor");
    renamed["model.nrom.weight"] = moved;
    check(&join(&renamed, &data), &["1 tensors are missing: model.norm.weight"]);
    let overflow = json!({"a": {"dtype": "F32", "shape": [u64::MAX / 2, 3], "data_offsets": [0, 4]}});
    check(&weights(&overflow, 4), &["header"]);
    let mut beyond = header.clone();
    beyond["model.norm.weight"]["data_offsets"] = json!([u64::MAX - 255, u64::MAX]);
    check(&join(&beyond, &data), &["header"]);
    let mut backwards = header.clone();
    backwards["model.norm.weight"]["data_offsets"] = json!([256, 0]);
    check(&join(&backwards, &data), &["header"]);

    // A name twice: JSON allows it, and the last one would win.
    let text = header.to_string();
    let entry = format!("\"model.norm.weight\":{}", header["model.norm.weight"]);
    let double = text.replacen('{', &format!("{{{entry},"), 1);
    let mut bytes = (double.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(double.as_bytes());
    bytes.extend_from_slice(&data);
    check(&bytes, &["model.norm.weight", "listed twice"]);
    let deep = format!("{{\"__metadata__\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let deep = [&(deep.len() as u64).to_le_bytes(), deep.as_bytes()].concat();
    check(&deep, &["safetensors header", "line 1"]);
    let many: serde_json::Map<String, Value> = (0..100_000)
        .map(|i| (i.to_string(), json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})))
        .collect();
    check(&weights(&many.into(), 0), &["tensors are missing", "model.embed_tokens.weight", " more"]);

    let mut nan = data.clone();
    let at = header["lm_head.weight"]["data_offsets"][0].as_u64().expect("offset") as usize;
    nan[at + 8..at + 12].copy_from_slice(&f32::NAN.to_le_bytes());
    nan[at + 20..at + 24].copy_from_slice(&f32::INFINITY.to_le_bytes());
    check(&join(&header, &nan), &["lm_head.weight", "2 of 32768 elements", "first is element 2", "NaN"]);

    std::fs::write(&file, &good).expect("write");
    load(dir.path(), None).expect("whole again");
}

#[test]
fn extra_tensors_are_named_and_old_buffers_are_not() {
    let dir = copy_of("llama3");
    let file = dir.path().join("model.safetensors");
    let (header, mut data) = parts(&std::fs::read(&file).expect("weights"));
    data.extend([0; 16]);
    let end = data.len();
    for (name, fine) in [("model.layers.0.self_attn.rotary_emb.inv_freq", true), ("score.weight", false)] {
        let mut header = header.clone();
        header[name] = json!({"dtype": "F32", "shape": [4], "data_offsets": [end - 16, end]});
        std::fs::write(&file, join(&header, &data)).expect("write");
        match load(dir.path(), None) {
            Ok(_) => assert!(fine, "{name}"),
            Err(e) => assert!(!fine && e.to_string().contains(name), "{name}: {e}"),
        }
    }
}

#[test]
fn configurations_that_are_not_are_refused() {
    let dir = copy_of("llama3");
    let path = dir.path().join("config.json");
    let good = json_text(&path);
    let check = |text: &str, needles: &[&str]| {
        std::fs::write(&path, text).expect("write");
        refused(dir.path(), needles);
    };
    check("[]", &["config.json", "JSON object"]);
    check(&format!("{{\"x\": {}", "[".repeat(1 << 20)), &["config.json", "recursion"]);
    check(&format!("{{\"x\": {}}}", "[0,".repeat(2 << 20)), &["config.json", "limit"]);
    check(&good[..good.len() / 2], &["config.json", "JSON"]);
    check(&good.replace("\"hidden_size\": 64", "\"hidden_size\": 18446744073709551616"), &["hidden_size"]);
    check(
        &good.replace("LlamaForCausalLM", "MambaForCausalLM"),
        &["MambaForCausalLM", "DeepseekV3ForCausalLM"],
    );
    let quantised = good.replacen('{', "{\"quantization_config\": {\"quant_method\": \"awq\"},", 1);
    check(&quantised, &["quantised", "awq", "bf16"]);
    std::fs::write(&path, &good).expect("write");
    load(dir.path(), None).expect("whole again");
}

fn json_text(path: &Path) -> String {
    serde_json::from_str::<Value>(&std::fs::read_to_string(path).expect("file"))
        .map(|v| format!("{v:#}"))
        .expect("JSON")
}

#[test]
fn indices_are_checked() {
    let dir = copy_of("llama3");
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::rename(dir.path().join("model.safetensors"), dir.path().join("a.safetensors")).expect("rename");
    let (header, _) = parts(&std::fs::read(dir.path().join("a.safetensors")).expect("weights"));
    let map = |file: &str| -> Value {
        let names = header.as_object().expect("object").keys().filter(|name| *name != "__metadata__");
        json!({"weight_map": names.map(|name| (name.clone(), json!(file))).collect::<serde_json::Map<_, _>>()})
    };
    std::fs::write(&index, map("a.safetensors").to_string()).expect("write");
    load(dir.path(), None).expect("one shard");
    std::fs::write(&index, map("../a.safetensors").to_string()).expect("write");
    refused(dir.path(), &["index.json", "../a.safetensors"]);
    std::fs::write(&index, map("b.safetensors").to_string()).expect("write");
    refused(dir.path(), &["b.safetensors"]);
    let mut wrong = map("a.safetensors");
    wrong["weight_map"]["nowhere.weight"] = json!("a.safetensors");
    std::fs::write(&index, wrong.to_string()).expect("write");
    refused(dir.path(), &["nowhere.weight"]);
    std::fs::write(&index, "[]").expect("write");
    refused(dir.path(), &["index.json", "JSON"]);
    std::fs::remove_file(&index).expect("remove");
    std::fs::write(dir.path().join("pytorch_model.bin"), "pickle").expect("write");
    refused(dir.path(), &["pytorch_model.bin", "safetensors"]);
}

#[test]
fn foreign_tokenizers_and_folders_are_refused() {
    let dir = copy_of("llama3");
    let path = dir.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).expect("file")).expect("JSON");
    let mut token = tokenizer["added_tokens"][0].clone();
    token["content"] = json!("<|one_too_many|>");
    token["id"] = json!(512);
    tokenizer["added_tokens"].as_array_mut().expect("list").push(token);
    std::fs::write(&path, tokenizer.to_string()).expect("write");
    refused(dir.path(), &["512", "another model"]);
    std::fs::write(&path, "{}").expect("write");
    refused(dir.path(), &["tokenizer.json"]);
    std::fs::remove_file(&path).expect("remove");
    refused(dir.path(), &["tokenizer.json", "fast"]);
    std::fs::remove_file(dir.path().join("config.json")).expect("remove");
    refused(dir.path(), &["config.json"]);
    refused(&dir.path().join("nowhere"), &["nowhere", ".gguf"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn flipped_bytes_never_panic(at in 0usize..4000, value: u8) {
        let dir = copy_of("llama3_bf16");
        let file = dir.path().join("model.safetensors");
        let mut bytes = std::fs::read(&file).expect("weights");
        bytes[at] = value;
        std::fs::write(&file, &bytes).expect("write");
        if let Err(e) = load(dir.path(), None) {
            prop_assert!(!e.to_string().is_empty());
        }
    }
}
