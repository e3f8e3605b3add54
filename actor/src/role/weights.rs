//! New weights: fetched and checked here, applied to a shadow copy, handed to the engine for the flip.
//!
//! A failure of any kind leaves the engine on the weights it has; the shadow copy then starts again from a key frame.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use freewheel_queue::{PolicyStore, QueueError};
use freewheel_types::PolicyVersion;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::backoff::Backoff;
use super::engine_thread::Command;
use super::loader::{PolicyLoader, Weights};
use crate::ActorError;

/// How long one question for newer weights may wait.
const WAIT: Duration = Duration::from_secs(1);

/// Follows the policy store.
pub(super) struct Puller<L: PolicyLoader> {
    store: Arc<dyn PolicyStore>,
    /// Lent to a blocking thread while it works.
    loader: Option<L>,
    /// Version of the shadow copy; `None` if it needs a key frame.
    shadow: Option<PolicyVersion>,
    /// Newest version handed to the engine.
    served: Option<PolicyVersion>,
    backoff: Backoff,
    bad: Arc<AtomicU64>,
}

impl<L: PolicyLoader> Puller<L> {
    pub(super) fn new(store: Arc<dyn PolicyStore>, loader: L, who: &str, bad: Arc<AtomicU64>) -> Self {
        let backoff = Backoff::new(&format!("{who}/weights"));
        Self { store, loader: Some(loader), shadow: None, served: None, backoff, bad }
    }

    /// The loader, when no pull is under way.
    pub(super) fn loader(&mut self) -> &mut L {
        self.loader.as_mut().expect("the loader is lent only during a pull")
    }

    /// Waits for weights newer than those served and makes them ready; `None` when told to stop.
    pub(super) async fn next(
        &mut self,
        spare: impl Fn() -> Option<Weights<L>>,
        stop: &CancellationToken,
    ) -> Result<Option<(PolicyVersion, Arc<Weights<L>>)>, ActorError> {
        while !stop.is_cancelled() {
            let found = tokio::select! {
                () = stop.cancelled() => return Ok(None),
                found = self.store.wait_newer(self.served, WAIT) => found,
            };
            let pulled = match found {
                Ok(None) => continue,
                Ok(Some(_)) => self.pull(&spare).await,
                Err(error) => Err(ActorError::Queue { what: "waiting for weights", source: error }),
            };
            match pulled {
                Ok(Some((version, weights))) => {
                    self.backoff.reset();
                    self.served = Some(version);
                    return Ok(Some((version, weights)));
                }
                Ok(None) => {}
                Err(ActorError::Queue { source: QueueError::Stopping, .. }) => return Ok(None),
                Err(error @ ActorError::Died(_)) => return Err(error),
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "weights not taken, keeping the old ones")
                }
            }
            if !self.backoff.wait(stop).await {
                return Ok(None);
            }
        }
        Ok(None)
    }

    async fn pull(
        &mut self,
        spare: &impl Fn() -> Option<Weights<L>>,
    ) -> Result<Option<(PolicyVersion, Arc<Weights<L>>)>, ActorError> {
        let fetched = self.store.fetch(self.shadow).await;
        let payloads = fetched.map_err(|source| {
            self.shadow = None;
            self.bad.fetch_add(u64::from(matches!(source, QueueError::BadWeights { .. })), Ordering::Relaxed);
            ActorError::Queue { what: "fetching weights", source }
        })?;
        let newest = payloads.last().map(|payload| payload.manifest.version);
        let Some(version) = newest.filter(|&version| self.served.is_none_or(|served| version > served))
        else {
            return Ok(None);
        };
        let mut loader = self.loader.take().expect("one pull at a time");
        let (mut shadow, spare) = (self.shadow, spare());
        let work = move || {
            let run = || {
                for payload in &payloads {
                    let manifest = &payload.manifest;
                    if manifest.base.is_some() && manifest.base != shadow {
                        let have = shadow.map_or("nothing".to_owned(), |have| have.to_string());
                        let what = format!("a delta that does not start from what is here, {have}");
                        return Err(ActorError::BadWeights { version: manifest.version, what });
                    }
                    shadow = None;
                    loader.apply(payload)?;
                    shadow = Some(manifest.version);
                }
                loader.pack(version, spare)
            };
            let result = run();
            (loader, result)
        };
        let joined = tokio::task::spawn_blocking(work).await;
        let (loader, result) = joined.map_err(|_| ActorError::Died("thread that applies weights"))?;
        self.loader = Some(loader);
        self.shadow = result.is_ok().then_some(version);
        self.bad.fetch_add(u64::from(result.is_err()), Ordering::Relaxed);
        result.map(|weights| Some((version, weights)))
    }
}

/// Keeps the engine on the newest weights until told to stop.
pub(super) async fn follow<L: PolicyLoader>(
    mut puller: Puller<L>,
    commands: flume::Sender<Command<Weights<L>>>,
    retired: flume::Receiver<Arc<Weights<L>>>,
    version: watch::Sender<PolicyVersion>,
    stop: CancellationToken,
) -> Result<(), ActorError> {
    let spare = || retired.drain().filter_map(Arc::into_inner).last();
    while let Some((newest, weights)) = puller.next(spare, &stop).await? {
        if commands.send_async(Command::Swap(weights)).await.is_err() {
            return Ok(()); // The engine is gone; whoever waits for it tells why.
        }
        info!(version = %newest, "new weights handed to the engine");
        version.send_replace(newest);
    }
    Ok(())
}
