//! The pool at work: issues tasks while the budget allows, takes in outcomes.
//!
//! Order of events: a task is in the log before it is in the queue; an outcome is in the log before the next
//! task that follows from it. So after a kill -9 the log gives back the pool as it was, and whatever is outstanding
//! is issued again under the same ids: the queue, the actors and the learner know duplicates by their ids.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use freewheel_queue::{QueueError, RolloutQueue, RunControl};
use freewheel_types::{Prompt, Task};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::log::{LogError, PoolLog, PoolRecord};
use super::params::{PoolError, PoolParams};
use super::pool::{Applied, PoolMetrics, PromptPool};

const OUTCOMES_MAX: usize = 256;
const OUTCOME_WAIT: Duration = Duration::from_millis(100);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// What the role needs from outside.
pub struct PoolDeps {
    /// The streams of the run.
    pub queue: Arc<dyn RolloutQueue>,
    /// The pool's log in the run folder; one that exists is continued.
    pub log: PathBuf,
    /// Where the pool's metrics are shown, if anybody looks.
    pub metrics: Option<watch::Sender<PoolMetrics>>,
}

/// What the role did, over all its lives.
pub type PoolSummary = PoolMetrics;

/// Why the role ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolRoleError {
    /// The pool cannot go on.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The log cannot be used.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The queue refused for a reason that waiting does not cure.
    #[error("prompt pool: {what}")]
    Queue {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: QueueError,
    },
}

/// Issues tasks for `prompts` until the run is finished or `shutdown` is cancelled. [`RunControl::Drain`] stops
/// issuing; outcomes are still taken in.
///
/// # Errors
/// If nothing can be issued any more, the log fails, or the queue fails in a way that waiting does not cure.
pub async fn run(
    prompts: Vec<Prompt>,
    params: PoolParams,
    deps: PoolDeps,
    shutdown: CancellationToken,
) -> Result<PoolSummary, PoolRoleError> {
    let (log, records) = PoolLog::open(&deps.log)?;
    let mut pool = PromptPool::new(prompts, params)?;
    for record in &records {
        pool.replay(record)?;
    }
    let mut role = Role { pool, log: Some(log), deps, reissue: true };
    let mut backoff = BACKOFF_MIN;
    loop {
        role.show();
        // A turn is never cut short: an outcome that was taken from the queue must reach the log.
        let turn = role.turn().await;
        if shutdown.is_cancelled() && !matches!(turn, Err(Trouble::Fatal(_))) {
            return Ok(role.pool.metrics());
        }
        match turn {
            Ok(RunControl::Finished) => return Ok(role.pool.metrics()),
            Ok(_) => backoff = BACKOFF_MIN,
            Err(Trouble::Fatal(error)) => return Err(error),
            Err(Trouble::Stopping) => return Ok(role.pool.metrics()),
            Err(Trouble::Wait(error)) => {
                tracing::warn!(%error, "the prompt pool waits for the queue");
                tokio::select! {
                    () = tokio::time::sleep(backoff) => {}
                    () = shutdown.cancelled() => return Ok(role.pool.metrics()),
                }
                backoff = (backoff * 2).min(BACKOFF_MAX);
            }
        }
    }
}

/// Why a turn did not end well.
enum Trouble {
    /// Try again after a pause.
    Wait(QueueError),
    /// The queue says that the run is stopping.
    Stopping,
    Fatal(PoolRoleError),
}

struct Role {
    pool: PromptPool,
    /// Away only while a blocking thread writes to it.
    log: Option<PoolLog>,
    deps: PoolDeps,
    /// The outstanding tasks have to be issued again: after a start, and after the queue lost its data.
    reissue: bool,
}

impl Role {
    async fn turn(&mut self) -> Result<RunControl, Trouble> {
        match self.try_turn().await {
            Err(Trouble::Wait(QueueError::DataLost { run })) => {
                tracing::warn!(
                    run,
                    outstanding = self.pool.outstanding().len(),
                    "the queue lost its data; issuing again"
                );
                self.reissue = true;
                self.deps
                    .queue
                    .reinit()
                    .await
                    .map_err(|error| trouble("setting up the queue again", error))?;
                Ok(RunControl::Run)
            }
            other => other,
        }
    }

