//! Where the learner before was: checkpoint, then everything in the journal after it, to the bit.

use std::path::Path;
use std::sync::{Arc, Mutex};

use freewheel_types::TaskId;

use super::{Learner, LearnerParts, checkpoint_dir, group_rules, journal_dir};
use crate::LearnerError;
use crate::assembly::{Arrival, Assembly, Ledger};
use crate::checkpoint::{Checkpoints, Loaded};
use crate::journal::{self, Journal, Opened, Position, Record, StepFormed};

/// What recovery found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Step of the checkpoint started from; `None`: the initial weights.
    pub checkpoint_step: Option<u64>,
    /// Updates made again from the journal.
    pub replayed_steps: u64,
    /// Rollouts in the journal that wait for a batch.
    pub held: u64,
}

/// What repeating a run came to: every update gave the weights that the journal states.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replayed {
    /// Step started from.
    pub from_step: u64,
    /// Updates repeated, those that were refused included.
    pub steps: u64,
    /// Step reached.
    pub step: u64,
    /// Digest of the weights there, hex.
    pub weights: String,
}

impl Learner {
    /// Takes up the run in `parts.run_dir` as the learner of `epoch`, which is claimed: newest sound checkpoint, then every step and
    /// every rollout in the journal after it. The result is, to the bit, where the learner before was when it last wrote.
    ///
    /// # Errors
    /// If config, checkpoint or journal are unsound, or a repeated step comes out different.
    pub fn recover(
        parts: LearnerParts,
        checkpoints: Checkpoints,
        epoch: u64,
    ) -> Result<(Self, Recovery), LearnerError> {
        let folder = journal_dir(&parts.run_dir);
        let journal = Arc::new(Mutex::new(Journal::open(parts.disk.clone(), &folder)?));
        let loaded = checkpoints.newest()?;
        let mut learner = Self::new(parts, checkpoints, Some(journal), epoch)?;
        let mut recovery = Recovery::default();
        let (mut from, mut news) = Default::default();
        if let Some(loaded) = &loaded {
            learner.restore(loaded)?;
            recovery.checkpoint_step = Some(loaded.state.step);
            (from, news) = (loaded.state.replay_from, loaded.state.journal_end);
        }
        recovery.replayed_steps = learner.replay(from, news, u64::MAX)?;
        recovery.held = learner.assembly.ledger().held();
        let position = learner.lock_journal().position();
        learner.last_accepted = position;
        learner.policy_mut().set_epoch(epoch);
        learner.open_journal()?;
        Ok((learner, recovery))
    }

    fn restore(&mut self, loaded: &Loaded) -> Result<(), LearnerError> {
        let state = &loaded.state;
        let unsound = |what: String| LearnerError::Checkpoint { path: loaded.path.clone(), what };
        if state.tokenizer != self.parts.tokenizer.to_string() {
            return Err(unsound(format!(
                "made with tokenizer {}, the model has {}",
                state.tokenizer, self.parts.tokenizer
            )));
        }
        self.policy_mut().restore(|optimizer| loaded.restore(optimizer), state.step)?;
        if self.policy().digest().to_string() != state.weights {
            return Err(unsound(
                "its masters do not round to its weights; is model.dtype another one?".into(),
            ));
        }
        self.companions.restore(loaded)?;
        let rules = group_rules(&self.parts);
        // What was held then is inserted again by the replay, which counts it again.
        let ledger = Ledger { received: state.ledger.received - state.ledger.held(), ..state.ledger };
        self.assembly = Assembly::restore(rules, state.consumed.clone(), state.settled.clone(), ledger);
        self.overtaking = state.overtaking.clone();
        self.refused_in_a_row = state.refused_in_a_row;
        self.made_again.extend(state.report.clone());
        self.last_report = state.report.clone();
        self.rolled_back_to = state.rolled_back_to;
        self.duals.restore(&state.duals);
        self.recent_outcomes = state.outcomes.iter().cloned().collect();
        self.new_outcomes = state.outcomes.clone();
        self.committed_step = Some(state.step);
        Ok(())
    }

