//! The learner without its surroundings: arrivals in, steps out, on one thread, with truth on disk.
//!
//! Everything that changes the weights happens here and is a function of the journal: [`Learner::recover`] repeats it to the bit.

mod recovery;
mod rollback;

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use freewheel_types::{Digest, DropReason, GroupFate, GroupOutcome, PolicyVersion, TaskId};

use crate::LearnerError;
use crate::assembly::{Arrival, Assembly, Group, GroupRules, Ledger, SettledGroup};
use crate::batch::Batch;
use crate::batching::{BatchRules, Overtaking};
use crate::checkpoint::{Checkpoints, Commit, ModelWriter, TrainerState, Writing, Written};
use crate::companions::Companions;
use crate::config::{KeepJournal, LearnerConfig};
use crate::consumed::IdSet;
use crate::critic::Critic;
use crate::disk::Disk;
use crate::dual::{CostSum, DualConfig, Duals};
use crate::journal::{Journal, Position, Record, StepFormed};
use crate::metrics::MetricsSink;
use crate::objective::Loss;
use crate::optim::Schedule;
use crate::policy::Policy;
use crate::report::{self, Interval, StepReport, StepTimes};
use crate::trainer::{PolicyTrainer, PromptImages};
use crate::update::{UpdateRules, Updated, update};

pub use recovery::{Recovery, Replayed};

/// Updates in a row that may fail before the learner goes back to a checkpoint, and the second time stops.
const REFUSED_MAX: u32 = 3;
/// Checkpoints in a row that may fail for want of space.
const FULL_DISK_MAX: u32 = 3;
/// Outcomes kept in a checkpoint, to be told again.
const OUTCOMES_KEPT: usize = 1024;

/// Gives the state of whatever chooses prompts, for the checkpoint.
pub trait CurriculumSource: Send + Sync {
    /// The state now, as JSON; `None` if it lives elsewhere.
    fn snapshot(&self) -> Option<Vec<u8>>;
}

/// The journal, shared by the thread that receives and the thread that trains.
pub type SharedJournal = Arc<Mutex<Journal>>;

/// What a learner is made of.
pub struct LearnerParts {
    /// Settings; without problems.
    pub config: LearnerConfig,
    /// The policy at its initial weights.
    pub policy: Policy,
    /// The reference at the initial weights; needed when the loss asks for one.
    pub reference: Option<Box<dyn PolicyTrainer>>,
    /// The critic; needed when the advantage asks for one.
    pub critic: Option<Critic>,
    /// Rollouts in a group.
    pub group_size: u32,
    /// Longest completion the run allows, tokens.
    pub max_new_tokens: u64,
    /// Digest of the tokenizer.
    pub tokenizer: Digest,
    /// Reads the images of prompts.
    pub images: Arc<dyn PromptImages>,
    /// Where the initial weights came from: what an adapter names as its base.
    pub base: String,
    /// The run's folder.
    pub run_dir: PathBuf,
    /// Where files go.
    pub disk: Arc<dyn Disk>,
    /// Writes the model part of a checkpoint.
    pub writer: Arc<dyn ModelWriter>,
    /// Asked at each checkpoint.
    pub curriculum: Option<Arc<dyn CurriculumSource>>,
    /// Costs that are kept under limits.
    pub duals: DualConfig,
    /// Told of every group that ends.
    pub metrics: Arc<dyn MetricsSink>,
}

/// The learner's state machine.
pub struct Learner {
    parts: LearnerParts,
    epoch: u64,
    loss: Loss,
    companions: Companions,
    duals: Duals,
    schedule: Schedule,
    batch_rules: BatchRules,
    assembly: Assembly,
    overtaking: Overtaking,
    /// `None` when a run is only repeated: nothing is written then.
    journal: Option<SharedJournal>,
    checkpoints: Checkpoints,
    writing: Writing,
    /// Seconds that training stood still for checkpoints since the last step; `None` if none was begun.
    pause_s: Option<f64>,
    /// Where the first record of each held group begins.
    begins: BTreeMap<TaskId, Position>,
    /// Where the record of the last arrival begins; arrivals come in journal order.
    last_accepted: Position,
    /// Groups dropped since the last step.
    dropped: Vec<(TaskId, DropReason)>,
    new_outcomes: Vec<GroupOutcome>,
    recent_outcomes: VecDeque<GroupOutcome>,
    last_report: Option<StepReport>,
    /// Steps that a learner before made, and perhaps told nobody of.
    made_again: Vec<StepReport>,
    refused_in_a_row: u32,
    /// Step of the checkpoint that the learner went back to, if it did.
    rolled_back_to: Option<u64>,
    full_disk_in_a_row: u32,
    committed_step: Option<u64>,
    interval: Interval,
    started: Instant,
    idle_s: f64,
}

