//! The commit point: model, optimiser, consumed set and curriculum, all or nothing.
//!
//! ```text
//! checkpoints/step-<n>-e<E>.tmp/  write every file ─► fsync each ─► fsync the folder
//!                ─► no EPOCH-<m> with m > E? ─► rename to step-<n>-e<E> ─► fsync parent ─► LATEST (tmp, fsync, rename, fsync)
//! ```
//!
//! A reader trusts a folder only if every file has the digest that `digests.json` states; otherwise it takes the one before.
//! Files: `config.json`, `model.safetensors` (or shards), tokenizer files (Hugging Face layout), `trainer.safetensors` (masters
//! and moments), `critic.safetensors` (those of a critic), `reference.bin` (weights of a reference that moves), `state.json`,
//! `curriculum.json`; and, for others, `adapter/` in PEFT's layout where adapters are trained. `EPOCH-<m>` files are the authority on who the learner is: claimed with
//! `O_EXCL`, looked at again before every rename.
//!
//! Writing is done by a thread of its own ([`Writing`]) while training goes on. It needs no copy: weights and optimiser move only at the end of
//! an update, which waits for those that are not written yet.

mod arenas;
mod writing;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use freewheel_model::{Adapter, Params};
use freewheel_types::{Digest, GroupOutcome};
use serde::{Deserialize, Serialize};

use self::arenas::ReadError;
pub use self::writing::{Writing, Written};
use crate::LearnerError;
use crate::assembly::Ledger;
use crate::batching::Overtaking;
use crate::companions::CompanionState;
use crate::consumed::IdSet;
use crate::disk::Disk;
use crate::dual::DualState;
use crate::journal::{self, Position};
use crate::optim::Optimizer;
use crate::policy::Lent;
use crate::report::StepReport;

const STATE: &str = "state.json";
const TRAINER: &str = "trainer.safetensors";
const CRITIC: &str = "critic.safetensors";
const REFERENCE: &str = "reference.bin";
const CURRICULUM: &str = "curriculum.json";
/// Marks a checkpoint that is not removed with the old ones.
const KEEP: &str = "KEEP";
const DIGESTS: &str = "digests.json";
/// Folder of the adapter.
const ADAPTER: &str = "adapter";
/// Layout of `state.json`; another number is refused.
const FORMAT: u32 = 2;

/// Writes a model in Hugging Face layout.
pub trait ModelWriter: Send + Sync {
    /// Writes every file but weights and optimiser state into `dir`, and `weights` as safetensors.
    ///
    /// # Errors
    /// If the disk refuses.
    fn write(&self, dir: &Path, weights: &Params) -> Result<(), LearnerError>;
}

/// Everything a learner resumes from, but the arenas.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Layout number.
    pub format: u32,
    /// Updates in the weights.
    pub step: u64,
    /// Epoch of the learner that wrote it.
    pub epoch: u64,
    /// Optimiser updates (more than `step` where batches are split).
    pub optimizer_steps: u64,
    /// Rollout ids that are done with.
    pub consumed: IdSet,
    /// Groups that are done with.
    pub settled: IdSet,
    /// Counters.
    pub ledger: Ledger,
    /// Memory of batch formation.
    pub overtaking: Overtaking,
    /// Journal: where the oldest rollout begins that was held when this was written.
    pub replay_from: Position,
    /// Journal: its end when this was written; later records are news.
    pub journal_end: Position,
    /// The newest outcomes reported, told again on resume; the pool knows which it has seen.
    pub outcomes: Vec<GroupOutcome>,
    /// What the last update told, in case nobody has heard it when this is read.
    #[serde(default)]
    pub report: Option<StepReport>,
    /// Updates in a row that were not applied.
    pub refused_in_a_row: u32,
    /// Step of the checkpoint that the learner went back to, if it did.
    #[serde(default)]
    pub rolled_back_to: Option<u64>,
    /// What the loss keeps beside the policy.
    #[serde(default)]
    pub companions: CompanionState,
    /// Multipliers of limited costs.
    #[serde(default)]
    pub duals: Vec<DualState>,
    /// Digest of the working weights, hex.
    pub weights: String,
    /// Digest of the tokenizer, hex.
    pub tokenizer: String,
}

