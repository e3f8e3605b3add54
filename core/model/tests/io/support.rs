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

/// The golden checkpoints of the index that write text, as far as they are there.
pub fn model_names() -> Vec<String> {
    let index = json(&oracles().join("models/index.json"));
    let names: Vec<String> = index
        .as_array()
        .expect("a list")
        .iter()
        .filter(|row| !row["architecture"].as_str().expect("a name").ends_with("ForSequenceClassification"))
        .map(|row| row["name"].as_str().expect("a name").to_owned())
        .filter(|name| model_dir(name).is_dir())
        .collect();
    assert!(names.len() >= 4, "golden checkpoints are missing from {}", oracles().display());
    names
}

/// The weight files of a golden checkpoint: one, or its shards.
pub fn weight_files(name: &str) -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(model_dir(name))
        .expect("golden checkpoint")
        .map(|entry| entry.expect("entry").path())
        .filter(|path| {
            let file = path.file_name().expect("a name").to_string_lossy();
            file.starts_with("model") && file.ends_with(".safetensors")
        })
        .collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("weights")).collect()
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
    let config = json(&model_dir(name).join("config.json"));
    let kind = ["dtype", "torch_dtype"].iter().find_map(|key| config[*key].as_str());
    if kind == Some("bfloat16") { WeightsDtype::Bf16 } else { WeightsDtype::F32 }
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
    let mut cache = KvCache::new(&weights, pages.len());
    let rows: Vec<usize> = (0..tokens.len()).collect();
    let seqs = [BatchSeq { rows: tokens.len(), position: 0, pages: &pages }];
    weights
        .forward(&threads, &mut cache, &ForwardBatch { tokens, seqs: &seqs, logit_rows: &rows, tiles: &[] })
        .logits
        .to_vec()
}

/// The largest difference of two lists of the same length.
pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
