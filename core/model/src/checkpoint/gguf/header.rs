//! The header: metadata and tensor table. No length in it is believed beyond the bytes that are there.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::ModelError;

const MAX_DIMENSIONS: u32 = 4;
const MAX_DEPTH: usize = 4;
/// List elements in all metadata together; the largest vocabularies with their merges come to a million and a half.
const MAX_ELEMENTS: usize = 1 << 21;
/// Bytes of the header, which are held; those of the largest vocabularies come to 20 MB.
const MAX_BYTES: usize = 128 << 20;
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 20;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Meta {
    /// Any integer.
    Int(i128),
    /// Any float.
    Float(f64),
    /// A flag.
    Bool(bool),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Meta>),
}

/// A tensor as the table has it.
#[derive(Debug)]
pub(super) struct TensorInfo {
    /// Slowest dimension first (the file has them the other way round).
    pub(super) shape: Vec<usize>,
    /// GGML type number.
    pub(super) kind: u32,
    /// Bytes from the start of the data.
    pub(super) offset: usize,
}

/// A parsed header.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) meta: BTreeMap<String, Meta>,
    pub(super) tensors: BTreeMap<String, TensorInfo>,
    pub(super) data_start: usize,
}

impl Meta {
    pub(super) fn int(&self) -> Option<i128> {
        match self {
            Meta::Int(n) => Some(*n),
            _ => None,
        }
    }

    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Meta::Text(text) => Some(text),
            _ => None,
        }
    }
}

impl Header {
    pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Self, ModelError> {
        let mut reader = Reader { path, bytes, at: 0, elements: 0 };
        if reader.take(4)? != b"GGUF" {
            return Err(reader.invalid("not a GGUF file"));
        }
        let version = reader.u32()?;
        if !(2..=3).contains(&version) {
            return Err(reader.invalid(&format!("GGUF version {version}, supported are 2 and 3")));
        }
        let (tensor_count, meta_count) = (reader.u64()?, reader.u64()?);
        if tensor_count > MAX_TENSORS || meta_count > MAX_KEYS {
            let what = format!(
                "{tensor_count} tensors and {meta_count} keys; the limits are {MAX_TENSORS} and {MAX_KEYS}"
            );
            return Err(reader.invalid(&what));
        }
        let mut meta = BTreeMap::new();
        for _ in 0..meta_count {
            let key = reader.text()?;
            let kind = reader.u32()?;
            let value = reader.value(kind, 0)?;
            if meta.insert(key.clone(), value).is_some() {
                return Err(reader.invalid(&format!("{key} is there twice")));
            }
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let name = reader.text()?;
            let info = reader.tensor()?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(reader.invalid(&format!("tensor {name} is listed twice")));
            }
        }
        let alignment = match meta.get("general.alignment").map(Meta::int) {
            None => 32,
            Some(Some(n)) if (1..=1 << 20).contains(&n) => n as usize,
            Some(_) => return Err(reader.invalid("general.alignment is not a number from 1 to 1048576")),
        };
        Ok(Self { meta, tensors, data_start: reader.at.next_multiple_of(alignment) })
    }
}

struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    elements: usize,
}

impl<'a> Reader<'a> {
    fn invalid(&self, what: &str) -> ModelError {
        ModelError::Invalid { path: self.path.to_owned(), what: format!("{what} (at byte {})", self.at) }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], ModelError> {
        let slice = self.at.checked_add(n).and_then(|end| self.bytes.get(self.at..end));
        let slice = slice
            .ok_or_else(|| self.invalid(&format!("the header wants {n} bytes more than the file has")))?;
        if self.at + n > MAX_BYTES {
            return Err(self.invalid(&format!("a header of more than {MAX_BYTES} bytes")));
        }
        self.at += n;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ModelError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn length(&mut self) -> Result<usize, ModelError> {
        let n = self.u64()?;
        usize::try_from(n).map_err(|_| self.invalid(&format!("length {n}")))
    }

    fn text(&mut self) -> Result<String, ModelError> {
        let n = self.length()?;
        let bytes = self.take(n)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| self.invalid("text that is not UTF-8"))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Meta, ModelError> {
        Ok(match kind {
            0 => Meta::Int(i128::from(self.array::<1>()?[0])),
            1 => Meta::Int(i128::from(i8::from_le_bytes(self.array()?))),
            2 => Meta::Int(i128::from(u16::from_le_bytes(self.array()?))),
            3 => Meta::Int(i128::from(i16::from_le_bytes(self.array()?))),
            4 => Meta::Int(i128::from(self.u32()?)),
            5 => Meta::Int(i128::from(i32::from_le_bytes(self.array()?))),
            // Through its shortest decimal, so that 1e-5 stays 1e-5.
            6 => Meta::Float(f32::from_le_bytes(self.array()?).to_string().parse().unwrap_or(f64::NAN)),
            7 => Meta::Bool(self.array::<1>()?[0] != 0),
            8 => Meta::Text(self.text()?),
            9 if depth < MAX_DEPTH => {
                let kind = self.u32()?;
                let n = self.length()?;
                // Every element takes a byte at least, and more of memory than of the file.
                self.elements = self.elements.saturating_add(n);
                if n > self.bytes.len() - self.at || self.elements > MAX_ELEMENTS {
                    return Err(
                        self.invalid(&format!("a list of {n} elements (at most {MAX_ELEMENTS} in all)"))
                    );
                }
                Meta::List((0..n).map(|_| self.value(kind, depth + 1)).collect::<Result<_, _>>()?)
            }
            10 => Meta::Int(i128::from(self.u64()?)),
            11 => Meta::Int(i128::from(i64::from_le_bytes(self.array()?))),
            12 => Meta::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(self.invalid(&format!("metadata of type {other}"))),
        })
    }

    fn tensor(&mut self) -> Result<TensorInfo, ModelError> {
        let dimensions = self.u32()?;
        if dimensions > MAX_DIMENSIONS {
            return Err(self.invalid(&format!("a tensor of {dimensions} dimensions")));
        }
        let mut shape = (0..dimensions).map(|_| self.length()).collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        Ok(TensorInfo { shape, kind: self.u32()?, offset: self.length()? })
    }
}
