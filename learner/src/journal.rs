//! What the learner consumed and what it made of it, in order, durable before it is acknowledged.
//!
//! ```text
//! journal/00000000.fwj   one segment, at most 64 MiB (or one record)
//!   record = len u32 │ kind u32 │ crc32c of the two │ crc32c of the payload │ payload        little-endian
//! ```
//!
//! A record counts once [`Journal::sync`] has returned. After a failed write or sync the journal refuses every further
//! call: what a failed fsync left behind is unknown, only a restart may look at it again. On opening, a torn tail of
//! the last segment is cut (it was never acknowledged); damage anywhere else is an error with file and offset.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use freewheel_types::{DropReason, PromptId, RolloutId, ScoredRollout, TaskId, codec};
use serde::{Deserialize, Serialize};

use crate::LearnerError;
use crate::disk::Disk;
use crate::dual::CostSum;

/// A segment is closed when it reaches this size.
pub const SEGMENT_BYTES: u64 = 64 << 20;
const HEADER: usize = 16;
const OPENED: u32 = 1;

/// A place between records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// Segment number.
    pub segment: u64,
    /// Byte within it.
    pub offset: u64,
}

/// One entry.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A learner started.
    Opened(Opened),
    /// A scored rollout was received.
    Consumed(Box<ScoredRollout>),
    /// A rollout was received and cannot be used.
    Bad(BadRollout),
    /// A rollout will never come.
    Abandoned(AbandonedRollout),
    /// An update was made, or tried.
    StepFormed(StepFormed),
    /// The learner went back to a checkpoint.
    RolledBack(RolledBack),
}

/// A learner started, from these weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// Its fencing epoch.
    pub epoch: u64,
    /// Updates in the weights it started from.
    pub step: u64,
    /// Digest of those weights, hex.
    pub weights: String,
    /// End of the journal before it: what an earlier learner, cut off but not aware of it, adds there does not count.
    pub sealed: Option<Position>,
}

/// A rollout that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadRollout {
    /// Which.
    pub rollout: RolloutId,
    /// What is wrong with it.
    pub reason: String,
}

/// A rollout that will never come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AbandonedRollout {
    /// Which.
    pub rollout: RolloutId,
    /// Its prompt.
    pub prompt: PromptId,
    /// Rollouts in its group.
    pub group_size: u32,
    /// Why.
    #[serde(default)]
    pub reason: String,
}

/// One update: enough to make the very same batch again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepFormed {
    /// Updates in the weights that the batch was trained on.
    pub from_step: u64,
    /// Rollouts in the batch, in order.
    pub rollouts: Vec<RolloutId>,
    /// Groups dropped since the step before, with the reason.
    pub dropped: Vec<(TaskId, DropReason)>,
    /// Whether the update was applied; `false` for a non-finite loss or gradient.
    pub applied: bool,
    /// Digest of the weights afterwards, hex.
    pub weights: String,
    /// What the limited costs came to since the step before, in the order of the config; moved the multipliers afterwards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub costs: Vec<CostSum>,
}

/// The weights of a checkpoint became the next version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolledBack {
    /// Updates in the weights left behind; the version after it carries those of the checkpoint.
    pub from_step: u64,
    /// Step of the checkpoint.
    pub to_step: u64,
    /// Epoch of the learner that wrote it.
    pub to_epoch: u64,
    /// Digest of the weights, hex.
    pub weights: String,
}

/// The journal, open for appending.
pub struct Journal {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    position: Position,
    sealed: Option<Position>,
    segment_bytes: u64,
    pending: Vec<u8>,
    broken: bool,
}

