//! The learner role: the training thread and what goes on around it.
//!
//! ```text
//! lease epoch ─► claim it on disk ─► training thread: recover ─┬─► intake   (fetch, journal, ack)
//!                                                              ├─► renew    (lease)
//!                                                              ├─► publish  (weights)
//!                                                              └─► this loop (outcomes, progress, metrics, stop)
//! ```
//!
//! The training thread is never waited for by the queue side and waits for nothing but rollouts. An error of any part ends all.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use freewheel_kernels::Threads;
use freewheel_model::{LoadedModel, ModelSpec, Params, SaveOptions};
use freewheel_queue::{PolicyStore, QueueError, RolloutQueue, RunControl};
use freewheel_types::{Accounting, Digest, GroupOutcome, PolicyVersion};
use serde_json::{Map, Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::LearnerError;
use crate::assembly::{Arrival, Ledger};
use crate::checkpoint::{Checkpoints, ModelWriter};
use crate::config::LearnerConfig;
use crate::consumed::IdSet;
use crate::core::{
    CurriculumSource, Learner, LearnerParts, Recovery, Replayed, SharedJournal, checkpoint_dir,
};
use crate::disk::{Disk, SystemDisk};
use crate::intake::{Door, Intake, Reading};
use crate::journal::Position;
use crate::metrics::{MetricsSink, NoMetrics};
use crate::policy::Policy;
use crate::publish::{Publisher, Slot, Snapshot};
use crate::report::StepReport;
use crate::sft::threads;
use crate::trainer::PolicyTrainer;
use crate::transformer::TransformerTrainer;

/// What the learner needs from outside.
pub struct LearnerDeps {
    /// Rollouts in, outcomes out.
    pub queue: Arc<dyn RolloutQueue>,
    /// Weights out.
    pub store: Arc<dyn PolicyStore>,
    /// The policy at its initial weights, in working precision; also the frozen reference, where the loss asks for one.
    pub model: LoadedModel,
    /// The run's folder.
    pub run_dir: PathBuf,
    /// Who this is, for the lease: host, process.
    pub holder: String,
    /// `queue.learner_lease_s`.
    pub lease: Duration,
    /// Rollouts in a group.
    pub group_size: u32,
    /// Longest completion the run allows, tokens.
    pub max_new_tokens: u64,
    /// State of the prompt pool for checkpoints, where it lives in this process.
    pub curriculum: Option<Arc<dyn CurriculumSource>>,
    /// Takes metric lines and finished groups.
    pub metrics: Arc<dyn MetricsSink>,
    /// Wall time after which the run ends.
    pub time_limit: Option<Duration>,
}

/// Why the learner ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LearnerEnd {
    /// All steps are made.
    StepsDone,
    /// The time limit was reached.
    TimeLimit,
    /// The run was told to drain or was finished by somebody else.
    Drained,
    /// This process was told to stop; the run may go on elsewhere.
    Shutdown,
}

/// What a learner did.
#[derive(Clone, Debug)]
pub struct LearnerSummary {
    /// Its newest weights.
    pub version: PolicyVersion,
    /// Digest of them, hex.
    pub weights: String,
    /// Where its rollouts are.
    pub ledger: Ledger,
    /// The last accounting taken, if the queue could be counted.
    pub accounting: Option<Accounting>,
    /// What recovery found at the start.
    pub recovery: Recovery,
    /// Why it ended.
    pub end: LearnerEnd,
}

