//! A GGUF file: an error or a model, never a panic.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

static FOLDER: LazyLock<tempfile::TempDir> =
    LazyLock::new(|| tempfile::tempdir().expect("a temporary folder"));

fuzz_target!(|data: &[u8]| {
    let path = FOLDER.path().join("model.gguf");
    std::fs::write(&path, data).expect("written");
    let _ = freewheel_model::load(&path, None);
});