impl Journal {
    /// Opens the journal in `folder`, cutting a torn tail; makes it if there is none.
    ///
    /// # Errors
    /// If the disk refuses or a segment is damaged.
    pub fn open(disk: Arc<dyn Disk>, folder: &Path) -> Result<Self, LearnerError> {
        disk.create_dir(folder).map_err(LearnerError::disk(folder, "make the journal's folder"))?;
        let segments = segments(&*disk, folder)?;
        let seals = seals(&*disk, folder, &segments)?;
        let mut end = Position::default();
        let mut sealed = None;
        for &segment in &segments {
            let len = check(
                &*disk,
                folder,
                segment,
                Some(&segment) == segments.last(),
                seals.get(&segment).copied(),
            )?;
            end = Position { segment, offset: len };
            if len > 0 {
                sealed = Some(end);
            }
        }
        if sealed == Some(end) {
            let path = segment_path(folder, end.segment);
            disk.truncate(&path, end.offset).map_err(LearnerError::disk(&path, "cut the torn tail"))?;
            disk.sync_file(&path).map_err(LearnerError::disk(&path, "sync"))?;
        }
        // A segment of its own for every learner: whoever still writes to the one before cannot touch this one.
        let first = if sealed == Some(end) { end.segment + 1 } else { end.segment };
        let mut journal = Self {
            disk,
            folder: folder.to_owned(),
            position: end,
            sealed,
            segment_bytes: SEGMENT_BYTES,
            pending: Vec::new(),
            broken: false,
        };
        journal.start_segment(first)?;
        Ok(journal)
    }

    /// Where the journal ended when it was opened; `None` if it was empty. Goes into the first record, [`Opened`].
    pub fn sealed(&self) -> Option<Position> {
        self.sealed
    }

    /// Where the next record will begin.
    pub fn position(&self) -> Position {
        Position { offset: self.position.offset + self.pending.len() as u64, ..self.position }
    }

    /// Adds a record; it counts after the next [`sync`](Self::sync). Returns where it begins.
    ///
    /// # Errors
    /// If the rollout is too large for an envelope, or a new segment cannot be made.
    pub fn append(&mut self, record: &Record) -> Result<Position, LearnerError> {
        let (kind, payload) = encode(record)?;
        if self.position().offset >= self.segment_bytes {
            self.sync()?;
            self.start_segment(self.position.segment + 1)?;
        }
        let at = self.position();
        self.pending.extend(header(kind, &payload));
        self.pending.extend(payload);
        Ok(at)
    }

