//! Stream entries as they come back from scripts, and small framed payloads.

use std::collections::BTreeMap;

use freewheel_types::{PromptId, RolloutId, Task, TaskId, TypesError, codec};
use redis::{FromRedisValue, ParsingError, Value};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::RunControl;
use crate::payload::ScoredEntry;

/// Field names and values of an entry. Bytes, because a damaged server file may hold anything.
#[derive(Debug, Default)]
pub(super) struct Fields(BTreeMap<Vec<u8>, Vec<u8>>);

impl FromRedisValue for Fields {
    fn from_redis_value(value: Value) -> Result<Self, ParsingError> {
        let flat = Vec::<Vec<u8>>::from_redis_value(value)?;
        let pairs = flat.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone()));
        Ok(Self(pairs.collect()))
    }
}

impl Fields {
    fn take(&mut self, name: &str) -> Option<Vec<u8>> {
        self.0.remove(name.as_bytes())
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name.as_bytes()).and_then(|value| std::str::from_utf8(value).ok())
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Option<T> {
        self.text(name)?.parse().ok()
    }

    /// Rollout id beside the payload.
    pub fn rollout(&self) -> Option<RolloutId> {
        self.number("rid").map(RolloutId)
    }

    /// The payload.
    pub fn payload(&mut self) -> Vec<u8> {
        self.take("d").unwrap_or_default()
    }

    /// An entry of the scored stream.
    pub fn scored(&mut self) -> ScoredEntry {
        if let Some(payload) = self.take("d") {
            return ScoredEntry::Payload(payload);
        }
        match (self.text("ab").and_then(prompt_id), self.number("g")) {
            (Some(prompt), Some(group_size)) => {
                let reason = self.text("why").unwrap_or_default().to_owned();
                ScoredEntry::Abandoned { prompt, group_size, reason }
            }
            _ => ScoredEntry::Bad(self.text("bad").unwrap_or("an entry without payload").to_owned()),
        }
    }

    /// An entry of the task stream: the task, or what it takes to end it.
    pub fn task(&mut self) -> Result<Task, DamagedTask> {
        codec::decode_task(&self.payload()).map_err(|error| DamagedTask { error, head: self.task_head() })
    }

    /// What stands beside the payload of a task.
    pub fn task_head(&self) -> Option<TaskHead> {
        Some(TaskHead {
            id: self.number("t").map(TaskId).filter(|id| *id <= TaskId::MAX)?,
            prompt: self.text("p").and_then(prompt_id)?,
            group_size: self.number("g").filter(|size| *size <= freewheel_types::MAX_GROUP_SIZE)?,
        })
    }

    /// `source`, `rid` and `reason` of a dead letter.
    pub fn dead_letter(&self) -> crate::DeadLetter {
        let text = |name| self.text(name).unwrap_or_default().to_owned();
        crate::DeadLetter { source: text("source"), rollout: self.rollout(), reason: text("reason") }
    }
}

/// What must be known of a task to end it.
#[derive(Clone, Copy, Debug)]
pub(super) struct TaskHead {
    pub id: TaskId,
    pub prompt: PromptId,
    pub group_size: u32,
}

/// A task whose payload cannot be read.
#[derive(Debug)]
pub(super) struct DamagedTask {
    pub error: TypesError,
    pub head: Option<TaskHead>,
}

fn prompt_id(hex: &str) -> Option<PromptId> {
    let mut id = [0; 16];
    if hex.len() != 32 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, digits) in id.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(PromptId(id))
}

/// Whether this is a stream id; only such may be handed to a script.
pub(super) fn is_entry_id(lease: &str) -> bool {
    let digits =
        |part: &str| !part.is_empty() && part.len() <= 20 && part.bytes().all(|b| b.is_ascii_digit());
    lease.split_once('-').is_some_and(|(time, count)| digits(time) && digits(count))
}

/// Name of a control state in Redis.
pub(super) fn control_name(control: RunControl) -> &'static str {
    match control {
        RunControl::Run => "run",
        RunControl::Drain => "drain",
        RunControl::Finished => "finished",
    }
}

/// The control state of that name; anything unknown is `Run`.
pub(super) fn control_of(name: &str) -> RunControl {
    [RunControl::Drain, RunControl::Finished]
        .into_iter()
        .find(|control| control_name(*control) == name)
        .unwrap_or_default()
}

/// Bytes of a small value, with a checksum behind.
pub(super) fn frame<T: Serialize>(value: &T) -> Result<Vec<u8>, TypesError> {
    let mut bytes = postcard::to_allocvec(value)?;
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    Ok(bytes)
}

/// The value of [`frame`]d bytes.
pub(super) fn unframe<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, TypesError> {
    let (body, checksum) = bytes
        .split_last_chunk::<4>()
        .ok_or_else(|| TypesError::Envelope(format!("{} bytes are too few", bytes.len())))?;
    if crc32c::crc32c(body).to_le_bytes() != *checksum {
        return Err(TypesError::Envelope("checksum does not match: damaged on the way".into()));
    }
    Ok(postcard::from_bytes(body)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_or_is_refused() {
        let bytes = frame(&(7u64, 0.1f64)).unwrap();
        assert_eq!(unframe::<(u64, f64)>(&bytes).unwrap(), (7, 0.1));
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x10;
            assert!(unframe::<(u64, f64)>(&bytes).is_err(), "byte {at}");
        }
        assert!(unframe::<u64>(&[1]).is_err());
    }

    #[test]
    fn only_stream_ids_are_leases() {
        assert!(is_entry_id("1700000000000-0"));
        for bad in ["", "-", "1-", "-1", "+", "1", "1-1-1", "a-1", "1-x", "999999999999999999999-0"] {
            assert!(!is_entry_id(bad), "{bad}");
        }
        assert_eq!(prompt_id("00ff00ff00ff00ff00ff00ff00ff00ff").map(|id| id.0[1]), Some(255));
        assert_eq!(prompt_id("+0ff00ff00ff00ff00ff00ff00ff00f"), None);
    }
}
