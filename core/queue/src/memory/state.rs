//! What the in-memory queue holds, and the rules by which it changes.
//!
//! Pure: no locks, no waiting, time handed in. It is also the model the Redis scripts are tested against,
//! so each method here says in Rust what one script says in Lua.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use freewheel_types::{
    GroupOutcome, MAX_GROUP_SIZE, PolicyVersion, PromptId, RolloutId, Task, TaskId, codec,
};
use roaring::RoaringTreemap;

use super::stream::{Feed, Stream};
use crate::payload::{self, ScoredEntry};
use crate::{
    DeadLetter, Delivery, LeasedRollout, LeasedTask, PutOutcome, QueueConfig, QueueCounts, QueueError,
    RunControl,
};

/// Dead letters kept.
const DEAD_LETTERS_MAX: usize = 10_000;

/// A task as the stream holds it: what must be readable even if the payload is damaged stands beside it.
#[derive(Debug)]
pub(super) struct TaskEntry {
    id: TaskId,
    prompt: PromptId,
    group_size: u32,
    payload: Vec<u8>,
}

/// Why the missing samples of a task will never come.
enum Lost {
    /// It cannot be run, or nobody survives it.
    Abandoned(String),
    /// It cannot be read.
    Damaged(String),
}

impl Lost {
    fn reason(&self) -> &str {
        match self {
            Self::Abandoned(reason) | Self::Damaged(reason) => reason,
        }
    }
}

/// The learner's lease.
#[derive(Debug)]
struct LearnerLease {
    holder: String,
    expires: Duration,
}

/// All streams and counters of one run.
#[derive(Debug)]
pub(super) struct State {
    config: QueueConfig,
    lease: Duration,
    pub control: RunControl,
    pub progress: PolicyVersion,
    learner: Option<LearnerLease>,
    epoch: u64,
    /// Task ids ever issued.
    issued: RoaringTreemap,
    /// Rollout ids ever delivered.
    seen: RoaringTreemap,
    pub tasks: Stream<TaskEntry>,
    /// Entry of every task in the stream.
    live: BTreeMap<TaskId, u64>,
    pub rollouts: Stream<(RolloutId, Vec<u8>)>,
    pub scored: Stream<(RolloutId, ScoredEntry)>,
    pub outcomes: Feed<GroupOutcome>,
    pub dead_letters: VecDeque<DeadLetter>,
    issued_rollouts: u64,
    delivered: u64,
    acked: u64,
    abandoned: u64,
    bytes: u64,
}

impl State {
    pub fn new(config: &QueueConfig) -> Self {
        Self {
            config: config.clone(),
            lease: config.lease(),
            control: RunControl::Run,
            progress: PolicyVersion::default(),
            learner: None,
            epoch: 0,
            issued: RoaringTreemap::new(),
            seen: RoaringTreemap::new(),
            tasks: Stream::default(),
            live: BTreeMap::new(),
            rollouts: Stream::default(),
            scored: Stream::default(),
            outcomes: Feed::default(),
            dead_letters: VecDeque::new(),
            issued_rollouts: 0,
            delivered: 0,
            acked: 0,
            abandoned: 0,
            bytes: 0,
        }
    }

    pub fn counts(&self) -> QueueCounts {
        QueueCounts {
            issued: self.issued_rollouts,
            delivered: self.delivered,
            rollouts: self.rollouts.len() as u64,
            scored: self.scored.len() as u64,
            acked: self.acked,
            tasks: self.tasks.len() as u64,
            abandoned: self.abandoned,
            bytes: self.bytes,
        }
    }

    /// When the first lease of a stream whose owner was last seen at `silent_since` runs out, and nobody will say so.
    pub fn runs_out(&self, silent_since: Option<Duration>, now: Duration) -> Duration {
        // With no lease now, none runs out before a whole lease time has passed.
        silent_since.unwrap_or(now) + self.lease
    }

    // --- tasks -----------------------------------------------------------------------------------

    pub fn issue(&mut self, task: &Task, payload: Vec<u8>) {
        if self.issued.insert(task.id.0) {
            self.issued_rollouts += u64::from(task.group_size);
        }
        if self.live.contains_key(&task.id) || self.delivered_of(task.id, task.group_size).all(|seen| seen) {
            return;
        }
        let (prompt, group_size) = (task.prompt.id, task.group_size);
        let entry = self.tasks.push(TaskEntry { id: task.id, prompt, group_size, payload });
        self.live.insert(task.id, entry);
    }

    /// Counts a task that was issued in an earlier life of the run, with those of its samples that reached the learner then.
    pub fn restore(&mut self, task: TaskId, group_size: u32, received: impl Fn(RolloutId) -> bool) {
        if !self.issued.insert(task.0) {
            return;
        }
        self.issued_rollouts += u64::from(group_size);
        for rollout in (0..group_size.min(MAX_GROUP_SIZE)).map(|k| task.rollout(k)).filter(|id| received(*id))
        {
            self.seen.insert(rollout.0);
            self.delivered += 1;
            self.acked += 1;
        }
    }

