//! Names of keys. All keys of a run share one hash tag, hence one Cluster slot.

use freewheel_types::{MAX_GROUP_SIZE, PolicyVersion, RolloutId, RunId, TaskId};

/// Bits in one block of a bitmap: 8 KiB.
const BLOCK_BITS: u64 = 1 << 16;

/// Key names of one run.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    prefix: String,
}

/// One bit of a bitmap that is cut into blocks.
pub(super) struct Bit {
    pub key: String,
    pub offset: u64,
}

impl Keys {
    pub fn new(run: &RunId) -> Self {
        Self { prefix: format!("fw:{{{run}}}:") }
    }

    /// `fw:{RUN}:name`.
    pub fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Where "was delivered" of a rollout is kept.
    pub fn seen(&self, rollout: RolloutId) -> Bit {
        self.bit("seen", rollout.0)
    }

    /// Where "was delivered" of a task's sample 0 is kept; the others follow, in the same block.
    pub fn seen_base(&self, task: TaskId) -> Bit {
        const { assert!(BLOCK_BITS.is_multiple_of(MAX_GROUP_SIZE as u64)) };
        self.seen(task.rollout(0))
    }

    /// Where "was issued" of a task is kept.
    pub fn issued(&self, task: TaskId) -> Bit {
        self.bit("issued", task.0)
    }

    fn bit(&self, name: &str, index: u64) -> Bit {
        let key = self.key(&format!("{name}:{}", index / BLOCK_BITS));
        Bit { key, offset: index % BLOCK_BITS }
    }

    /// Manifest of a published version.
    pub fn manifest(&self, version: PolicyVersion) -> String {
        self.key(&format!("wm:{}.{}", version.epoch, version.step))
    }

    /// Piece `piece` of chunk `chunk` of the upload `nonce` of a version.
    pub fn piece(&self, version: PolicyVersion, nonce: &str, chunk: usize, piece: usize) -> String {
        self.key(&format!("wc:{}.{}:{nonce}:{chunk}.{piece}", version.epoch, version.step))
    }
}
