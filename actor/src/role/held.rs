//! Tasks this actor holds a lease on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use freewheel_queue::LeasedTask;
use freewheel_types::{Task, TaskId};
use tokio::sync::Notify;

/// The tasks in hand. The lock is never held over an await.
#[derive(Default)]
pub(super) struct Held {
    tasks: Mutex<BTreeMap<TaskId, HeldTask>>,
    changed: Notify,
}

/// One task in hand.
#[derive(Clone)]
pub(super) struct HeldTask {
    pub(super) task: Task,
    pub(super) lease: String,
    /// Samples not delivered yet.
    pub(super) missing: BTreeSet<u32>,
    /// Whether another actor has it now; what is done here may still arrive first.
    pub(super) lost: bool,
}

impl Held {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<TaskId, HeldTask>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a task in hand; `false` if it was in hand already and only its lease is new.
    pub(super) fn take(&self, leased: &LeasedTask) -> bool {
        let mut tasks = self.lock();
        if let Some(held) = tasks.get_mut(&leased.task.id) {
            held.lease.clone_from(&leased.lease);
            held.lost = false;
            return false;
        }
        let missing = (0..leased.task.group_size).collect();
        let held = HeldTask { task: leased.task.clone(), lease: leased.lease.clone(), missing, lost: false };
        tasks.insert(leased.task.id, held);
        true
    }

    /// Samples known to be delivered; returns those that are not.
    pub(super) fn set_delivered(&self, task: TaskId, delivered: &[bool]) -> Vec<u32> {
        let mut tasks = self.lock();
        let Some(held) = tasks.get_mut(&task) else { return Vec::new() };
        held.missing.retain(|&k| !delivered.get(k as usize).copied().unwrap_or(false));
        held.missing.iter().copied().collect()
    }

    /// One sample is delivered. The task, out of hand now, if it was the last.
    pub(super) fn deliver(&self, task: TaskId, sample: u32) -> Option<HeldTask> {
        let whole = {
            let mut tasks = self.lock();
            let held = tasks.get_mut(&task)?;
            held.missing.remove(&sample);
            held.missing.is_empty().then(|| tasks.remove(&task)).flatten()
        };
        self.changed.notify_waiters();
        whole
    }

    /// Lets go of a task.
    pub(super) fn drop_task(&self, task: TaskId) -> Option<HeldTask> {
        let held = self.lock().remove(&task);
        self.changed.notify_waiters();
        held
    }

    /// Somebody else has the task now.
    pub(super) fn mark_lost(&self, task: TaskId, lease: &str) {
        if let Some(held) = self.lock().get_mut(&task).filter(|held| held.lease == lease) {
            held.lost = true;
        }
    }

    pub(super) fn get(&self, task: TaskId) -> Option<HeldTask> {
        self.lock().get(&task).cloned()
    }

    /// Leases to renew.
    pub(super) fn leases(&self) -> Vec<(TaskId, String)> {
        self.lock()
            .iter()
            .filter(|(_, held)| !held.lost)
            .map(|(&id, held)| (id, held.lease.clone()))
            .collect()
    }

    /// Tasks in hand.
    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }

    /// Samples not delivered yet, over all tasks.
    pub(super) fn missing(&self) -> usize {
        self.lock().values().map(|held| held.missing.len()).sum()
    }

    /// Waits until `ready` holds; looked at after every change.
    pub(super) async fn until(&self, ready: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if ready(self) {
                return;
            }
            changed.await;
        }
    }
}