/// Runs the learner until its steps are made, the run drains, or `shutdown`. On every way out but an error a checkpoint is committed.
///
/// # Errors
/// If a newer learner took over, the disk refuses, training diverged, or what is on disk is unsound.
pub async fn run(
    config: LearnerConfig,
    deps: LearnerDeps,
    shutdown: CancellationToken,
) -> Result<LearnerSummary, LearnerError> {
    let disk: Arc<dyn Disk> = Arc::new(SystemDisk);
    let LearnerDeps { model, run_dir, group_size, max_new_tokens, curriculum, metrics, .. } = deps;
    let outside = Outside {
        queue: deps.queue,
        store: deps.store,
        holder: deps.holder,
        lease: deps.lease,
        metrics: metrics.clone(),
        time_limit: deps.time_limit,
        spec: model.model.spec().clone(),
        tokenizer: model.tokenizer.digest(),
        keep_last: config.keep_last,
        keyframe_every: config.keyframe_every,
        run_dir: run_dir.clone(),
        disk: disk.clone(),
    };
    let build = move || LearnerParts {
        group_size,
        max_new_tokens,
        curriculum,
        metrics,
        ..parts(config, model, run_dir, disk)
    };
    run_with(Box::new(build), outside, shutdown).await
}

fn frozen(model: &LoadedModel, threads: Threads) -> Box<dyn PolicyTrainer> {
    Box::new(TransformerTrainer::new(&model.model, &model.params, threads))
}

/// Writes checkpoints that every tool of the field can load.
struct HuggingFaceWriter {
    model: LoadedModel,
    disk: Arc<dyn Disk>,
}

impl ModelWriter for HuggingFaceWriter {
    fn write(&self, dir: &Path, weights: &Params) -> Result<(), LearnerError> {
        let sink = &mut |name: &str, pieces: &[&[u8]]| {
            self.disk
                .write(&dir.join(name), &mut |out| pieces.iter().try_for_each(|piece| out.write_all(piece)))
        };
        freewheel_model::save_into(&self.model, weights, &SaveOptions::default(), sink)
            .map_err(LearnerError::disk(dir, "write the model"))
    }
}

/// The parts of a learner that trains the transformer of `model`.
fn parts(config: LearnerConfig, model: LoadedModel, run_dir: PathBuf, disk: Arc<dyn Disk>) -> LearnerParts {
    let threads = threads(config.threads);
    let reference = (config.loss.kl_coef > 0.0).then(|| frozen(&model, threads.clone()));
    let trainer = TransformerTrainer::new(&model.model, &model.params, threads.clone());
    LearnerParts {
        policy: Policy::new(Box::new(trainer), model.params.clone(), config.optimizer(), threads),
        config,
        reference,
        group_size: 1,
        max_new_tokens: model.model.spec().max_positions as u64,
        tokenizer: model.tokenizer.digest(),
        run_dir,
        writer: Box::new(HuggingFaceWriter { model, disk: disk.clone() }),
        disk,
        curriculum: None,
        metrics: Arc::new(NoMetrics),
    }
}

/// Repeats the updates of the run in `run_dir` from its journal and compares the weights after each with those journalled; up to
/// step `until`, from the newest checkpoint before it, or all of them from the initial weights. Writes nothing.
///
/// # Errors
/// [`LearnerError::ReplayMismatch`] at the first step that differs.
pub fn replay(
    config: LearnerConfig,
    model: LoadedModel,
    run_dir: &Path,
    shape: RunShape,
    until: Option<u64>,
) -> Result<Replayed, LearnerError> {
    let mut parts = parts(config, model, run_dir.to_owned(), Arc::new(SystemDisk));
    (parts.group_size, parts.max_new_tokens) = (shape.group_size, shape.max_new_tokens);
    Learner::repeat_run(parts, until)
}

/// What of a run's config the learner needs besides its own section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunShape {
    /// Rollouts in a group.
    pub group_size: u32,
    /// Longest completion the run allows, tokens.
    pub max_new_tokens: u64,
}

/// What surrounds the training thread, whatever trains in it.
pub(crate) struct Outside {
    pub queue: Arc<dyn RolloutQueue>,
    pub store: Arc<dyn PolicyStore>,
    pub holder: String,
    pub lease: Duration,
    pub metrics: Arc<dyn MetricsSink>,
    pub time_limit: Option<Duration>,
    pub spec: ModelSpec,
    pub tokenizer: Digest,
    pub keep_last: usize,
    pub keyframe_every: u64,
    pub run_dir: PathBuf,
    pub disk: Arc<dyn Disk>,
}

