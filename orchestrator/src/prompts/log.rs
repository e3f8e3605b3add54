//! What the pool decided and learned, on disk before anybody else hears of it.
//!
//! An append-only file of records: length, CRC-32C of the length, CRC-32C of the JSON, JSON. Replaying it gives the state of the pool, bit for
//! bit. A torn tail (the process was killed while writing) is cut; damage before the tail is an error.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use freewheel_types::{GroupOutcome, PolicyVersion, PromptId, TaskId};
use serde::{Deserialize, Serialize};

use super::pool::Chosen;

/// Longest record; a longer length field is damage.
const RECORD_BYTES_MAX: usize = 1 << 20;
const HEADER: usize = 12;

/// One record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PoolRecord {
    /// A task was issued.
    Issued {
        /// The task.
        task: TaskId,
        /// Its prompt.
        prompt: PromptId,
        /// Rollouts asked for.
        group_size: u32,
        /// Oldest weights that may draw it.
        min_version: PolicyVersion,
        /// Which rule chose it; `None` in logs of older runs.
        #[serde(default)]
        chosen: Option<Chosen>,
    },
    /// A group ended.
    Ended(GroupOutcome),
}

/// What is wrong with the log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The file cannot be opened, read, written or synced. After a failed sync the log must not be used again.
    #[error("prompt pool log {path}: {what}")]
    Io {
        /// The file.
        path: String,
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// Damage that is not a torn tail.
    #[error(
        "prompt pool log {path} is damaged at byte {offset}: {what}; restore it from a copy, or start a new run"
    )]
    Damaged {
        /// The file.
        path: String,
        /// Where.
        offset: u64,
        /// What is wrong.
        what: String,
    },
}

/// The open log, positioned at its end.
#[derive(Debug)]
pub struct PoolLog {
    path: PathBuf,
    file: File,
    /// A write or sync failed: nothing after it can be trusted.
    broken: bool,
}

impl PoolLog {
    /// Opens or creates `path`, gives back its records, and cuts a torn tail.
    ///
    /// # Errors
    /// If it cannot be read or is damaged before its tail.
    pub fn open(path: &Path) -> Result<(Self, Vec<PoolRecord>), LogError> {
        let io = |what| move |source| LogError::Io { path: path.display().to_string(), what, source };
        let created = !path.exists();
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io("cannot be opened"))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io("cannot be read"))?;
        let (records, sound) = decode(&bytes).map_err(|(offset, what)| LogError::Damaged {
            path: path.display().to_string(),
            offset: offset as u64,
            what,
        })?;
        if sound < bytes.len() {
            tracing::warn!(path = %path.display(), bytes = bytes.len() - sound, "cutting a torn record off the prompt pool log");
            file.set_len(sound as u64).map_err(io("cannot be cut"))?;
            file.sync_all().map_err(io("cannot be synced"))?;
        }
        file.seek(SeekFrom::Start(sound as u64)).map_err(io("cannot be positioned"))?;
        if created && let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            File::open(parent).and_then(|dir| dir.sync_all()).map_err(io("its folder cannot be synced"))?;
        }
        Ok((Self { path: path.to_owned(), file, broken: false }, records))
    }

    /// The records of the log at `path`, which may belong to a run at work: nothing is changed, a torn tail is left out.
    ///
    /// # Errors
    /// If it cannot be read or is damaged before its tail.
    pub fn read(path: &Path) -> Result<Vec<PoolRecord>, LogError> {
        let name = || path.display().to_string();
        let bytes = std::fs::read(path).map_err(|source| LogError::Io {
            path: name(),
            what: "cannot be read",
            source,
        })?;
        let damaged = |(offset, what)| LogError::Damaged { path: name(), offset: offset as u64, what };
        decode(&bytes).map(|(records, _)| records).map_err(damaged)
    }

    /// Appends records and waits until they are on disk.
    ///
    /// # Errors
    /// If they may not be; the log then refuses everything.
    pub fn append(&mut self, records: &[PoolRecord]) -> Result<(), LogError> {
        let io = |what, source| LogError::Io { path: self.path.display().to_string(), what, source };
        if self.broken {
            return Err(io("failed before and is not written any more", std::io::ErrorKind::Other.into()));
        }
        let mut bytes = Vec::new();
        for record in records {
            let payload =
                serde_json::to_vec(record).map_err(|e| io("a record cannot be written as JSON", e.into()))?;
            let length = (payload.len() as u32).to_le_bytes();
            bytes.extend_from_slice(&length);
            bytes.extend_from_slice(&crc32c::crc32c(&length).to_le_bytes());
            bytes.extend_from_slice(&crc32c::crc32c(&payload).to_le_bytes());
            bytes.extend_from_slice(&payload);
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let written = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        self.broken = written.is_err();
        written.map_err(|source| io("cannot be written", source))
    }
}

/// The records, and the bytes they take. `Err`: (offset, what) of damage that is not a torn tail.
fn decode(bytes: &[u8]) -> Result<(Vec<PoolRecord>, usize), (usize, String)> {
    let (mut records, mut at) = (Vec::new(), 0);
    while bytes.len() - at >= HEADER {
        let word = |from: usize| {
            u32::from_le_bytes([bytes[from], bytes[from + 1], bytes[from + 2], bytes[from + 3]])
        };
        let (length, length_crc, crc) = (word(at) as usize, word(at + 4), word(at + 8));
        // A file that was extended but not written is zero to its end.
        if bytes[at..].iter().all(|b| *b == 0) {
            break;
        }
        if length > RECORD_BYTES_MAX || crc32c::crc32c(&bytes[at..at + 4]) != length_crc {
            return Err((at, format!("the length of the record ({length} bytes) is wrong")));
        }
        let end = at + HEADER + length;
        if end > bytes.len() {
            break;
        }
        let payload = &bytes[at + HEADER..end];
        if crc32c::crc32c(payload) != crc {
            if end == bytes.len() {
                break;
            }
            return Err((at, "the checksum does not match".into()));
        }
        records.push(
            serde_json::from_slice(payload).map_err(|e| (at, format!("the record does not parse: {e}")))?,
        );
        at = end;
    }
    Ok((records, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issued(task: u64) -> PoolRecord {
        PoolRecord::Issued {
            task: TaskId(task),
            prompt: PromptId([7; 16]),
            group_size: 8,
            min_version: PolicyVersion::new(1, task),
            chosen: None,
        }
    }

    #[test]
    fn a_kill_at_any_byte_loses_at_most_the_record_being_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pool.log");
        let (mut log, none) = PoolLog::open(&path).unwrap();
        assert!(none.is_empty());
        log.append(&[issued(0), issued(1)]).unwrap();
        let two = std::fs::metadata(&path).unwrap().len() as usize;
        log.append(&[issued(2)]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in two..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut log, records) = PoolLog::open(&path).unwrap();
            let expected = if cut == whole.len() { 3 } else { 2 };
            assert_eq!(records.len(), expected, "cut at {cut}");
            log.append(&[issued(9)]).unwrap();
            assert_eq!(PoolLog::open(&path).unwrap().1.last(), Some(&issued(9)));
        }
    }

    #[test]
    fn a_flipped_bit_inside_is_an_error_with_the_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pool.log");
        PoolLog::open(&path).unwrap().0.append(&[issued(0), issued(1)]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() / 2 {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            std::fs::write(&path, &bytes).unwrap();
            let error = PoolLog::open(&path).expect_err("a flipped bit").to_string();
            assert!(error.contains("damaged at byte 0"), "byte {at}: {error}");
        }
    }
}
