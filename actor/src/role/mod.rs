//! The actor role: joins an engine with the rollout queue and the policy store.
//!
//! ```text
//!   weights ──Swap──►┐                         admit    leases tasks when there is room, holds them back until the
//!   admit ──Submit──►├─► engine thread                  weights are as new as the task asks
//!   deliver ◄─Finished─┘                       deliver  puts every finished sample at once, finishes whole tasks
//!                                              renew    extends leases every third of their time
//!                                              weights  pulls, checks, applies to a shadow copy, hands over
//!                                              watch    run control, heartbeat, metrics
//! ```
//!
//! Who waits for whom: a full queue stops `deliver`, which stops admission; a full channel of finished samples stops
//! the engine. Nobody waits for the learner. An actor that dies loses what it had not put; the leases lapse and another
//! actor redoes just that, with the same random numbers.

mod admit;
mod backoff;
mod deliver;
mod engine_thread;
mod held;
mod loader;
mod metrics;
mod weights;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use freewheel_queue::{PolicyStore, QueueError, RolloutQueue, RunControl};
use freewheel_types::{ActorId, PolicyVersion, SamplingParams, TaskId};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use loader::{PolicyLoader, PromptCodec, Weights};
pub use metrics::ActorMetrics;

use crate::engine::{Engine, StopSpec, TextDecoder};
use crate::{ActorConfig, ActorError};
use admit::Admission;
use backoff::Backoff;
use engine_thread::{Gauge, Wires};
use held::{Held, HeldTask};
use weights::Puller;

/// How often run control is read and metrics are told.
const WATCH: Duration = Duration::from_millis(200);
/// How often an actor says which version it serves.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// What an actor works with.
pub struct ActorDeps<L: PolicyLoader> {
    /// Its name within the run.
    pub actor: ActorId,
    /// Where tasks come from and rollouts go.
    pub queue: Arc<dyn RolloutQueue>,
    /// Where weights come from.
    pub store: Arc<dyn PolicyStore>,
    /// Makes weights of payloads, and the backend.
    pub loader: L,
    /// Text to ids and back.
    pub codec: Arc<dyn PromptCodec>,
    /// End-of-sequence ids of the model.
    pub eos_ids: Vec<u32>,
    /// Whether the last sample of every group is a greedy one: what the learner compares the others with.
    pub greedy_last: bool,
    /// How long a lease lasts: `queue.lease_s`.
    pub lease: Duration,
    /// Told several times a second.
    pub metrics: watch::Sender<ActorMetrics>,
}

/// What the tasks of one actor share.
struct Shared {
    config: ActorConfig,
    greedy_last: bool,
    actor: ActorId,
    queue: Arc<dyn RolloutQueue>,
    held: Held,
    busy: watch::Sender<bool>,
    counters: Counters,
    /// No new tasks.
    stop: CancellationToken,
    /// No further tries: whatever is not delivered is left to others.
    abandon: CancellationToken,
}

#[derive(Default)]
struct Counters {
    rollouts: AtomicU64,
    duplicates: AtomicU64,
    refused: AtomicU64,
    busy: AtomicU64,
    bad_weights: Arc<AtomicU64>,
}

impl Shared {
    /// How sample `index` of a task of `group_size` is drawn.
    fn sampling(&self, index: u32, group_size: u32) -> SamplingParams {
        match self.greedy_last && index + 1 == group_size {
            true => SamplingParams::GREEDY,
            false => self.config.sampling(),
        }
    }

