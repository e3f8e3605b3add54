//! The two interfaces every backend implements.

use std::time::Duration;

use async_trait::async_trait;
use freewheel_types::{
    ActorId, GroupOutcome, PolicyVersion, PromptId, Rollout, RolloutId, ScoredRollout, Task, TaskId,
    TypesError, WeightsPayload,
};

use crate::QueueError;

/// All streams of one run. Cheap to share (`Arc<dyn RolloutQueue>`); every method may be called from any task.
///
/// Methods that wait return an empty list when `wait` is over, and [`QueueError::Stopping`] as soon as the run
/// is [`RunControl::Finished`] and nothing is left to hand out. Any method may return
/// [`QueueError::Unavailable`] (try again) or [`QueueError::DataLost`] (see [`reinit`](Self::reinit)).
#[async_trait]
pub trait RolloutQueue: Send + Sync {
    // --- prompt pool -----------------------------------------------------------------------------

    /// Adds a task to the task stream and counts its rollouts as issued, unless this task id was issued before
    /// (then the entry is added only if the task is no longer in the stream).
    async fn issue(&self, task: &Task) -> Result<(), QueueError>;

    /// Outcomes reported since the last call, oldest first; waits up to `wait` for the first.
    async fn outcomes(&self, max: usize, wait: Duration) -> Result<Vec<GroupOutcome>, QueueError>;

    // --- actor -----------------------------------------------------------------------------------

