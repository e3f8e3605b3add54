//! Reading safetensors: one file, or shards with an index.
//!
//! Headers are read and compared with the layout before a single weight is touched or an arena is allocated, so a
//! damaged or foreign file costs neither time nor memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use freewheel_types::WeightsDtype;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use super::elements::{Elements, fill};
use super::mmap;
use super::mxfp4::{self, Mxfp4};
use crate::error::ModelError;
use crate::params::{ParamLayout, Params, TensorSpec};
use crate::spec::ModelSpec;

/// Real headers are a few MB for the largest models.
const MAX_HEADER_BYTES: u64 = 8 << 20;
const MAX_TENSORS: usize = 1 << 20;
/// Names in an error message before it says "and n more".
const NAMED: usize = 3;

/// The index of the largest released models has 10 MB.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// What is read of an index.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// An opened checkpoint: shards, and where each tensor is.
pub(super) struct Checkpoint {
    path: PathBuf,
    shards: Vec<Mmap>,
    tensors: BTreeMap<String, Stored>,
}

struct Stored {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: std::ops::Range<usize>,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists, in `dir`.
    pub(super) fn open(dir: &Path) -> Result<Self, ModelError> {
        let (single, index) = (dir.join("model.safetensors"), dir.join("model.safetensors.index.json"));
        if single.is_file() {
            return Self::from_shards(single.clone(), &[single]);
        }
        if index.is_file() {
            return Self::from_index(dir, index);
        }
        let hint =
            if dir.join("pytorch_model.bin").exists() || dir.join("pytorch_model.bin.index.json").exists() {
                "; pytorch_model.bin is a pickle and is not read: save the model with safetensors"
            } else {
                ""
            };
        Err(ModelError::File {
            path: dir.to_owned(),
            what: format!("neither model.safetensors nor model.safetensors.index.json is there{hint}"),
            source: None,
        })
    }

    /// Opens one file.
    pub(super) fn file(path: &Path) -> Result<Self, ModelError> {
        Self::from_shards(path.to_owned(), &[path.to_owned()])
    }

