//! Published weights in this process.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use freewheel_types::{ActorId, PolicyVersion, WeightsPayload};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::MemoryQueue;
use crate::clock::{Clock, SystemClock};
use crate::versions::{self, Published};
use crate::weights::{self, HEARTBEAT};
use crate::{PolicyStore, QueueConfig, QueueError, RunControl};

/// Published weights, in this process.
pub struct MemoryStore {
    keep_versions: usize,
    clock: Arc<dyn Clock>,
    /// Knows who the learner is and whether the run has finished, if there is one.
    queue: Option<Arc<MemoryQueue>>,
    state: Mutex<State>,
    published: Notify,
}

#[derive(Default)]
struct State {
    list: Vec<Published>,
    payloads: BTreeMap<PolicyVersion, Arc<WeightsPayload>>,
    actors: BTreeMap<String, (PolicyVersion, Duration)>,
    epoch: u64,
}

impl MemoryStore {
    /// An empty store; an epoch is over once a newer one has published.
    pub fn new(config: &QueueConfig) -> Arc<Self> {
        Self::build(config, Arc::new(SystemClock::default()), None)
    }

    /// An empty store that takes the learner's epoch and the end of the run from `queue`.
    pub fn with_queue(config: &QueueConfig, queue: Arc<MemoryQueue>) -> Arc<Self> {
        Self::build(config, queue.clock.clone(), Some(queue))
    }

    fn build(config: &QueueConfig, clock: Arc<dyn Clock>, queue: Option<Arc<MemoryQueue>>) -> Arc<Self> {
        let (state, published) = (Mutex::default(), Notify::new());
        Arc::new(Self { keep_versions: config.keep_versions as usize, clock, queue, state, published })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fence(&self, epoch: u64, newest: u64) -> Result<(), QueueError> {
        match &self.queue {
            Some(queue) => queue.lock().fence(epoch, "publishing weights"),
            None if epoch < newest => Err(QueueError::Fenced { epoch, what: "publishing weights" }),
            None => Ok(()),
        }
    }

    fn finished(&self) -> bool {
        self.queue.as_ref().is_some_and(|queue| queue.lock().control == RunControl::Finished)
    }
}

impl State {
    fn live(&self, now: Duration) -> impl Iterator<Item = (&String, PolicyVersion)> {
        let is_live = move |since: Duration| since + HEARTBEAT > now;
        self.actors.iter().filter(move |(_, (_, since))| is_live(*since)).map(|(actor, (v, _))| (actor, *v))
    }
}

#[async_trait]
impl PolicyStore for MemoryStore {
    async fn publish(&self, epoch: u64, payload: &WeightsPayload) -> Result<(), QueueError> {
        weights::check_offer(epoch, payload)?;
        let version = payload.manifest.version;
        let mut state = self.lock();
        self.fence(epoch, state.epoch)?;
        if let Some(last) = state.list.last().map(|published| published.version)
            && version <= last
        {
            let again =
                version == last && state.payloads.get(&last).is_some_and(|p| p.manifest == payload.manifest);
            return if again { Ok(()) } else { Err(QueueError::StaleVersion { version }) };
        }
        state.epoch = epoch;
        state.list.push(Published { version, base: payload.manifest.base });
        state.payloads.insert(version, Arc::new(payload.clone()));
        let in_use: Vec<PolicyVersion> = state.live(self.clock.now()).map(|(_, version)| version).collect();
        for old in versions::collect(&state.list, self.keep_versions, &in_use) {
            state.list.retain(|published| published.version != old);
            state.payloads.remove(&old);
        }
        drop(state);
        self.published.notify_waiters();
        Ok(())
    }

    async fn latest(&self) -> Result<Option<PolicyVersion>, QueueError> {
        Ok(self.lock().list.last().map(|published| published.version))
    }

    async fn wait_newer(
        &self,
        than: Option<PolicyVersion>,
        wait: Duration,
    ) -> Result<Option<PolicyVersion>, QueueError> {
        let deadline = Instant::now() + wait;
        loop {
            let published = self.published.notified();
            // Without a queue nothing but a publication ends the waiting.
            let changed = self.queue.as_ref().map_or(&self.published, |queue| &queue.changed).notified();
            tokio::pin!(published, changed);
            published.as_mut().enable();
            changed.as_mut().enable();
            let newer = self.latest().await?.filter(|newest| than.is_none_or(|than| *newest > than));
            let left = deadline.saturating_duration_since(Instant::now());
            if newer.is_some() || left.is_zero() {
                return Ok(newer);
            }
            if self.finished() {
                return Err(QueueError::Stopping);
            }
            tokio::select! {
                () = published => {}
                () = changed => {}
                () = tokio::time::sleep(left) => {}
            }
        }
    }

    async fn fetch(&self, have: Option<PolicyVersion>) -> Result<Vec<WeightsPayload>, QueueError> {
        let payloads: Vec<Arc<WeightsPayload>> = {
            let state = self.lock();
            let Some(newest) = state.list.last() else { return Ok(Vec::new()) };
            let path =
                versions::chain(&state.list, have).ok_or_else(|| weights::no_way(newest.version, have))?;
            path.iter().filter_map(|version| state.payloads.get(version).cloned()).collect()
        };
        payloads.iter().try_for_each(|payload| weights::verify(payload))?;
        Ok(payloads.iter().map(|payload| WeightsPayload::clone(payload)).collect())
    }

    async fn heartbeat(&self, actor: &ActorId, version: PolicyVersion) -> Result<(), QueueError> {
        let now = self.clock.now();
        let mut state = self.lock();
        state.actors.retain(|_, (_, since)| *since + HEARTBEAT > now);
        state.actors.insert(actor.0.clone(), (version, now));
        Ok(())
    }

    async fn actors(&self) -> Result<Vec<(ActorId, PolicyVersion)>, QueueError> {
        Ok(self.lock().live(self.clock.now()).map(|(actor, v)| (ActorId(actor.clone()), v)).collect())
    }
}
