//! Checks on weights that do not depend on the backend.

use std::time::Duration;

use freewheel_types::{Digest, PolicyVersion, WeightsPayload};

use crate::QueueError;

/// How long an actor counts as live after it last said which version it serves.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(60);

/// Checks what a learner offers before a byte of it is stored.
pub(crate) fn check_offer(epoch: u64, payload: &WeightsPayload) -> Result<(), QueueError> {
    let manifest = &payload.manifest;
    let version = manifest.version;
    let bad = |what: String| Err(QueueError::BadWeights { version, what });
    if version.epoch > epoch {
        return bad(format!("the version is of a later epoch than its learner, {epoch}"));
    }
    if manifest.base.is_some_and(|base| base >= version) {
        return bad("a delta cannot be against a newer version".into());
    }
    let lens = payload.chunks.iter().map(|chunk| chunk.len() as u64);
    if !lens.eq(manifest.chunks.iter().map(|chunk| chunk.len)) {
        return bad("the chunks do not have the lengths of the manifest".into());
    }
    Ok(())
}

/// Checks every chunk against the manifest.
pub(crate) fn verify(payload: &WeightsPayload) -> Result<(), QueueError> {
    let manifest = &payload.manifest;
    let bad = |what: String| Err(QueueError::BadWeights { version: manifest.version, what });
    if payload.chunks.len() != manifest.chunks.len() {
        return bad(format!("{} chunks, the manifest names {}", payload.chunks.len(), manifest.chunks.len()));
    }
    for (index, (chunk, expected)) in payload.chunks.iter().zip(&manifest.chunks).enumerate() {
        if chunk.len() as u64 != expected.len {
            return bad(format!("chunk {index} has {} bytes, expected {}", chunk.len(), expected.len));
        }
        if Digest::of(chunk) != expected.digest {
            return bad(format!("chunk {index} does not match its digest"));
        }
    }
    Ok(())
}

/// No chain of deltas and no key frame leads to the newest version.
pub(crate) fn no_way(version: PolicyVersion, have: Option<PolicyVersion>) -> QueueError {
    let have = have.map_or("nothing".to_owned(), |have| have.to_string());
    QueueError::BadWeights {
        version,
        what: format!("no key frame and no chain of deltas leads there from {have}; publish a key frame"),
    }
}