    /// Tries as long as the queue is out of reach; [`QueueError::Stopping`] if told to give up meanwhile.
    async fn retry<T, F>(&self, what: &'static str, mut call: impl FnMut() -> F) -> Result<T, QueueError>
    where
        F: Future<Output = Result<T, QueueError>>,
    {
        let mut backoff = Backoff::new(&format!("{}/{what}", self.actor));
        loop {
            match call().await {
                Err(error @ (QueueError::Unavailable { .. } | QueueError::DataLost { .. })) => {
                    warn!(what, error = &error as &dyn std::error::Error, "trying again");
                }
                done => return done,
            }
            if !backoff.wait(&self.abandon).await {
                return Err(QueueError::Stopping);
            }
        }
    }

    /// Ends a task whose samples are all delivered; whoever else has it now will find that out.
    async fn finish(&self, held: &HeldTask) {
        let task = held.task.id;
        if held.lost {
            return;
        }
        match self.retry("finishing a task", || self.queue.finish_task(&self.actor, task, &held.lease)).await
        {
            Ok(()) | Err(QueueError::Stopping) => {}
            // The lease lapses, the task is handed out again, and whatever the queue misses is redone.
            Err(error) => warn!(%task, error = &error as &dyn std::error::Error, "task not finished"),
        }
    }

    /// Ends a task that can never run: the prompt pool learns why and sets the prompt aside.
    async fn refuse(&self, task: TaskId, reason: &str) {
        warn!(%task, reason, "task refused");
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
        let Some(held) = self.held.drop_task(task) else { return };
        let abandon = || self.queue.abandon_task(&self.actor, &held.task, &held.lease, reason);
        match self.retry("abandoning a task", abandon).await {
            Ok(()) | Err(QueueError::Stopping) => {}
            // The lease lapses; the queue counts the deliveries and abandons it in the end.
            Err(error) => warn!(%task, error = &error as &dyn std::error::Error, "task not abandoned"),
        }
    }

    fn set_busy(&self, busy: bool) {
        self.busy.send_if_modified(|was| std::mem::replace(was, busy) != busy);
    }

    async fn wait_not_busy(&self) {
        let mut busy = self.busy.subscribe();
        // The sender lives as long as `self`, so waiting cannot fail.
        let _ = busy.wait_for(|&busy| !busy).await;
    }
}

/// Runs one actor until `shutdown`, until the run is finished, or until something breaks that waiting does not cure.
/// On `shutdown` it takes no new tasks, lets running samples go on for `drain_s`, and leaves the rest to other actors.
/// Returns its last metrics.
///
/// # Errors
/// A setting that cannot work with this model ([`ActorError::Config`]), or a bug ([`ActorError::Died`]). An
/// unreachable queue is not an error: the actor tries on.
pub async fn run<L: PolicyLoader>(
    config: ActorConfig,
    deps: ActorDeps<L>,
    shutdown: CancellationToken,
) -> Result<ActorMetrics, ActorError> {
    let ActorDeps { actor, queue, store, loader, codec, eos_ids, greedy_last, lease, metrics } = deps;
    let (stop, abandon) = (shutdown.child_token(), CancellationToken::new());
    let counters = Counters::default();
    let mut puller = Puller::new(store.clone(), loader, &actor.0, counters.bad_weights.clone());
    let shared = Arc::new(Shared {
        config,
        greedy_last,
        actor,
        queue,
        held: Held::default(),
        busy: watch::Sender::new(false),
        counters,
        stop,
        abandon,
    });
    // However this function ends, so do its helpers.
    let _give_up = shared.abandon.clone().drop_guard();
    let control = tokio::spawn(follow_control(shared.clone()));
    let Some((version, weights)) = puller.next(|| None, &shared.stop).await? else {
        return Ok(ActorMetrics::default());
    };
    info!(actor = %shared.actor, %version, "first weights are here");
    let backend = puller.loader().backend(weights);
    let decoder: Arc<dyn TextDecoder> = codec.clone();
    let engine = Engine::new(backend, decoder, shared.config.engine())?;

    let (commands, engine_commands) = flume::bounded(64);
    let (engine_events, events) = flume::bounded(4);
    let (engine_retired, retired) = flume::bounded(4);
    let gauge = Gauge::default();
    let wires = Wires {
        commands: engine_commands,
        events: engine_events,
        retired: engine_retired,
        gauge: gauge.clone(),
    };
    let name = format!("engine-{}", shared.actor);
    let thread = std::thread::Builder::new().name(name).spawn(move || engine_thread::drive(engine, &wires));
    let thread = thread.map_err(|_| ActorError::Died("start of the engine thread"))?;

    let version_sender = watch::Sender::new(version);
    let stop_ids: Vec<u32> =
        eos_ids.into_iter().chain(shared.config.stop_token_ids.iter().copied()).collect();
    let admission = Admission {
        shared: shared.clone(),
        codec,
        stop_spec: StopSpec { ids: stop_ids.into(), strings: shared.config.stop.clone().into() },
        commands: commands.clone(),
        version: version_sender.subscribe(),
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(beat(shared.clone(), store, gauge.clone(), metrics.clone()));
    tasks.spawn(renew(shared.clone(), lease));
    tasks.spawn(weights::follow(puller, commands.clone(), retired, version_sender, shared.stop.clone()));
    tasks.spawn(admission.run());
    tasks.spawn(deliver::deliver(shared.clone(), events));

    let result = supervise(&shared, &mut tasks, commands).await;
    let joined = tokio::task::spawn_blocking(move || thread.join()).await;
    let _ = control.await;
    result?;
    if !matches!(joined, Ok(Ok(()))) {
        return Err(ActorError::Died("engine thread"));
    }
    Ok(*metrics.borrow())
}

/// Waits for the end: drains when told to stop, abandons when told so or when time is up, then joins every task.
/// `engine_alive` keeps the engine running until then.
async fn supervise<T>(
    shared: &Shared,
    tasks: &mut JoinSet<Result<(), ActorError>>,
    engine_alive: T,
) -> Result<(), ActorError> {
    let mut result = Ok(());
    let flatten =
        |joined: Result<Result<(), ActorError>, _>| joined.unwrap_or(Err(ActorError::Died("async task")));
    // Tasks end by themselves only after `stop`, with one exception: the engine thread died and `deliver` saw it.
    tokio::select! {
        () = shared.stop.cancelled() => {}
        Some(joined) = tasks.join_next() => result = flatten(joined),
    }
    shared.stop.cancel();
    if result.is_ok() {
        let drained = shared.held.until(|held| held.len() == 0);
        tokio::select! {
            () = drained => {}
            () = shared.abandon.cancelled() => {}
            () = tokio::time::sleep(Duration::from_secs_f64(shared.config.drain_s)) => {
                info!(tasks = shared.held.len(), "time is up, unfinished tasks are left to other actors");
            }
        }
    }
    shared.abandon.cancel();
    drop(engine_alive);
    while let Some(joined) = tasks.join_next().await {
        result = result.and(flatten(joined));
    }
    result
}

/// Ends the actor when the run has finished.
async fn follow_control(shared: Arc<Shared>) {
    let mut backoff = Backoff::new(&format!("{}/control", shared.actor));
    loop {
        tokio::select! {
            () = shared.abandon.cancelled() => return,
            () = tokio::time::sleep(WATCH) => {}
        }
        match shared.queue.control().await {
            Ok(RunControl::Finished) | Err(QueueError::Stopping) => {
                shared.abandon.cancel();
                shared.stop.cancel();
                return;
            }
            Ok(_) => backoff.reset(),
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "run control cannot be read");
                backoff.wait(&shared.abandon).await;
            }
        }
    }
}

