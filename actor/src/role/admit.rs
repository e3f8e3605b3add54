//! Tasks in: leased when there is room, checked, held back until the weights are new enough, handed to the engine.

use std::sync::Arc;
use std::time::Duration;

use freewheel_queue::QueueError;
use freewheel_types::{MAX_GROUP_SIZE, PolicyVersion, Task};
use tokio::sync::watch;
use tracing::{debug, warn};

use super::Shared;
use super::backoff::Backoff;
use super::engine_thread::Command;
use super::loader::PromptCodec;
use crate::ActorError;
use crate::engine::{Request, SampleSpec, StopSpec};

/// How long one lease call may wait for a task.
const WAIT: Duration = Duration::from_millis(500);

/// What admission needs beside the shared state.
pub(super) struct Admission<W> {
    pub(super) shared: Arc<Shared>,
    pub(super) codec: Arc<dyn PromptCodec>,
    pub(super) stop_spec: StopSpec,
    pub(super) commands: flume::Sender<Command<W>>,
    pub(super) version: watch::Receiver<PolicyVersion>,
}

impl<W> Admission<W> {
    /// Leases and admits until told to stop or the run has finished.
    pub(super) async fn run(mut self) -> Result<(), ActorError> {
        let shared = self.shared.clone();
        let slots = shared.config.max_live;
        // Enough for every slot, and a little so that no slot waits for the next lease.
        let wanted = slots + (slots / 4).max(1);
        let mut backoff = Backoff::new(&format!("{}/lease", shared.actor));
        let mut group_size = wanted;
        loop {
            tokio::select! {
                () = shared.stop.cancelled() => return Ok(()),
                () = async {
                    shared.wait_not_busy().await;
                    shared.held.until(|held| held.missing() < wanted).await;
                } => {}
            }
            let room = wanted.saturating_sub(shared.held.missing());
            let max = (room / group_size).max(1);
            let leased = match shared.queue.lease_tasks(&shared.actor, max, WAIT).await {
                Ok(leased) => leased,
                Err(QueueError::Stopping) => return Ok(()),
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "no tasks could be leased");
                    backoff.wait(&shared.stop).await;
                    continue;
                }
            };
            backoff.reset();
            let mut fresh = Vec::new();
            for leased in leased {
                group_size = (leased.task.group_size as usize).max(1);
                if shared.held.take(&leased) {
                    fresh.push(leased.task);
                }
            }
            let mut fresh = fresh.into_iter();
            while let Some(task) = fresh.next() {
                if !self.admit(&task).await? {
                    // Not begun, so there is nothing to drain: their leases lapse.
                    std::iter::once(task).chain(fresh).for_each(|task| drop(shared.held.drop_task(task.id)));
                    return Ok(());
                }
            }
        }
    }

    /// Admits one task; `false` when told to stop meanwhile.
    async fn admit(&mut self, task: &Task) -> Result<bool, ActorError> {
        let shared = self.shared.clone();
        if !(1..=MAX_GROUP_SIZE).contains(&task.group_size) {
            let reason = format!("group_size is {}, 1 to {MAX_GROUP_SIZE} are allowed", task.group_size);
            shared.refuse(task.id, &reason).await;
            return Ok(true);
        }
        tokio::select! {
            () = shared.stop.cancelled() => return Ok(false),
            reached = self.version.wait_for(|&version| version >= task.min_version) => {
                if reached.is_err() {
                    return Ok(false);
                }
            }
        }
        let delivered = match shared.retry("asking what was delivered", || shared.queue.delivered(task)).await
        {
            Ok(delivered) => delivered,
            Err(QueueError::Stopping) => return Ok(false),
            Err(error) => {
                shared.refuse(task.id, &error.to_string()).await;
                return Ok(true);
            }
        };
        let missing = shared.held.set_delivered(task.id, &delivered);
        if missing.is_empty() {
            debug!(task = %task.id, "every sample was delivered before");
            if let Some(held) = shared.held.drop_task(task.id) {
                shared.finish(&held).await;
            }
            return Ok(true);
        }
        let prompt = match self.codec.encode_prompt(&task.prompt.body) {
            Ok(prompt) => prompt,
            Err(error) => {
                shared.refuse(task.id, &error.to_string()).await;
                return Ok(true);
            }
        };
        let sampling = |k: u32| shared.sampling(k, task.group_size);
        // Samples that are drawn alike are one request: all, or all but a greedy one.
        for samples in missing.chunk_by(|&a, &b| sampling(a) == sampling(b)) {
            let request = Request {
                id: task.id.0,
                prompt_ids: prompt.ids.clone(),
                tiles: prompt.tiles.clone(),
                samples: samples.iter().map(|&k| SampleSpec { rollout: task.id.rollout(k) }).collect(),
                seed: task.seed,
                sampling: sampling(samples[0]),
                max_new_tokens: shared.config.max_new_tokens,
                stop: self.stop_spec.clone(),
            };
            if self.commands.send_async(Command::Submit(request)).await.is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
