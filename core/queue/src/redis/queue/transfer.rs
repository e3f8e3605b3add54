//! Entries in and out of the streams: one look each, no waiting.

use std::sync::Mutex;
use std::time::Duration;

use freewheel_types::{ActorId, RolloutId, TaskId};

use super::{RedisQueue, lock};
use crate::payload::{self, ScoredEntry};
use crate::redis::cursors::Reaper;
use crate::redis::entries::{DamagedTask, Fields, TaskHead, control_of};
use crate::redis::link::Request;
use crate::redis::scripts::SCRIPTS;
use crate::{Delivery, LeasedRollout, LeasedTask, PutOutcome, QueueError, RolloutQueue, RunControl};

/// Longest pause between two looks for abandoned entries.
const REAP_MAX: Duration = Duration::from_secs(1);

type Leased = (String, Vec<(String, u32, Fields)>);
type Fetched = (String, String, Vec<(String, Fields)>);

impl RedisQueue {
    /// Whether this look is to look for abandoned entries too.
    fn reap(&self, reaper: &Mutex<Reaper>, first: bool) -> bool {
        lock(reaper).due((self.config.lease() / 20).min(REAP_MAX), first)
    }

    /// One look at a stream: abandoned entries if it is time to look for them, then new ones.
    async fn lease(
        &self,
        (stream, group): (&'static str, &'static str),
        owner: &str,
        max: usize,
        reap: bool,
    ) -> Result<(bool, Vec<(String, u32, Fields)>), QueueError> {
        let lease = self.config.lease();
        let mut call = self.prepare(&SCRIPTS.lease, &[stream, "ctl"]);
        call.arg(group).arg(owner).arg(max).arg(lease.as_millis() as u64).arg(u8::from(reap));
        let (control, entries): Leased = self.call(&call, 0, "leasing").await?;
        Ok((control_of(&control) == RunControl::Finished, entries))
    }

    pub(super) async fn lease_tasks_now(
        &self,
        actor: &str,
        max: usize,
        first: bool,
    ) -> Result<(bool, Vec<LeasedTask>), QueueError> {
        let reap = self.reap(&self.task_reaper, first);
        let mut leased = Vec::new();
        loop {
            let want = max - leased.len();
            let (finished, entries) = self.lease(("tasks", "actors"), actor, want, reap).await?;
            let found = entries.len();
            for (id, deliveries, mut fields) in entries {
                if deliveries > self.config.max_deliveries {
                    let reason = payload::too_often(self.config.max_deliveries);
                    self.give_up(&id, fields.task_head(), &reason, false, None).await?;
                    continue;
                }
                match fields.task() {
                    Ok(task) => leased.push(LeasedTask { task, lease: id, deliveries }),
                    Err(DamagedTask { error, head }) => {
                        self.give_up(&id, head, &error.to_string(), true, None).await?
                    }
                }
            }
            if found == 0 || leased.len() >= max {
                return Ok((finished, leased));
            }
        }
    }

    /// Ends a task whose missing samples will never come: those of a damaged one go to the learner as bad, of another as
    /// abandoned. With an `owner`, only if the lease is still the owner's.
    pub(super) async fn give_up(
        &self,
        id: &str,
        head: Option<TaskHead>,
        reason: &str,
        damaged: bool,
        owner: Option<&ActorId>,
    ) -> Result<(), QueueError> {
        let reason = payload::bounded(reason);
        tracing::warn!(task = ?head.map(|head| head.id.0), reason, "task given up");
        let seen = self.keys.seen_base(head.map_or(TaskId(0), |head| head.id));
        let mut call = self.prepare(&SCRIPTS.abandon, &["tasks", "live", &seen.key, "scored", "cnt", "dlq"]);
        call.arg(id).arg(head.map_or(String::new(), |head| head.id.to_string())).arg(seen.offset);
        match head {
            Some(head) if !damaged => call.arg("ab").arg(head.prompt.to_string()),
            _ => call.arg("bad").arg(&reason),
        };
        call.arg(&reason).arg(owner.map_or("", |owner| owner.0.as_str()));
        if let Some(head) = head {
            (0..head.group_size).for_each(|k| {
                call.arg(head.id.rollout(k).0);
            });
        }
        self.call::<u64>(&call, 0, "giving a task up").await.map(drop)
    }

