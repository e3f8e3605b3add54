//! The rollout streams of a run in Redis.

mod transfer;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use freewheel_types::{
    ActorId, GroupOutcome, MAX_GROUP_SIZE, PolicyVersion, Rollout, RolloutId, RunId, ScoredRollout, Task,
    TaskId, codec,
};
use redis::{FromRedisValue, Script, ScriptInvocation};

use super::cursors::{Fetching, Reaper};
use super::entries::{Fields, TaskHead, control_name, control_of, frame, is_entry_id, unframe};
use super::inspect;
use super::keys::Keys;
use super::link::{Failure, Link, Request};
use super::scripts::SCRIPTS;
use super::{CONNECT, Poll, random_name};
use crate::payload::{self, ScoredEntry};
use crate::{
    DeadLetter, Delivery, LeasedRollout, LeasedTask, PutOutcome, QueueConfig, QueueCounts, QueueError,
    QueueSecret, RolloutQueue, RunControl,
};

/// Acknowledgements per script call: keeps a call short for everybody else.
const ACK_BATCH: usize = 256;

/// All streams of one run, in Redis.
pub struct RedisQueue {
    link: Arc<Link>,
    keys: Keys,
    run: RunId,
    config: QueueConfig,
    /// Which life of the server's data this client knows.
    incarnation: Mutex<String>,
    /// Which life the prompt pool knows: it must learn of every loss, so only [`reinit`](RolloutQueue::reinit) changes it.
    pool_incarnation: Mutex<String>,
    task_reaper: Mutex<Reaper>,
    rollout_reaper: Mutex<Reaper>,
    learner: Mutex<Fetching>,
    /// Outcomes given to the pool and not confirmed yet.
    given: tokio::sync::Mutex<Vec<String>>,
}

impl RedisQueue {
    /// Connects and sets up what is missing.
    ///
    /// # Errors
    /// [`QueueError::Unavailable`] if no server answers within a few seconds, [`QueueError::Config`] if it is the
    /// wrong one.
    pub async fn connect(
        url: &QueueSecret,
        run: &RunId,
        config: &QueueConfig,
    ) -> Result<Arc<Self>, QueueError> {
        let limit = config.timeout();
        let link = Link::open(url, limit)?;
        let queue = Self {
            keys: Keys::new(run),
            run: run.clone(),
            config: config.clone(),
            incarnation: Mutex::default(),
            pool_incarnation: Mutex::default(),
            task_reaper: Mutex::default(),
            rollout_reaper: Mutex::default(),
            learner: Mutex::default(),
            given: tokio::sync::Mutex::default(),
            link,
        };
        inspect::check_version(&queue.link, limit.min(CONNECT))
            .await
            .map_err(|failure| queue.error(failure, 0))?;
        queue.initialise().await?;
        Ok(Arc::new(queue))
    }

    /// The newest dead letters, newest first.
    ///
    /// # Errors
    /// As any call.
    pub async fn dead_letters(&self, max: usize) -> Result<Vec<DeadLetter>, QueueError> {
        let mut command = redis::cmd("XREVRANGE");
        command.arg(self.keys.key("dlq")).arg("+").arg("-").arg("COUNT").arg(max);
        let letters: Vec<(String, Fields)> = self
            .link
            .call(Request::Command(&command), 0, "reading dead letters")
            .await
            .map_err(|failure| self.error(failure, 0))?;
        Ok(letters.iter().map(|(_, fields)| fields.dead_letter()).collect())
    }

    async fn initialise(&self) -> Result<(), QueueError> {
        let mut init = SCRIPTS.init.key(self.keys.key("inc"));
        for stream in ["tasks", "rollouts", "scored", "outcomes"] {
            init.key(self.keys.key(stream));
        }
        init.arg(random_name());
        let incarnation: String = self.call(&init, 0, "setting up the streams").await?;
        lock(&self.pool_incarnation).clone_from(&incarnation);
        *lock(&self.incarnation) = incarnation;
        *lock(&self.learner) = Fetching::default();
        Ok(())
    }