    /// Makes every appended record durable.
    ///
    /// # Errors
    /// If the disk refuses; the journal is of no use from then on.
    pub fn sync(&mut self) -> Result<(), LearnerError> {
        let path = self.segment_path(self.position.segment);
        if self.broken {
            let source = std::io::Error::other("an earlier write or fsync failed");
            return Err(LearnerError::Disk { path, what: "append to the journal", source });
        }
        if self.pending.is_empty() {
            return Ok(());
        }
        self.broken = true;
        self.disk.append(&path, &self.pending).map_err(LearnerError::disk(&path, "append to the journal"))?;
        self.disk.sync_file(&path).map_err(LearnerError::disk(&path, "fsync the journal"))?;
        self.broken = false;
        self.position.offset += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    /// Smaller segments, for tests.
    #[cfg(test)]
    pub(crate) fn with_segment_bytes(mut self, bytes: u64) -> Self {
        self.segment_bytes = bytes;
        self
    }

    fn start_segment(&mut self, segment: u64) -> Result<(), LearnerError> {
        let path = self.segment_path(segment);
        self.broken = true;
        self.disk
            .write(&path, &mut |_| Ok(()))
            .map_err(LearnerError::disk(&path, "start a journal segment"))?;
        self.disk.sync_file(&path).map_err(LearnerError::disk(&path, "sync"))?;
        self.disk.sync_dir(&self.folder).map_err(LearnerError::disk(&self.folder, "sync"))?;
        self.broken = false;
        self.position = Position { segment, offset: 0 };
        Ok(())
    }

    fn segment_path(&self, segment: u64) -> PathBuf {
        segment_path(&self.folder, segment)
    }
}

/// Reads every record from `from` on, in order, and hands it to `each` with its position.
///
/// # Errors
/// If the disk refuses, a record is damaged, or `each` fails.
pub fn read(
    disk: &dyn Disk,
    folder: &Path,
    from: Position,
    each: &mut dyn FnMut(Position, Record) -> Result<(), LearnerError>,
) -> Result<(), LearnerError> {
    let segments = segments(disk, folder)?;
    if let Some(first) = segments.first().filter(|first| **first > from.segment) {
        let what = format!(
            "the segment is missing, the journal begins with {first:08}.fwj; learner.keep_journal = \"checkpoints\" keeps no more than checkpoints need"
        );
        return Err(damaged(&segment_path(folder, from.segment), 0, what));
    }
    let seals = seals(disk, folder, &segments)?;
    for &segment in segments.iter().filter(|&&segment| segment >= from.segment) {
        let path = segment_path(folder, segment);
        let bytes = read_segment(disk, &path, seals.get(&segment).copied())?;
        let start = if segment == from.segment { from.offset } else { 0 };
        if start > bytes.len() as u64 {
            return Err(damaged(&path, start, "the file ends before this".into()));
        }
        let mut at = start as usize;
        while let Some((kind, payload, next)) =
            next_record(&path, &bytes, at, Some(&segment) == segments.last())?
        {
            let record = decode(kind, payload).map_err(|what| damaged(&path, at as u64, what))?;
            each(Position { segment, offset: at as u64 }, record)?;
            at = next;
        }
    }
    Ok(())
}

/// Where the journal begins: at 0, unless older segments were removed.
///
/// # Errors
/// If the disk refuses, or a segment is missing.
pub fn start(disk: &dyn Disk, folder: &Path) -> Result<Position, LearnerError> {
    let first = segments(disk, folder)?.first().copied();
    Ok(Position { segment: first.unwrap_or(0), offset: 0 })
}

/// Removes the segments before `segment`, the oldest first, so that a crash leaves no gap.
///
/// # Errors
/// If the disk refuses.
pub fn remove_before(disk: &dyn Disk, folder: &Path, segment: u64) -> Result<(), LearnerError> {
    let old: Vec<u64> = segments(disk, folder)?.into_iter().filter(|&old| old < segment).collect();
    for &old in &old {
        let path = segment_path(folder, old);
        disk.remove_file(&path).map_err(LearnerError::disk(&path, "remove"))?;
        disk.sync_dir(folder).map_err(LearnerError::disk(folder, "sync"))?;
    }
    Ok(())
}

/// Numbers of the segments, ascending and gapless.
fn segments(disk: &dyn Disk, folder: &Path) -> Result<Vec<u64>, LearnerError> {
    let paths = disk.list(folder).map_err(LearnerError::disk(folder, "list"))?;
    let number =
        |path: &PathBuf| -> Option<u64> { path.file_name()?.to_str()?.strip_suffix(".fwj")?.parse().ok() };
    let numbers: Vec<u64> = paths.iter().filter_map(number).collect();
    match numbers.windows(2).find(|pair| pair[1] != pair[0] + 1) {
        Some(pair) => Err(damaged(&segment_path(folder, pair[0] + 1), 0, "the segment is missing".into())),
        None => Ok(numbers),
    }
}

fn segment_path(folder: &Path, segment: u64) -> PathBuf {
    folder.join(format!("{segment:08}.fwj"))
}

/// Where each segment ends for good, as the first record of the next learner's segment states it.
fn seals(disk: &dyn Disk, folder: &Path, segments: &[u64]) -> Result<BTreeMap<u64, u64>, LearnerError> {
    let mut seals = BTreeMap::new();
    for &segment in segments {
        let path = segment_path(folder, segment);
        let bytes = read_segment(disk, &path, None)?;
        let first = next_record(&path, &bytes, 0, Some(&segment) == segments.last())?;
        if let Some((OPENED, payload, _)) = first
            && let Ok(Record::Opened(Opened { sealed: Some(end), .. })) = decode(OPENED, payload)
        {
            seals.insert(end.segment, end.offset);
        }
    }
    Ok(seals)
}

fn read_segment(disk: &dyn Disk, path: &Path, seal: Option<u64>) -> Result<Vec<u8>, LearnerError> {
    let mut bytes = disk.read(path).map_err(LearnerError::disk(path, "read"))?;
    if let Some(seal) = seal {
        bytes.truncate(seal as usize);
    }
    Ok(bytes)
}

/// Length of the sound part of a segment.
fn check(
    disk: &dyn Disk,
    folder: &Path,
    segment: u64,
    last: bool,
    seal: Option<u64>,
) -> Result<u64, LearnerError> {
    let path = segment_path(folder, segment);
    let bytes = read_segment(disk, &path, seal)?;
    let mut at = 0;
    while let Some((_, _, next)) = next_record(&path, &bytes, at, last)? {
        at = next;
    }
    Ok(at as u64)
}

/// Kind and payload of a record, and where the next begins.
type Framed<'a> = (u32, &'a [u8], usize);

