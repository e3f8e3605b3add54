//! The in-memory backend: everything in one process, one lock, same rules as Redis.
//!
//! Callers wait on a notification, never inside the lock. Payloads are held encoded, so that byte caps, checks
//! and damaged entries behave as they do over the network. Nothing here survives the process: the journal and
//! the checkpoint do.

mod state;
mod store;
mod stream;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use freewheel_types::{
    ActorId, GroupOutcome, PolicyVersion, Rollout, RolloutId, RunId, ScoredRollout, Task, TaskId, codec,
};
use state::State;
pub use store::MemoryStore;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::clock::{Clock, SystemClock};
use crate::{
    DeadLetter, Delivery, LeasedRollout, LeasedTask, PutOutcome, QueueConfig, QueueCounts, QueueError,
    RolloutQueue, RunControl,
};

/// How often a waiting call looks again without being told to: leases run out silently.
const POLL: Duration = Duration::from_millis(20);

/// All streams of one run, in this process.
pub struct MemoryQueue {
    run: RunId,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    changed: Notify,
}

impl MemoryQueue {
    /// An empty queue.
    pub fn new(run: RunId, config: &QueueConfig) -> Arc<Self> {
        Self::with_clock(run, config, Arc::new(SystemClock::default()))
    }

    /// An empty queue whose leases follow `clock`.
    pub fn with_clock(run: RunId, config: &QueueConfig, clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self { run, clock, state: Mutex::new(State::new(config)), changed: Notify::new() })
    }

    /// The run this queue belongs to.
    pub fn run(&self) -> &RunId {
        &self.run
    }

    /// Bad payloads put aside so far, oldest first.
    pub fn dead_letters(&self) -> Vec<DeadLetter> {
        self.lock().dead_letters.iter().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and wakes whoever waits for it.
    fn change<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let result = f(&mut self.lock());
        self.changed.notify_waiters();
        result
    }

    /// Takes until something comes, time is up, or the run has finished.
    async fn take<T>(
        &self,
        wait: Duration,
        mut f: impl FnMut(&mut State, Duration) -> Result<Vec<T>, QueueError> + Send,
    ) -> Result<Vec<T>, QueueError> {
        let deadline = Instant::now() + wait;
        loop {
            let notified = self.changed.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            let (items, finished) = {
                let mut state = self.lock();
                (f(&mut state, self.clock.now())?, state.control == RunControl::Finished)
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if !items.is_empty() || left.is_zero() {
                return Ok(items);
            }
            if finished {
                return Err(QueueError::Stopping);
            }
            let _ = tokio::time::timeout(left.min(POLL), notified).await;
        }
    }
}

#[async_trait]
impl RolloutQueue for MemoryQueue {
    async fn issue(&self, task: &Task) -> Result<(), QueueError> {
        let payload = codec::encode_task(task)?;
        self.change(|state| state.issue(task, payload));
        Ok(())
    }

    async fn outcomes(&self, max: usize, wait: Duration) -> Result<Vec<GroupOutcome>, QueueError> {
        self.take(wait, |state, _| {
            let n = max.min(state.outcomes.len());
            Ok(state.outcomes.drain(..n).collect())
        })
        .await
    }

    async fn lease_tasks(
        &self,
        actor: &ActorId,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<LeasedTask>, QueueError> {
        self.take(wait, |state, now| Ok(state.lease_tasks(&actor.0, max, now))).await
    }

    async fn extend_task(&self, actor: &ActorId, _task: TaskId, lease: &str) -> Result<bool, QueueError> {
        Ok(self.lock().extend_task(&actor.0, lease, self.clock.now()))
    }

    async fn delivered(&self, task: &Task) -> Result<Vec<bool>, QueueError> {
        Ok(self.lock().delivered_of(task.id, task.group_size).collect())
    }

    async fn put_rollout(&self, rollout: &Rollout) -> Result<PutOutcome, QueueError> {
        let payload = codec::encode_rollout(rollout)?;
        Ok(self.change(|state| state.put_rollout(rollout.id, payload)))
    }

    async fn put_scored(&self, scored: &ScoredRollout) -> Result<PutOutcome, QueueError> {
        let payload = codec::encode_scored(scored)?;
        Ok(self.change(|state| state.put_scored(scored.rollout.id, payload)))
    }

    async fn finish_task(&self, _actor: &ActorId, task: TaskId, lease: &str) -> Result<(), QueueError> {
        self.change(|state| state.finish_task(task, lease))
    }

    async fn lease_rollouts(
        &self,
        worker: &str,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<LeasedRollout>, QueueError> {
        self.take(wait, |state, now| Ok(state.lease_rollouts(worker, max, now))).await
    }

    async fn forward_scored(
        &self,
        _worker: &str,
        lease: &str,
        scored: &ScoredRollout,
    ) -> Result<(), QueueError> {
        let payload = codec::encode_scored(scored)?;
        self.change(|state| state.forward(lease, scored.rollout.id, payload))
    }

    async fn acquire_learner(&self, holder: &str, floor: u64) -> Result<Option<u64>, QueueError> {
        Ok(self.change(|state| state.acquire_learner(holder, floor, self.clock.now())))
    }

    async fn renew_learner(&self, holder: &str, epoch: u64) -> Result<(), QueueError> {
        self.lock().renew_learner(holder, epoch, self.clock.now())
    }

    async fn fetch_scored(
        &self,
        epoch: u64,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, QueueError> {
        self.take(wait, |state, now| state.fetch_scored(epoch, max, now)).await
    }

    async fn ack_scored(&self, epoch: u64, deliveries: &[String]) -> Result<(), QueueError> {
        self.change(|state| state.ack_scored(epoch, deliveries))
    }

    async fn report(&self, epoch: u64, outcome: &GroupOutcome) -> Result<(), QueueError> {
        self.change(|state| {
            state.fence(epoch, "reporting an outcome")?;
            state.outcomes.push_back(outcome.clone());
            Ok(())
        })
    }

    async fn dead_letter(
        &self,
        source: &str,
        rollout: Option<RolloutId>,
        reason: &str,
    ) -> Result<(), QueueError> {
        let letter = DeadLetter { source: source.to_owned(), rollout, reason: reason.to_owned() };
        self.lock().dead_letter(letter);
        Ok(())
    }

    async fn counts(&self) -> Result<QueueCounts, QueueError> {
        Ok(self.lock().counts())
    }

    async fn control(&self) -> Result<RunControl, QueueError> {
        Ok(self.lock().control)
    }

    async fn set_control(&self, control: RunControl) -> Result<(), QueueError> {
        self.change(|state| state.control = control);
        Ok(())
    }

    async fn set_progress(&self, epoch: u64, version: PolicyVersion) -> Result<(), QueueError> {
        self.change(|state| {
            state.fence(epoch, "reporting progress")?;
            state.progress = version;
            Ok(())
        })
    }

    async fn progress(&self) -> Result<PolicyVersion, QueueError> {
        Ok(self.lock().progress)
    }
}
