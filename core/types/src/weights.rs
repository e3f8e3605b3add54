//! Weights on the wire: a manifest, and a payload cut into digested chunks.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::PolicyVersion;

/// BLAKE3 digest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Digest of all that `reader` gives, and its length in bytes.
    ///
    /// # Errors
    /// Those of the reader.
    pub fn of_reader(reader: &mut dyn std::io::Read) -> std::io::Result<(Self, u64)> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(reader)?;
        Ok((Self(*hasher.finalize().as_bytes()), hasher.count()))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// Element type of published weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightsDtype {
    /// 32-bit floats: oracles and small models.
    F32,
    /// bfloat16, the working format.
    Bf16,
}

impl WeightsDtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// What a published version consists of; everything a reader checks before it believes a byte.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version these weights are.
    pub version: PolicyVersion,
    /// The version a delta is against; `None` for a key frame.
    pub base: Option<PolicyVersion>,
    /// Element type.
    pub dtype: WeightsDtype,
    /// Every tensor in arena order.
    pub tensors: Vec<TensorEntry>,
    /// Payload chunks in order.
    pub chunks: Vec<ChunkDigest>,
    /// Digest of the *decoded arena*: what the reader must hold after applying the payload.
    pub arena_digest: Digest,
    /// Digest of `tokenizer.json`, so that actor and learner cannot differ.
    pub tokenizer_digest: Digest,
    /// Non-zero elements of the delta over all elements; 1 for a key frame.
    pub density: f64,
}

/// One tensor of the arena.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Checkpoint name.
    pub name: String,
    /// Shape, outermost first.
    pub shape: Vec<u64>,
}

/// Size and digest of one payload chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkDigest {
    /// Bytes.
    pub len: u64,
    /// Digest of those bytes.
    pub digest: Digest,
}

/// A manifest with its chunks, as handed to a policy store and as it comes back.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightsPayload {
    /// The description.
    pub manifest: Manifest,
    /// The chunks it names, in order.
    pub chunks: Vec<Vec<u8>>,
}

impl Manifest {
    /// Payload bytes.
    pub fn payload_len(&self) -> u64 {
        self.chunks.iter().map(|chunk| chunk.len).sum()
    }
}