    /// Leases up to `max` tasks, those abandoned by dead actors first; waits up to `wait` for one.
    async fn lease_tasks(
        &self,
        actor: &ActorId,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<LeasedTask>, QueueError>;

    /// Renews a lease. `false`: somebody else owns the task now (keep going, late puts become duplicates, or drop it).
    async fn extend_task(&self, actor: &ActorId, task: TaskId, lease: &str) -> Result<bool, QueueError>;

    /// Which of the task's samples were delivered before, by sample index: a reclaimed task redoes only the rest.
    async fn delivered(&self, task: &Task) -> Result<Vec<bool>, QueueError>;

    /// Offers one finished rollout to the reward workers.
    async fn put_rollout(&self, rollout: &Rollout) -> Result<PutOutcome, QueueError>;

    /// Offers one rollout that was scored in the actor straight to the learner.
    async fn put_scored(&self, scored: &ScoredRollout) -> Result<PutOutcome, QueueError>;

    /// Ends a task all of whose samples were accepted (or were duplicates). Idempotent. A task with a sample missing
    /// is refused ([`QueueError::Config`]) and stays: whoever cannot finish a task lets its lease run out.
    async fn finish_task(&self, actor: &ActorId, task: TaskId, lease: &str) -> Result<(), QueueError>;

    /// Ends a task that can never run, at once: each of its missing samples goes to the learner as
    /// [`DeliveryBody::Abandoned`] with `reason`. Idempotent. A lease that is no longer this actor's changes nothing: whoever
    /// has the task may fare better.
    async fn abandon_task(
        &self,
        actor: &ActorId,
        task: &Task,
        lease: &str,
        reason: &str,
    ) -> Result<(), QueueError>;

    // --- reward ----------------------------------------------------------------------------------

    /// Leases up to `max` rollouts for scoring; waits up to `wait` for one.
    async fn lease_rollouts(
        &self,
        worker: &str,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<LeasedRollout>, QueueError>;

    /// Replaces a leased rollout by its scored form, atomically and idempotently.
    async fn forward_scored(
        &self,
        worker: &str,
        lease: &str,
        scored: &ScoredRollout,
    ) -> Result<(), QueueError>;

    // --- learner ---------------------------------------------------------------------------------

    /// Tries to become the learner. `floor` is the highest epoch the checkpoint directory knows; the epoch
    /// granted is above it. `None`: another learner holds a live lease.
    async fn acquire_learner(&self, holder: &str, floor: u64) -> Result<Option<u64>, QueueError>;

    /// Renews the learner's lease; [`QueueError::Fenced`] if the epoch is over.
    async fn renew_learner(&self, holder: &str, epoch: u64) -> Result<(), QueueError>;

    /// Up to `max` scored rollouts, in stream order, those a previous learner left unacknowledged first;
    /// waits up to `wait` for one.
    async fn fetch_scored(&self, epoch: u64, max: usize, wait: Duration)
    -> Result<Vec<Delivery>, QueueError>;

    /// Ends deliveries that are safe in the journal. Idempotent.
    async fn ack_scored(&self, epoch: u64, deliveries: &[String]) -> Result<(), QueueError>;

    /// Tells the prompt pool what became of a group.
    async fn report(&self, epoch: u64, outcome: &GroupOutcome) -> Result<(), QueueError>;

    /// Puts a bad payload aside (bounded), with the reason; never the only copy of a prompt.
    async fn dead_letter(
        &self,
        source: &str,
        rollout: Option<RolloutId>,
        reason: &str,
    ) -> Result<(), QueueError>;

    // --- everyone --------------------------------------------------------------------------------

    /// A consistent snapshot of the counters and stream lengths.
    async fn counts(&self) -> Result<QueueCounts, QueueError>;

    /// What the run was told to do.
    async fn control(&self) -> Result<RunControl, QueueError>;

    /// Tells the run what to do.
    async fn set_control(&self, control: RunControl) -> Result<(), QueueError>;

    /// Tells everyone how far the learner has come; read back by [`progress`](Self::progress).
    async fn set_progress(&self, epoch: u64, version: PolicyVersion) -> Result<(), QueueError>;

    /// The learner's current version (0-e0 before the first report).
    async fn progress(&self) -> Result<PolicyVersion, QueueError>;

    /// For the prompt pool, after [`QueueError::DataLost`]: sets the streams up again with all counters at zero; then
    /// it issues its outstanding tasks again under their ids. The other roles only try again: their calls succeed
    /// once the pool has done so, and the learner's next renewal restores its epoch. Nothing to do in memory.
    async fn reinit(&self) -> Result<(), QueueError> {
        Ok(())
    }
}

/// Where published weights live.
#[async_trait]
pub trait PolicyStore: Send + Sync {
    /// Publishes a version: chunks first, then one atomic flip makes it current. Readers never see half of it.
    /// Also collects versions nobody needs.
    async fn publish(&self, epoch: u64, payload: &WeightsPayload) -> Result<(), QueueError>;

    /// The newest published version.
    async fn latest(&self) -> Result<Option<PolicyVersion>, QueueError>;

    /// Waits up to `wait` for a version newer than `than`; [`QueueError::Stopping`] as soon as the run is finished.
    async fn wait_newer(
        &self,
        than: Option<PolicyVersion>,
        wait: Duration,
    ) -> Result<Option<PolicyVersion>, QueueError>;

    /// The payloads that lead from `have` to the newest version, in the order to apply them: a chain of deltas, or a
    /// key frame with the deltas after it. Empty if `have` is the newest. Chunk digests are verified here.
    async fn fetch(&self, have: Option<PolicyVersion>) -> Result<Vec<WeightsPayload>, QueueError>;

    /// Says which version an actor serves; keeps that version from being collected.
    async fn heartbeat(&self, actor: &ActorId, version: PolicyVersion) -> Result<(), QueueError>;

    /// Every live actor with the version it serves.
    async fn actors(&self) -> Result<Vec<(ActorId, PolicyVersion)>, QueueError>;
}

/// A task with its lease.
#[derive(Clone, Debug)]
pub struct LeasedTask {
    /// The task.
    pub task: Task,
    /// Opaque lease token.
    pub lease: String,
    /// How often the task has been handed out, this time included.
    pub deliveries: u32,
}

/// A rollout with its lease.
#[derive(Clone, Debug)]
pub struct LeasedRollout {
    /// The rollout.
    pub rollout: Rollout,
    /// Opaque lease token.
    pub lease: String,
}

/// One entry of the scored stream. Every issued rollout id arrives as exactly one of the bodies.
#[derive(Debug)]
pub struct Delivery {
    /// Opaque id for [`RolloutQueue::ack_scored`].
    pub id: String,
    /// What it holds.
    pub body: DeliveryBody,
}

/// What an entry of the scored stream holds.
#[derive(Debug)]
pub enum DeliveryBody {
    /// A rollout with its reward record.
    Scored(Box<ScoredRollout>),
    /// A payload that failed its checks: journalled as invalid, acknowledged and counted.
    Bad {
        /// Rollout id as it stands beside the payload. `None` only if that is damaged too: then nobody knows which group waits
        /// for it.
        rollout: Option<RolloutId>,
        /// What is wrong with it.
        error: TypesError,
    },
    /// A rollout that will never come: its task can never run, or was handed out too often. Its prompt is quarantined.
    Abandoned {
        /// The rollout.
        rollout: RolloutId,
        /// Its prompt.
        prompt: PromptId,
        /// Rollouts in its group.
        group_size: u32,
        /// Why.
        reason: String,
    },
}

/// What became of a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// Stored.
    Accepted,
    /// This rollout id was delivered before; nothing was stored.
    Duplicate,
    /// The queue is at its byte or length cap: stop admitting tasks and try again later.
    Busy,
}

/// Counters and lengths, taken at one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounts {
    /// Rollouts asked for by issued tasks.
    pub issued: u64,
    /// Distinct rollouts delivered by actors.
    pub delivered: u64,
    /// Rollouts in the `rollouts` stream, leased ones included.
    pub rollouts: u64,
    /// Scored rollouts in the `scored` stream not yet acknowledged.
    pub scored: u64,
    /// Scored rollouts acknowledged by the learner since the run began.
    pub acked: u64,
    /// Tasks in the task stream, leased ones included.
    pub tasks: u64,
    /// Rollouts of tasks given up; they count as delivered.
    pub abandoned: u64,
    /// Payload bytes held.
    pub bytes: u64,
}

/// What the run was told to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RunControl {
    /// Go on.
    #[default]
    Run,
    /// Issue nothing more, finish what is in hand, checkpoint, end.
    Drain,
    /// The work is done: every role ends.
    Finished,
}
