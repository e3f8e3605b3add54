//! Frames: a delta or a whole arena, cut into digested chunks, with the manifest that a reader checks.

use std::ops::Range;

use freewheel_types::{ChunkDigest, Digest, Manifest, PolicyVersion, WeightsDtype, WeightsPayload};

use super::{DeltaError, apply, density, encode};
use crate::params::{ParamData, Params};

/// Largest chunk of a payload.
pub const CHUNK_BYTES: usize = 8 << 20;

/// The whole of `params` as a frame that needs no base.
pub fn key_frame(params: &Params, version: PolicyVersion, tokenizer_digest: Digest) -> WeightsPayload {
    let bytes = match params.dtype() {
        WeightsDtype::Bf16 => encode(&vec![0u16; params.layout.total], words::<u16>(params)),
        WeightsDtype::F32 => encode(&vec![0u32; params.layout.total], words::<u32>(params)),
    };
    frame(params, version, None, tokenizer_digest, 1.0, &bytes)
}

/// The way from `base` (version `base_version`) to `params` as a frame.
///
/// # Panics
/// If the two differ in layout or element type: a bug of the caller.
pub fn delta_frame(
    base: &Params,
    base_version: PolicyVersion,
    params: &Params,
    version: PolicyVersion,
    tokenizer_digest: Digest,
) -> WeightsPayload {
    assert_eq!(base.dtype(), params.dtype(), "a delta keeps the element type");
    let (bytes, density) = match params.dtype() {
        WeightsDtype::Bf16 => {
            (encode(words::<u16>(base), words(params)), density(words::<u16>(base), words(params)))
        }
        WeightsDtype::F32 => {
            (encode(words::<u32>(base), words(params)), density(words::<u32>(base), words(params)))
        }
    };
    frame(params, version, Some(base_version), tokenizer_digest, density, &bytes)
}

/// Turns `params` (of version `current`; for a key frame any content) into the frame's version, and checks the result to the last bit.
/// Returns what changed, coarsely.
///
/// # Errors
/// If the frame is not for this model, type or version, or anything is damaged. Checks of the manifest and the chunks come first
/// and leave `params` alone; after a later error `params` is worthless: drop the shadow copy and fetch a key frame.
pub fn apply_frame(
    params: &mut Params,
    current: Option<PolicyVersion>,
    payload: &WeightsPayload,
) -> Result<Vec<Range<usize>>, DeltaError> {
    let manifest = &payload.manifest;
    check_target(params, current, manifest)?;
    let bytes = joined(payload)?;
    let whole = 0..params.layout.total;
    let changed = match (&mut params.data, manifest.base) {
        (ParamData::Bf16(values), base) => {
            apply_words::<u16>(bytemuck::cast_slice_mut(values), base, &bytes)?
        }
        (ParamData::F32(values), base) => apply_words::<u32>(bytemuck::cast_slice_mut(values), base, &bytes)?,
    };
    let digest = params.digest();
    if digest != manifest.arena_digest {
        return Err(DeltaError::Damaged(format!(
            "the result is {digest}, the manifest says {}",
            manifest.arena_digest
        )));
    }
    Ok(if manifest.base.is_none() { vec![whole] } else { changed })
}

fn apply_words<W: super::Word>(
    values: &mut [W],
    base: Option<PolicyVersion>,
    bytes: &[u8],
) -> Result<Vec<Range<usize>>, DeltaError> {
    if base.is_none() {
        values.fill(W::zeroed());
    }
    apply(values, bytes)
}

fn words<W: super::Word>(params: &Params) -> &[W] {
    bytemuck::cast_slice(params.as_bytes())
}

fn frame(
    params: &Params,
    version: PolicyVersion,
    base: Option<PolicyVersion>,
    tokenizer_digest: Digest,
    density: f64,
    bytes: &[u8],
) -> WeightsPayload {
    let chunks: Vec<Vec<u8>> = bytes.chunks(CHUNK_BYTES).map(<[u8]>::to_vec).collect();
    let manifest = Manifest {
        version,
        base,
        dtype: params.dtype(),
        tensors: params.layout.entries(),
        chunks: chunks
            .iter()
            .map(|chunk| ChunkDigest { len: chunk.len() as u64, digest: Digest::of(chunk) })
            .collect(),
        arena_digest: params.digest(),
        tokenizer_digest,
        density,
    };
    WeightsPayload { manifest, chunks }
}

fn check_target(
    params: &Params,
    current: Option<PolicyVersion>,
    manifest: &Manifest,
) -> Result<(), DeltaError> {
    let mismatch = |what: &str, got: String, expected: String| {
        Err(DeltaError::Mismatch { what: what.to_owned(), got, expected })
    };
    if manifest.dtype != params.dtype() {
        return mismatch("element type", format!("{:?}", manifest.dtype), format!("{:?}", params.dtype()));
    }
    if manifest.base.is_some() && manifest.base != current {
        return mismatch("base version", format!("{:?}", manifest.base), format!("{current:?}"));
    }
    let ours = params.layout.entries();
    if manifest.tensors != ours {
        let name = |entry: Option<&freewheel_types::TensorEntry>| {
            entry.map_or_else(|| "no tensor".to_owned(), |entry| format!("{} {:?}", entry.name, entry.shape))
        };
        let pairs =
            (0..ours.len().max(manifest.tensors.len())).map(|i| (manifest.tensors.get(i), ours.get(i)));
        let differing: Vec<_> = pairs.filter(|(theirs, ours)| theirs != ours).take(3).collect();
        let list = |side: fn(&(Option<_>, Option<_>)) -> _| {
            differing.iter().map(|pair| name(side(pair))).collect::<Vec<_>>().join(", ")
        };
        return mismatch("tensor table (first differences)", list(|pair| pair.0), list(|pair| pair.1));
    }
    Ok(())
}

/// The chunks as one payload, each held against its digest.
fn joined(payload: &WeightsPayload) -> Result<Vec<u8>, DeltaError> {
    let (chunks, expected) = (&payload.chunks, &payload.manifest.chunks);
    if chunks.len() != expected.len() {
        return Err(DeltaError::Damaged(format!(
            "{} chunks, the manifest names {}",
            chunks.len(),
            expected.len()
        )));
    }
    for (index, (chunk, expected)) in chunks.iter().zip(expected).enumerate() {
        if chunk.len() as u64 != expected.len || Digest::of(chunk) != expected.digest {
            return Err(DeltaError::Damaged(format!("chunk {index} does not match its digest")));
        }
    }
    Ok(chunks.concat())
}