/// What makes a group one to train on in this run.
fn group_rules(parts: &LearnerParts) -> GroupRules {
    GroupRules {
        min_valid: parts.config.min_valid,
        group_size: parts.group_size + parts.config.loss.needs_greedy() as u32,
        needs_contrast: parts.config.loss.advantage_config().kind.needs_contrast(),
        greedy_baseline: parts.config.loss.needs_greedy(),
    }
}

/// Folder of the journal in a run's folder.
pub fn journal_dir(run_dir: &Path) -> PathBuf {
    run_dir.join("journal")
}

/// Folder of the checkpoints in a run's folder.
pub fn checkpoint_dir(run_dir: &Path) -> PathBuf {
    run_dir.join("checkpoints")
}

impl Learner {
    fn new(
        mut parts: LearnerParts,
        checkpoints: Checkpoints,
        journal: Option<SharedJournal>,
        epoch: u64,
    ) -> Result<Self, LearnerError> {
        let config = &parts.config;
        let mut problems = config.problems();
        problems.extend(config.optimizer.problems_with("learner", &parts.policy.weights().layout));
        if !problems.is_empty() {
            return Err(LearnerError::Config(problems.join("\n")));
        }
        let checkpoints = match (config.keep_journal, &journal) {
            (KeepJournal::Checkpoints, Some(_)) => checkpoints.trimming(journal_dir(&parts.run_dir)),
            _ => checkpoints,
        };
        let loss = Loss::new(&config.loss).map_err(|problems| LearnerError::Config(problems.join("\n")))?;
        if loss.needs_reference() && parts.reference.is_none() {
            return Err(LearnerError::Config("learner.kl_coef above 0 needs a reference model".into()));
        }
        if config.loss.needs_critic() && parts.critic.is_none() {
            return Err(LearnerError::Config("learner.advantage = \"gae\" needs a critic".into()));
        }
        let (reference, critic) = (parts.reference.take(), parts.critic.take());
        let companions = Companions::new(&config.loss, &parts.policy, reference, critic);
        let rules = group_rules(&parts);
        Ok(Self {
            epoch,
            companions,
            last_accepted: Position::default(),
            loss,
            duals: Duals::new(parts.duals.clone()),
            schedule: Schedule::new(config.schedule.clone(), config.steps),
            batch_rules: BatchRules {
                groups_per_step: config.groups_per_step,
                window: config.window,
                max_staleness: config.max_staleness,
                refill_max: config.refill_max,
                groups_min: config.minibatches,
            },
            assembly: Assembly::new(rules),
            overtaking: Overtaking::default(),
            journal,
            checkpoints,
            writing: Writing::default(),
            pause_s: None,
            begins: BTreeMap::new(),
            dropped: Vec::new(),
            new_outcomes: Vec::new(),
            recent_outcomes: VecDeque::new(),
            last_report: None,
            made_again: Vec::new(),
            refused_in_a_row: 0,
            rolled_back_to: None,
            full_disk_in_a_row: 0,
            committed_step: None,
            interval: Interval::default(),
            started: Instant::now(),
            idle_s: 0.0,
            parts,
        })
    }

    // --- the loop's steps ------------------------------------------------------------------------

    /// Takes an arrival whose journal record begins at `at`.
    pub fn accept(&mut self, arrival: Arrival, at: Position) {
        self.last_accepted = at;
        let task = arrival.rollout().task();
        if let Arrival::Scored(scored) = &arrival
            && let Some(oldest) = scored.rollout.version_oldest()
        {
            self.overtaking.saw(task, oldest.step);
        }
        if !self.assembly.knows(arrival.rollout()) {
            self.begins.entry(task).or_insert(at);
        }
        if let Some(settled) = self.assembly.insert(arrival) {
            self.note_settled(&settled);
        }
    }

