//! `model.safetensors` of a small model whose other files are sound: an error or a model, never a panic.
#![no_main]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let fixture: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/llama3");
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture.join(name), folder.path().join(name)).expect("a fixture");
    }
    folder
});

fuzz_target!(|data: &[u8]| {
    std::fs::write(FOLDER.path().join("model.safetensors"), data).expect("written");
    let _ = freewheel_model::load(FOLDER.path(), None);
});
