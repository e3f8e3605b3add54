//! Sentence embeddings: an encoder's rows, averaged and scaled to length 1, as sentence-transformers does.
//!
//! Only that definition is known: a folder whose `modules.json` or `1_Pooling/config.json` asks for another one is refused. An embedding does not depend on
//! what else is in the batch.

use std::path::Path;
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_types::Digest;
use serde_json::Value;

use crate::checkpoint::{self, LoadedEncoder, read_json};
use crate::config::{ENCODERS, encoder_spec_from_config};
use crate::encoder::{EncoderBatch, EncoderWeights, mean_pooled};
use crate::error::ModelError;
use crate::tokenizer::{Framed, Tokenizer};
use crate::transformer::Purpose;

/// A model that turns a text into a vector.
#[derive(Debug)]
pub struct Embedder {
    weights: EncoderWeights,
    token_types: bool,
    info: EmbedderInfo,
    version: String,
}

/// What is known of an embedder without its weights.
#[derive(Clone, Debug)]
pub struct EmbedderInfo {
    /// Length of an embedding.
    pub width: usize,
    /// Longest input, tokens, special ones included.
    pub max_tokens: usize,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
}

impl EmbedderInfo {
    /// Reads configuration and tokenizer of the encoder in `dir`, not its weights.
    ///
    /// # Errors
    /// Whatever is wrong with those files; [`ModelError::Unsupported`] for what is no encoder or is not pooled by the mean.
    pub fn read(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let config = read_json(&path)?;
        let spec = encoder_spec_from_config(&path, &config).map_err(|error| match error {
            ModelError::Unsupported { path, what, .. } => {
                let hint = format!("; embeddings need an encoder: {}", ENCODERS.join(", "));
                ModelError::Unsupported { path, what, hint }
            }
            other => other,
        })?;
        check_pooling(dir)?;
        let tokenizer = Tokenizer::from_folder(dir)?;
        tokenizer.check_fits(spec.vocab_size)?;
        let max_tokens = limit(dir)?.map_or(spec.max_positions, |limit| limit.min(spec.max_positions));
        Ok(Self { width: spec.hidden, max_tokens, tokenizer: Arc::new(tokenizer) })
    }
}

/// Longest input that the model was made for, where the folder says so.
fn limit(dir: &Path) -> Result<Option<usize>, ModelError> {
    let path = dir.join("sentence_bert_config.json");
    if !path.exists() {
        return Ok(None);
    }
    match read_json(&path)?.get("max_seq_length").unwrap_or(&Value::Null) {
        Value::Null => Ok(None),
        value => match value.as_u64() {
            Some(limit) if limit > 0 => Ok(Some(limit as usize)),
            _ => {
                let what = format!("max_seq_length = {value}: expected a number of tokens");
                Err(ModelError::Invalid { path, what })
            }
        },
    }
}

fn check_pooling(dir: &Path) -> Result<(), ModelError> {
    let path = dir.join("1_Pooling/config.json");
    if !path.exists() {
        return Ok(());
    }
    let config = read_json(&path)?;
    let on = |(key, value): (&String, &Value)| {
        (key.starts_with("pooling_mode_") && value == &Value::Bool(true)).then(|| key.clone())
    };
    let modes: Vec<String> = config.iter().filter_map(on).collect();
    if modes == ["pooling_mode_mean_tokens"] {
        return Ok(());
    }
    let what =
        format!("pooling by {}", if modes.is_empty() { "nothing".into() } else { modes.join(" and ") });
    Err(ModelError::Unsupported { path, what, hint: "; supported is pooling_mode_mean_tokens alone".into() })
}

impl Embedder {
    /// Loads the encoder in `dir` and packs its weights; a classification head is not looked at.
    ///
    /// # Errors
    /// Whatever is wrong with the files, by name; see [`EmbedderInfo::read`].
    pub fn load(dir: &Path, threads: &Threads) -> Result<Self, ModelError> {
        let info = EmbedderInfo::read(dir)?;
        let LoadedEncoder { encoder, params, .. } = checkpoint::load_encoder(dir, None)?;
        let both = format!("{}{}{}", params.digest(), info.tokenizer.digest(), info.max_tokens);
        let version = Digest::of(both.as_bytes()).to_string()[..16].to_owned();
        let weights = EncoderWeights::pack(&encoder, &params, Purpose::Sampling, threads);
        Ok(Self { weights, token_types: encoder.spec().token_types > 1, info, version })
    }