/// A checkpoint as it is on disk.
pub struct Loaded {
    /// Its folder.
    pub path: PathBuf,
    /// Its state.
    pub state: TrainerState,
    /// What the curriculum source gave.
    pub curriculum: Option<Vec<u8>>,
    disk: Arc<dyn Disk>,
}

/// What is to be committed.
pub struct Commit {
    /// The state.
    pub state: TrainerState,
    /// Weights in working precision, masters and moments.
    pub policy: Lent,
    /// Those of the critic, if there is one.
    pub critic: Option<Lent>,
    /// The adapter, if adapters are trained and PEFT has a place for them: written into `adapter/` for others, never read again.
    pub adapter: Option<Adapter>,
    /// Weights of the reference, if it moves.
    pub reference: Option<Arc<Params>>,
    /// The curriculum's state.
    pub curriculum: Option<Vec<u8>>,
    /// What the adapter is an adapter to.
    pub base: String,
}

#[derive(Serialize, Deserialize)]
struct FileDigest {
    len: u64,
    blake3: String,
}

/// The folder of checkpoints of one run.
#[derive(Clone)]
pub struct Checkpoints {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    keep_last: usize,
    /// The journal, if what no checkpoint needs of it is to go.
    journal: Option<PathBuf>,
}

impl Checkpoints {
    /// The checkpoints in `folder`, which is made if missing.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn open(disk: Arc<dyn Disk>, folder: &Path, keep_last: usize) -> Result<Self, LearnerError> {
        disk.create_dir(folder).map_err(LearnerError::disk(folder, "make the checkpoint folder"))?;
        Ok(Self { disk, folder: folder.to_owned(), keep_last: keep_last.max(2), journal: None })
    }

    /// The same, to read from only.
    pub fn read_only(disk: Arc<dyn Disk>, folder: &Path) -> Self {
        Self { disk, folder: folder.to_owned(), keep_last: usize::MAX, journal: None }
    }

    /// With every commit, removes of `journal` what none of the checkpoints kept resumes from.
    pub fn trimming(mut self, journal: PathBuf) -> Self {
        self.journal = Some(journal);
        self
    }

    /// Removes what a crash left half written. Only the learner that holds the epoch may call it.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn clean(&self) -> Result<(), LearnerError> {
        for path in self.list()? {
            if name(&path).starts_with("step-") && name(&path).ends_with(".tmp") {
                self.disk.remove_dir(&path).map_err(LearnerError::disk(&path, "remove"))?;
            }
        }
        Ok(())
    }

    /// The highest epoch ever claimed here; 0 if none was.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn epoch_floor(&self) -> Result<u64, LearnerError> {
        let epoch = |path: &PathBuf| name(path).strip_prefix("EPOCH-")?.parse().ok();
        Ok(self.list()?.iter().filter_map(epoch).max().unwrap_or(0))
    }

    /// Makes `epoch` ours, for good.
    ///
    /// # Errors
    /// [`LearnerError::Fenced`] if somebody claimed it or a newer one.
    pub fn claim(&self, epoch: u64) -> Result<(), LearnerError> {
        let path = self.folder.join(format!("EPOCH-{epoch:010}"));
        match self.disk.create_new(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(LearnerError::Fenced { epoch, by: format!("{} exists", path.display()) });
            }
            made => made.map_err(LearnerError::disk(&path, "claim the epoch"))?,
        }
        self.disk.sync_dir(&self.folder).map_err(LearnerError::disk(&self.folder, "sync"))?;
        self.check_epoch(epoch)
    }

    /// Whether `epoch` is still the newest.
    ///
    /// # Errors
    /// [`LearnerError::Fenced`] if a newer one was claimed.
    pub fn check_epoch(&self, epoch: u64) -> Result<(), LearnerError> {
        match self.epoch_floor()? {
            newest if newest > epoch => {
                Err(LearnerError::Fenced { epoch, by: format!("EPOCH-{newest:010} exists") })
            }
            _ => Ok(()),
        }
    }

    /// Writes and commits a checkpoint, then removes the oldest beyond those kept.
    ///
    /// # Errors
    /// If the disk refuses or the epoch is over. The checkpoints before are untouched then.
    pub fn commit(&self, commit: Commit, model: &dyn ModelWriter) -> Result<PathBuf, LearnerError> {
        let (step, epoch) = (commit.state.step, commit.state.epoch);
        let path = self.path(step, epoch);
        let tmp = self.folder.join(format!("step-{step}-e{epoch}.tmp"));
        let written = self.write(commit, model, &tmp).and_then(|()| self.check_epoch(epoch));
        if let Err(error) = written {
            // Best effort: what is left is ignored by readers and removed by the next learner.
            self.disk.remove_dir(&tmp).ok();
            return Err(error);
        }
        self.disk.rename(&tmp, &path).map_err(LearnerError::disk(&path, "rename the checkpoint"))?;
        self.disk.sync_dir(&self.folder).map_err(LearnerError::disk(&self.folder, "sync"))?;
        self.set_latest(&path)?;
        self.remove_old()?;
        self.trim_journal()?;
        Ok(path)
    }

    fn write(&self, commit: Commit, model: &dyn ModelWriter, tmp: &Path) -> Result<(), LearnerError> {
        let Commit { state, policy, critic, adapter, reference, curriculum, base } = commit;
        if self.list()?.iter().any(|path| path == tmp) {
            self.disk.remove_dir(tmp).map_err(LearnerError::disk(tmp, "write the checkpoint"))?;
        }
        self.disk.create_dir(tmp).map_err(LearnerError::disk(tmp, "write the checkpoint"))?;
        model.write(tmp, &policy.weights)?;
        for (file, lent) in [(TRAINER, Some(policy)), (CRITIC, critic)] {
            let Some(lent) = lent else { continue };
            let file = tmp.join(file);
            self.disk
                .write(&file, &mut |out| arenas::write(&lent.optimizer, out))
                .map_err(LearnerError::disk(&file, "write the checkpoint"))?;
            // Here it goes back: what follows, syncs and digests, no update waits for.
            drop(lent);
        }
        if let Some(reference) = reference {
            self.write_bytes(&tmp.join(REFERENCE), reference.as_bytes())?;
        }
        if let Some(adapter) = &adapter {
            let dir = tmp.join(ADAPTER);
            self.disk.create_dir(&dir).map_err(LearnerError::disk(&dir, "write the adapter"))?;
            for (name, bytes) in adapter.files(&base) {
                let path = dir.join(name);
                self.write_bytes(&path, &bytes)?;
                self.disk.sync_file(&path).map_err(LearnerError::disk(&path, "fsync"))?;
            }
            self.disk.sync_dir(&dir).map_err(LearnerError::disk(&dir, "fsync"))?;
        }
        let state = serde_json::to_vec_pretty(&state).expect("plain data always serialises");
        self.write_bytes(&tmp.join(STATE), &state)?;
        if let Some(curriculum) = curriculum {
            self.write_bytes(&tmp.join(CURRICULUM), &curriculum)?;
        }
        let mut digests = BTreeMap::new();
        let listed = self.disk.list(tmp).map_err(LearnerError::disk(tmp, "write the checkpoint"))?;
        for path in listed.into_iter().filter(|path| name(path) != ADAPTER) {
            self.disk.sync_file(&path).map_err(LearnerError::disk(&path, "fsync"))?;
            digests.insert(name(&path).to_owned(), self.digest(&path)?);
        }
        let path = tmp.join(DIGESTS);
        self.write_bytes(&path, &serde_json::to_vec_pretty(&digests).expect("plain data always serialises"))?;
        self.disk.sync_file(&path).map_err(LearnerError::disk(&path, "fsync"))?;
        self.disk.sync_dir(tmp).map_err(LearnerError::disk(tmp, "fsync"))
    }

    /// The newest checkpoint whose digests hold: newest lineage first, then newest step.
    ///
    /// # Errors
    /// If the disk refuses, or there are checkpoints but none is sound.
    pub fn newest(&self) -> Result<Option<Loaded>, LearnerError> {
        let found = self.committed()?;
        let mut problems = Vec::new();
        for (_, _, path) in found.iter().rev() {
            match self.load(path) {
                Ok(loaded) => return Ok(Some(loaded)),
                Err(error) => {
                    tracing::warn!(checkpoint = %path.display(), %error, "checkpoint is unsound, trying the one before");
                    problems.push(error.to_string());
                }
            }
        }
        match problems.is_empty() {
            true => Ok(None),
            false => Err(LearnerError::Checkpoint {
                path: self.folder.clone(),
                what: format!("no sound checkpoint: {}", problems.join("; ")),
            }),
        }
    }

    /// The state in the newest checkpoint whose `state.json` is sound; weights and optimiser are not looked at.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn newest_state(&self) -> Result<Option<TrainerState>, LearnerError> {
        let found = self.committed()?;
        Ok(found.iter().rev().find_map(|(_, _, path)| self.state(path)))
    }

    /// The state in `path`, if it is sound.
    fn state(&self, path: &Path) -> Option<TrainerState> {
        let digests = self.disk.read(&path.join(DIGESTS)).ok()?;
        let digests: BTreeMap<String, FileDigest> = serde_json::from_slice(&digests).ok()?;
        let bytes = self.disk.read(&path.join(STATE)).ok()?;
        let sound = digests.get(STATE)?.blake3 == Digest::of(&bytes).to_string();
        let state: TrainerState = serde_json::from_slice(&bytes).ok()?;
        (sound && state.format == FORMAT).then_some(state)
    }

    /// The checkpoint in `path`, every digest checked.
    ///
    /// # Errors
    /// If a file is missing, damaged or of another layout.
    pub fn load(&self, path: &Path) -> Result<Loaded, LearnerError> {
        let unsound = |path: &Path, what: String| LearnerError::Checkpoint { path: path.to_owned(), what };
        let read = |name: &str| {
            let file = path.join(name);
            self.disk.read(&file).map_err(LearnerError::disk(&file, "read"))
        };
        let digests: BTreeMap<String, FileDigest> = serde_json::from_slice(&read(DIGESTS)?)
            .map_err(|e| unsound(&path.join(DIGESTS), e.to_string()))?;
        for (file, expected) in &digests {
            let found = self.digest(&path.join(file))?;
            if (found.len, &found.blake3) != (expected.len, &expected.blake3) {
                return Err(unsound(&path.join(file), "its digest is not the one in digests.json".into()));
            }
        }
        for needed in [STATE, TRAINER] {
            if !digests.contains_key(needed) {
                return Err(unsound(&path.join(DIGESTS), format!("{needed} is not listed")));
            }
        }
        let state: TrainerState =
            serde_json::from_slice(&read(STATE)?).map_err(|e| unsound(&path.join(STATE), e.to_string()))?;
        if state.format != FORMAT {
            let what = format!("layout {}, this build reads {FORMAT}", state.format);
            return Err(unsound(&path.join(STATE), what));
        }
        let curriculum = digests.contains_key(CURRICULUM).then(|| read(CURRICULUM)).transpose()?;
        Ok(Loaded { path: path.to_owned(), state, curriculum, disk: self.disk.clone() })
    }

    /// Committed checkpoints as (epoch, step, path), oldest first.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn committed(&self) -> Result<Vec<(u64, u64, PathBuf)>, LearnerError> {
        let parse = |path: PathBuf| {
            let (step, epoch) = name(&path).strip_prefix("step-")?.split_once("-e")?;
            Some((epoch.parse().ok()?, step.parse().ok()?, path.clone()))
        };
        let mut found: Vec<_> = self.list()?.into_iter().filter_map(parse).collect();
        found.sort();
        Ok(found)
    }

    /// Where the checkpoint of `step` by the learner of `epoch` is.
    pub fn path(&self, step: u64, epoch: u64) -> PathBuf {
        self.folder.join(format!("step-{step}-e{epoch}"))
    }

    /// Keeps the checkpoint in `path` for good: the journal refers to it.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn keep(&self, path: &Path) -> Result<(), LearnerError> {
        let mark = path.join(KEEP);
        match self.disk.create_new(&mark) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(LearnerError::disk(&mark, "mark the checkpoint"))?,
        }
        self.disk.sync_dir(path).map_err(LearnerError::disk(path, "sync"))
    }

    fn set_latest(&self, path: &Path) -> Result<(), LearnerError> {
        let (tmp, latest) = (self.folder.join("LATEST.tmp"), self.folder.join("LATEST"));
        self.write_bytes(&tmp, format!("{}\n", name(path)).as_bytes())?;
        self.disk.sync_file(&tmp).map_err(LearnerError::disk(&tmp, "fsync"))?;
        self.disk.rename(&tmp, &latest).map_err(LearnerError::disk(&latest, "rename"))?;
        self.disk.sync_dir(&self.folder).map_err(LearnerError::disk(&self.folder, "sync"))
    }

    fn remove_old(&self) -> Result<(), LearnerError> {
        let found = self.committed()?;
        for (_, _, path) in &found[..found.len().saturating_sub(self.keep_last)] {
            let files = self.disk.list(path).map_err(LearnerError::disk(path, "list"))?;
            if files.iter().any(|file| name(file) == KEEP) {
                continue;
            }
            self.disk.remove_dir(path).map_err(LearnerError::disk(path, "remove"))?;
        }
        Ok(())
    }

    fn trim_journal(&self) -> Result<(), LearnerError> {
        let Some(folder) = &self.journal else { return Ok(()) };
        let found = self.committed()?;
        let newest = &found[found.len().saturating_sub(self.keep_last)..];
        let states: Option<Vec<TrainerState>> = newest.iter().map(|(_, _, path)| self.state(path)).collect();
        // One that cannot be read, or too few of them: whatever may still be needed stays.
        let Some(states) = states.filter(|states| states.len() >= self.keep_last) else { return Ok(()) };
        let needed = states.iter().map(|state| state.replay_from.segment).min();
        needed.map_or(Ok(()), |needed| journal::remove_before(&*self.disk, folder, needed))
    }

    fn write_bytes(&self, path: &Path, bytes: &[u8]) -> Result<(), LearnerError> {
        self.disk
            .write(path, &mut |out: &mut dyn Write| out.write_all(bytes))
            .map_err(LearnerError::disk(path, "write the checkpoint"))
    }

    /// Piece by piece: a trainer's state is larger than the model.
    fn digest(&self, path: &Path) -> Result<FileDigest, LearnerError> {
        let digest = || Digest::of_reader(&mut *self.disk.open(path)?);
        let (digest, len) = digest().map_err(LearnerError::disk(path, "read"))?;
        Ok(FileDigest { len, blake3: digest.to_string() })
    }

    fn list(&self) -> Result<Vec<PathBuf>, LearnerError> {
        self.disk.list(&self.folder).map_err(LearnerError::disk(&self.folder, "list"))
    }
}

