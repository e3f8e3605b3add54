//! GGUF files: llama.cpp's format, read once and turned into the same model as a folder would give.
//!
//! The header is parsed here, bounded by the size of the file; quantised blocks are decoded by candle. What comes out
//! has Hugging Face's names, shapes and configuration, so that saving it gives a normal checkpoint.

mod config;
mod header;
mod names;
mod sentencepiece;
mod tokenizer;

use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use freewheel_types::WeightsDtype;

use self::header::{Header, TensorInfo};
use self::names::Source;
use super::elements::{Elements, fill};
use super::{LoadedModel, mmap};
use crate::config::spec_from_config;
use crate::error::ModelError;
use crate::generation::GenerationConfig;
use crate::params::TensorSpec;
use crate::tokenizer::Tokenizer;
use crate::{ModelSpec, Transformer};

/// Loads the GGUF file `path`.
pub(super) fn load(path: &Path, dtype: Option<WeightsDtype>) -> Result<LoadedModel, ModelError> {
    let map = mmap::map(path)?;
    let file = File { path, header: Header::parse(path, &map)?, bytes: &map };
    let config_json = config::config_json(&file)?;
    let spec = spec_from_config(path, &config_json)?;
    let tokenizer = Tokenizer::from_files(path, tokenizer::files(&file)?)?;
    tokenizer.check_fits(spec.vocab_size)?;
    let raw = config::generation_json(&file);
    let generation = GenerationConfig::new(path, raw, &config_json, &tokenizer)?;
    let model = Transformer::new(spec);
    let spec = model.spec();
    for tensor in &model.layout().tensors {
        file.check(spec, tensor)?;
    }
    let params =
        fill(path, model.layout(), dtype.unwrap_or(WeightsDtype::F32), |tensor| file.read(spec, tensor))?;
    let source = path.to_owned();
    Ok(LoadedModel { model, params, tokenizer: Arc::new(tokenizer), generation, config_json, source })
}

/// A mapped file with its header.
struct File<'a> {
    path: &'a Path,
    header: Header,
    bytes: &'a [u8],
}

impl File<'_> {
    fn invalid(&self, what: impl Into<String>) -> ModelError {
        ModelError::Invalid { path: self.path.to_owned(), what: what.into() }
    }

    fn unsupported(&self, what: impl Into<String>, hint: &str) -> ModelError {
        ModelError::Unsupported { path: self.path.to_owned(), what: what.into(), hint: hint.into() }
    }

    fn info(&self, name: &str) -> Result<&TensorInfo, ModelError> {
        self.header.tensors.get(name).ok_or_else(|| self.invalid(format!("tensor {name} is missing")))
    }

    /// Whether the file holds `tensor` in the right shape and a format we decode.
    fn check(&self, spec: &ModelSpec, tensor: &TensorSpec) -> Result<(), ModelError> {
        let source = self.source(spec, tensor)?;
        let info = self.info(&source.name)?;
        let mut expected = tensor.shape.clone();
        if let Some((_, experts)) = source.expert {
            expected.insert(0, experts);
        }
        if info.shape != expected {
            return Err(
                self.invalid(format!("{}: shape {:?} where {expected:?} is due", source.name, info.shape))
            );
        }
        self.block(&source.name, info)?;
        self.tensor_bytes(&source.name, info)?;
        Ok(())
    }

    fn source(&self, spec: &ModelSpec, tensor: &TensorSpec) -> Result<Source, ModelError> {
        names::source(spec, &tensor.name)
            .ok_or_else(|| self.unsupported(format!("{} in a GGUF file", tensor.name), ""))
    }

    /// Format of a tensor: its decoder, elements and bytes of a block.
    fn block(&self, name: &str, info: &TensorInfo) -> Result<GgmlDType, ModelError> {
        let kind = match info.kind {
            0 => GgmlDType::F32,
            1 => GgmlDType::F16,
            2 => GgmlDType::Q4_0,
            3 => GgmlDType::Q4_1,
            6 => GgmlDType::Q5_0,
            7 => GgmlDType::Q5_1,
            8 => GgmlDType::Q8_0,
            12 => GgmlDType::Q4K,
            13 => GgmlDType::Q5K,
            14 => GgmlDType::Q6K,
            30 => GgmlDType::BF16,
            other => {
                let hint =
                    "; supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K";
                return Err(self.unsupported(format!("{name}: GGML type {other}"), hint));
            }
        };
        match info.shape.last() {
            Some(row) if row % kind.block_size() == 0 => Ok(kind),
            _ => {
                Err(self
                    .invalid(format!("{name}: rows of {:?} are no multiple of the block size", info.shape)))
            }
        }
    }

    fn tensor_bytes(&self, name: &str, info: &TensorInfo) -> Result<&[u8], ModelError> {
        let kind = self.block(name, info)?;
        let elements = info.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let range =
            elements.and_then(|n| (n / kind.block_size()).checked_mul(kind.type_size())).and_then(|length| {
                let start = self.header.data_start.checked_add(info.offset)?;
                Some(start..start.checked_add(length)?)
            });
        range.and_then(|range| self.bytes.get(range)).ok_or_else(|| {
            self.invalid(format!("{name}: data at offset {} goes past the end of the file", info.offset))
        })
    }

    fn read<'s>(&'s self, spec: &ModelSpec, tensor: &TensorSpec) -> Result<Elements<'s>, ModelError> {
        let source = self.source(spec, tensor)?;
        let info = self.info(&source.name)?;
        let kind = self.block(&source.name, info)?;
        let mut bytes = self.tensor_bytes(&source.name, info)?;
        if let Some((expert, experts)) = source.expert {
            let each = bytes.len() / experts;
            bytes = &bytes[expert * each..(expert + 1) * each];
        }
        let mut elements = match kind {
            GgmlDType::F32 => Elements::F32(bytes),
            GgmlDType::F16 => Elements::F16(bytes),
            GgmlDType::BF16 => Elements::Bf16(bytes),
            _ => {
                // candle wants aligned blocks, so they are copied out of the map.
                let blocks: Vec<u8> = bytes.into();
                qtensor_from_ggml(kind, &blocks, tensor.shape.clone(), &Device::Cpu)
                    .and_then(|quantised| quantised.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>())
                    .map(Elements::Decoded)
                    .map_err(|e| self.invalid(format!("{}: {e}", source.name)))?
            }
        };
        if source.offset != 0.0 {
            elements = Elements::Decoded(elements.to_f32().iter().map(|x| x - source.offset).collect());
        }
        if let Some(heads) = source.rotary_heads {
            elements = Elements::Decoded(unpermute(&elements.to_f32(), heads, tensor.shape[0]));
        }
        Ok(elements)
    }
}

/// llama.cpp stores the rows of q and k so that rotated pairs are neighbours; ours are half a head apart.
fn unpermute(values: &[f32], heads: usize, rows: usize) -> Vec<f32> {
    let (head_dim, width) = (rows / heads, values.len() / rows);
    let half = head_dim / 2;
    let mut out = Vec::with_capacity(values.len());
    for row in 0..rows {
        let (head, within) = (row / head_dim, row % head_dim);
        let from = head * head_dim + (within % half) * 2 + within / half;
        out.extend_from_slice(&values[from * width..(from + 1) * width]);
    }
    out
}
