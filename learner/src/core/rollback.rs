//! Going back once: what follows on several updates in a row that were not finite.
//!
//! The weights of the newest sound checkpoint before them become the *next* version: step numbers never go back, so that no
//! two versions share a name. It is a record of the journal like any update, and repeated like one; the checkpoint it went
//! back to is kept for that. A second time is one too many: whatever is wrong did not come from a few bad updates.

use std::path::PathBuf;

use serde_json::{Map, json};

use super::{Learner, REFUSED_MAX};
use crate::LearnerError;
use crate::checkpoint::Loaded;
use crate::journal::{Record, RolledBack};
use crate::report::StepReport;

impl Learner {
    /// Whether too many updates in a row were refused to make another one.
    pub(super) fn must_roll_back(&self) -> bool {
        self.refused_in_a_row >= REFUSED_MAX
    }

    /// Goes back to the newest checkpoint with other weights.
    ///
    /// # Errors
    /// [`LearnerError::Diverged`] if it did so before, or there is no such checkpoint.
    pub(super) fn roll_back(&mut self) -> Result<StepReport, LearnerError> {
        let written = self.writing.end();
        self.note_written(written)?;
        let (from_step, loaded) = (self.policy().step(), self.checkpoint_before(self.policy().step())?);
        let Some(loaded) = loaded.filter(|_| self.rolled_back_to.is_none()) else {
            return Err(LearnerError::Diverged {
                count: self.refused_in_a_row,
                step: from_step,
                folder: self.parts.run_dir.join("bad-steps"),
            });
        };
        self.checkpoints.keep(&loaded.path)?;
        self.go_back_to(&loaded)?;
        let (to_step, epoch) = (loaded.state.step, loaded.state.epoch);
        tracing::error!(from_step, to_step, "rolled back: {REFUSED_MAX} updates in a row were not finite");
        let record =
            RolledBack { from_step, to_step, to_epoch: epoch, weights: self.policy().digest().to_string() };
        self.checkpoints.check_epoch(self.epoch)?;
        let mut journal = self.lock_journal();
        journal.append(&Record::RolledBack(record))?;
        journal.sync()?;
        drop(journal);
        Ok(self.rollback_report(to_step))
    }

    /// Repeats a journalled return.
    pub(super) fn repeat_rollback(&mut self, record: &RolledBack) -> Result<(), LearnerError> {
        let loaded = self.checkpoints.load(&self.checkpoints.path(record.to_step, record.to_epoch))?;
        self.go_back_to(&loaded)?;
        let report = self.rollback_report(record.to_step);
        self.made_again.push(report);
        let computed = self.policy().digest().to_string();
        match computed == record.weights {
            true => Ok(()),
            false => Err(LearnerError::ReplayMismatch {
                step: self.policy().step(),
                computed,
                journalled: record.weights.clone(),
            }),
        }
    }

    fn checkpoint_before(&self, step: u64) -> Result<Option<Loaded>, LearnerError> {
        let before: Vec<(u64, u64, PathBuf)> =
            self.checkpoints.committed()?.into_iter().filter(|(_, at, _)| *at < step).collect();
        let sound = |(_, _, path): &(u64, u64, PathBuf)| match self.checkpoints.load(path) {
            Ok(loaded) => Some(loaded),
            Err(error) => {
                tracing::warn!(checkpoint = %path.display(), %error, "checkpoint is unsound, trying the one before");
                None
            }
        };
        Ok(before.iter().rev().find_map(sound))
    }

    fn go_back_to(&mut self, loaded: &Loaded) -> Result<(), LearnerError> {
        let step = self.policy().step() + 1;
        self.policy_mut().restore(|optimizer| loaded.restore(optimizer), step)?;
        self.companions.restore(loaded)?;
        self.refused_in_a_row = 0;
        self.rolled_back_to = Some(loaded.state.step);
        Ok(())
    }

    fn rollback_report(&mut self, to_step: u64) -> StepReport {
        let version = self.policy().version();
        let line = json!({
            "step": version.step, "version": version.step, "epoch": version.epoch,
            "time/wall_s": self.started.elapsed().as_secs_f64(), "train/applied": false, "train/rolled_back_to": to_step,
        });
        let line: Map<_, _> = line.as_object().cloned().expect("an object was just written");
        let report = StepReport { version, line, ledger: *self.assembly.ledger() };
        self.last_report = Some(report.clone());
        report
    }
}
