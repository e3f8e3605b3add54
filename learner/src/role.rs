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

mod control;
mod parts;
mod thread;

use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use freewheel_model::{LoadedModel, ModelSpec};
use freewheel_queue::{PolicyStore, QueueError, RolloutQueue, RunControl};
use freewheel_types::{Accounting, Digest, PolicyVersion};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use parts::{RunShape, replay};

use crate::LearnerError;
use crate::assembly::Ledger;
use crate::checkpoint::Checkpoints;
use crate::config::LearnerConfig;
use crate::core::{CurriculumSource, LearnerParts, Recovery, checkpoint_dir};
use crate::disk::{Disk, SystemDisk};
use crate::dual::DualConfig;
use crate::metrics::MetricsSink;
use crate::publish::Publisher;
use crate::trainer::PromptImages;
use control::Control;
use parts::parts;
use thread::Wires;

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
    /// Costs that are kept under limits.
    pub duals: DualConfig,
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
    let LearnerDeps { model, run_dir, group_size, max_new_tokens, duals, curriculum, metrics, .. } = deps;
    let outside = Outside {
        queue: deps.queue,
        store: deps.store,
        holder: deps.holder,
        lease: deps.lease,
        metrics: metrics.clone(),
        time_limit: deps.time_limit,
        spec: model.model.spec().clone(),
        tokenizer: model.tokenizer.digest(),
        images: model.tokenizer.clone(),
        keep_last: config.keep_last,
        keyframe_every: config.keyframe_every,
        run_dir: run_dir.clone(),
        disk: disk.clone(),
    };
    let build = move || LearnerParts {
        group_size,
        max_new_tokens,
        duals,
        curriculum,
        metrics,
        ..parts(config, model, run_dir, disk)
    };
    run_with(Box::new(build), outside, shutdown).await
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
    pub images: Arc<dyn PromptImages>,
    pub keep_last: usize,
    pub keyframe_every: u64,
    pub run_dir: PathBuf,
    pub disk: Arc<dyn Disk>,
}

pub(crate) type Build = Box<dyn FnOnce() -> LearnerParts + Send>;

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
        .spawn(move || thread::train(build, checkpoints, epoch, wires))
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