pub(crate) type Build = Box<dyn FnOnce() -> LearnerParts + Send>;

/// What the training thread says.
enum Event {
    Recovered(Box<Recovered>),
    Step(Box<StepReport>, Vec<GroupOutcome>),
    Outcomes(Vec<GroupOutcome>),
    Ended(Result<Box<Ended>, LearnerError>),
}

struct Recovered {
    recovery: Recovery,
    version: PolicyVersion,
    seen: IdSet,
    ledger: Ledger,
    journal: SharedJournal,
    outcomes: Vec<GroupOutcome>,
}

struct Ended {
    version: PolicyVersion,
    weights: String,
    ledger: Ledger,
    finished: bool,
}

/// The training thread's ends of the channels.
struct Wires {
    events: mpsc::UnboundedSender<Event>,
    inbox: std_mpsc::Receiver<(Position, Arrival)>,
    slot: Slot,
    stop: CancellationToken,
    step: Arc<AtomicU64>,
}

pub(crate) async fn run_with(
    build: Build,
    outside: Outside,
    shutdown: CancellationToken,
) -> Result<LearnerSummary, LearnerError> {
    let checkpoints =
        Checkpoints::open(outside.disk.clone(), &checkpoint_dir(&outside.run_dir), outside.keep_last)?;
    let Some(epoch) = acquire(&outside, &checkpoints, &shutdown).await? else {
        return Err(LearnerError::Config("stopped while waiting for the learner's lease".into()));
    };
    checkpoints.claim(epoch)?;
    checkpoints.clean()?;
    let (events_in, events) = mpsc::unbounded_channel();
    let (inbox_in, inbox) = std_mpsc::channel();
    let (slot, snapshots) = watch::channel(None);
    let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
    let step = Arc::new(AtomicU64::new(0));
    let wires = Wires { events: events_in, inbox, slot, stop: stop.clone(), step: step.clone() };
    let thread = std::thread::Builder::new()
        .name("learner".into())
        .spawn(move || train(build, checkpoints, epoch, wires))
        .map_err(LearnerError::disk(&outside.run_dir, "start the training thread"))?;
    let stats = Arc::new(Mutex::new(None));
    let mut tasks = JoinSet::new();
    let publisher = Publisher {
        store: outside.store.clone(),
        epoch,
        keyframe_every: outside.keyframe_every,
        tokenizer: outside.tokenizer,
        stats: stats.clone(),
        abort: abort.clone(),
    };
    tasks.spawn(publisher.run(snapshots));
    tasks.spawn(renew(outside.queue.clone(), outside.holder.clone(), epoch, outside.lease, abort.clone()));
    let mut control = Control {
        outside,
        epoch,
        step,
        stats,
        stop,
        shutdown,
        inbox: Some(inbox_in),
        readings: None,
        last: None,
    };
    let result = control.run(events, &mut tasks).await;
    control.stop.cancel();
    // Ended means the slot's sender is gone: the publisher ends by itself once the last weights are out.
    drop(control.readings.take());
    if result.is_err() {
        abort.cancel();
    }
    let result = finish(result, tasks, &abort).await;
    tokio::task::spawn_blocking(move || thread.join().expect("the training thread does not panic"))
        .await
        .expect("joining does not panic");
    let summary = result?;
    if summary.end != LearnerEnd::Shutdown {
        control.retry("finish the run", || control.outside.queue.set_control(RunControl::Finished)).await?;
    }
    Ok(summary)
}

