//! Rollouts out: every finished sample is put at once; a task whose samples are all delivered is finished.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use freewheel_queue::{PutOutcome, QueueError};
use freewheel_types::{Rollout, TaskId};
use tracing::{debug, warn};

use super::Shared;
use super::backoff::Backoff;
use super::engine_thread::Event;
use crate::ActorError;
use crate::engine::Finished;

/// Takes what the engine tells until it is gone.
pub(super) async fn deliver(shared: Arc<Shared>, events: flume::Receiver<Event>) -> Result<(), ActorError> {
    while let Ok(event) = events.recv_async().await {
        match event {
            Event::Refused { request, error } => shared.refuse(TaskId(request), &error.to_string()).await,
            Event::Finished(finished) => {
                for sample in finished {
                    if shared.abandon.is_cancelled() {
                        return Ok(());
                    }
                    deliver_one(&shared, sample).await;
                }
            }
        }
    }
    // The engine ends only after the actor has given up.
    if shared.abandon.is_cancelled() { Ok(()) } else { Err(ActorError::Died("engine thread")) }
}

async fn deliver_one(shared: &Shared, sample: Finished) {
    let task = sample.rollout.task();
    let Some(held) = shared.held.get(task) else {
        debug!(rollout = %sample.rollout, "a sample of a task no longer in hand is dropped");
        return;
    };
    let rollout = Rollout {
        id: sample.rollout,
        group_size: held.task.group_size,
        prompt: held.task.prompt,
        prompt_ids: sample.prompt_ids.to_vec(),
        output_ids: sample.output_ids,
        behaviour_logprobs: sample.behaviour_logprobs,
        versions: sample.versions,
        experts: sample.experts,
        text: sample.text,
        finish_reason: sample.finish_reason,
        sampling: shared.sampling(sample.rollout.index(), held.task.group_size),
        actor: shared.actor.clone(),
        generation_s: sample.generation_s,
    };
    if put(shared, &rollout).await
        && let Some(held) = shared.held.deliver(task, rollout.id.index())
    {
        shared.finish(&held).await;
    }
}

/// Puts a rollout however long it takes; `false` if it cannot be put or the actor is told to give up.
async fn put(shared: &Shared, rollout: &Rollout) -> bool {
    let mut backoff = Backoff::new(&format!("{}/put", shared.actor));
    loop {
        match shared.queue.put_rollout(rollout).await {
            Ok(PutOutcome::Accepted) => {
                shared.set_busy(false);
                shared.counters.rollouts.fetch_add(1, Ordering::Relaxed);
                return true;
            }
            Ok(PutOutcome::Duplicate) => {
                shared.set_busy(false);
                shared.counters.duplicates.fetch_add(1, Ordering::Relaxed);
                return true;
            }
            Ok(PutOutcome::Busy) => {
                shared.set_busy(true);
                shared.counters.busy.fetch_add(1, Ordering::Relaxed);
            }
            Err(error @ (QueueError::Payload(_) | QueueError::Config(_))) => {
                shared.refuse(rollout.id.task(), &error.to_string()).await;
                return false;
            }
            Err(QueueError::Stopping) => return false,
            Err(error) => {
                warn!(rollout = %rollout.id, error = &error as &dyn std::error::Error, "put failed, trying again")
            }
        }
        if !backoff.wait(&shared.abandon).await {
            return false;
        }
    }
}