    async fn try_turn(&mut self) -> Result<RunControl, Trouble> {
        let queue = Arc::clone(&self.deps.queue);
        let control =
            queue.control().await.map_err(|error| trouble("reading the run's control flag", error))?;
        if control == RunControl::Finished {
            return Ok(control);
        }
        if self.reissue {
            for id in self.pool.outstanding() {
                let task = self.pool.task(id).expect("outstanding tasks are known");
                queue.issue(&task).await.map_err(|error| trouble("issuing a task again", error))?;
            }
            self.reissue = false;
        }
        if control == RunControl::Run {
            self.issue().await?;
        }
        let outcomes = queue.outcomes(OUTCOMES_MAX, OUTCOME_WAIT).await;
        let outcomes = outcomes.map_err(|error| trouble("taking in outcomes", error))?;
        let mut ended = Vec::new();
        for outcome in outcomes {
            match self.pool.apply(&outcome) {
                Applied::Ended => ended.push(PoolRecord::Ended(outcome)),
                Applied::Ignored => tracing::debug!(task = %outcome.task, "outcome of a task that had ended"),
            }
        }
        self.append(ended).await?;
        Ok(control)
    }

    /// Issues all that the budget allows: first to the log, at once, then to the queue.
    async fn issue(&mut self) -> Result<(), Trouble> {
        let mut tasks: Vec<Task> = Vec::new();
        loop {
            match self.pool.next_task() {
                Ok(Some(task)) => tasks.push(task),
                Ok(None) => break,
                Err(error) if tasks.is_empty() => return Err(Trouble::Fatal(error.into())),
                Err(_) => break, // said again on the next turn, after these went out
            }
        }
        if tasks.is_empty() {
            return Ok(());
        }
        // Until all of them are out, a failure leaves tasks that only the pool knows.
        self.reissue = true;
        let records = tasks.iter().map(|task| self.record(task)).collect();
        self.append(records).await?;
        for task in &tasks {
            self.deps.queue.issue(task).await.map_err(|error| trouble("issuing a task", error))?;
        }
        self.reissue = false;
        Ok(())
    }

    /// Appends on a thread that may block.
    async fn append(&mut self, records: Vec<PoolRecord>) -> Result<(), Trouble> {
        if records.is_empty() {
            return Ok(());
        }
        let mut log = self.log.take().expect("one append at a time");
        let written = tokio::task::spawn_blocking(move || {
            let result = log.append(&records);
            (log, result)
        });
        let (log, result) = written.await.expect("appending does not panic");
        self.log = Some(log);
        result.map_err(|error| Trouble::Fatal(error.into()))
    }

    fn record(&self, task: &Task) -> PoolRecord {
        let Task { id, prompt, group_size, min_version, .. } = task;
        let (task, prompt, group_size, min_version) = (*id, prompt.id, *group_size, *min_version);
        PoolRecord::Issued { task, prompt, group_size, min_version, chosen: self.pool.chosen(task).cloned() }
    }

    fn show(&self) {
        if let Some(sender) = &self.deps.metrics {
            sender.send_replace(self.pool.metrics());
        }
    }
}

fn trouble(what: &'static str, error: QueueError) -> Trouble {
    match error {
        QueueError::Unavailable { .. } | QueueError::DataLost { .. } => Trouble::Wait(error),
        QueueError::Stopping => Trouble::Stopping,
        source => Trouble::Fatal(PoolRoleError::Queue { what, source }),
    }
}

#[cfg(test)]
mod tests {
    use freewheel_queue::memory::MemoryQueue;
    use freewheel_queue::{LeasedTask, QueueConfig};
    use freewheel_types::{ActorId, DropReason, GroupFate, GroupOutcome, PolicyVersion};

    use super::*;
    use crate::prompts::{ArithmeticGenerator, CurriculumConfig, Split};

    fn prompts() -> Vec<Prompt> {
        ArithmeticGenerator::new(1, &[1, 2], Split::Train).prompts(40)
    }

    fn params() -> PoolParams {
        PoolParams {
            group_size: 4,
            baselines: 0,
            groups_per_step: 2,
            max_staleness: 1,
            seed: 3,
            steps: 100,
            curriculum: CurriculumConfig::default(),
        }
    }

    fn queue() -> Arc<MemoryQueue> {
        MemoryQueue::new("t".parse().unwrap(), &QueueConfig::default())
    }

    fn deps(queue: &Arc<MemoryQueue>, dir: &std::path::Path) -> PoolDeps {
        PoolDeps { queue: queue.clone(), log: dir.join("pool.log"), metrics: None }
    }