    pub(super) async fn lease_rollouts_now(
        &self,
        worker: &str,
        max: usize,
        first: bool,
    ) -> Result<(bool, Vec<LeasedRollout>), QueueError> {
        let reap = self.reap(&self.rollout_reaper, first);
        let mut leased = Vec::new();
        loop {
            let want = max - leased.len();
            let (finished, entries) = self.lease(("rollouts", "reward"), worker, want, reap).await?;
            let found = entries.len();
            for (id, deliveries, mut fields) in entries {
                let beside = fields.rollout();
                match payload::open_rollout(&fields.payload(), beside, deliveries, self.config.max_deliveries)
                {
                    Ok(rollout) => leased.push(LeasedRollout { rollout, lease: id }),
                    Err(entry) => {
                        if let ScoredEntry::Bad(reason) = &entry {
                            self.dead_letter("rollouts", beside, reason).await?;
                        }
                        self.replace(&id, beside, &entry, false).await?;
                    }
                }
            }
            if found == 0 || leased.len() >= max {
                return Ok((finished, leased));
            }
        }
    }

    /// Moves an entry from `rollouts` to `scored`; one that was `leased` must be `rollout`'s.
    pub(super) async fn replace(
        &self,
        id: &str,
        rollout: Option<RolloutId>,
        entry: &ScoredEntry,
        leased: bool,
    ) -> Result<(), QueueError> {
        let mut call = self.prepare(&SCRIPTS.forward, &["rollouts", "scored", "bytes"]);
        call.arg(id).arg(rollout.map_or(String::new(), |rollout| rollout.0.to_string()));
        match entry {
            ScoredEntry::Payload(payload) => call.arg("d").arg(payload),
            ScoredEntry::Bad(reason) => call.arg("bad").arg(reason),
            ScoredEntry::Abandoned { prompt, .. } => call.arg("ab").arg(prompt.to_string()),
        };
        call.arg(u8::from(leased));
        self.send(&call, entry.bytes(), "forwarding a rollout").await.map(|_: u64| ()).map_err(|failure| {
            match (failure.code(), rollout) {
                ("MISMATCH", Some(rollout)) => payload::wrong_lease(id, rollout),
                _ => self.error(failure, 0),
            }
        })
    }

    pub(super) async fn put(
        &self,
        stream: &'static str,
        rollout: RolloutId,
        payload: &[u8],
    ) -> Result<PutOutcome, QueueError> {
        let seen = self.keys.seen(rollout);
        let mut call = self.prepare(&SCRIPTS.put, &[stream, &seen.key, "bytes", "cnt"]);
        call.arg(seen.offset).arg(self.config.max_len).arg(self.config.max_bytes).arg(rollout.0).arg(payload);
        match self.send::<String>(&call, payload.len() as u64, "putting a rollout").await {
            Ok(outcome) => Ok(match outcome.as_str() {
                "DUP" => PutOutcome::Duplicate,
                "BUSY" => PutOutcome::Busy,
                _ => PutOutcome::Accepted,
            }),
            // Full by its own count rather than ours: it drains, because everything else may still run.
            Err(failure) if failure.code() == "OOM" => Ok(PutOutcome::Busy),
            Err(failure) => Err(self.error(failure, 0)),
        }
    }

    pub(super) async fn fetch_now(
        &self,
        epoch: u64,
        max: usize,
    ) -> Result<(bool, Vec<Delivery>), QueueError> {
        let mut retry = self.link.retry();
        // Each try starts from what is known then: a lost reply leaves entries pending that must be claimed again.
        let (next, control, entries): Fetched = loop {
            let cursor = lock(&self.learner).begin(epoch);
            let mut call = self.prepare(&SCRIPTS.fetch, &["scored", "epoch", "ctl"]);
            call.arg(epoch).arg(payload::learner_name(epoch)).arg(max).arg(&cursor);
            match retry.once(&Request::Script(&call), "fetching").await {
                Ok(fetched) => break fetched,
                Err(failure) => {
                    self.adopt(&failure).await;
                    retry.pause(failure).await.map_err(|failure| self.error(failure, epoch))?;
                }
            }
        };
        let fresh = lock(&self.learner).arrived(next, entries);
        let deliveries = fresh.into_iter().map(|(id, mut fields)| {
            let beside = fields.rollout();
            Delivery { id, body: payload::open_scored(&fields.scored(), beside) }
        });
        Ok((control_of(&control) == RunControl::Finished, deliveries.collect()))
    }
}
