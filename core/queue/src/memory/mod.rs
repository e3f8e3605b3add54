//! The in-memory backend: everything in one process, one lock, same rules as Redis.
//!
//! ```text
//! issue, put, forward ─► state, under the lock ─► id of the new entry ─► channel ─► whoever waits in a lease or fetch
//! ```
//!
//! **Waking up.** Nobody polls. New entries of a stream are in a flume channel; a call that found nothing waits at its end,
//! and an entry wakes exactly one waiter. What has no entry wakes everybody by a notification: the run's control flag, a new
//! learner's epoch. What happens in silence, a lease running out, has a timer: set to the moment the oldest lease ends.
//! Whatever is received goes back into the state, under the lock, before the call decides what to take; so a call that is
//! refused or dropped loses nothing.
//!
//! Payloads are held encoded, so that byte caps, checks and damaged entries behave as they do over the network. Nothing here
//! survives the process: the journal and the checkpoint do, and [`MemoryQueue::restore`] builds on them.

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
use stream::Feed;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::clock::{Clock, SystemClock};
use crate::{
    DeadLetter, Delivery, LeasedRollout, LeasedTask, PutOutcome, QueueConfig, QueueCounts, QueueError,
    RolloutQueue, RunControl,
};

/// All streams of one run, in this process.
pub struct MemoryQueue {
    run: RunId,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    /// Control flag or epoch changed, or something that was received is left over.
    changed: Notify,
}

/// Where a call looks for news.
struct Source<A> {
    feed: fn(&mut State) -> &mut Feed<A>,
    /// When the first lease runs out, where leases do.
    runs_out: fn(&State, Duration) -> Option<Duration>,
}

const TASKS: Source<u64> = Source {
    feed: |state| &mut state.tasks.new,
    runs_out: |state, now| Some(state.runs_out(state.tasks.silent_since(), now)),
};
const ROLLOUTS: Source<u64> = Source {
    feed: |state| &mut state.rollouts.new,
    runs_out: |state, now| Some(state.runs_out(state.rollouts.silent_since(), now)),
};
const SCORED: Source<u64> = Source { feed: |state| &mut state.scored.new, runs_out: |_, _| None };
const OUTCOMES: Source<GroupOutcome> = Source { feed: |state| &mut state.outcomes, runs_out: |_, _| None };

impl MemoryQueue {
    /// An empty queue.
    pub fn new(run: RunId, config: &QueueConfig) -> Arc<Self> {
        Self::with_clock(run, config, Arc::new(SystemClock::default()))
    }

    /// An empty queue whose leases follow `clock`.
    pub fn with_clock(run: RunId, config: &QueueConfig, clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self { run, clock, state: Mutex::new(State::new(config)), changed: Notify::new() })
    }

    /// Makes an empty queue the continuation of one that a process before this had: `issued` are all tasks the prompt pool ever
    /// issued, with their group sizes; `received` says which rollouts the learner has. Those are duplicates from now on, the
    /// counters go on, and a task that is issued again is redone only where a sample is missing. To be called before any role
    /// starts.
    pub fn restore(
        &self,
        issued: impl IntoIterator<Item = (TaskId, u32)>,
        received: impl Fn(RolloutId) -> bool,
    ) {
        let mut state = self.lock();
        issued.into_iter().for_each(|(task, group_size)| state.restore(task, group_size, &received));
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

    /// Changes what has no stream of its own and wakes everybody.
    fn change<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let result = f(&mut self.lock());
        self.changed.notify_waiters();
        result
    }

    /// Takes until something comes, time is up, or the run has finished.
    async fn take<A: Send, T>(
        &self,
        source: Source<A>,
        wait: Duration,
        mut f: impl FnMut(&mut State, Duration) -> Result<Vec<T>, QueueError> + Send,
    ) -> Result<Vec<T>, QueueError> {
        let deadline = Instant::now() + wait;
        let receiver = (source.feed)(&mut self.lock()).receiver();
        let mut received = None;
        loop {
            let notified = self.changed.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            let (items, finished, quiet) = {
                let (mut state, now) = (self.lock(), self.clock.now());
                received.take().into_iter().for_each(|item| (source.feed)(&mut state).hand_in(item));
                let items = f(&mut state, now);
                if (source.feed)(&mut state).has_leftovers() {
                    self.changed.notify_waiters();
                }
                let runs_out = (source.runs_out)(&state, now);
                (items?, state.control == RunControl::Finished, runs_out.map(|at| at.saturating_sub(now)))
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if !items.is_empty() || left.is_zero() {
                return Ok(items);
            }
            if finished {
                return Err(QueueError::Stopping);
            }
            tokio::select! {
                item = receiver.recv_async() => received = item.ok(),
                () = notified => {}
                () = tokio::time::sleep(quiet.map_or(left, |quiet| left.min(quiet))) => {}
            }
        }
    }
}