/// The record at byte `at` and where the next begins; `None` at the end, or at a torn tail if this is the `last` segment.
fn next_record<'a>(
    path: &Path,
    bytes: &'a [u8],
    at: usize,
    last: bool,
) -> Result<Option<Framed<'a>>, LearnerError> {
    let rest = &bytes[at..];
    if rest.is_empty() {
        return Ok(None);
    }
    // A torn tail is one that a crash can leave: too short, or blocks never written, which read as zeros.
    let torn = |after: usize| last && bytes[after.min(bytes.len())..].iter().all(|&b| b == 0);
    let end =
        |what: &str, torn: bool| if torn { Ok(None) } else { Err(damaged(path, at as u64, what.into())) };
    if rest.len() < HEADER {
        return end("half a header", last);
    }
    let word = |i: usize| u32::from_le_bytes(rest[4 * i..4 * i + 4].try_into().expect("four bytes"));
    if crc32c::crc32c(&rest[..8]) != word(2) {
        return end("the header's checksum does not match", torn(at + HEADER));
    }
    let next = at + HEADER + word(0) as usize;
    let Some(payload) = bytes.get(at + HEADER..next) else {
        return end("the file ends inside a record", last);
    };
    if crc32c::crc32c(payload) != word(3) {
        return end("the payload's checksum does not match", torn(next));
    }
    Ok(Some((word(1), payload, next)))
}

fn damaged(path: &Path, offset: u64, what: String) -> LearnerError {
    LearnerError::Journal { path: path.to_owned(), offset, what }
}

fn header(kind: u32, payload: &[u8]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    header[4..8].copy_from_slice(&kind.to_le_bytes());
    let crc = crc32c::crc32c(&header[..8]);
    header[8..12].copy_from_slice(&crc.to_le_bytes());
    header[12..].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    header
}

fn encode(record: &Record) -> Result<(u32, Vec<u8>), LearnerError> {
    let json = |value: serde_json::Result<Vec<u8>>| value.expect("plain data always serialises");
    Ok(match record {
        Record::Opened(opened) => (OPENED, json(serde_json::to_vec(opened))),
        Record::Consumed(scored) => (2, codec::encode_scored(scored)?),
        Record::Bad(bad) => (3, json(serde_json::to_vec(bad))),
        Record::Abandoned(abandoned) => (4, json(serde_json::to_vec(abandoned))),
        Record::StepFormed(step) => (5, json(serde_json::to_vec(step))),
        Record::RolledBack(back) => (6, json(serde_json::to_vec(back))),
    })
}

