//! Where metrics go: one flat map a step, names as in the contract (`reward/mean`, `train/loss`, …).

use std::sync::Mutex;

use freewheel_types::{GroupFate, PolicyVersion};
use serde_json::{Map, Value};

use crate::assembly::Group;

/// Takes metric lines. Called in step order; must not block for long.
pub trait MetricsSink: Send + Sync {
    /// One step's metrics.
    fn step(&self, line: &Map<String, Value>);

    /// Metrics of a step that an earlier process made, and of which it may have told before it ended.
    fn made_again(&self, _line: &Map<String, Value>) {}

    /// A group that ended at weights `version`, with every member: for rollout samples. Called by the training thread, also for
    /// groups that are gone through again after a restart.
    fn group(&self, _version: PolicyVersion, _group: &Group, _fate: GroupFate) {}
}

/// Forgets every line.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMetrics;

impl MetricsSink for NoMetrics {
    fn step(&self, _line: &Map<String, Value>) {}
}

/// Keeps every line.
#[derive(Debug, Default)]
pub struct MemoryMetrics {
    lines: Mutex<Vec<Map<String, Value>>>,
}

impl MemoryMetrics {
    /// The lines so far.
    pub fn lines(&self) -> Vec<Map<String, Value>> {
        self.lines.lock().expect("no holder of the lock panics").clone()
    }
}

impl MetricsSink for MemoryMetrics {
    fn step(&self, line: &Map<String, Value>) {
        self.lines.lock().expect("no holder of the lock panics").push(line.clone());
    }
}
