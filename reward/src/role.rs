//! The reward role: leases rollouts, scores them on threads of its own, forwards them scored.
//!
//! ```text
//! async: lease ─► permit ─► job ─► await (deadline) ─► forward_scored
//! threads:                   └► RewardStack::score ─┘
//! ```
//!
//! A job is handed over only when a thread is free, so its deadline counts scoring, not waiting. A thread that
//! does not come back in time is replaced (up to a limit) and its rollout forwarded unscored. Nothing is lost
//! when the role dies: a lease that ends is given to another worker, and forwarding is idempotent.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use freewheel_queue::{LeasedRollout, QueueError, RolloutQueue, RunControl};
use freewheel_types::{RewardRecord, Rollout, ScoredRollout, Verdict};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{Completion, RewardConfig, RewardError, RewardStack};

/// How long one lease call may wait for work, which is also how soon the role sees that the run is over.
const LEASE_WAIT: Duration = Duration::from_millis(250);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Threads that may hang before the role stops leasing.
const HUNG_MAX: usize = 32;
/// Past the stack's own deadline, time for it to say itself which component was late.
const GRACE: Duration = Duration::from_millis(200);

/// What the role needs from outside.
pub struct RewardDeps {
    /// The streams of the run.
    pub queue: Arc<dyn RolloutQueue>,
    /// Name of this worker within the run, for leases.
    pub worker: String,
}

/// What the role did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RewardSummary {
    /// Rollouts forwarded with a reward.
    pub scored: u64,
    /// Rollouts forwarded without one.
    pub unscored: u64,
}

/// Scores rollouts until the run is finished or `shutdown` is cancelled; rollouts in hand are forwarded first.
///
/// # Errors
/// If the configuration is unusable or the queue fails in a way that waiting does not cure.
pub async fn run(
    config: RewardConfig,
    deps: RewardDeps,
    shutdown: CancellationToken,
) -> Result<RewardSummary, RewardError> {
    let stack = Arc::new(RewardStack::new(&config).map_err(RewardError::Config)?);
    let asked = tokio::task::spawn_blocking({
        let stack = Arc::clone(&stack);
        move || stack.check_at_start()
    });
    tokio::select! {
        // A panic in there is a bug of ours and goes on here.
        checked = asked => checked.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic())).map_err(RewardError::Config)?,
        () = shutdown.cancelled() => return Ok(RewardSummary::default()),
    }
    let role = Arc::new(Role {
        pool: Pool::start(Arc::clone(&stack), &deps.worker, config.workers)?,
        stack,
        queue: deps.queue,
        worker: deps.worker,
        scored: AtomicU64::new(0),
        unscored: AtomicU64::new(0),
    });
    let slots = Arc::new(Semaphore::new(config.workers));
    let mut jobs: JoinSet<Result<(), RewardError>> = JoinSet::new();
    let mut backoff = BACKOFF_MIN;
    // A reward server's long absence: whether the last look found it, and whether it was told.
    let (mut away, mut told) = (false, false);
    let outcome = loop {
        while let Some(done) = jobs.try_join_next() {
            joined(done)?;
        }
        // One free thread first: a rollout is leased only by who can start on it.
        let permit = tokio::select! {
            permit = Arc::clone(&slots).acquire_owned() => permit.expect("the semaphore is never closed"),
            () = shutdown.cancelled() => break Ok(()),
        };
        if let Some(wait) = role.stack.away() {
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(worker = %role.worker, "a reward server has not answered for long; rollouts wait for it");
            }
            away = true;
            tokio::select! {
                () = tokio::time::sleep(wait.min(LEASE_WAIT)) => {}
                () = shutdown.cancelled() => break Ok(()),
            }
            if role.finished().await {
                break Ok(());
            }
            continue;
        }
        // Where a server was away, one rollout finds out whether it still is.
        let trial = std::mem::take(&mut away);
        let max = if trial { 1 } else { 1 + slots.available_permits() };
        told &= trial;
        let leased = tokio::select! {
            leased = role.queue.lease_rollouts(&role.worker, max, LEASE_WAIT) => leased,
            () = shutdown.cancelled() => break Ok(()),
        };
        match leased {
            Ok(leased) if leased.is_empty() => {
                backoff = BACKOFF_MIN;
                if role.finished().await {
                    break Ok(());
                }
            }
            Ok(leased) => {
                backoff = BACKOFF_MIN;
                role.dispatch(leased, permit, &slots, &mut jobs).await;
                while trial && let Some(done) = jobs.join_next().await {
                    joined(done)?;
                }
            }
            Err(QueueError::Stopping) => break Ok(()),
            Err(error) if transient(&error) => {
                tracing::warn!(worker = %role.worker, %error, "waiting for the queue");
                if pause(&mut backoff, &shutdown).await {
                    break Ok(());
                }
            }
            Err(source) => break Err(role.failed("leasing rollouts", source)),
        }
    };
    while let Some(done) = jobs.join_next().await {
        joined(done)?;
    }
    outcome.map(|()| role.summary())
}

fn joined(done: Result<Result<(), RewardError>, tokio::task::JoinError>) -> Result<(), RewardError> {
    match done {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Ok(()),
    }
}

fn transient(error: &QueueError) -> bool {
    // DataLost: the prompt pool re-initialises the queue and issues again; until then there is nothing to lease.
    matches!(error, QueueError::Unavailable { .. } | QueueError::DataLost { .. } | QueueError::Payload(_))
}