fn decode(kind: u32, payload: &[u8]) -> Result<Record, String> {
    let text = |error: serde_json::Error| error.to_string();
    Ok(match kind {
        OPENED => Record::Opened(serde_json::from_slice(payload).map_err(text)?),
        2 => Record::Consumed(Box::new(codec::decode_scored(payload).map_err(|e| e.to_string())?)),
        3 => Record::Bad(serde_json::from_slice(payload).map_err(text)?),
        4 => Record::Abandoned(serde_json::from_slice(payload).map_err(text)?),
        5 => Record::StepFormed(serde_json::from_slice(payload).map_err(text)?),
        6 => Record::RolledBack(serde_json::from_slice(payload).map_err(text)?),
        _ => return Err(format!("record kind {kind} is unknown to this build")),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::disk::SystemDisk;

    fn bad(n: u64) -> Record {
        Record::Bad(BadRollout { rollout: RolloutId(n), reason: format!("reason {n}") })
    }

    fn opened(sealed: Option<Position>) -> Record {
        Record::Opened(Opened { epoch: 1, step: 0, weights: "0".into(), sealed })
    }

    /// A journal of `count` records in small segments.
    fn filled(folder: &Path, count: u64) {
        let mut journal = Journal::open(Arc::new(SystemDisk), folder).unwrap().with_segment_bytes(200);
        journal.append(&opened(journal.sealed())).unwrap();
        for n in 0..count {
            journal.append(&bad(n)).unwrap();
        }
        journal.sync().unwrap();
    }

    fn contents(folder: &Path, from: Position) -> Result<Vec<(Position, Record)>, LearnerError> {
        let mut all = Vec::new();
        read(&SystemDisk, folder, from, &mut |at, record| {
            all.push((at, record));
            Ok(())
        })?;
        Ok(all)
    }

    fn bad_ids(folder: &Path) -> Vec<u64> {
        let ids =
            contents(folder, Position::default()).unwrap().into_iter().filter_map(
                |(_, record)| match record {
                    Record::Bad(bad) => Some(bad.rollout.0),
                    _ => None,
                },
            );
        ids.collect()
    }

    #[test]
    fn records_come_back_in_order_over_segments_and_from_any_position() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 12);
        let all = contents(dir.path(), Position::default()).unwrap();
        assert_eq!(bad_ids(dir.path()), (0..12).collect::<Vec<_>>());
        assert!(all.last().unwrap().0.segment >= 2, "several segments");
        for (i, (at, _)) in all.iter().enumerate() {
            assert_eq!(contents(dir.path(), *at).unwrap(), all[i..], "from {at:?}");
        }
    }

    #[test]
    fn a_torn_tail_is_cut_and_what_was_synced_stays() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 12);
        let last = segment_path(dir.path(), *segments(&SystemDisk, dir.path()).unwrap().last().unwrap());
        let whole = std::fs::read(&last).unwrap();
        for cut in 1..whole.len() {
            for zeros in [0, 40] {
                let mut torn = whole[..cut].to_vec();
                torn.extend(std::iter::repeat_n(0, zeros));
                std::fs::write(&last, &torn).unwrap();
                let dir = copy(dir.path());
                let journal = Journal::open(Arc::new(SystemDisk), dir.path()).unwrap();
                drop(journal);
                let ids = bad_ids(dir.path());
                assert_eq!(ids, (0..ids.len() as u64).collect::<Vec<_>>(), "cut at {cut}, {zeros} zeros");
            }
        }
    }

    fn copy(folder: &Path) -> tempfile::TempDir {
        let to = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, to.path().join(path.file_name().unwrap())).unwrap();
        }
        to
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_flipped_bit_before_the_last_record_is_refused_with_its_place(at in any::<usize>(), bit in 0u8..8) {
            let dir = tempfile::tempdir().unwrap();
            filled(dir.path(), 12);
            let numbers = segments(&SystemDisk, dir.path()).unwrap();
            let path = segment_path(dir.path(), numbers[0]);
            let mut bytes = std::fs::read(&path).unwrap();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            std::fs::write(&path, bytes).unwrap();
            let error = Journal::open(Arc::new(SystemDisk), dir.path()).map(drop).unwrap_err();
            prop_assert!(error.to_string().contains("00000000.fwj"), "{}", error);
            let LearnerError::Journal { offset, .. } = error else { panic!("{error}") };
            prop_assert!(offset <= at as u64);
            prop_assert!(contents(dir.path(), Position::default()).is_err());
        }
    }

    #[test]
    fn what_is_removed_at_the_front_is_missed_only_by_who_reads_from_there() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 20);
        let all = contents(dir.path(), Position::default()).unwrap();
        remove_before(&SystemDisk, dir.path(), 2).unwrap();
        let begin = start(&SystemDisk, dir.path()).unwrap();
        assert_eq!(begin, Position { segment: 2, offset: 0 });
        let left: Vec<_> = all.into_iter().filter(|(at, _)| *at >= begin).collect();
        assert_eq!(contents(dir.path(), begin).unwrap(), left);
        let error = contents(dir.path(), Position { segment: 1, offset: 0 }).unwrap_err().to_string();
        assert!(error.contains("00000001.fwj") && error.contains("keep_journal"), "{error}");
        // It goes on after the last one, as always.
        let journal = Journal::open(Arc::new(SystemDisk), dir.path()).unwrap();
        assert_eq!(journal.position().segment, left.last().unwrap().0.segment + 1);
    }

    #[test]
    fn a_missing_segment_is_named() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path(), 20);
        std::fs::remove_file(segment_path(dir.path(), 1)).unwrap();
        let error = Journal::open(Arc::new(SystemDisk), dir.path()).map(drop).unwrap_err().to_string();
        assert!(error.contains("00000001.fwj") && error.contains("missing"), "{error}");
    }
}