    async fn lease(queue: &MemoryQueue, n: usize) -> Vec<LeasedTask> {
        let actor = ActorId("a".into());
        let mut tasks: Vec<LeasedTask> = Vec::new();
        while tasks.len() < n {
            let more = queue.lease_tasks(&actor, n - tasks.len(), Duration::from_secs(5)).await.unwrap();
            assert!(!more.is_empty(), "only {} of {n} tasks", tasks.len());
            tasks.extend(more);
        }
        tasks
    }

    fn outcome(task: &Task, fate: GroupFate) -> GroupOutcome {
        GroupOutcome {
            task: task.id,
            prompt: task.prompt.id,
            version: PolicyVersion::new(1, 0),
            sampled_by: PolicyVersion::new(1, 0),
            scored: 4,
            correct: 2,
            reward_mean: Some(0.5),
            graded: vec![],
            fate,
            dropped: vec![],
            given_up: None,
        }
    }

    #[tokio::test]
    async fn tasks_go_out_within_the_budget_and_a_drop_is_refilled() {
        let (queue, dir) = (queue(), tempfile::tempdir().unwrap());
        let role = tokio::spawn(run(prompts(), params(), deps(&queue, dir.path()), CancellationToken::new()));
        let tasks = lease(&queue, 4).await;
        assert_eq!(tasks.iter().map(|t| t.task.id.0).collect::<Vec<_>>(), [0, 1, 2, 3]);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(queue.counts().await.unwrap().issued, 16);
        let epoch = queue.acquire_learner("l", 0).await.unwrap().unwrap();
        queue
            .report(epoch, &outcome(&tasks[1].task, GroupFate::Dropped(DropReason::ZeroSignal)))
            .await
            .unwrap();
        assert_eq!(lease(&queue, 1).await[0].task.id.0, 4);
        queue.set_control(RunControl::Finished).await.unwrap();
        let summary = tokio::time::timeout(Duration::from_secs(5), role).await.unwrap().unwrap().unwrap();
        assert_eq!((summary.issued, summary.dropped, summary.outstanding), (5, 1, 4));
    }

    #[tokio::test]
    async fn a_killed_pool_goes_on_with_the_same_tasks_under_the_same_ids() {
        let dir = tempfile::tempdir().unwrap();
        let first = queue();
        let role = tokio::spawn(run(prompts(), params(), deps(&first, dir.path()), CancellationToken::new()));
        let before = lease(&first, 4).await;
        let epoch = first.acquire_learner("l", 0).await.unwrap().unwrap();
        first.report(epoch, &outcome(&before[0].task, GroupFate::Trained { step: 1 })).await.unwrap();
        let next = lease(&first, 1).await;
        role.abort();
        let _ = role.await;
        // A new process with an empty queue.
        let second = queue();
        let stop = CancellationToken::new();
        let role = tokio::spawn(run(prompts(), params(), deps(&second, dir.path()), stop.clone()));
        let after: Vec<Task> = lease(&second, 4).await.into_iter().map(|t| t.task).collect();
        let expected: Vec<Task> = before[1..].iter().chain(&next).map(|t| t.task.clone()).collect();
        assert_eq!(after, expected);
        stop.cancel();
        let summary = tokio::time::timeout(Duration::from_secs(5), role).await.unwrap().unwrap().unwrap();
        assert_eq!((summary.issued, summary.trained, summary.outstanding), (5, 1, 4));
    }

    #[tokio::test]
    async fn draining_stops_issuing_and_still_takes_outcomes() {
        let (queue, dir) = (queue(), tempfile::tempdir().unwrap());
        let role = tokio::spawn(run(prompts(), params(), deps(&queue, dir.path()), CancellationToken::new()));
        let tasks = lease(&queue, 4).await;
        queue.set_control(RunControl::Drain).await.unwrap();
        tokio::time::sleep(Duration::from_millis(250)).await;
        let epoch = queue.acquire_learner("l", 0).await.unwrap().unwrap();
        for task in &tasks {
            queue.report(epoch, &outcome(&task.task, GroupFate::Trained { step: 1 })).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
        queue.set_control(RunControl::Finished).await.unwrap();
        let summary = tokio::time::timeout(Duration::from_secs(5), role).await.unwrap().unwrap().unwrap();
        assert_eq!((summary.issued, summary.trained, summary.outstanding), (4, 4, 0));
    }
}
