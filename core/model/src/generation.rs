//! `generation_config.json`: where a model stops, and how its makers sample from it.

use std::path::Path;

use serde_json::{Map, Value};

use crate::checkpoint::read_json;
use crate::error::ModelError;
use crate::tokenizer::Tokenizer;

/// Defaults of generation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Ids that end a sequence, ascending; may be empty.
    pub eos_ids: Vec<u32>,
    /// Beginning-of-sequence id.
    pub bos_id: Option<u32>,
    /// Padding id.
    pub pad_id: Option<u32>,
    /// Sampling temperature, if the makers recommend one.
    pub temperature: Option<f32>,
    /// Top-k, likewise.
    pub top_k: Option<u32>,
    /// Top-p, likewise.
    pub top_p: Option<f32>,
    /// Min-p, likewise.
    pub min_p: Option<f32>,
    /// The file as it was, for saving unchanged.
    pub raw: Map<String, Value>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` in `dir`; what it does not say comes from `config.json`, then the tokenizer.
    ///
    /// # Errors
    /// A file that is no JSON object, or ids that are not ids.
    pub fn from_folder(
        dir: &Path,
        config: &Map<String, Value>,
        tokenizer: &Tokenizer,
    ) -> Result<Self, ModelError> {
        let path = dir.join("generation_config.json");
        let raw = if path.is_file() { read_json(&path)? } else { Map::new() };
        Self::new(&path, raw, config, tokenizer)
    }

    /// The defaults that `raw` gives; `path` is for messages.
    pub(crate) fn new(
        path: &Path,
        raw: Map<String, Value>,
        config: &Map<String, Value>,
        tokenizer: &Tokenizer,
    ) -> Result<Self, ModelError> {
        let ids = |map: &Map<String, Value>, key: &str| {
            ids(map, key).ok_or_else(|| ModelError::Invalid {
                path: path.to_owned(),
                what: format!("{key} = {}: expected an id or a list of ids", map[key]),
            })
        };
        let pick = |key: &str, token: &str| -> Result<Vec<u32>, ModelError> {
            for map in [&raw, config] {
                let found = ids(map, key)?;
                if !found.is_empty() {
                    return Ok(found);
                }
            }
            Ok(tokenizer.special(token).and_then(|text| tokenizer.token_to_id(text)).into_iter().collect())
        };
        let mut eos_ids = pick("eos_token_id", "eos_token")?;
        eos_ids.sort_unstable();
        eos_ids.dedup();
        let number = |key: &str| raw.get(key).and_then(Value::as_f64).map(|x| x as f32);
        Ok(Self {
            eos_ids,
            bos_id: pick("bos_token_id", "bos_token")?.first().copied(),
            pad_id: pick("pad_token_id", "pad_token")?.first().copied(),
            temperature: number("temperature"),
            top_k: raw.get("top_k").and_then(Value::as_u64).and_then(|k| u32::try_from(k).ok()),
            top_p: number("top_p"),
            min_p: number("min_p"),
            raw,
        })
    }
}

/// One id, a list of them, or none (absent, null, or -1 as some exporters write).
fn ids(map: &Map<String, Value>, key: &str) -> Option<Vec<u32>> {
    match map.get(key) {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Number(n)) if n.as_i64() == Some(-1) => Some(Vec::new()),
        Some(Value::Array(items)) => {
            items.iter().map(|item| item.as_u64().and_then(|n| u32::try_from(n).ok())).collect()
        }
        Some(value) => value.as_u64().and_then(|n| u32::try_from(n).ok()).map(|id| vec![id]),
    }
}
