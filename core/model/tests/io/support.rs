//! Where golden data lies, and how it is read.

use std::path::{Path, PathBuf};

use freewheel_kernels::Threads;
use freewheel_model::{BatchSeq, ForwardBatch, KvCache, LoadedModel, PolicyWeights, Purpose};
use freewheel_types::{PolicyVersion, WeightsDtype};
use serde_json::Value;

/// The folder of golden data: the fixtures of the repository, or a full set named by `FREEWHEEL_ORACLES`.
pub fn oracles() -> PathBuf {
    match std::env::var_os("FREEWHEEL_ORACLES") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures"),
    }
}

/// A golden checkpoint's folder.
pub fn model_dir(name: &str) -> PathBuf {
    oracles().join("models").join(name)
}

/// The golden checkpoints that are there, of those that can be loaded.
pub fn model_names() -> Vec<String> {
    let supported = [
        "gemma3_text",
        "gpt_oss",
        "llama3",
        "llama3_bf16",
        "llama4_text_step1",
        "llama4_text_step2",
        "llama4_vision",
        "mixtral",
        "olmoe",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "qwen3_moe_bf16",
    ];
    let names: Vec<String> =
        supported.iter().filter(|name| model_dir(name).is_dir()).map(|name| (*name).to_owned()).collect();
    assert!(names.len() >= 4, "golden checkpoints are missing from {}", oracles().display());
    names
}

/// A JSON file.
pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("golden file")).expect("golden JSON")
}

/// A list of ids.
pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list of ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// A copy of a golden checkpoint that may be damaged.
pub fn copy_of(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for entry in std::fs::read_dir(model_dir(name)).expect("golden checkpoint") {
        let entry = entry.expect("entry");
        if !entry.file_name().to_string_lossy().starts_with("golden") {
            std::fs::write(dir.path().join(entry.file_name()), std::fs::read(entry.path()).expect("file"))
                .expect("copy");
        }
    }
    dir
}

/// The element type that `config.json` of a golden checkpoint names.
pub fn stored_dtype(name: &str) -> WeightsDtype {
    if name.ends_with("bf16") { WeightsDtype::Bf16 } else { WeightsDtype::F32 }
}

/// Logits of every position of `tokens`.
pub fn logits(model: &LoadedModel, tokens: &[u32]) -> Vec<f32> {
    let threads = Threads::single();
    let weights = PolicyWeights::pack(
        &model.model,
        &model.params,
        PolicyVersion::new(1, 0),
        Purpose::Sampling,
        &threads,
    );
    let pages: Vec<u32> = (0..tokens.len().div_ceil(16) as u32).collect();
    let mut cache = KvCache::new(&model.model, pages.len());
    let rows: Vec<usize> = (0..tokens.len()).collect();
    let seqs = [BatchSeq { rows: tokens.len(), position: 0, pages: &pages }];
    weights
        .forward(&threads, &mut cache, &ForwardBatch { tokens, seqs: &seqs, logit_rows: &rows, tiles: &[] })
        .logits
}

/// The largest difference of two lists of the same length.
pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
