//! The learner's view of the queue with an ear on it: every rollout it takes in is offered to the sample log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use freewheel_queue::{
    Delivery, DeliveryBody, LeasedRollout, LeasedTask, PutOutcome, QueueCounts, QueueError, RolloutQueue,
    RunControl,
};
use freewheel_types::{
    ActorId, GroupOutcome, PolicyVersion, Rollout, RolloutId, ScoredRollout, Task, TaskId,
};

use crate::folder::SampleLog;

/// Passes every call on; looks at `fetch_scored` and `set_progress` as they go by.
pub struct TappedQueue {
    queue: Arc<dyn RolloutQueue>,
    samples: SampleLog,
    step: AtomicU64,
}

impl TappedQueue {
    /// `queue` with samples going to `samples`.
    pub fn new(queue: Arc<dyn RolloutQueue>, samples: SampleLog) -> Arc<Self> {
        Arc::new(Self { queue, samples, step: AtomicU64::new(0) })
    }
}

#[async_trait]
impl RolloutQueue for TappedQueue {
    async fn issue(&self, task: &Task) -> Result<(), QueueError> {
        self.queue.issue(task).await
    }

    async fn outcomes(&self, max: usize, wait: Duration) -> Result<Vec<GroupOutcome>, QueueError> {
        self.queue.outcomes(max, wait).await
    }

    async fn lease_tasks(
        &self,
        actor: &ActorId,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<LeasedTask>, QueueError> {
        self.queue.lease_tasks(actor, max, wait).await
    }

    async fn extend_task(&self, actor: &ActorId, task: TaskId, lease: &str) -> Result<bool, QueueError> {
        self.queue.extend_task(actor, task, lease).await
    }

    async fn delivered(&self, task: &Task) -> Result<Vec<bool>, QueueError> {
        self.queue.delivered(task).await
    }

    async fn put_rollout(&self, rollout: &Rollout) -> Result<PutOutcome, QueueError> {
        self.queue.put_rollout(rollout).await
    }

    async fn put_scored(&self, scored: &ScoredRollout) -> Result<PutOutcome, QueueError> {
        self.queue.put_scored(scored).await
    }

    async fn finish_task(&self, actor: &ActorId, task: TaskId, lease: &str) -> Result<(), QueueError> {
        self.queue.finish_task(actor, task, lease).await
    }

    async fn abandon_task(
        &self,
        actor: &ActorId,
        task: &Task,
        lease: &str,
        reason: &str,
    ) -> Result<(), QueueError> {
        self.queue.abandon_task(actor, task, lease, reason).await
    }

    async fn lease_rollouts(
        &self,
        worker: &str,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<LeasedRollout>, QueueError> {
        self.queue.lease_rollouts(worker, max, wait).await
    }

    async fn forward_scored(
        &self,
        worker: &str,
        lease: &str,
        scored: &ScoredRollout,
    ) -> Result<(), QueueError> {
        self.queue.forward_scored(worker, lease, scored).await
    }

    async fn acquire_learner(&self, holder: &str, floor: u64) -> Result<Option<u64>, QueueError> {
        self.queue.acquire_learner(holder, floor).await
    }

    async fn renew_learner(&self, holder: &str, epoch: u64) -> Result<(), QueueError> {
        self.queue.renew_learner(holder, epoch).await
    }

    async fn fetch_scored(
        &self,
        epoch: u64,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, QueueError> {
        let deliveries = self.queue.fetch_scored(epoch, max, wait).await?;
        let step = self.step.load(Ordering::Relaxed);
        for delivery in &deliveries {
            if let DeliveryBody::Scored(scored) = &delivery.body {
                self.samples.offer(step, scored);
            }
        }
        Ok(deliveries)
    }

    async fn ack_scored(&self, epoch: u64, deliveries: &[String]) -> Result<(), QueueError> {
        self.queue.ack_scored(epoch, deliveries).await
    }

    async fn report(&self, epoch: u64, outcome: &GroupOutcome) -> Result<(), QueueError> {
        self.queue.report(epoch, outcome).await
    }

    async fn dead_letter(
        &self,
        source: &str,
        rollout: Option<RolloutId>,
        reason: &str,
    ) -> Result<(), QueueError> {
        self.queue.dead_letter(source, rollout, reason).await
    }

    async fn counts(&self) -> Result<QueueCounts, QueueError> {
        self.queue.counts().await
    }

    async fn control(&self) -> Result<RunControl, QueueError> {
        self.queue.control().await
    }

    async fn set_control(&self, control: RunControl) -> Result<(), QueueError> {
        self.queue.set_control(control).await
    }

    async fn set_progress(&self, epoch: u64, version: PolicyVersion) -> Result<(), QueueError> {
        self.step.store(version.step, Ordering::Relaxed);
        self.queue.set_progress(epoch, version).await
    }

    async fn progress(&self) -> Result<PolicyVersion, QueueError> {
        self.queue.progress().await
    }

    async fn reinit(&self) -> Result<(), QueueError> {
        self.queue.reinit().await
    }
}