    /// Makes one step if a batch can be formed now; after too many updates in a row that were not finite, the step is a return
    /// to a checkpoint.
    ///
    /// # Errors
    /// If the journal cannot be written, or there is no going back.
    pub fn try_step(&mut self) -> Result<Option<StepReport>, LearnerError> {
        if self.must_roll_back() {
            return self.roll_back().map(Some);
        }
        let step = self.policy().step();
        for task in self.overtaking.stale(&self.batch_rules, &self.assembly, step) {
            let settled = self.assembly.drop_ready(task, DropReason::Stale);
            self.note_settled(&settled);
        }
        let Some(tasks) = self.overtaking.form(&self.batch_rules, &self.assembly, step) else {
            return Ok(None);
        };
        if tasks.len() < self.batch_rules.groups_per_step {
            let (groups, wanted) = (tasks.len(), self.batch_rules.groups_per_step);
            tracing::warn!(
                step,
                groups,
                wanted,
                "a smaller batch: too many groups had to be replaced (learner.refill_max)"
            );
        }
        let trained = self.train(&tasks, None)?;
        self.checkpoints.check_epoch(self.epoch)?;
        let mut journal = self.lock_journal();
        journal.append(&Record::StepFormed(trained.record))?;
        journal.sync()?;
        drop(journal);
        Ok(Some(trained.report))
    }

    /// Counts time spent waiting for rollouts.
    pub fn waited(&mut self, seconds: f64) {
        self.idle_s += seconds;
    }

    /// Outcomes not yet reported.
    pub fn take_outcomes(&mut self) -> Vec<GroupOutcome> {
        std::mem::take(&mut self.new_outcomes)
    }

    /// Steps that recovery came upon, oldest first.
    pub fn take_made_again(&mut self) -> Vec<StepReport> {
        std::mem::take(&mut self.made_again)
    }

    /// Begins a checkpoint if one is due; if `now` asks for one, returns when it is committed. Else it is written while training goes
    /// on, after the one before.
    ///
    /// # Errors
    /// If the disk refused this one or the one before for another reason than being full, or was full several times.
    pub fn checkpoint(&mut self, now: bool) -> Result<(), LearnerError> {
        let (step, began) = (self.policy().step(), Instant::now());
        let due = now || step.is_multiple_of(self.parts.config.checkpoint_every);
        let written = if due { self.writing.end() } else { self.writing.ended() };
        self.note_written(written)?;
        if !due || self.committed_step == Some(step) {
            return Ok(());
        }
        let commit = self.commit();
        self.writing.begin(&self.checkpoints, commit, self.parts.writer.clone())?;
        if now {
            let written = self.writing.end();
            self.note_written(written)?;
        }
        *self.pause_s.get_or_insert_default() += began.elapsed().as_secs_f64();
        Ok(())
    }