impl TrainerState {
    /// The layout number this build writes.
    pub const FORMAT: u32 = FORMAT;
}

impl Loaded {
    /// Puts masters and moments into `optimizer`, which has the model's layout.
    ///
    /// # Errors
    /// If a tensor is missing, of another size or another type. The optimiser is then half restored: drop it.
    pub fn restore(&self, optimizer: &mut Optimizer) -> Result<(), LearnerError> {
        self.restore_from(TRAINER, optimizer, self.state.optimizer_steps)
    }

    /// The same for the critic's, after `steps` updates.
    ///
    /// # Errors
    /// As [`restore`](Self::restore).
    pub fn restore_critic(&self, optimizer: &mut Optimizer, steps: u64) -> Result<(), LearnerError> {
        self.restore_from(CRITIC, optimizer, steps)
    }

    /// Weights of the reference, as bytes.
    ///
    /// # Errors
    /// If the disk refuses, or there are none.
    pub fn reference(&self) -> Result<Vec<u8>, LearnerError> {
        let path = self.path.join(REFERENCE);
        self.disk.read(&path).map_err(LearnerError::disk(&path, "read"))
    }

    fn restore_from(&self, file: &str, optimizer: &mut Optimizer, steps: u64) -> Result<(), LearnerError> {
        let path = self.path.join(file);
        let mut file = self.disk.open(&path).map_err(LearnerError::disk(&path, "read"))?;
        arenas::read(optimizer, &mut file).map_err(|error| match error {
            ReadError::Io(error) => LearnerError::disk(&path, "read")(error),
            ReadError::Unsound(what) => LearnerError::Checkpoint { path: path.clone(), what },
        })?;
        optimizer.set_steps(steps);
        Ok(())
    }
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or("")
}
