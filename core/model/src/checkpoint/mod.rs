//! Checkpoints: files in, files out.
//!
//! ```text
//! HF folder ── config.json, *.safetensors, tokenizer ──┐         (gpt-oss: experts in MXFP4 are decoded)
//!                                                       ├─► LoadedModel ──► save: HF folder
//! GGUF file ── metadata, quantised tensors ────────────┘
//! ```
//!
//! Everything is checked before it is believed: headers against the configuration, tokenizer against the embedding,
//! values against NaN. Nothing here resumes, publishes or versions weights; that is the learner's.

mod adapter;
mod candle;
mod convert;
mod elements;
mod fused;
mod gguf;
mod mmap;
mod mxfp4;
mod safetensors;
mod save;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use freewheel_types::WeightsDtype;
use serde_json::{Map, Value};

use crate::Transformer;
use crate::config::{encoder_spec_from_config, spec_from_config};
use crate::encoder::Encoder;
use crate::error::ModelError;
use crate::generation::GenerationConfig;
use crate::params::Params;
use crate::spec::{ModelSpec, OutputHead};
use crate::tokenizer::Tokenizer;

pub use adapter::{Adapter, add_product};
pub use convert::convert;
pub use save::{FileSink, SaveOptions, save, save_into};

/// `config.json` and its kin are small; a bigger file is not what it says it is, and would take many times its size.
const MAX_JSON_BYTES: u64 = 4 << 20;

/// A model with everything that belongs to it.
#[derive(Clone, Debug)]
pub struct LoadedModel {
    /// What it is.
    pub model: Arc<Transformer>,
    /// Its weights.
    pub params: Params,
    /// Its tokenizer and chat template.
    pub tokenizer: Arc<Tokenizer>,
    /// Its end-of-sequence ids and sampling defaults.
    pub generation: GenerationConfig,
    /// `config.json` as it was, for saving unchanged what this build does not use.
    pub config_json: Map<String, Value>,
    /// Where it came from.
    pub source: PathBuf,
}

/// An encoder with everything that belongs to it.
#[derive(Clone, Debug)]
pub struct LoadedEncoder {
    /// What it is.
    pub encoder: Arc<Encoder>,
    /// Its weights.
    pub params: Params,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// `config.json` as it was.
    pub config_json: Map<String, Value>,
    /// Where it came from.
    pub source: PathBuf,
}

/// Loads a model: a folder in Hugging Face's layout, a GGUF file, or a folder that holds one GGUF file.
///
/// `dtype` is the element type of the arena; `None` keeps what is stored (f16 and quantised weights become f32).
///
/// # Errors
/// Whatever is wrong with the files, by name; see [`ModelError`].
pub fn load(path: &Path, dtype: Option<WeightsDtype>) -> Result<LoadedModel, ModelError> {
    load_as(path, dtype, Wanted::Policy)
}

/// Loads a decoder as [`load`] does, whether it writes text or has a classification head: to be converted, not to be run.
///
/// # Errors
/// As [`load`].
pub fn load_any(path: &Path, dtype: Option<WeightsDtype>) -> Result<LoadedModel, ModelError> {
    load_as(path, dtype, Wanted::Any)
}

fn load_as(path: &Path, dtype: Option<WeightsDtype>, wanted: Wanted) -> Result<LoadedModel, ModelError> {
    if !path.exists() {
        return Err(ModelError::File {
            path: path.to_owned(),
            what: "no such model; expected a folder with config.json, or a .gguf file".into(),
            source: None,
        });
    }
    let is_gguf = |path: &Path| path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
    if path.is_file() {
        return if is_gguf(path) {
            gguf::load(path, dtype)
        } else {
            let what = "expected a folder with config.json, or a .gguf file".into();
            Err(ModelError::Invalid { path: path.to_owned(), what })
        };
    }
    if !path.join("config.json").exists() {
        let error =
            |e| ModelError::File { path: path.to_owned(), what: "cannot be listed".into(), source: Some(e) };
        let entries = std::fs::read_dir(path).map_err(error)?;
        let files: Vec<PathBuf> =
            entries.flatten().map(|entry| entry.path()).filter(|file| is_gguf(file)).collect();
        if let [file] = files.as_slice() {
            return gguf::load(file, dtype);
        }
    }
    load_folder(path, dtype, wanted)
}