    fn note_written(&mut self, written: Option<Written>) -> Result<(), LearnerError> {
        let Some(Written { step, result }) = written else { return Ok(()) };
        match result {
            Ok(path) => {
                tracing::info!(checkpoint = %path.display(), step, "checkpoint committed");
                self.full_disk_in_a_row = 0;
                self.committed_step = Some(step);
                Ok(())
            }
            Err(LearnerError::Disk { source, path, .. })
                if source.kind() == std::io::ErrorKind::StorageFull
                    && self.full_disk_in_a_row + 1 < FULL_DISK_MAX =>
            {
                self.full_disk_in_a_row += 1;
                tracing::error!(path = %path.display(), step, "disk is full, this checkpoint is skipped");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn commit(&mut self) -> Commit {
        let end = self.lock_journal().position();
        let held_from = self.begins.values().min().copied();
        let state = TrainerState {
            format: TrainerState::FORMAT,
            step: self.policy().step(),
            epoch: self.epoch,
            optimizer_steps: self.policy().optimizer().steps(),
            consumed: self.assembly.consumed(),
            settled: self.assembly.settled().clone(),
            ledger: *self.assembly.ledger(),
            overtaking: self.overtaking.clone(),
            // Rollouts that are in the journal but not here yet lie after the last one that is.
            replay_from: held_from.unwrap_or(end).min(self.last_accepted),
            journal_end: end,
            outcomes: self.recent_outcomes.iter().cloned().collect(),
            report: self.last_report.clone(),
            refused_in_a_row: self.refused_in_a_row,
            rolled_back_to: self.rolled_back_to,
            companions: self.companions.state(),
            duals: self.duals.states().to_vec(),
            weights: self.policy().digest().to_string(),
            tokenizer: self.parts.tokenizer.to_string(),
        };
        Commit {
            state,
            critic: self.companions.critic_mut().map(|critic| critic.model.lend()),
            adapter: self.policy().adapter(),
            base: self.parts.base.clone(),
            reference: self.companions.moving_reference(),
            curriculum: self.parts.curriculum.as_ref().and_then(|source| source.snapshot()),
            policy: self.policy_mut().lend(),
        }
    }

    /// Seconds that training stood still for checkpoints since the step before; `None` if there was none.
    fn take_pause(&mut self) -> Option<f64> {
        let critic = self.companions.critic_mut().map_or(0.0, |critic| critic.model.take_waited());
        let waited = self.policy_mut().take_waited() + critic;
        self.pause_s.take().map(|pause_s| pause_s + waited)
    }

    /// Trains on ready groups; `costs` are those journalled when the update is repeated.
    fn train(&mut self, tasks: &[TaskId], costs: Option<&[CostSum]>) -> Result<Trained, LearnerError> {
        let started = Instant::now();
        let before = self.policy().version();
        self.overtaking.formed(&self.assembly, tasks);
        let groups = self.assembly.take(tasks);
        let config = &self.parts.config;
        let factor = self.schedule.factor(before.step);
        let mut credit = config.loss.credit_rules();
        credit.advantage.reward_ema = self.companions.reward_ema();
        let rules = UpdateRules {
            micro_batch_tokens: config.micro_batch_tokens,
            minibatches: config.minibatches,
            router_replay: config.router_replay,
            learning_rate: config.learning_rate * factor,
            ess_learning_rate: config.loss.ess_learning_rate,
            critic_learning_rate: config.loss.critic_learning_rate.unwrap_or(config.learning_rate) * factor,
            credit,
            reward_divergence: config.loss.reward_divergence(),
            entropy_coef: self.companions.entropy_coef(),
        };
        let (images, length_max) = (&*self.parts.images, self.parts.max_new_tokens);
        let mut batch = Batch::new(&groups, &config.loss, images, before.step, length_max, &self.duals);
        let helpers = self.companions.helpers();
        let updated = update(&mut self.parts.policy, helpers, &self.loss, &mut batch, &rules);
        if updated.moved {
            self.parts.policy.advance();
            self.companions.after(&batch, &updated, &self.parts.policy);
        }
        self.refused_in_a_row = if updated.applied { 0 } else { self.refused_in_a_row + 1 };
        if !updated.applied {
            self.save_bad_step(before, &batch)?;
        }
        let rollouts = batch.rollouts();
        let dropped = std::mem::take(&mut self.dropped);
        groups.iter().filter(|_| updated.moved).for_each(|group| self.interval.add(group, None));
        let times = StepTimes {
            wall_s: self.started.elapsed().as_secs_f64(),
            idle_s: std::mem::take(&mut self.idle_s),
            train_s: started.elapsed().as_secs_f64(),
        };
        let interval = std::mem::take(&mut self.interval);
        let after = self.policy().version();
        let mut line =
            report::line(after, &batch, &updated, &self.loss, rules.learning_rate, &interval, &times);
        line.insert("train/groups".into(), groups.len().into());
        if let Some(pause_s) = self.take_pause() {
            line.insert("learner/checkpoint_pause_s".into(), pause_s.into());
        }
        let mut record = StepFormed {
            from_step: before.step,
            rollouts,
            dropped,
            applied: updated.moved,
            weights: self.policy().digest().to_string(),
            costs: Vec::new(),
        };
        self.end_batch(groups, before, &updated);
        record.costs = self.duals.update(costs);
        report::write_duals(&mut line, &self.duals, &record.costs);
        let report = StepReport { version: after, line, ledger: *self.assembly.ledger() };
        self.last_report = Some(report.clone());
        Ok(Trained { record, report })
    }

    fn end_batch(&mut self, groups: Vec<Group>, before: PolicyVersion, updated: &Updated) {
        if updated.moved {
            self.assembly.trained(&groups);
            let fate = GroupFate::Trained { step: self.policy().step() };
            groups.iter().for_each(|group| self.note_outcome(group, before, fate));
        } else {
            for settled in self.assembly.drop_batch(groups, DropReason::Invalid) {
                self.note_settled(&settled);
            }
        }
    }

    fn note_settled(&mut self, settled: &SettledGroup) {
        self.dropped.push((settled.group.id, settled.reason));
        // One that came too late says nothing about its prompt.
        if settled.reason != DropReason::Stale {
            self.overtaking.replaced(settled.group.id);
        }
        self.interval.add(&settled.group, Some(settled.reason));
        let version = self.policy().version();
        self.note_outcome(&settled.group, version, GroupFate::Dropped(settled.reason));
    }

    fn note_outcome(&mut self, group: &Group, version: PolicyVersion, fate: GroupFate) {
        self.begins.remove(&group.id);
        self.duals.ended(group);
        self.parts.metrics.group(version, group, fate);
        let outcome = report::outcome(group, version, fate);
        self.recent_outcomes.push_back(outcome.clone());
        if self.recent_outcomes.len() > OUTCOMES_KEPT {
            self.recent_outcomes.pop_front();
        }
        self.new_outcomes.push(outcome);
    }

    /// Writes a batch whose loss or gradient was not finite to `bad-steps/`, one rollout a line.
    fn save_bad_step(&self, version: PolicyVersion, batch: &Batch<'_>) -> Result<(), LearnerError> {
        if self.journal.is_none() {
            return Ok(());
        }
        let folder = self.parts.run_dir.join("bad-steps");
        let path = folder.join(format!("step-{}-{}.jsonl", version.step, self.refused_in_a_row));
        tracing::error!(step = version.step, path = %path.display(), "loss or gradient is not finite, update skipped");
        let mut text = Vec::new();
        for sample in &batch.samples {
            let rollout = &sample.scored.rollout;
            let line = serde_json::json!({
                "rollout": rollout.id, "prompt_ids": rollout.prompt_ids, "output_ids": rollout.output_ids,
                "behaviour_logprobs": rollout.behaviour_logprobs, "versions": rollout.versions,
                "reward": sample.scored.reward.reward(), "advantages": sample.advantages,
            });
            serde_json::to_writer(&mut text, &line).expect("plain data always serialises");
            text.push(b'\n');
        }
        let disk = &self.parts.disk;
        disk.create_dir(&folder).map_err(LearnerError::disk(&folder, "make the folder"))?;
        disk.write(&path, &mut |out| out.write_all(&text)).map_err(LearnerError::disk(&path, "write"))
    }

    // --- what others look at ---------------------------------------------------------------------

    /// The policy.
    pub fn policy(&self) -> &Policy {
        &self.parts.policy
    }

    fn policy_mut(&mut self) -> &mut Policy {
        &mut self.parts.policy
    }

    /// Settings.
    pub fn config(&self) -> &LearnerConfig {
        &self.parts.config
    }

    /// The journal.
    ///
    /// # Panics
    /// If this learner only repeats a run.
    pub fn journal(&self) -> SharedJournal {
        self.journal.clone().expect("a learner that only repeats has no journal")
    }

    fn lock_journal(&self) -> MutexGuard<'_, Journal> {
        let journal = self.journal.as_ref().expect("a learner that only repeats writes nothing");
        journal.lock().expect("no holder of the lock panics")
    }

    /// Rollout ids that arrived.
    pub fn seen(&self) -> &IdSet {
        self.assembly.seen()
    }

    /// Counters.
    pub fn ledger(&self) -> &Ledger {
        self.assembly.ledger()
    }

    /// Whether all steps are made.
    pub fn finished(&self) -> bool {
        self.policy().step() >= self.parts.config.steps
    }
}

/// What one call of `train` leaves.
struct Trained {
    record: StepFormed,
    report: StepReport,
}
