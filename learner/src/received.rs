//! What the learner of a run has taken in, from its folder alone: for a queue that starts empty and must not ask for it again.

use std::path::Path;

use crate::LearnerError;
use crate::checkpoint::Checkpoints;
use crate::consumed::IdSet;
use crate::core::{checkpoint_dir, journal_dir};
use crate::disk::SystemDisk;
use crate::journal::{self, Position, Record};

/// Ids of all rollouts that a learner of the run in `run_dir` has in its journal. Of groups that have ended, ids that were never
/// asked for may be in it too. Reads the journal from the newest checkpoint on; writes nothing.
///
/// # Errors
/// If the disk refuses, or the journal is damaged.
pub fn received(run_dir: &Path) -> Result<IdSet, LearnerError> {
    let (disk, folder) = (SystemDisk, journal_dir(run_dir));
    if !folder.is_dir() {
        return Ok(IdSet::default());
    }
    let checkpoints = Checkpoints::read_only(std::sync::Arc::new(SystemDisk), &checkpoint_dir(run_dir));
    // Everything a checkpoint knows of is in the journal before its end: any sound state saves reading, none is needed.
    let newest = if checkpoint_dir(run_dir).is_dir() { checkpoints.newest_state()? } else { None };
    let (mut ids, from) =
        newest.map_or_else(|| (IdSet::default(), Position::default()), |s| (s.consumed, s.replay_from));
    journal::read(&disk, &folder, from, &mut |_, record| {
        match record {
            Record::Consumed(scored) => ids.insert(scored.rollout.id.0),
            Record::Bad(bad) => ids.insert(bad.rollout.0),
            Record::Abandoned(gone) => ids.insert(gone.rollout.0),
            Record::Opened(_) | Record::StepFormed(_) | Record::RolledBack(_) => false,
        };
        Ok(())
    })?;
    Ok(ids)
}