    /// Repeats the journal from `from` on; steps before `news` are in the weights already, those from `until` on are left alone.
    /// Returns the number of steps made.
    fn replay(&mut self, from: Position, news: Position, until: u64) -> Result<u64, LearnerError> {
        let folder = journal_dir(&self.parts.run_dir);
        let disk = self.parts.disk.clone();
        let mut steps = 0;
        journal::read(&*disk, &folder, from, &mut |at, record| {
            match record {
                Record::Opened(opened) if self.policy().step() < until => {
                    self.check_opened(&folder, at, news, &opened)?
                }
                Record::Consumed(scored) => self.accept_once(Arrival::Scored(scored), at),
                Record::Bad(bad) => self.accept_once(Arrival::Bad(bad.rollout), at),
                Record::Abandoned(gone) => self.accept_once(
                    Arrival::Abandoned {
                        rollout: gone.rollout,
                        prompt: gone.prompt,
                        group_size: gone.group_size,
                        reason: gone.reason,
                    },
                    at,
                ),
                Record::StepFormed(formed) if at >= news && formed.from_step < until => {
                    self.repeat(&folder, at, &formed)?;
                    steps += 1;
                }
                Record::RolledBack(record) if at >= news && record.from_step < until => {
                    self.repeat_rollback(&record)?;
                    steps += 1;
                }
                Record::Opened(_) | Record::StepFormed(_) | Record::RolledBack(_) => {}
            }
            Ok(())
        })?;
        Ok(steps)
    }

    fn accept_once(&mut self, arrival: Arrival, at: Position) {
        if !self.assembly.knows(arrival.rollout()) {
            self.accept(arrival, at);
        }
    }

    /// A learner that started later than `news` must have started from the weights that are here now.
    fn check_opened(
        &self,
        folder: &Path,
        at: Position,
        news: Position,
        opened: &Opened,
    ) -> Result<(), LearnerError> {
        let here = self.policy().digest().to_string();
        if at >= news && opened.weights != here {
            let what = format!(
                "a learner started here from weights {} at step {}, this one has {here} at step {}; is model.path another model?",
                opened.weights,
                opened.step,
                self.policy().step()
            );
            return Err(LearnerError::Journal { path: folder.to_owned(), offset: at.offset, what });
        }
        Ok(())
    }

    fn repeat(&mut self, folder: &Path, at: Position, formed: &StepFormed) -> Result<(), LearnerError> {
        let damaged =
            |what: String| LearnerError::Journal { path: folder.to_owned(), offset: at.offset, what };
        if formed.from_step != self.policy().step() {
            return Err(damaged(format!(
                "a step from {}, but the weights are at {}",
                formed.from_step,
                self.policy().step()
            )));
        }
        for (task, reason) in &formed.dropped {
            if self.assembly.ready().contains_key(task) {
                let settled = self.assembly.drop_ready(*task, *reason);
                self.note_settled(&settled);
            }
        }
        let mut tasks: Vec<TaskId> = formed.rollouts.iter().map(|rollout| rollout.task()).collect();
        tasks.dedup();
        if let Some(missing) = tasks.iter().find(|task| !self.assembly.ready().contains_key(task)) {
            return Err(damaged(format!(
                "group {missing} was trained on, but its rollouts are not in the journal before"
            )));
        }
        let trained = self.train(&tasks, Some(&formed.costs))?;
        self.made_again.push(trained.report);
        if trained.record.weights != formed.weights {
            return Err(LearnerError::ReplayMismatch {
                step: self.policy().step(),
                computed: trained.record.weights,
                journalled: formed.weights.clone(),
            });
        }
        Ok(())
    }

    fn open_journal(&mut self) -> Result<(), LearnerError> {
        let mut journal = self.lock_journal();
        let opened = Opened {
            epoch: self.epoch,
            step: self.policy().step(),
            weights: self.policy().digest().to_string(),
            sealed: journal.sealed(),
        };
        journal.append(&Record::Opened(opened))?;
        journal.sync()
    }

    /// Repeats the journal of a run and compares every update's weights; writes nothing. See [`replay`](crate::replay).
    ///
    /// # Errors
    /// As [`recover`](Self::recover).
    pub fn repeat_run(parts: LearnerParts, until: Option<u64>) -> Result<Replayed, LearnerError> {
        let checkpoints = Checkpoints::read_only(parts.disk.clone(), &checkpoint_dir(&parts.run_dir));
        let before = |step: u64| until.is_some_and(|until| step < until);
        let start = checkpoints.committed()?.into_iter().rev().find(|(_, step, _)| before(*step));
        let loaded = start.map(|(_, _, path)| checkpoints.load(&path)).transpose()?;
        let mut learner = Self::new(parts, checkpoints, None, 0)?;
        let (mut from, mut news) = Default::default();
        if let Some(loaded) = &loaded {
            learner.restore(loaded)?;
            (from, news) = (loaded.state.replay_from, loaded.state.journal_end);
        }
        let from_step = learner.policy().step();
        let steps = learner.replay(from, news, until.unwrap_or(u64::MAX))?;
        Ok(Replayed {
            from_step,
            steps,
            step: learner.policy().step(),
            weights: learner.policy().digest().to_string(),
        })
    }
}