#[async_trait]
impl RolloutQueue for MemoryQueue {
    async fn issue(&self, task: &Task) -> Result<(), QueueError> {
        let payload = codec::encode_task(task)?;
        self.lock().issue(task, payload);
        Ok(())
    }

    async fn outcomes(&self, max: usize, wait: Duration) -> Result<Vec<GroupOutcome>, QueueError> {
        let take = |state: &mut State, _| Ok(std::iter::from_fn(|| state.outcomes.pop()).take(max).collect());
        self.take(OUTCOMES, wait, take).await
    }

    async fn lease_tasks(
        &self,
        actor: &ActorId,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<LeasedTask>, QueueError> {
        self.take(TASKS, wait, |state, now| Ok(state.lease_tasks(&actor.0, max, now))).await
    }

    async fn extend_task(&self, actor: &ActorId, _task: TaskId, lease: &str) -> Result<bool, QueueError> {
        Ok(self.lock().extend_task(&actor.0, lease, self.clock.now()))
    }

    async fn delivered(&self, task: &Task) -> Result<Vec<bool>, QueueError> {
        Ok(self.lock().delivered_of(task.id, task.group_size).collect())
    }

    async fn put_rollout(&self, rollout: &Rollout) -> Result<PutOutcome, QueueError> {
        let payload = codec::encode_rollout(rollout)?;
        Ok(self.lock().put_rollout(rollout.id, payload))
    }

    async fn put_scored(&self, scored: &ScoredRollout) -> Result<PutOutcome, QueueError> {
        let payload = codec::encode_scored(scored)?;
        Ok(self.lock().put_scored(scored.rollout.id, payload))
    }

    async fn finish_task(&self, _actor: &ActorId, task: TaskId, lease: &str) -> Result<(), QueueError> {
        self.lock().finish_task(task, lease)
    }

    async fn abandon_task(
        &self,
        actor: &ActorId,
        task: &Task,
        lease: &str,
        reason: &str,
    ) -> Result<(), QueueError> {
        self.lock().abandon_task(&actor.0, task.id, lease, reason);
        Ok(())
    }

    async fn lease_rollouts(
        &self,
        worker: &str,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<LeasedRollout>, QueueError> {
        self.take(ROLLOUTS, wait, |state, now| Ok(state.lease_rollouts(worker, max, now))).await
    }

    async fn forward_scored(
        &self,
        _worker: &str,
        lease: &str,
        scored: &ScoredRollout,
    ) -> Result<(), QueueError> {
        let payload = codec::encode_scored(scored)?;
        self.lock().forward(lease, scored.rollout.id, payload)
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
        self.take(SCORED, wait, |state, now| state.fetch_scored(epoch, max, now)).await
    }

    async fn ack_scored(&self, epoch: u64, deliveries: &[String]) -> Result<(), QueueError> {
        self.lock().ack_scored(epoch, deliveries)
    }

    async fn report(&self, epoch: u64, outcome: &GroupOutcome) -> Result<(), QueueError> {
        let mut state = self.lock();
        state.fence(epoch, "reporting an outcome")?;
        state.outcomes.push(outcome.clone());
        Ok(())
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
        let mut state = self.lock();
        state.fence(epoch, "reporting progress")?;
        state.progress = version;
        Ok(())
    }

    async fn progress(&self) -> Result<PolicyVersion, QueueError> {
        Ok(self.lock().progress)
    }
}

#[cfg(test)]
mod tests;
