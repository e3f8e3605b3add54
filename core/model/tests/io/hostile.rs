//! Hostile files: mutations of sound headers, the same ones at every run. Each gives an error that names the file, or a
//! model; never a panic, and never much memory. The targets in `fuzz/` go on from here with chance.

use std::path::Path;

use freewheel_model::encoder::Encoder;
use freewheel_model::{Transformer, encoder_spec_from_config, load, spec_from_config};
use freewheel_types::CounterRng;
use serde_json::{Map, Value, json};

use super::corrupt::{join, parts};
use super::gguf::llama_file;
use super::support::{copy_of, json, model_dir, oracles};

const CASES: u64 = 300;
/// What all cases together may have in memory at once.
const MEMORY_MAX: u64 = 512 << 20;

/// Choices of one case.
struct Chance {
    rng: CounterRng,
    at: u64,
}

impl Chance {
    fn new(case: u64) -> Self {
        Self { rng: CounterRng::new(41, case), at: 0 }
    }

    fn below(&mut self, n: usize) -> usize {
        self.at += 1;
        self.rng.below(self.at, n as u64) as usize
    }
}

/// Values that have broken parsers.
fn extreme(chance: &mut Chance) -> Value {
    let values = [
        json!(0),
        json!(-1),
        json!(1),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1u64 << 24),
        json!((1u64 << 24) + 1),
        json!(1u64 << 62),
        json!(1e308),
        json!(0.1),
        json!(true),
        json!(null),
        json!(""),
        json!("../../etc/passwd"),
        json!([]),
        json!({}),
        json!([0, u64::MAX]),
        json!([[[[[[[[]]]]]]]]),
        json!("I64"),
        json!("x".repeat(70_000)),
    ];
    values[chance.below(values.len())].clone()
}

/// Changes one to three places of an object: a value, a missing key, a key's other name.
fn mutate(chance: &mut Chance, object: &mut Map<String, Value>) {
    for _ in 0..=chance.below(3) {
        let Some(key) = object.keys().nth(chance.below(object.len().max(1))).cloned() else { return };
        match (chance.below(6), &mut object[&key]) {
            (0..=2, Value::Object(inner)) if !inner.is_empty() => mutate(chance, inner),
            (0..=2, Value::Array(items)) if !items.is_empty() => {
                let at = chance.below(items.len());
                items[at] = extreme(chance);
            }
            (0, _) => drop(object.remove(&key)),
            (1, value) => {
                let value = value.clone();
                object.insert(format!("{key}{}", chance.below(3)), value);
            }
            (_, value) => *value = extreme(chance),
        }
    }
}

/// Flips, cuts, repeats or overwrites bytes among the first `header` of `bytes`.
fn scramble(chance: &mut Chance, bytes: &mut Vec<u8>, header: usize) {
    for _ in 0..=chance.below(3) {
        let at = chance.below(header.min(bytes.len()).max(1));
        match chance.below(5) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, chance.below(256) as u8),
            2 => {
                let end = (at + 8).min(bytes.len());
                let number = [u64::MAX, 0, 1 << 40, 1 << 63][chance.below(4)].to_le_bytes();
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            3 => {
                let end = (at + chance.below(200)).min(bytes.len());
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            _ => bytes[at] ^= 1 << chance.below(8),
        }
        if bytes.is_empty() {
            return;
        }
    }
}

fn check(path: &Path, file: &str, case: u64) {
    if let Err(error) = load(path, None) {
        let error = error.to_string();
        assert!(error.contains(file) || error.contains("tokenizer"), "case {case}: {error}");
    }
}

/// The most memory this process ever had, where the system says so.
fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? << 10)
}

fn check_memory() {
    if let Some(peak) = peak_bytes() {
        assert!(peak <= MEMORY_MAX, "{} MB were taken", peak >> 20);
    }
}

#[test]
fn mutated_weights_are_an_error_or_a_model() {
    let dir = copy_of("llama3_bf16");
    let file = dir.path().join("model.safetensors");
    let good = std::fs::read(&file).expect("weights");
    let (header, data) = parts(&good);
    let header_len = good.len() - data.len();
    for case in 0..CASES {
        let mut chance = Chance::new(case);
        let bytes = if case % 2 == 0 {
            let mut header = header.clone();
            mutate(&mut chance, header.as_object_mut().expect("an object"));
            join(&header, &data)
        } else {
            let mut bytes = good.clone();
            scramble(&mut chance, &mut bytes, header_len);
            bytes
        };
        std::fs::write(&file, bytes).expect("write");
        check(dir.path(), "model.safetensors", case);
    }
    check_memory();
}

#[test]
fn mutated_gguf_files_are_an_error_or_a_model() {
    let good = llama_file(&load(&model_dir("llama3"), None).expect("golden checkpoint")).bytes();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("model.gguf");
    for case in 0..CASES {
        let mut bytes = good.clone();
        // The first keys, or anything up to where the weights begin.
        let header = if case % 2 == 0 { 800 } else { 16_000 };
        scramble(&mut Chance::new(1000 + case), &mut bytes, header);
        std::fs::write(&path, bytes).expect("write");
        check(&path, "model.gguf", case);
    }
    check_memory();
}

#[test]
fn mutated_configurations_are_an_error_or_a_structure() {
    let mut configs = Vec::new();
    for entry in std::fs::read_dir(oracles().join("models")).expect("golden checkpoints") {
        let path = entry.expect("entry").path().join("config.json");
        if path.is_file() {
            configs.push(json(&path));
        }
    }
    assert!(configs.len() >= 8, "only {} configurations", configs.len());
    let (path, mut sound) = (Path::new("config.json"), 0);
    for (index, config) in configs.iter().enumerate() {
        for case in 0..CASES {
            let mut chance = Chance::new(10_000 * (index as u64 + 1) + case);
            let mut config = config.as_object().expect("an object").clone();
            mutate(&mut chance, &mut config);
            match spec_from_config(path, &config) {
                Ok(spec) => {
                    sound += 1;
                    Transformer::new(spec);
                }
                Err(error) => assert!(error.to_string().starts_with("config.json: "), "case {case}: {error}"),
            }
            if let Ok(spec) = encoder_spec_from_config(path, &config) {
                sound += 1;
                Encoder::new(spec);
            }
        }
    }
    assert!(sound > 100, "only {sound} of the mutations left a model: the deeper checks were not reached");
    check_memory();
}
