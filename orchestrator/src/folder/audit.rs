//! `audit.jsonl`: what was judged, what became of it, and what moved; append-only, each record chained to the one before.
//!
//! A line is `{"seq", "prev", "kind", "body", "hash"}`; `hash` is BLAKE3 over the line without it, `prev` the hash before. So a record that is changed, left out or
//! put in shows, as does one moved; a tail that is cut off shows only against a hash that was noted elsewhere, which is why `freewheel audit verify` prints the
//! last one. Texts of prompts and completions are not in it, only digests: the journal holds them.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};

use freewheel_learner::assembly::Group;
use freewheel_types::{Digest, GroupFate, PolicyVersion};
use serde_json::{Map, Value, json};

use crate::cli::reward_json;

/// Hash before the first record.
const START: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// What stands before the hash of a line, and after it. The hash is over the bytes as they are: numbers need not survive being read.
const HASH: &str = ",\"hash\":\"";
const END: &str = "\"}\n";

/// The log, open for appending.
#[derive(Debug)]
pub struct AuditLog {
    file: File,
    seq: u64,
    last: String,
}

/// A log whose chain holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Records.
    pub records: u64,
    /// Hash of the last one.
    pub last: String,
}

/// Why a log is not sound.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// It cannot be read or written.
    #[error("{path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A record is not what was written.
    #[error("{path}:{line}: {what}")]
    Broken {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// What does not fit.
        what: String,
    },
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> AuditError + '_ {
    |source| AuditError::Io { path: path.to_owned(), source }
}

impl AuditLog {
    /// Opens or begins the log at `path`. A last line that was cut off while it was written is completed by nothing: it is removed.
    ///
    /// # Errors
    /// If it cannot be opened, or its chain is broken.
    pub fn open(path: &Path) -> Result<Self, AuditError> {
        let (verified, whole) = walk(path, true)?;
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(io(path))?;
        if file.metadata().map_err(io(path))?.len() > whole {
            file.set_len(whole).map_err(io(path))?;
        }
        Ok(Self { file, seq: verified.records, last: verified.last })
    }

    /// Appends one record.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn append(&mut self, kind: &str, body: Value) -> std::io::Result<()> {
        let record = json!({"seq": self.seq, "prev": self.last, "kind": kind, "body": body}).to_string();
        let hash = Digest::of(record.as_bytes()).to_string();
        let open = record.strip_suffix('}').expect("an object ends so");
        self.file.write_all(format!("{open}{HASH}{hash}{END}").as_bytes())?;
        (self.seq, self.last) = (self.seq + 1, hash);
        Ok(())
    }

    /// What was appended is on disk from here on.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn sync(&mut self) -> std::io::Result<()> {
        self.file.sync_data()
    }
}

/// Checks every record of the log at `path`.
///
/// # Errors
/// If it cannot be read, or the first record that does not fit.
pub fn verify(path: &Path) -> Result<Verified, AuditError> {
    File::open(path).map_err(io(path))?;
    walk(path, false).map(|(verified, _)| verified)
}

/// The chain, and the bytes that hold it; with `torn`, a last line without its end is left out.
fn walk(path: &Path, torn: bool) -> Result<(Verified, u64), AuditError> {
    let mut verified = Verified { records: 0, last: START.to_owned() };
    let Ok(file) = File::open(path) else { return Ok((verified, 0)) };
    let (mut reader, mut bytes, mut line) = (BufReader::new(file), 0, String::new());
    loop {
        line.clear();
        let n = reader.read_line(&mut line).map_err(io(path))?;
        if n == 0 || (torn && !line.ends_with('\n')) {
            return Ok((verified, bytes));
        }
        let broken =
            |what: String| AuditError::Broken { path: path.to_owned(), line: verified.records + 1, what };
        let last = check(&line, &verified).map_err(broken)?;
        verified = Verified { records: verified.records + 1, last };
        bytes += n as u64;
    }
}

/// The hash of a record that fits.
fn check(line: &str, before: &Verified) -> Result<String, String> {
    let parts = line.strip_suffix(END).and_then(|line| line.rsplit_once(HASH));
    let (open, hash) = parts.ok_or("is no record")?;
    let record = format!("{open}}}");
    if Digest::of(record.as_bytes()).to_string() != hash {
        return Err("was changed after it was written".into());
    }
    let record: Map<String, Value> =
        serde_json::from_str(&record).map_err(|e| format!("is no record: {e}"))?;
    if record.get("seq") != Some(&json!(before.records)) {
        return Err(format!("is not number {}", before.records));
    }
    if record.get("prev") != Some(&json!(before.last)) {
        return Err("does not follow the record before it".into());
    }
    Ok(hash.to_owned())
}

/// The record of a group that ended: every member with its reward, and what became of all.
pub fn group_record(version: PolicyVersion, group: &Group, fate: GroupFate) -> Value {
    let members: Vec<Value> = group
        .judged()
        .map(|scored| {
            let rollout = &scored.rollout;
            json!({
                "rollout": rollout.id.to_string(),
                "prompt": rollout.prompt.id.to_string(),
                "actor": rollout.actor.to_string(),
                "versions": [rollout.version_oldest().map(|v| v.to_string()), rollout.version_newest().map(|v| v.to_string())],
                "text_digest": Digest::of(rollout.text.as_bytes()).to_string(),
                "reward": reward_json(&scored.reward),
            })
        })
        .collect();
    json!({"task": group.id.0, "at": version.to_string(), "fate": fate, "members": members})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(path: &Path) {
        let mut log = AuditLog::open(path).unwrap();
        for i in 0..3 {
            log.append("step", json!({"step": i, "x": 0.5})).unwrap();
        }
        log.sync().unwrap();
    }

    #[test]
    fn any_changed_byte_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        filled(&path);
        assert_eq!(verify(&path).unwrap().records, 3);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            assert!(verify(&path).is_err(), "byte {at}: {:?}", char::from(whole[at]));
        }
    }

    #[test]
    fn records_left_out_put_in_or_moved_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        filled(&path);
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for order in [vec![0, 2], vec![0, 2, 1], vec![0, 1, 1, 2], vec![1, 2]] {
            let mixed: String = order.iter().map(|i| format!("{}\n", lines[*i])).collect();
            std::fs::write(&path, mixed).unwrap();
            assert!(verify(&path).is_err(), "{order:?}");
        }
    }

    #[test]
    fn it_goes_on_after_a_line_that_was_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        filled(&path);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 5]).unwrap();
        filled(&path);
        assert_eq!(verify(&path).unwrap().records, 5);
        assert!(verify(&dir.path().join("none")).is_err());
    }
}