    /// Names and shapes of all tensors, sorted by name.
    pub(super) fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors.iter().map(|(name, stored)| (name.as_str(), stored.shape.as_slice()))
    }

    fn from_index(dir: &Path, index: PathBuf) -> Result<Self, ModelError> {
        let invalid = |what: String| ModelError::Invalid { path: index.clone(), what };
        let text = super::read_text(&index, MAX_INDEX_BYTES)?;
        let Index { weight_map: map } =
            serde_json::from_str(&text).map_err(|e| invalid(format!("not an index in JSON: {e}")))?;
        let mut files: Vec<&str> = Vec::new();
        for (name, file) in &map {
            // A file name from outside must not lead out of the folder.
            if file.contains(['/', '\\']) || !file.ends_with(".safetensors") {
                let what = format!("weight_map.{name} = {file:?}: expected a .safetensors file name");
                return Err(invalid(what));
            }
            files.push(file);
        }
        files.sort_unstable();
        files.dedup();
        let paths: Vec<PathBuf> = files.iter().map(|file| dir.join(file)).collect();
        let checkpoint = Self::from_shards(index.clone(), &paths)?;
        for (name, file) in &map {
            match checkpoint.tensors.get(name) {
                Some(stored) if files[stored.shard] == file => {}
                _ => return Err(invalid(format!("weight_map says that {name} is in {file}, but it is not"))),
            }
        }
        Ok(checkpoint)
    }

    fn from_shards(path: PathBuf, files: &[PathBuf]) -> Result<Self, ModelError> {
        let mut checkpoint = Self { path, shards: Vec::new(), tensors: BTreeMap::new() };
        for (shard, file) in files.iter().enumerate() {
            let map = mmap::map(file)?;
            checkpoint.add_shard(file, shard, &map)?;
            checkpoint.shards.push(map);
        }
        Ok(checkpoint)
    }

    fn add_shard(&mut self, file: &Path, shard: usize, map: &[u8]) -> Result<(), ModelError> {
        let invalid = |what: String| ModelError::Invalid { path: file.to_owned(), what };
        let Some(length) = map.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes)) else {
            return Err(invalid(format!("{} bytes are too few for a safetensors header", map.len())));
        };
        if length > MAX_HEADER_BYTES || length > (map.len() - 8) as u64 {
            return Err(invalid(format!(
                "offset 0: a header of {length} bytes, where the file has {} and the limit is {MAX_HEADER_BYTES}",
                map.len()
            )));
        }
        // Checks in the crate: UTF-8, JSON, gapless and ordered offsets, sizes that match shape and type, no overflow.
        // What it does not see is a name given twice: the last one wins.
        let header = &map[8..8 + length as usize];
        if let Some(name) = twice(header).map_err(|e| invalid(format!("safetensors header: {e}")))? {
            return Err(invalid(format!("safetensors header: tensor {name} is listed twice")));
        }
        let (_, metadata) =
            SafeTensors::read_metadata(map).map_err(|e| invalid(format!("safetensors header: {e}")))?;
        let start = 8 + length as usize;
        for (name, info) in metadata.tensors() {
            let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
            let stored = Stored { shard, dtype: info.dtype, shape: info.shape.clone(), bytes };
            if self.tensors.insert(name.clone(), stored).is_some() {
                return Err(invalid(format!("tensor {name} is in two shards")));
            }
            if self.tensors.len() > MAX_TENSORS {
                return Err(invalid(format!("more than {MAX_TENSORS} tensors")));
            }
        }
        Ok(())
    }

    /// The narrowest arena type that loses nothing: bf16 if every tensor is bf16 (or MXFP4, in bytes), else f32.
    fn natural_dtype(&self) -> WeightsDtype {
        if self.tensors.values().all(|stored| matches!(stored.dtype, Dtype::BF16 | Dtype::U8)) {
            WeightsDtype::Bf16
        } else {
            WeightsDtype::F32
        }
    }

    /// Whether there is a tensor `name`.
    pub(super) fn holds(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Compares names, shapes and types with `layout`; of the others, `ignorable` ones may be there.
    pub(super) fn check(
        &self,
        layout: &ParamLayout,
        ignorable: impl Fn(&str) -> bool,
    ) -> Result<(), ModelError> {
        let invalid = |what: String| ModelError::Invalid { path: self.path.clone(), what };
        let missing: Vec<&str> = layout
            .tensors
            .iter()
            .filter(|tensor| !self.tensors.contains_key(&tensor.name) && self.packed(tensor).is_none())
            .map(|t| t.name.as_str())
            .collect();
        if !missing.is_empty() {
            return Err(invalid(format!("{} tensors are missing: {}", missing.len(), list(&missing))));
        }
        let mut wanted = BTreeSet::new();
        for tensor in &layout.tensors {
            match self.tensors.get(&tensor.name) {
                Some(stored) => self.check_plain(tensor, stored)?,
                None => {
                    self.check_packed(tensor)?;
                    wanted.extend(mxfp4::names(&tensor.name));
                    continue;
                }
            }
            wanted.insert(tensor.name.clone());
        }
        if self.tensors.len() > wanted.len() {
            let extra: Vec<&str> = self
                .tensors
                .keys()
                .filter(|name| !wanted.contains(*name) && !ignorable(name))
                .map(String::as_str)
                .collect();
            if !extra.is_empty() {
                return Err(invalid(format!(
                    "{} tensors that config.json has no place for: {}",
                    extra.len(),
                    list(&extra)
                )));
            }
        }
        Ok(())
    }

    fn check_plain(&self, tensor: &TensorSpec, stored: &Stored) -> Result<(), ModelError> {
        self.check_shape(&tensor.name, &stored.shape, &tensor.shape)?;
        if matches!(stored.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Ok(());
        }
        Err(ModelError::Unsupported {
            path: self.path.clone(),
            what: format!("{}: element type {:?}", tensor.name, stored.dtype),
            hint: "; supported are F32, F16 and BF16".into(),
        })
    }

    /// Blocks and scales of a tensor in MXFP4.
    fn check_packed(&self, tensor: &TensorSpec) -> Result<(), ModelError> {
        let invalid = |what: String| ModelError::Invalid { path: self.path.clone(), what };
        let shapes = mxfp4::shapes(tensor).ok_or_else(|| {
            invalid(format!("{}: {:?} is not made of blocks of MXFP4", tensor.name, tensor.shape))
        })?;
        for (name, shape) in mxfp4::names(&tensor.name).iter().zip(&shapes) {
            let stored = &self.tensors[name];
            self.check_shape(name, &stored.shape, shape)?;
            if stored.dtype != Dtype::U8 {
                return Err(invalid(format!("{name}: element type {:?}, expected U8", stored.dtype)));
            }
        }
        Ok(())
    }

    fn check_shape(&self, name: &str, found: &[usize], wanted: &[usize]) -> Result<(), ModelError> {
        if found == wanted {
            return Ok(());
        }
        let what = format!("{name}: shape {found:?} where config.json asks for {wanted:?}");
        Err(ModelError::Invalid { path: self.path.clone(), what })
    }

    /// Blocks and scales of `tensor`, if both are there.
    fn packed(&self, tensor: &TensorSpec) -> Option<[&Stored; 2]> {
        let [blocks, scales] = mxfp4::names(&tensor.name);
        Some([self.tensors.get(&blocks)?, self.tensors.get(&scales)?])
    }

    fn bytes(&self, stored: &Stored) -> &[u8] {
        &self.shards[stored.shard][stored.bytes.clone()]
    }

    /// The weights, as `dtype` or as stored. [`Self::check`] comes first.
    pub(super) fn read(
        &self,
        layout: &Arc<ParamLayout>,
        dtype: Option<WeightsDtype>,
    ) -> Result<Params, ModelError> {
        fill(&self.path, layout, dtype.unwrap_or_else(|| self.natural_dtype()), |tensor| {
            if let (Some([blocks, scales]), [_, inputs, outputs]) =
                (self.packed(tensor), tensor.shape.as_slice())
            {
                let (blocks, scales) = (self.bytes(blocks), self.bytes(scales));
                let (inputs, outputs) = (*inputs, *outputs);
                return Ok(Elements::Mxfp4(Mxfp4 { blocks, scales, inputs, outputs }));
            }
            let stored = &self.tensors[&tensor.name];
            let bytes = self.bytes(stored);
            Ok(match stored.dtype {
                Dtype::F16 => Elements::F16(bytes),
                Dtype::BF16 => Elements::Bf16(bytes),
                _ => Elements::F32(bytes),
            })
        })
    }
}

