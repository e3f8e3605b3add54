//! Weights on their way out, beside training: the newest snapshot is encoded and published, older ones that waited are skipped.
//!
//! ```text
//! training thread ─ snapshot ─► slot (one place, newest wins) ─► delta or key frame ─► policy store
//! ```

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use freewheel_model::{Params, delta};
use freewheel_queue::{PolicyStore, QueueError};
use freewheel_types::{Digest, PolicyVersion};
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::LearnerError;

/// Weights to publish.
#[derive(Debug)]
pub struct Snapshot {
    /// Which.
    pub version: PolicyVersion,
    /// Their values.
    pub params: Params,
}

/// Where the training thread leaves its newest weights; `None` before the first.
pub type Slot = watch::Sender<Option<Arc<Snapshot>>>;

/// Figures of the last publication.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PublishStats {
    version: PolicyVersion,
    bytes: u64,
    density: f64,
    seconds: f64,
}

impl PublishStats {
    /// Adds `weights/…`.
    pub fn write(&self, line: &mut Map<String, Value>) {
        line.insert("weights/bytes".into(), json!(self.bytes));
        line.insert("weights/density".into(), json!(self.density));
        line.insert("weights/publish_s".into(), json!(self.seconds));
        line.insert("weights/version".into(), json!(self.version.step));
    }
}

/// Publishes what comes into the slot until its sender is gone and the last snapshot is out.
pub struct Publisher {
    /// Where to.
    pub store: Arc<dyn PolicyStore>,
    /// The learner's epoch.
    pub epoch: u64,
    /// Every this many publications goes out whole.
    pub keyframe_every: u64,
    /// Digest of the tokenizer.
    pub tokenizer: Digest,
    /// Figures for the metrics.
    pub stats: Arc<Mutex<Option<PublishStats>>>,
    /// Gives up retrying.
    pub abort: CancellationToken,
}

impl Publisher {
    /// Runs to the end.
    ///
    /// # Errors
    /// [`LearnerError::Queue`] if another learner holds a newer epoch, or the store cannot work at all.
    pub async fn run(self, mut slot: watch::Receiver<Option<Arc<Snapshot>>>) -> Result<(), LearnerError> {
        let mut base: Option<Arc<Snapshot>> = None;
        let mut publications = 0;
        while slot.changed().await.is_ok() {
            let Some(snapshot) = slot.borrow_and_update().clone() else { continue };
            let whole = publications % self.keyframe_every == 0;
            self.publish(base.take().filter(|_| !whole), snapshot.clone()).await?;
            base = Some(snapshot);
            publications += 1;
        }
        Ok(())
    }

    async fn publish(
        &self,
        base: Option<Arc<Snapshot>>,
        snapshot: Arc<Snapshot>,
    ) -> Result<(), LearnerError> {
        let started = Instant::now();
        let tokenizer = self.tokenizer;
        let version = snapshot.version;
        let encode = move || match base {
            Some(base) => {
                delta::delta_frame(&base.params, base.version, &snapshot.params, snapshot.version, tokenizer)
            }
            None => delta::key_frame(&snapshot.params, snapshot.version, tokenizer),
        };
        let payload = tokio::task::spawn_blocking(encode).await.expect("encoding does not panic");
        let mut pause = Duration::from_millis(100);
        loop {
            match self.store.publish(self.epoch, &payload).await {
                Ok(()) => break,
                Err(QueueError::StaleVersion { .. }) => {
                    tracing::warn!(%version, "a newer version is published already");
                    break;
                }
                Err(error @ (QueueError::Unavailable { .. } | QueueError::DataLost { .. })) => {
                    tracing::warn!(%version, %error, "weights could not be published, trying again");
                    tokio::select! {
                        () = self.abort.cancelled() => return Ok(()),
                        () = tokio::time::sleep(pause) => pause = (2 * pause).min(Duration::from_secs(5)),
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        let stats = PublishStats {
            version,
            bytes: payload.manifest.payload_len(),
            density: payload.manifest.density,
            seconds: started.elapsed().as_secs_f64(),
        };
        *self.stats.lock().expect("no holder of the lock panics") = Some(stats);
        Ok(())
    }
}