/// Waits for the publisher, then ends the rest.
async fn finish(
    result: Result<LearnerSummary, LearnerError>,
    mut tasks: JoinSet<Result<(), LearnerError>>,
    abort: &CancellationToken,
) -> Result<LearnerSummary, LearnerError> {
    let mut result = result;
    let patience = tokio::time::sleep(Duration::from_secs(30));
    tokio::pin!(patience);
    // Intake and publisher end by themselves; the lease is renewed until they have.
    while tasks.len() > 1 {
        tokio::select! {
            ended = tasks.join_next() => {
                if let (Some(Ok(Err(error))), true) = (ended, result.is_ok()) {
                    result = Err(error);
                }
            }
            () = &mut patience => break,
        }
    }
    abort.cancel();
    while tasks.join_next().await.is_some() {}
    result
}

async fn acquire(
    outside: &Outside,
    checkpoints: &Checkpoints,
    shutdown: &CancellationToken,
) -> Result<Option<u64>, LearnerError> {
    let mut told = false;
    while !shutdown.is_cancelled() {
        match outside.queue.acquire_learner(&outside.holder, checkpoints.epoch_floor()?).await {
            Ok(Some(epoch)) => return Ok(Some(epoch)),
            Ok(None) if !told => {
                tracing::info!(
                    holder = outside.holder,
                    "another learner holds the lease, waiting for it to end"
                );
                told = true;
            }
            Ok(None) => {}
            Err(error @ QueueError::Unavailable { .. }) => tracing::warn!(%error, "no lease yet"),
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = tokio::time::sleep(outside.lease / 3) => {}
        }
    }
    Ok(None)
}

