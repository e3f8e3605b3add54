//! `config.json`: an error or a model's structure, never a panic and never an absurd allocation.
#![no_main]

use std::path::Path;

use freewheel_model::{Transformer, encoder::Encoder, encoder_spec_from_config, spec_from_config};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(serde_json::Value::Object(config)) = serde_json::from_slice(data) else { return };
    if let Ok(spec) = spec_from_config(Path::new("config.json"), &config) {
        let _ = Transformer::new(spec);
    }
    if let Ok(spec) = encoder_spec_from_config(Path::new("config.json"), &config) {
        let _ = Encoder::new(spec);
    }
});