    pub fn delivered_of(&self, task: TaskId, group_size: u32) -> impl Iterator<Item = bool> + '_ {
        (0..group_size.min(MAX_GROUP_SIZE)).map(move |k| self.seen.contains(task.rollout(k).0))
    }

    pub fn lease_tasks(&mut self, actor: &str, max: usize, now: Duration) -> Vec<LeasedTask> {
        let mut leased = Vec::new();
        while leased.len() < max {
            let want = max - leased.len();
            let lease = self.lease;
            let mut ids = self.tasks.reclaim(actor, want, now, |_, since| since + lease <= now);
            ids.extend(self.tasks.take_new(actor, want - ids.len(), now));
            if ids.is_empty() {
                break;
            }
            leased.extend(ids.into_iter().filter_map(|id| self.open_task(id)));
        }
        leased
    }

    /// The task of a fresh lease, unless it was handed out too often or is damaged: then it ends here.
    fn open_task(&mut self, id: u64) -> Option<LeasedTask> {
        let entry = self.tasks.get(id)?;
        if entry.deliveries > self.config.max_deliveries {
            self.give_up(id, Lost::Abandoned(payload::too_often(self.config.max_deliveries)));
            return None;
        }
        match codec::decode_task(&entry.item.payload) {
            Ok(task) => Some(LeasedTask { task, lease: id.to_string(), deliveries: entry.deliveries }),
            Err(error) => {
                self.give_up(id, Lost::Damaged(error.to_string()));
                None
            }
        }
    }

    /// Ends a task whose missing samples will never come; each goes to the learner as abandoned, or as bad.
    fn give_up(&mut self, id: u64, lost: Lost) {
        let Some(task) = self.tasks.remove(id) else { return };
        self.live.remove(&task.id);
        let reason = lost.reason().to_owned();
        self.dead_letter(DeadLetter { source: "tasks".into(), rollout: Some(task.id.rollout(0)), reason });
        for rollout in (0..task.group_size).map(|k| task.id.rollout(k)) {
            if !self.seen.insert(rollout.0) {
                continue;
            }
            self.delivered += 1;
            let entry = match &lost {
                Lost::Damaged(what) => ScoredEntry::Bad(what.clone()),
                Lost::Abandoned(reason) => {
                    self.abandoned += 1;
                    let (prompt, group_size, reason) = (task.prompt, task.group_size, reason.clone());
                    ScoredEntry::Abandoned { prompt, group_size, reason }
                }
            };
            self.scored.push((rollout, entry));
        }
    }

    pub fn abandon_task(&mut self, actor: &str, task: TaskId, lease: &str, reason: &str) {
        let owned = |id: &u64| {
            let entry = self.tasks.get(*id).filter(|entry| entry.item.id == task);
            entry.and_then(|entry| entry.lease.as_ref()).is_some_and(|(owner, _)| owner == actor)
        };
        if let Some(id) = lease.parse().ok().filter(owned) {
            self.give_up(id, Lost::Abandoned(payload::bounded(reason)));
        }
    }

    pub fn extend_task(&mut self, actor: &str, lease: &str, now: Duration) -> bool {
        lease.parse().is_ok_and(|id| self.tasks.extend(id, actor, now))
    }

    pub fn finish_task(&mut self, task: TaskId, lease: &str) -> Result<(), QueueError> {
        let Some(id) = lease.parse().ok().filter(|id| self.tasks.get(*id).is_some_and(|e| e.item.id == task))
        else {
            return Ok(());
        };
        let group_size = self.tasks.get(id).map_or(0, |entry| entry.item.group_size);
        if let Some(index) = self.delivered_of(task, group_size).position(|seen| !seen) {
            return Err(payload::unfinished(task, index as u32, group_size));
        }
        self.tasks.remove(id);
        self.live.remove(&task);
        Ok(())
    }

    // --- rollouts --------------------------------------------------------------------------------

    fn admit(&mut self, rollout: RolloutId, bytes: usize, len: usize) -> PutOutcome {
        let bytes = bytes as u64;
        if self.seen.contains(rollout.0) {
            return PutOutcome::Duplicate;
        }
        if len as u64 >= self.config.max_len || self.bytes + bytes > self.config.max_bytes {
            return PutOutcome::Busy;
        }
        self.seen.insert(rollout.0);
        self.delivered += 1;
        self.bytes += bytes;
        PutOutcome::Accepted
    }

    pub fn put_rollout(&mut self, rollout: RolloutId, payload: Vec<u8>) -> PutOutcome {
        let outcome = self.admit(rollout, payload.len(), self.rollouts.len());
        if outcome == PutOutcome::Accepted {
            self.rollouts.push((rollout, payload));
        }
        outcome
    }

    pub fn put_scored(&mut self, rollout: RolloutId, payload: Vec<u8>) -> PutOutcome {
        let outcome = self.admit(rollout, payload.len(), self.scored.len());
        if outcome == PutOutcome::Accepted {
            self.scored.push((rollout, ScoredEntry::Payload(payload)));
        }
        outcome
    }

    pub fn lease_rollouts(&mut self, worker: &str, max: usize, now: Duration) -> Vec<LeasedRollout> {
        let mut leased = Vec::new();
        while leased.len() < max {
            let want = max - leased.len();
            let lease = self.lease;
            let mut ids = self.rollouts.reclaim(worker, want, now, |_, since| since + lease <= now);
            ids.extend(self.rollouts.take_new(worker, want - ids.len(), now));
            if ids.is_empty() {
                break;
            }
            leased.extend(ids.into_iter().filter_map(|id| self.open_rollout(id)));
        }
        leased
    }

    fn open_rollout(&mut self, id: u64) -> Option<LeasedRollout> {
        let entry = self.rollouts.get(id)?;
        let (rollout_id, payload) = &entry.item;
        let replaced = match payload::open_rollout(
            payload,
            Some(*rollout_id),
            entry.deliveries,
            self.config.max_deliveries,
        ) {
            Ok(rollout) => return Some(LeasedRollout { rollout, lease: id.to_string() }),
            Err(replaced) => replaced,
        };
        let rollout = *rollout_id;
        if let ScoredEntry::Bad(reason) = &replaced {
            let reason = reason.clone();
            self.dead_letter(DeadLetter { source: "rollouts".into(), rollout: Some(rollout), reason });
        }
        self.replace(id, rollout, replaced);
        None
    }

    pub fn forward(&mut self, lease: &str, rollout: RolloutId, payload: Vec<u8>) -> Result<(), QueueError> {
        let Some((id, entry)) = lease.parse().ok().and_then(|id| Some((id, self.rollouts.get(id)?))) else {
            return Ok(());
        };
        if entry.item.0 != rollout {
            return Err(payload::wrong_lease(lease, rollout));
        }
        self.replace(id, rollout, ScoredEntry::Payload(payload));
        Ok(())
    }

    fn replace(&mut self, id: u64, rollout: RolloutId, entry: ScoredEntry) {
        let Some((_, old)) = self.rollouts.remove(id) else { return };
        self.bytes = self.bytes - old.len() as u64 + entry.bytes();
        self.scored.push((rollout, entry));
    }

    // --- learner ---------------------------------------------------------------------------------

    pub fn acquire_learner(&mut self, holder: &str, floor: u64, now: Duration) -> Option<u64> {
        if self.learner.as_ref().is_some_and(|lease| lease.expires > now) {
            return None;
        }
        self.epoch = self.epoch.max(floor) + 1;
        self.learner = Some(LearnerLease { holder: holder.to_owned(), expires: self.learner_expiry(now) });
        Some(self.epoch)
    }

    pub fn renew_learner(&mut self, holder: &str, epoch: u64, now: Duration) -> Result<(), QueueError> {
        self.fence(epoch, "renewing the learner lease")?;
        let expires = self.learner_expiry(now);
        match &mut self.learner {
            Some(lease) if lease.holder == holder => lease.expires = expires,
            _ => return Err(QueueError::Fenced { epoch, what: "renewing the learner lease" }),
        }
        Ok(())
    }

    fn learner_expiry(&self, now: Duration) -> Duration {
        now + self.config.learner_lease()
    }

    /// Refuses any epoch but the current one.
    pub fn fence(&self, epoch: u64, what: &'static str) -> Result<(), QueueError> {
        if epoch == self.epoch && epoch > 0 { Ok(()) } else { Err(QueueError::Fenced { epoch, what }) }
    }

    pub fn fetch_scored(
        &mut self,
        epoch: u64,
        max: usize,
        now: Duration,
    ) -> Result<Vec<Delivery>, QueueError> {
        self.fence(epoch, "fetching")?;
        let owner = payload::learner_name(epoch);
        let mut ids = self.scored.reclaim(&owner, max, now, |holder, _| holder != owner);
        ids.extend(self.scored.take_new(&owner, max - ids.len(), now));
        let open = |id: u64| {
            let (rollout, entry) = &self.scored.get(id)?.item;
            Some(Delivery { id: id.to_string(), body: payload::open_scored(entry, Some(*rollout)) })
        };
        Ok(ids.into_iter().filter_map(open).collect())
    }

    pub fn ack_scored(&mut self, epoch: u64, deliveries: &[String]) -> Result<(), QueueError> {
        self.fence(epoch, "acknowledging")?;
        for id in deliveries.iter().filter_map(|id| id.parse().ok()) {
            if let Some((_, entry)) = self.scored.remove(id) {
                self.bytes -= entry.bytes();
                self.acked += 1;
            }
        }
        Ok(())
    }

    pub fn dead_letter(&mut self, letter: DeadLetter) {
        if self.dead_letters.len() == DEAD_LETTERS_MAX {
            self.dead_letters.pop_front();
        }
        self.dead_letters.push_back(letter);
    }
}