    /// A call of `script` on `keys`; every queue script takes the incarnation first.
    fn prepare(&self, script: &'static Script, keys: &[&str]) -> ScriptInvocation<'static> {
        self.prepare_in(&self.incarnation, script, keys)
    }

    fn prepare_in(
        &self,
        incarnation: &Mutex<String>,
        script: &'static Script,
        keys: &[&str],
    ) -> ScriptInvocation<'static> {
        let mut call = script.key(self.keys.key("inc"));
        for key in keys {
            call.key(if key.starts_with("fw:") { (*key).to_owned() } else { self.keys.key(key) });
        }
        call.arg(lock(incarnation).as_str());
        call
    }

    async fn call<T: FromRedisValue>(
        &self,
        call: &ScriptInvocation<'_>,
        epoch: u64,
        what: &'static str,
    ) -> Result<T, QueueError> {
        self.send(call, 0, what).await.map_err(|failure| self.error(failure, epoch))
    }

    async fn send<T: FromRedisValue>(
        &self,
        call: &ScriptInvocation<'_>,
        bytes: u64,
        what: &'static str,
    ) -> Result<T, Failure> {
        let result = self.link.call(Request::Script(call), bytes, what).await;
        if let Err(failure) = &result {
            self.adopt(failure).await;
        }
        result
    }

    /// After a loss: joins what the prompt pool has set up again, if it has. The call that noticed fails all the same.
    async fn adopt(&self, failure: &Failure) {
        if failure.code() != "DATALOST" {
            return;
        }
        let mut command = redis::cmd("GET");
        command.arg(self.keys.key("inc"));
        if let Ok(Some(incarnation)) = self.link.call(Request::Command(&command), 0, "joining again").await {
            *lock(&self.incarnation) = incarnation;
        }
    }