async fn renew(
    queue: Arc<dyn RolloutQueue>,
    holder: String,
    epoch: u64,
    lease: Duration,
    abort: CancellationToken,
) -> Result<(), LearnerError> {
    loop {
        tokio::select! {
            () = abort.cancelled() => return Ok(()),
            () = tokio::time::sleep(lease / 3) => {}
        }
        match queue.renew_learner(&holder, epoch).await {
            Ok(()) => {}
            // Nobody else can take the lease either while the queue is away: go on with what is journalled.
            Err(error @ (QueueError::Unavailable { .. } | QueueError::DataLost { .. })) => {
                tracing::warn!(%error, "the lease could not be renewed");
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// The asynchronous side's own loop.
struct Control {
    outside: Outside,
    epoch: u64,
    step: Arc<AtomicU64>,
    stats: Arc<Mutex<Option<crate::publish::PublishStats>>>,
    stop: CancellationToken,
    shutdown: CancellationToken,
    inbox: Option<std_mpsc::Sender<(Position, Arrival)>>,
    readings: Option<mpsc::UnboundedSender<oneshot::Sender<Reading>>>,
    last: Option<Accounting>,
}

impl Control {
    async fn run(
        &mut self,
        mut events: mpsc::UnboundedReceiver<Event>,
        tasks: &mut JoinSet<Result<(), LearnerError>>,
    ) -> Result<LearnerSummary, LearnerError> {
        let started = Instant::now();
        let mut poll = tokio::time::interval(Duration::from_millis(200));
        let mut why = LearnerEnd::StepsDone;
        let mut recovery = Recovery::default();
        let shutdown = self.shutdown.clone();
        loop {
            tokio::select! {
                event = events.recv() => match event.expect("the training thread says when it ends") {
                    Event::Recovered(recovered) => {
                        recovery = recovered.recovery.clone();
                        self.recovered(*recovered, tasks).await?;
                    }
                    Event::Step(report, outcomes) => self.step(*report, outcomes).await?,
                    Event::Outcomes(outcomes) => self.report(&outcomes).await?,
                    Event::Ended(ended) => {
                        let ended = ended?;
                        let end = if ended.finished { LearnerEnd::StepsDone } else { why };
                        let Ended { version, weights, ledger, .. } = *ended;
                        return Ok(LearnerSummary { version, weights, ledger, accounting: self.last, recovery, end });
                    }
                },
                Some(ended) = tasks.join_next() => {
                    ended.expect("no task panics")?;
                }
                () = shutdown.cancelled(), if !self.stop.is_cancelled() => {
                    why = LearnerEnd::Shutdown;
                    self.stop.cancel();
                }
                _ = poll.tick(), if !self.stop.is_cancelled() => {
                    if self.outside.time_limit.is_some_and(|limit| started.elapsed() >= limit) {
                        why = LearnerEnd::TimeLimit;
                        self.stop.cancel();
                    } else if matches!(self.outside.queue.control().await, Ok(RunControl::Drain | RunControl::Finished)) {
                        why = LearnerEnd::Drained;
                        self.stop.cancel();
                    }
                }
            }
        }
    }

    /// The training thread is where the last learner was: tell everyone, open the door.
    async fn recovered(
        &mut self,
        recovered: Recovered,
        tasks: &mut JoinSet<Result<(), LearnerError>>,
    ) -> Result<(), LearnerError> {
        let version = recovered.version;
        tracing::info!(%version, ?recovered.recovery, "learner is ready");
        self.retry("report progress", || self.outside.queue.set_progress(self.epoch, version)).await?;
        self.report(&recovered.outcomes).await?;
        let (ask, readings) = mpsc::unbounded_channel();
        self.readings = Some(ask);
        let intake = Intake {
            queue: self.outside.queue.clone(),
            epoch: self.epoch,
            door: Door::new(&self.outside.spec, version, self.step.clone()),
            journal: recovered.journal,
            seen: recovered.seen,
            received: recovered.ledger.received,
            inbox: self.inbox.take().expect("recovery happens once"),
            readings,
            stop: self.stop.clone(),
        };
        tasks.spawn(intake.run());
        Ok(())
    }

    async fn step(&mut self, report: StepReport, outcomes: Vec<GroupOutcome>) -> Result<(), LearnerError> {
        // Progress first: a task issued because a slot came free is to be sampled by the new weights.
        let version = report.version;
        self.retry("report progress", || self.outside.queue.set_progress(self.epoch, version)).await?;
        self.report(&outcomes).await?;
        let mut line = report.line;
        if let Some(stats) = *self.stats.lock().expect("no holder of the lock panics") {
            stats.write(&mut line);
        }
        if let Some(reading) = self.reading().await {
            self.last = Some(account(&reading, &report.ledger));
            write_accounting(&mut line, &reading, self.last.as_ref().expect("just set"));
        }
        self.outside.metrics.step(&line);
        Ok(())
    }

    async fn report(&self, outcomes: &[GroupOutcome]) -> Result<(), LearnerError> {
        for outcome in outcomes {
            self.retry("report an outcome", || self.outside.queue.report(self.epoch, outcome)).await?;
        }
        Ok(())
    }

    async fn reading(&self) -> Option<Reading> {
        let (reply, answer) = oneshot::channel();
        self.readings.as_ref()?.send(reply).ok()?;
        answer.await.ok()
    }

    /// Repeats a call while the queue is away. Refused by a newer epoch, it is an error.
    async fn retry<F, R>(&self, what: &'static str, call: F) -> Result<(), LearnerError>
    where
        F: Fn() -> R,
        R: Future<Output = Result<(), QueueError>>,
    {
        let mut pause = Duration::from_millis(50);
        loop {
            match call().await {
                Ok(()) => return Ok(()),
                Err(error @ (QueueError::Unavailable { .. } | QueueError::DataLost { .. })) => {
                    tracing::warn!(%error, what, "queue is away");
                    tokio::select! {
                        () = self.shutdown.cancelled() => return Ok(()),
                        () = tokio::time::sleep(pause) => pause = (2 * pause).min(Duration::from_secs(5)),
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Where every rollout is, at one moment.
fn account(reading: &Reading, ledger: &Ledger) -> Accounting {
    let counts = &reading.counts;
    // What the door let in and the training thread has not settled is held here.
    let held = reading.received - ledger.trained - ledger.dropped.total();
    Accounting {
        issued: counts.issued,
        trained: ledger.trained,
        dropped: ledger.dropped,
        queued: counts.rollouts + counts.scored + held,
        in_flight: counts.issued.saturating_sub(counts.delivered),
    }
}

fn write_accounting(line: &mut Map<String, Value>, reading: &Reading, accounting: &Accounting) {
    line.insert("queue/depth".into(), json!(reading.counts.rollouts + reading.counts.scored));
    line.insert("queue/bytes".into(), json!(reading.counts.bytes));
    line.insert("queue/duplicates".into(), json!(reading.duplicates));
    line.insert("accounting/issued".into(), json!(accounting.issued));
    line.insert("accounting/trained".into(), json!(accounting.trained));
    for reason in freewheel_types::DropReason::ALL {
        line.insert(format!("accounting/dropped_{}", reason.name()), json!(accounting.dropped.get(reason)));
    }
    line.insert("accounting/queued".into(), json!(accounting.queued));
    line.insert("accounting/in_flight".into(), json!(accounting.in_flight));
    line.insert("accounting/imbalance".into(), json!(accounting.imbalance()));
    if accounting.imbalance() != 0 {
        tracing::error!(
            ?accounting,
            imbalance = accounting.imbalance(),
            "rollouts are missing or counted twice"
        );
    }
}

/// The training thread.
fn train(build: Build, checkpoints: Checkpoints, epoch: u64, wires: Wires) {
    let result = train_to_end(build, checkpoints, epoch, &wires);
    wires.events.send(Event::Ended(result.map(Box::new))).ok();
}

fn train_to_end(
    build: Build,
    checkpoints: Checkpoints,
    epoch: u64,
    wires: &Wires,
) -> Result<Ended, LearnerError> {
    let (mut learner, recovery) = Learner::recover(build(), checkpoints, epoch)?;
    let publish_every = learner.config().publish_every;
    wires.step.store(learner.policy().step(), Ordering::Release);
    publish(&learner, wires);
    let recovered = Recovered {
        recovery,
        version: learner.policy().version(),
        seen: learner.seen().clone(),
        ledger: *learner.ledger(),
        journal: learner.journal(),
        outcomes: learner.take_outcomes(),
    };
    wires.events.send(Event::Recovered(Box::new(recovered))).ok();
    while !learner.finished() && !wires.stop.is_cancelled() {
        take_arrivals(&mut learner, wires);
        let Some(report) = learner.try_step()? else {
            send_outcomes(&mut learner, wires);
            wait(&mut learner, wires);
            continue;
        };
        let step = report.version.step;
        wires.step.store(step, Ordering::Release);
        if step.is_multiple_of(publish_every) || learner.finished() {
            publish(&learner, wires);
        }
        let outcomes = learner.take_outcomes();
        wires.events.send(Event::Step(Box::new(report), outcomes)).ok();
        learner.checkpoint(false)?;
    }
    learner.checkpoint(true)?;
    Ok(Ended {
        version: learner.policy().version(),
        weights: learner.policy().digest().to_string(),
        ledger: *learner.ledger(),
        finished: learner.finished(),
    })
}

fn take_arrivals(learner: &mut Learner, wires: &Wires) {
    while let Ok((at, arrival)) = wires.inbox.try_recv() {
        learner.accept(arrival, at);
    }
}

/// Waits for an arrival, but looks up now and then.
fn wait(learner: &mut Learner, wires: &Wires) {
    let since = Instant::now();
    if let Ok((at, arrival)) = wires.inbox.recv_timeout(Duration::from_millis(50)) {
        learner.accept(arrival, at);
    }
    learner.waited(since.elapsed().as_secs_f64());
}

fn send_outcomes(learner: &mut Learner, wires: &Wires) {
    let outcomes = learner.take_outcomes();
    if !outcomes.is_empty() {
        wires.events.send(Event::Outcomes(outcomes)).ok();
    }
}

fn publish(learner: &Learner, wires: &Wires) {
    let snapshot =
        Snapshot { version: learner.policy().version(), params: learner.policy().weights().clone() };
    wires.slot.send_replace(Some(Arc::new(snapshot)));
}