/// Buffers that old exporters left in, the second copy of a tied head, and DeepSeek's layers past the last one, which
/// predict several tokens ahead and have no part in the model (transformers leaves them out too).
pub(super) fn ignorable(name: &str, spec: &ModelSpec) -> bool {
    let layer = || name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
    is_buffer(name)
        || (spec.tied_embeddings && name == "lm_head.weight")
        || (spec.names.predictors && layer().is_some_and(|layer| layer >= spec.layers.len()))
}

/// Buffers that old exporters left in.
pub(super) fn is_buffer(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name.ends_with("embeddings.position_ids")
}

/// A key that the JSON object `header` holds twice.
fn twice(header: &[u8]) -> Result<Option<String>, serde_json::Error> {
    struct Keys;
    impl<'de> serde::de::Visitor<'de> for Keys {
        type Value = Option<String>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a table of tensors")
        }

        fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let (mut keys, mut twice) = (BTreeSet::new(), None);
            while let Some((key, _)) = map.next_entry::<String, serde::de::IgnoredAny>()? {
                if let Some(again) = keys.replace(key) {
                    twice.get_or_insert(again);
                }
            }
            Ok(twice)
        }
    }
    serde::Deserializer::deserialize_map(&mut serde_json::Deserializer::from_slice(header), Keys)
}

fn list(names: &[&str]) -> String {
    let shown = names[..names.len().min(NAMED)].join(", ");
    match names.len().saturating_sub(NAMED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