    fn error(&self, failure: Failure, epoch: u64) -> QueueError {
        failure.into_error(self.run.as_str(), self.link.address(), epoch)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl RolloutQueue for RedisQueue {
    async fn issue(&self, task: &Task) -> Result<(), QueueError> {
        let payload = codec::encode_task(task)?;
        let (issued, seen) = (self.keys.issued(task.id), self.keys.seen_base(task.id));
        let mut call = self.prepare_in(
            &self.pool_incarnation,
            &SCRIPTS.issue,
            &["tasks", &issued.key, "live", "cnt", &seen.key],
        );
        call.arg(task.id.0).arg(issued.offset).arg(seen.offset).arg(task.group_size);
        call.arg(task.prompt.id.to_string()).arg(&payload);
        let bytes = payload.len() as u64;
        self.send::<u64>(&call, bytes, "issuing a task")
            .await
            .map(drop)
            .map_err(|failure| self.error(failure, 0))
    }

    async fn outcomes(&self, max: usize, wait: Duration) -> Result<Vec<GroupOutcome>, QueueError> {
        let mut poll = Poll::new(wait);
        let mut given = self.given.lock().await;
        loop {
            let mut call = self.prepare_in(&self.pool_incarnation, &SCRIPTS.outcomes, &["outcomes", "ctl"]);
            call.arg(max).arg(&*given);
            let (control, entries): (String, Vec<(String, Vec<u8>)>) =
                self.call(&call, 0, "reading outcomes").await?;
            let mut outcomes = Vec::with_capacity(entries.len());
            for (id, bytes) in &entries {
                match unframe(bytes) {
                    Ok(outcome) => outcomes.push(outcome),
                    Err(error) => self.dead_letter("outcomes", None, &format!("entry {id}: {error}")).await?,
                }
            }
            // From here to the return nothing waits: what is confirmed by the next call was really given.
            *given = entries.into_iter().map(|(id, _)| id).collect();
            let finished = control_of(&control) == RunControl::Finished;
            if !outcomes.is_empty() || !poll.again(finished).await? {
                return Ok(outcomes);
            }
        }
    }

    async fn lease_tasks(
        &self,
        actor: &ActorId,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<LeasedTask>, QueueError> {
        let mut poll = Poll::new(wait);
        loop {
            let (finished, leased) = self.lease_tasks_now(&actor.0, max, poll.first()).await?;
            if !leased.is_empty() || !poll.again(finished).await? {
                return Ok(leased);
            }
        }
    }

    async fn extend_task(&self, actor: &ActorId, _task: TaskId, lease: &str) -> Result<bool, QueueError> {
        if !is_entry_id(lease) {
            return Ok(false);
        }
        let mut call = self.prepare(&SCRIPTS.extend, &["tasks"]);
        call.arg("actors").arg(&actor.0).arg(lease);
        self.call(&call, 0, "renewing a task lease").await
    }

    async fn delivered(&self, task: &Task) -> Result<Vec<bool>, QueueError> {
        let seen = self.keys.seen_base(task.id);
        let mut call = self.prepare(&SCRIPTS.delivered, &[&seen.key]);
        call.arg(seen.offset).arg(task.group_size);
        self.call(&call, 0, "reading what was delivered").await
    }

    async fn put_rollout(&self, rollout: &Rollout) -> Result<PutOutcome, QueueError> {
        self.put("rollouts", rollout.id, &codec::encode_rollout(rollout)?).await
    }

    async fn put_scored(&self, scored: &ScoredRollout) -> Result<PutOutcome, QueueError> {
        self.put("scored", scored.rollout.id, &codec::encode_scored(scored)?).await
    }

    async fn finish_task(&self, _actor: &ActorId, task: TaskId, lease: &str) -> Result<(), QueueError> {
        if !is_entry_id(lease) {
            return Ok(());
        }
        let seen = self.keys.seen_base(task);
        let mut call = self.prepare(&SCRIPTS.finish, &["tasks", "live", &seen.key]);
        call.arg(lease).arg(task.0).arg(seen.offset);
        let (missing, group_size): (i64, u32) = self.call(&call, 0, "finishing a task").await?;
        match u32::try_from(missing) {
            Ok(index) => Err(payload::unfinished(task, index, group_size)),
            Err(_none_missing) => Ok(()),
        }
    }

    async fn abandon_task(
        &self,
        actor: &ActorId,
        task: &Task,
        lease: &str,
        reason: &str,
    ) -> Result<(), QueueError> {
        if !is_entry_id(lease) {
            return Ok(());
        }
        let group_size = task.group_size.min(MAX_GROUP_SIZE);
        let head = TaskHead { id: task.id, prompt: task.prompt.id, group_size };
        self.give_up(lease, Some(head), reason, false, Some(actor)).await
    }

    async fn lease_rollouts(
        &self,
        worker: &str,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<LeasedRollout>, QueueError> {
        let mut poll = Poll::new(wait);
        loop {
            let (finished, leased) = self.lease_rollouts_now(worker, max, poll.first()).await?;
            if !leased.is_empty() || !poll.again(finished).await? {
                return Ok(leased);
            }
        }
    }

    async fn forward_scored(
        &self,
        _worker: &str,
        lease: &str,
        scored: &ScoredRollout,
    ) -> Result<(), QueueError> {
        let entry = ScoredEntry::Payload(codec::encode_scored(scored)?);
        if !is_entry_id(lease) {
            return Ok(());
        }
        self.replace(lease, Some(scored.rollout.id), &entry, true).await
    }

    async fn acquire_learner(&self, holder: &str, floor: u64) -> Result<Option<u64>, QueueError> {
        let ttl = self.config.learner_lease().as_millis() as u64;
        let mut call = self.prepare(&SCRIPTS.acquire, &["lease", "epoch"]);
        call.arg(holder).arg(ttl).arg(floor);
        let epoch: u64 = self.call(&call, 0, "acquiring the learner lease").await?;
        Ok(Some(epoch).filter(|epoch| *epoch > 0))
    }

    async fn renew_learner(&self, holder: &str, epoch: u64) -> Result<(), QueueError> {
        let ttl = self.config.learner_lease().as_millis() as u64;
        let mut call = self.prepare(&SCRIPTS.renew, &["lease", "epoch"]);
        call.arg(holder).arg(epoch).arg(ttl);
        self.call::<u64>(&call, epoch, "renewing the learner lease").await.map(drop)
    }

    async fn fetch_scored(
        &self,
        epoch: u64,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, QueueError> {
        let mut poll = Poll::new(wait);
        loop {
            let (finished, deliveries) = self.fetch_now(epoch, max).await?;
            if !deliveries.is_empty() || !poll.again(finished).await? {
                return Ok(deliveries);
            }
        }
    }

    async fn ack_scored(&self, epoch: u64, deliveries: &[String]) -> Result<(), QueueError> {
        let ids: Vec<&String> = deliveries.iter().filter(|id| is_entry_id(id)).collect();
        // An empty list still says whether the epoch is over.
        let batches = if ids.is_empty() { vec![&ids[..]] } else { ids.chunks(ACK_BATCH).collect() };
        for batch in batches {
            let mut call = self.prepare(&SCRIPTS.ack, &["scored", "epoch", "bytes", "cnt"]);
            call.arg(epoch).arg(batch);
            self.call::<u64>(&call, epoch, "acknowledging").await?;
            let mut learner = lock(&self.learner);
            batch.iter().for_each(|id| {
                learner.handed.remove(*id);
            });
        }
        Ok(())
    }

    async fn report(&self, epoch: u64, outcome: &GroupOutcome) -> Result<(), QueueError> {
        let mut call = self.prepare(&SCRIPTS.report, &["outcomes", "epoch"]);
        call.arg(epoch).arg(frame(outcome)?);
        self.call::<String>(&call, epoch, "reporting an outcome").await.map(drop)
    }

    async fn dead_letter(
        &self,
        source: &str,
        rollout: Option<RolloutId>,
        reason: &str,
    ) -> Result<(), QueueError> {
        let mut call = self.prepare(&SCRIPTS.dead_letter, &["dlq"]);
        call.arg(source).arg(rollout.map_or(String::new(), |rollout| rollout.0.to_string())).arg(reason);
        self.call::<String>(&call, 0, "writing a dead letter").await.map(drop)
    }

    async fn counts(&self) -> Result<QueueCounts, QueueError> {
        let call = self.prepare(&SCRIPTS.counts, &["cnt", "rollouts", "scored", "tasks", "bytes"]);
        let n: [u64; 8] = self.call(&call, 0, "counting").await?;
        let [issued, delivered, acked, abandoned, rollouts, scored, tasks, bytes] = n;
        Ok(QueueCounts { issued, delivered, rollouts, scored, acked, tasks, abandoned, bytes })
    }

    async fn control(&self) -> Result<RunControl, QueueError> {
        let call = self.prepare(&SCRIPTS.get, &["ctl"]);
        let name: Option<String> = self.call(&call, 0, "reading the run's control").await?;
        Ok(name.map_or(RunControl::Run, |name| control_of(&name)))
    }

    async fn set_control(&self, control: RunControl) -> Result<(), QueueError> {
        let mut call = self.prepare(&SCRIPTS.set, &["ctl"]);
        call.arg(control_name(control));
        self.call::<String>(&call, 0, "setting the run's control").await.map(drop)
    }

    async fn set_progress(&self, epoch: u64, version: PolicyVersion) -> Result<(), QueueError> {
        let mut call = self.prepare(&SCRIPTS.set_progress, &["prog", "epoch"]);
        call.arg(epoch).arg(format!("{} {}", version.epoch, version.step));
        self.call::<String>(&call, epoch, "reporting progress").await.map(drop)
    }

    async fn progress(&self) -> Result<PolicyVersion, QueueError> {
        let call = self.prepare(&SCRIPTS.get, &["prog"]);
        let text: Option<String> = self.call(&call, 0, "reading progress").await?;
        Ok(text.as_deref().and_then(super::store::version_of).unwrap_or_default())
    }

    async fn reinit(&self) -> Result<(), QueueError> {
        self.initialise().await
    }
}