/// Loads a decoder with a classification head (`…ForSequenceClassification`), such as a reward model.
///
/// # Errors
/// As [`load`]; [`ModelError::Unsupported`] for a model without such a head.
pub fn load_classifier(dir: &Path, dtype: Option<WeightsDtype>) -> Result<LoadedModel, ModelError> {
    load_folder(dir, dtype, Wanted::Classifier)
}

/// Loads an encoder: a folder in Hugging Face's layout.
///
/// # Errors
/// As [`load`].
pub fn load_encoder(dir: &Path, dtype: Option<WeightsDtype>) -> Result<LoadedEncoder, ModelError> {
    let config_path = dir.join("config.json");
    let config_json = read_json(&config_path)?;
    let mut spec = encoder_spec_from_config(&config_path, &config_json)?;
    let checkpoint = safetensors::Checkpoint::open(dir)?;
    // Exporters of sentence embeddings leave the pooler out, since nothing reads it.
    if spec.labels.is_none() && !checkpoint.holds("pooler.dense.weight") {
        spec.pooler = None;
    }
    let vocab_size = spec.vocab_size;
    let encoder = Encoder::new(spec);
    checkpoint.check(encoder.layout(), safetensors::is_buffer)?;
    let tokenizer = Tokenizer::from_folder(dir)?;
    tokenizer.check_fits(vocab_size)?;
    let params = checkpoint.read(encoder.layout(), dtype)?;
    let (tokenizer, source) = (Arc::new(tokenizer), dir.to_owned());
    Ok(LoadedEncoder { encoder, params, tokenizer, config_json, source })
}

/// What a folder is to hold.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Policy,
    Classifier,
    Any,
}

impl Wanted {
    fn check(self, path: &Path, spec: &ModelSpec) -> Result<(), ModelError> {
        let found = match spec.head {
            OutputHead::LanguageModel => Wanted::Policy,
            OutputHead::Classifier { .. } => Wanted::Classifier,
        };
        let (what, hint) = match self {
            Wanted::Any => return Ok(()),
            wanted if wanted == found => return Ok(()),
            Wanted::Policy => {
                ("sampling from", "it scores text: use it as a reward component, kind = \"model\"")
            }
            Wanted::Classifier => ("scoring with", "it writes text and has no classification head"),
        };
        Err(ModelError::Unsupported {
            path: path.to_owned(),
            what: format!("{what} architecture `{}`", spec.architecture),
            hint: format!("; {hint}"),
        })
    }
}

fn load_folder(dir: &Path, dtype: Option<WeightsDtype>, wanted: Wanted) -> Result<LoadedModel, ModelError> {
    let config_path = dir.join("config.json");
    let mut config_json = read_json(&config_path)?;
    let spec = spec_from_config(&config_path, &config_json)?;
    wanted.check(&config_path, &spec)?;
    let model = Transformer::new(spec);
    let checkpoint = safetensors::Checkpoint::open(dir)?;
    checkpoint.check(model.layout(), |name| safetensors::ignorable(name, model.spec()))?;
    let mut tokenizer = Tokenizer::from_folder(dir)?;
    if let Some(vision) = &model.spec().vision {
        tokenizer.read_images(dir, vision)?;
    }
    tokenizer.check_fits(model.spec().vocab_size)?;
    let generation = GenerationConfig::from_folder(dir, &config_json, &tokenizer)?;
    let params = checkpoint.read(model.layout(), dtype)?;
    // Weights are decoded now, and would be saved so.
    config_json.remove("quantization_config");
    Ok(LoadedModel {
        model,
        params,
        tokenizer: Arc::new(tokenizer),
        generation,
        config_json,
        source: dir.to_owned(),
    })
}

/// Reads a JSON object, bounded.
pub(crate) fn read_json(path: &Path) -> Result<Map<String, Value>, ModelError> {
    let text = read_text(path, MAX_JSON_BYTES)?;
    serde_json::from_str(&text)
        .map_err(|e| ModelError::Invalid { path: path.to_owned(), what: format!("not a JSON object: {e}") })
}

/// Reads a text file of at most `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, ModelError> {
    let error = |what: &str, source| ModelError::File { path: path.to_owned(), what: what.into(), source };
    let size = std::fs::metadata(path).map_err(|e| error("cannot be read", Some(e)))?.len();
    if size > limit {
        return Err(error(&format!("{size} bytes, more than the limit of {limit}"), None));
    }
    std::fs::read_to_string(path).map_err(|e| error("cannot be read as text", Some(e)))
}