    /// What is known of it without its weights.
    pub fn info(&self) -> &EmbedderInfo {
        &self.info
    }

    /// Identity of weights, tokenizer and longest input, 16 hex digits: the same version gives the same embeddings.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The embedding of each input: mean over its rows, length 1.
    ///
    /// # Panics
    /// If an input is empty, longer than [`EmbedderInfo::max_tokens`] or holds an id outside the vocabulary.
    pub fn embed(&self, threads: &Threads, inputs: &[Framed]) -> Vec<Vec<f32>> {
        if inputs.is_empty() {
            return Vec::new();
        }
        let lengths: Vec<usize> = inputs.iter().map(|input| input.ids.len()).collect();
        let limit = self.info.max_tokens;
        for len in &lengths {
            assert!((1..=limit).contains(len), "{len} tokens of 1 to {limit}");
        }
        let tokens: Vec<u32> = inputs.iter().flat_map(|input| &input.ids).copied().collect();
        let types: Vec<u32> = inputs.iter().flat_map(|input| &input.token_types).copied().collect();
        let token_types = self.token_types.then_some(&types[..]);
        let batch = EncoderBatch { tokens: &tokens, token_types, lengths: &lengths };
        let hidden_td = self.weights.forward(threads, &batch);
        mean_pooled(&hidden_td, &lengths, self.info.width)
            .chunks_exact(self.info.width)
            .map(<[f32]>::to_vec)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/bert_classifier")
    }

    fn framed(embedder: &Embedder, text: &str) -> Framed {
        let tokenizer = &embedder.info().tokenizer;
        tokenizer.frame(&tokenizer.encode(text).unwrap(), None).unwrap()
    }

    #[test]
    fn an_embedding_is_the_mean_of_its_rows_at_length_one_whatever_is_beside_it() {
        let threads = Threads::single();
        let embedder = Embedder::load(&fixture(), &threads).unwrap();
        let inputs = [framed(&embedder, "the cat"), framed(&embedder, "a much longer sentence, is it not?")];
        let both = embedder.embed(&threads, &inputs);
        for (input, found) in inputs.iter().zip(&both) {
            let lengths = [input.ids.len()];
            let batch =
                EncoderBatch { tokens: &input.ids, token_types: Some(&input.token_types), lengths: &lengths };
            let hidden = embedder.weights.forward(&threads, &batch);
            let width = embedder.info().width;
            let mean = |d: usize| {
                hidden.iter().skip(d).step_by(width).map(|x| f64::from(*x)).sum::<f64>() / lengths[0] as f64
            };
            let norm = (0..width).map(|d| mean(d).powi(2)).sum::<f64>().sqrt();
            for (d, x) in found.iter().enumerate() {
                assert!((f64::from(*x) - mean(d) / norm).abs() <= 1e-6, "{d}");
            }
            assert_eq!(embedder.embed(&threads, std::slice::from_ref(input))[0], *found, "the same alone");
        }
    }

    #[test]
    fn another_pooling_is_refused_and_a_shorter_limit_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(fixture()).unwrap().flatten() {
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        std::fs::write(dir.path().join("sentence_bert_config.json"), r#"{"max_seq_length": 16}"#).unwrap();
        assert_eq!(EmbedderInfo::read(dir.path()).unwrap().max_tokens, 16);
        std::fs::create_dir(dir.path().join("1_Pooling")).unwrap();
        let pooling = dir.path().join("1_Pooling/config.json");
        std::fs::write(&pooling, r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}"#)
            .unwrap();
        let why = EmbedderInfo::read(dir.path()).unwrap_err().to_string();
        assert!(why.contains("pooling_mode_cls_token"), "{why}");
        std::fs::write(dir.path().join("sentence_bert_config.json"), r#"{"max_seq_length": -1}"#).unwrap();
        std::fs::remove_file(&pooling).unwrap();
        assert!(EmbedderInfo::read(dir.path()).unwrap_err().to_string().contains("max_seq_length = -1"));
    }
}