/// Sleeps for `backoff` and doubles it; true if shutdown came first.
async fn pause(backoff: &mut Duration, shutdown: &CancellationToken) -> bool {
    let wait = *backoff;
    *backoff = (wait * 2).min(BACKOFF_MAX);
    tokio::select! {
        () = tokio::time::sleep(wait) => false,
        () = shutdown.cancelled() => true,
    }
}

struct Role {
    pool: Pool,
    stack: Arc<RewardStack>,
    queue: Arc<dyn RolloutQueue>,
    worker: String,
    scored: AtomicU64,
    unscored: AtomicU64,
}

impl Role {
    async fn dispatch(
        self: &Arc<Self>,
        leased: Vec<LeasedRollout>,
        permit: OwnedSemaphorePermit,
        slots: &Arc<Semaphore>,
        jobs: &mut JoinSet<Result<(), RewardError>>,
    ) {
        let mut permit = Some(permit);
        for item in leased {
            let permit = match permit.take() {
                Some(permit) => permit,
                None => Arc::clone(slots).acquire_owned().await.expect("the semaphore is never closed"),
            };
            let role = Arc::clone(self);
            jobs.spawn(async move { role.handle(item, permit).await });
        }
    }

    async fn handle(&self, item: LeasedRollout, permit: OwnedSemaphorePermit) -> Result<(), RewardError> {
        let LeasedRollout { rollout, lease } = item;
        let (rollout, record) = self.pool.score(rollout, &self.stack).await;
        drop(permit);
        let counter = match record.verdict {
            Verdict::Scored { .. } => &self.scored,
            Verdict::Unscored { ref reason } => {
                tracing::debug!(rollout = %rollout.id, reason, "unscored");
                &self.unscored
            }
        };
        let scored = ScoredRollout { rollout, reward: record };
        let mut backoff = BACKOFF_MIN;
        loop {
            match self.queue.forward_scored(&self.worker, &lease, &scored).await {
                Ok(()) => {
                    counter.fetch_add(1, Ordering::Relaxed);
                    return Ok(());
                }
                Err(QueueError::Stopping) => return Ok(()),
                Err(QueueError::DataLost { .. }) => return Ok(()), // will be issued and drawn again
                Err(error) if transient(&error) => {
                    if self.finished().await {
                        return Ok(());
                    }
                    tracing::warn!(worker = %self.worker, %error, rollout = %scored.rollout.id, "cannot forward, trying again");
                    tokio::time::sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF_MAX);
                }
                Err(source) => return Err(self.failed("forwarding a scored rollout", source)),
            }
        }
    }

    async fn finished(&self) -> bool {
        matches!(self.queue.control().await, Ok(RunControl::Finished))
    }

    fn failed(&self, what: &'static str, source: QueueError) -> RewardError {
        RewardError::Queue { worker: self.worker.clone(), what, source }
    }

    fn summary(&self) -> RewardSummary {
        RewardSummary {
            scored: self.scored.load(Ordering::Relaxed),
            unscored: self.unscored.load(Ordering::Relaxed),
        }
    }
}

struct Job {
    rollout: Arc<Rollout>,
    reply: oneshot::Sender<RewardRecord>,
}

/// Threads that score. They end when the pool is dropped.
struct Pool {
    jobs: flume::Sender<Job>,
    inbox: flume::Receiver<Job>,
    name: String,
    hung: AtomicU64,
}

impl Pool {
    fn start(stack: Arc<RewardStack>, worker: &str, threads: usize) -> Result<Self, RewardError> {
        let (jobs, inbox) = flume::bounded(threads);
        let pool = Self { jobs, inbox, name: worker.to_owned(), hung: AtomicU64::new(0) };
        for _ in 0..threads {
            pool.spawn(&stack).map_err(|source| RewardError::Thread { worker: worker.to_owned(), source })?;
        }
        Ok(pool)
    }

    fn spawn(&self, stack: &Arc<RewardStack>) -> std::io::Result<()> {
        let (inbox, stack) = (self.inbox.clone(), Arc::clone(stack));
        let body = move || {
            while let Ok(Job { rollout, reply }) = inbox.recv() {
                let record = stack.score(&Completion::from(&*rollout));
                drop(rollout); // before the reply, so that the other side owns it alone
                if reply.send(record).is_err() {
                    return; // too late: this thread has been replaced
                }
            }
        };
        std::thread::Builder::new().name(format!("reward-{}", self.name)).spawn(body).map(drop)
    }

    /// Scores on a thread; a thread that hangs costs the rollout its reward and is replaced.
    async fn score(&self, rollout: Rollout, stack: &Arc<RewardStack>) -> (Rollout, RewardRecord) {
        let rollout = Arc::new(rollout);
        let (reply, answer) = oneshot::channel();
        let job = Job { rollout: Arc::clone(&rollout), reply };
        let record = match self.jobs.send_async(job).await {
            Err(_) => stack.unscored("no scoring thread is left"),
            Ok(()) => match tokio::time::timeout(stack.deadline() + GRACE, answer).await {
                Ok(Ok(record)) => record,
                Ok(Err(_)) => stack.unscored("the scoring thread ended"),
                Err(_) => {
                    let hung = self.hung.fetch_add(1, Ordering::Relaxed) as usize + 1;
                    tracing::error!(worker = %self.name, hung, rollout = %rollout.id, "a verifier hangs; its thread is replaced");
                    if hung <= HUNG_MAX
                        && let Err(error) = self.spawn(stack)
                    {
                        tracing::error!(worker = %self.name, %error, "cannot start a scoring thread");
                    }
                    stack.unscored(format!("not done within deadline_ms = {}", stack.deadline().as_millis()))
                }
            },
        };
        (Arc::unwrap_or_clone(rollout), record)
    }
}
