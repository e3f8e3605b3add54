//! Writing a checkpoint that the reference library loads unchanged.
//!
//! What goes into which file is decided here; how a file is put on disk is the caller's, through [`save_into`]: the
//! learner hashes and syncs every file of a commit. [`save`] is for everyone else.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use freewheel_types::WeightsDtype;
use serde_json::{Map, Value, json};

use super::LoadedModel;
use crate::error::ModelError;
use crate::generation::GenerationConfig;
use crate::params::{Params, TensorSpec};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// How to save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SaveOptions {
    /// Most bytes of weights in one file; a bigger model is cut into shards with an index.
    pub shard_bytes: u64,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self { shard_bytes: 5_000_000_000 }
    }
}

/// Where the files of a checkpoint go: called once for each, with its name and its content in consecutive pieces.
pub type FileSink<'a> = dyn FnMut(&str, &[&[u8]]) -> io::Result<()> + 'a;

/// Writes `model`, with `params` as its weights, into the folder `dir`, which is created. Returns the files written.
///
/// Files are written under their final names and not synced: use a fresh folder and rename it, or [`save_into`], where
/// a crash must not be seen. Weight files of an earlier save that this one does not replace are removed.
///
/// # Errors
/// [`ModelError::File`] with the file that could not be written.
pub fn save(
    dir: &Path,
    model: &LoadedModel,
    params: &Params,
    options: &SaveOptions,
) -> Result<Vec<PathBuf>, ModelError> {
    let failed = |path: &Path, source| ModelError::File {
        path: path.to_owned(),
        what: "cannot be written".into(),
        source: Some(source),
    };
    std::fs::create_dir_all(dir).map_err(|e| failed(dir, e))?;
    let mut written = Vec::new();
    let mut current = dir.to_owned();
    save_into(model, params, options, &mut |name, pieces| {
        current = dir.join(name);
        let mut file = io::BufWriter::new(std::fs::File::create(&current)?);
        pieces.iter().try_for_each(|piece| io::Write::write_all(&mut file, piece))?;
        io::Write::flush(&mut file)?;
        written.push(current.clone());
        Ok(())
    })
    .map_err(|e| failed(&current, e))?;
    remove_stale(dir, &written).map_err(|e| failed(dir, e))?;
    Ok(written)
}

/// Hands every file of the checkpoint to `sink`: configuration, tokenizer, weights (the weights uncopied).
///
/// # Errors
/// The first error of `sink`.
pub fn save_into(
    model: &LoadedModel,
    params: &Params,
    options: &SaveOptions,
    sink: &mut FileSink<'_>,
) -> io::Result<()> {
    sink("config.json", &[pretty(&config_json(model, params.dtype())).as_bytes()])?;
    sink("generation_config.json", &[pretty(&generation_json(&model.generation)).as_bytes()])?;
    for (name, bytes) in model.tokenizer.files() {
        sink(name, &[bytes])?;
    }
    let shards = shards(params, options.shard_bytes);
    let mut weight_map = Map::new();
    for (number, tensors) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => SINGLE.to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        weight_map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), name.as_str().into())));
        let header = header(tensors, params.dtype());
        let mut pieces: Vec<&[u8]> = vec![&header];
        pieces.extend(tensors.iter().map(|tensor| tensor_bytes(params, tensor)));
        sink(&name, &pieces)?;
    }
    if shards.len() > 1 {
        let index = json!({
            "metadata": {"total_size": params.as_bytes().len(), "total_parameters": params.layout.total},
            "weight_map": weight_map,
        });
        sink(INDEX, &[pretty(&index).as_bytes()])?;
    }
    Ok(())
}

/// `config.json` as it was, with the architecture and the element type of what is saved.
fn config_json(model: &LoadedModel, dtype: WeightsDtype) -> Value {
    let mut config = model.config_json.clone();
    config.insert("architectures".into(), json!([model.model.spec().architecture]));
    let name = match dtype {
        WeightsDtype::F32 => "float32",
        WeightsDtype::Bf16 => "bfloat16",
    };
    // Both spellings exist; a file keeps the one it has.
    let modern = config.contains_key("dtype");
    if modern {
        config.insert("dtype".into(), name.into());
    }
    if !modern || config.contains_key("torch_dtype") {
        config.insert("torch_dtype".into(), name.into());
    }
    config.into()
}

fn generation_json(generation: &GenerationConfig) -> Value {
    let mut raw = generation.raw.clone();
    let mut put = |key: &str, ids: &[u32]| match ids {
        [] => {}
        _ if raw.get(key).is_some_and(|value| !value.is_null()) => {}
        [one] => drop(raw.insert(key.into(), (*one).into())),
        more => drop(raw.insert(key.into(), more.into())),
    };
    put("bos_token_id", generation.bos_id.as_slice());
    put("eos_token_id", &generation.eos_ids);
    put("pad_token_id", generation.pad_id.as_slice());
    raw.into()
}

fn pretty(value: &Value) -> String {
    // Alternate display of a JSON value is indented by two, as the reference library writes it.
    format!("{value:#}\n")
}

fn tensor_bytes<'p>(params: &'p Params, tensor: &TensorSpec) -> &'p [u8] {
    let (range, width) = (tensor.range(), params.dtype().size());
    &params.as_bytes()[range.start * width..range.end * width]
}

/// Consecutive tensors, together at most `limit` bytes (but one at least).
fn shards(params: &Params, limit: u64) -> Vec<&[TensorSpec]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    let tensors = &params.layout.tensors;
    for (i, tensor) in tensors.iter().enumerate() {
        let size = (tensor.len() * params.dtype().size()) as u64;
        if i > start && bytes + size > limit {
            shards.push(&tensors[start..i]);
            (start, bytes) = (i, 0);
        }
        bytes += size;
    }
    shards.push(&tensors[start..]);
    shards
}

/// The head of a safetensors file, padded so that the data behind it is aligned.
pub(super) fn header(tensors: &[TensorSpec], dtype: WeightsDtype) -> Vec<u8> {
    let name = match dtype {
        WeightsDtype::F32 => "F32",
        WeightsDtype::Bf16 => "BF16",
    };
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0;
    for tensor in tensors {
        let end = at + tensor.len() * dtype.size();
        map.insert(
            tensor.name.clone(),
            json!({"dtype": name, "shape": tensor.shape, "data_offsets": [at, end]}),
        );
        at = end;
    }
    let mut text = Value::Object(map).to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A loader would prefer an old single file to our shards, or find shards that belong to nothing.
fn remove_stale(dir: &Path, written: &[PathBuf]) -> io::Result<()> {
    let kept: BTreeSet<&Path> = written.iter().map(PathBuf::as_path).collect();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let ours = name == SINGLE
            || name == INDEX
            || (name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors"));
        if ours && !kept.contains(path.as_path()) {
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}