/// Extends the leases in hand every third of their time.
async fn renew(shared: Arc<Shared>, lease: Duration) -> Result<(), ActorError> {
    loop {
        tokio::select! {
            () = shared.abandon.cancelled() => return Ok(()),
            () = tokio::time::sleep(lease / 3) => {}
        }
        for (task, token) in shared.held.leases() {
            match shared.queue.extend_task(&shared.actor, task, &token).await {
                Ok(true) => {}
                Ok(false) => {
                    warn!(%task, "another actor has the task now; late rollouts will be duplicates");
                    shared.held.mark_lost(task, &token);
                }
                Err(error) => warn!(%task, error = &error as &dyn std::error::Error, "lease not extended"),
            }
        }
    }
}

/// Tells metrics and which version is served.
async fn beat(
    shared: Arc<Shared>,
    store: Arc<dyn PolicyStore>,
    gauge: Gauge,
    metrics: watch::Sender<ActorMetrics>,
) -> Result<(), ActorError> {
    let began = Instant::now();
    let mut told: Option<(PolicyVersion, Instant)> = None;
    loop {
        let last = shared.abandon.is_cancelled();
        let snapshot = shared.metrics(&gauge, began.elapsed().as_secs_f64());
        metrics.send_replace(snapshot);
        if last {
            return Ok(());
        }
        let due = |(version, at): (PolicyVersion, Instant)| {
            Some(version) != snapshot.version || at.elapsed() >= HEARTBEAT
        };
        if let Some(version) = snapshot.version
            && told.is_none_or(due)
        {
            match store.heartbeat(&shared.actor, version).await {
                Ok(()) => told = Some((version, Instant::now())),
                Err(error) => warn!(error = &error as &dyn std::error::Error, "no heartbeat"),
            }
        }
        tokio::select! {
            () = shared.abandon.cancelled() => {}
            () = tokio::time::sleep(WATCH) => {}
        }
    }
}

impl Shared {
    fn metrics(&self, gauge: &Gauge, wall_s: f64) -> ActorMetrics {
        let (stats, version) = gauge.read();
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ActorMetrics {
            wall_s,
            version,
            tokens: stats.tokens,
            rows: stats.rows,
            rollouts: load(&self.counters.rollouts),
            duplicates: load(&self.counters.duplicates),
            refused: load(&self.counters.refused),
            busy: load(&self.counters.busy),
            bad_weights: load(&self.counters.bad_weights),
            slot_s: stats.slot_s,
            apply_pause_s: stats.swap_pause_s,
            apply_pause_s_max: stats.swap_pause_s_max,
            preemptions: stats.preemptions,
            prefix_tokens: stats.prefix_tokens,
            drafted: stats.drafted,
            draft_hits: stats.draft_hits,
            live: stats.live,
            waiting: stats.waiting,
            tasks: self.held.len(),
            kv_pages_used: stats.pages_used,
            kv_pages: stats.pages,
        }
    }
}
