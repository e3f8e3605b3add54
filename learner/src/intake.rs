//! The door: fetch, check, journal, acknowledge, hand over. In that order, so that nothing acknowledged can be lost.

use std::sync::mpsc::Sender;
use std::sync::{Arc, atomic::AtomicU64, atomic::Ordering};
use std::time::Duration;

use freewheel_model::ModelSpec;
use freewheel_queue::{Delivery, DeliveryBody, QueueCounts, QueueError, RolloutQueue};
use freewheel_types::{PolicyVersion, ScoredRollout};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::LearnerError;
use crate::assembly::Arrival;
use crate::consumed::IdSet;
use crate::core::SharedJournal;
use crate::journal::{AbandonedRollout, BadRollout, Position, Record};
use crate::trainer::PromptImages;

const FETCH_MAX: usize = 256;
const FETCH_WAIT: Duration = Duration::from_millis(20);

/// What the learner requires of a rollout beyond the codec's checks.
#[derive(Clone)]
pub struct Door {
    /// Vocabulary size.
    pub vocab_size: u32,
    /// Tokens of the longest sequence.
    pub max_positions: usize,
    /// (MoE layers, experts per token, experts) of a mixture-of-experts model.
    pub moe: Option<(usize, usize, usize)>,
    /// Epoch of this learner.
    pub epoch: u64,
    /// Updates in the weights it started from.
    pub started_at: u64,
    /// Updates in its newest weights.
    pub step: Arc<AtomicU64>,
    /// Reads the images of prompts.
    pub images: Arc<dyn PromptImages>,
}

impl Door {
    /// What `spec` implies.
    pub fn new(
        spec: &ModelSpec,
        version: PolicyVersion,
        step: Arc<AtomicU64>,
        images: Arc<dyn PromptImages>,
    ) -> Self {
        let experts = spec.layers.iter().find_map(|(_, ffn)| match ffn {
            freewheel_model::FfnSpec::Moe(moe) => Some(moe.experts),
            freewheel_model::FfnSpec::Dense { .. } => None,
        });
        Self {
            vocab_size: spec.vocab_size as u32,
            max_positions: spec.max_positions,
            moe: experts.map(|experts| (spec.moe_layers(), spec.top_k(), experts)),
            epoch: version.epoch,
            started_at: version.step,
            step,
            images,
        }
    }

    /// What is wrong with `scored`, if anything.
    pub fn refuse(&self, scored: &ScoredRollout) -> Option<String> {
        let rollout = &scored.rollout;
        if let Err(error) = rollout.validate(self.vocab_size) {
            return Some(error.to_string());
        }
        let tokens = rollout.prompt_ids.len() + rollout.len();
        if tokens > self.max_positions {
            return Some(format!("{tokens} tokens, the model takes {}", self.max_positions));
        }
        let newest = self.step.load(Ordering::Acquire);
        for span in &rollout.versions {
            let step = span.version.step;
            if span.version.epoch > self.epoch || step > newest {
                return Some(format!("drawn by version {}, which was never published", span.version));
            }
            if span.version.epoch < self.epoch && step > self.started_at {
                return Some(format!("drawn by version {}, which was rolled back", span.version));
            }
        }
        if let Err(what) = self.images.tiles_of(&rollout.prompt.body, &rollout.prompt_ids) {
            return Some(what);
        }
        self.refuse_experts(scored, tokens - 1)
    }

    fn refuse_experts(&self, scored: &ScoredRollout, rows: usize) -> Option<String> {
        let trace = &scored.rollout.experts;
        if trace.ids.is_empty() {
            return None;
        }
        let Some((layers, top_k, experts)) = self.moe else {
            return Some("an expert trace for a model without experts".into());
        };
        let expected = rows * layers * top_k;
        if (usize::from(trace.layers), usize::from(trace.top_k), trace.ids.len()) != (layers, top_k, expected)
        {
            return Some(format!("an expert trace of {} ids, expected {expected}", trace.ids.len()));
        }
        let unknown = trace.ids.iter().find(|&&id| usize::from(id) >= experts);
        unknown.map(|id| format!("expert {id} of {experts}"))
    }
}

/// A reading of queue and door at one moment between two fetches.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// The queue's counters.
    pub counts: QueueCounts,
    /// Distinct rollouts received since the run began.
    pub received: u64,
    /// Further copies of them.
    pub duplicates: u64,
}

/// The receiving side of the learner.
pub struct Intake {
    /// Where from.
    pub queue: Arc<dyn RolloutQueue>,
    /// The learner's epoch.
    pub epoch: u64,
    /// Checks.
    pub door: Door,
    /// Where to first.
    pub journal: SharedJournal,
    /// Rollouts that arrived before.
    pub seen: IdSet,
    /// How many those are.
    pub received: u64,
    /// Where to then.
    pub inbox: Sender<(Position, Arrival)>,
    /// Asks for a reading.
    pub readings: mpsc::UnboundedReceiver<oneshot::Sender<Reading>>,
    /// Ends it.
    pub stop: CancellationToken,
}

impl Intake {
    /// Runs until stopped.
    ///
    /// # Errors
    /// If the journal cannot be written, the epoch is over, or the queue cannot work at all.
    pub async fn run(mut self) -> Result<(), LearnerError> {
        let mut duplicates = 0;
        while !self.stop.is_cancelled() {
            self.answer_readings(duplicates).await;
            let deliveries = match self.queue.fetch_scored(self.epoch, FETCH_MAX, FETCH_WAIT).await {
                Ok(deliveries) => deliveries,
                Err(QueueError::Stopping) => {
                    tokio::time::sleep(FETCH_WAIT).await;
                    continue;
                }
                Err(error @ (QueueError::Unavailable { .. } | QueueError::DataLost { .. })) => {
                    tracing::warn!(%error, "no rollouts can be fetched, trying again");
                    tokio::time::sleep(Duration::from_millis(500)).await;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            if deliveries.is_empty() {
                continue;
            }
            let ids: Vec<String> = deliveries.iter().map(|delivery| delivery.id.clone()).collect();
            let arrivals = self.take(deliveries, &mut duplicates).await;
            let arrivals = self.write(arrivals).await?;
            self.received += arrivals.len() as u64;
            self.acknowledge(&ids).await?;
            for (at, arrival) in arrivals {
                // The training thread may have ended: what it did not take is in the journal.
                self.inbox.send((at, arrival)).ok();
            }
        }
        // Nothing is taken any more; steps still under way want to be accounted for.
        while let Some(reply) = self.readings.recv().await {
            self.answer(reply, duplicates).await;
        }
        Ok(())
    }

    async fn answer_readings(&mut self, duplicates: u64) {
        while let Ok(reply) = self.readings.try_recv() {
            self.answer(reply, duplicates).await;
        }
    }

    async fn answer(&self, reply: oneshot::Sender<Reading>, duplicates: u64) {
        match self.queue.counts().await {
            Ok(counts) => drop(reply.send(Reading { counts, received: self.received, duplicates })),
            Err(error) => tracing::warn!(%error, "the queue could not be counted"),
        }
    }

    /// Sorts deliveries: new ones become arrivals, bad ones are put aside.
    async fn take(
        &mut self,
        deliveries: Vec<Delivery>,
        duplicates: &mut u64,
    ) -> Vec<(Arrival, Option<String>)> {
        let mut arrivals = Vec::new();
        for delivery in deliveries {
            let (arrival, reason) = match delivery.body {
                DeliveryBody::Scored(scored) => match self.door.refuse(&scored) {
                    None => (Arrival::Scored(scored), None),
                    Some(reason) => (Arrival::Bad(scored.rollout.id), Some(reason)),
                },
                DeliveryBody::Abandoned { rollout, prompt, group_size, reason } => {
                    (Arrival::Abandoned { rollout, prompt, group_size, reason }, None)
                }
                DeliveryBody::Bad { rollout: Some(rollout), error } => {
                    (Arrival::Bad(rollout), Some(error.to_string()))
                }
                DeliveryBody::Bad { rollout: None, error } => {
                    self.put_aside(&delivery.id, None, &error.to_string()).await;
                    continue;
                }
            };
            if !self.seen.insert(arrival.rollout().0) {
                *duplicates += 1;
                continue;
            }
            if let Some(reason) = &reason {
                self.put_aside(&delivery.id, Some(arrival.rollout()), reason).await;
            }
            arrivals.push((arrival, reason));
        }
        arrivals
    }

    async fn put_aside(&self, source: &str, rollout: Option<freewheel_types::RolloutId>, reason: &str) {
        tracing::warn!(source, ?rollout, reason, "a rollout cannot be used");
        if let Err(error) = self.queue.dead_letter(source, rollout, reason).await {
            tracing::warn!(%error, "it could not be put aside either");
        }
    }

    /// Journals arrivals, durably.
    async fn write(
        &self,
        arrivals: Vec<(Arrival, Option<String>)>,
    ) -> Result<Vec<(Position, Arrival)>, LearnerError> {
        let journal = self.journal.clone();
        let write = move || {
            let mut journal = journal.lock().expect("no holder of the lock panics");
            let mut placed = Vec::with_capacity(arrivals.len());
            for (arrival, reason) in arrivals {
                let (record, arrival) = record(arrival, reason);
                let at = journal.append(&record)?;
                placed.push((at, arrival.unwrap_or_else(|| arrival_of(record))));
            }
            journal.sync()?;
            Ok(placed)
        };
        tokio::task::spawn_blocking(write).await.expect("journalling does not panic")
    }

    async fn acknowledge(&self, ids: &[String]) -> Result<(), LearnerError> {
        loop {
            match self.queue.ack_scored(self.epoch, ids).await {
                Ok(()) | Err(QueueError::DataLost { .. } | QueueError::Stopping) => return Ok(()),
                Err(error @ QueueError::Unavailable { .. }) => {
                    tracing::warn!(%error, "deliveries could not be acknowledged, trying again");
                    tokio::time::sleep(Duration::from_millis(500)).await;
                    // Whoever comes next gets them again and knows them.
                    if self.stop.is_cancelled() {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The record of an arrival, and the arrival where the record does not carry it whole.
fn record(arrival: Arrival, reason: Option<String>) -> (Record, Option<Arrival>) {
    match arrival {
        Arrival::Scored(scored) | Arrival::Baseline(scored) => (Record::Consumed(scored), None),
        Arrival::Bad(rollout) => {
            let reason = reason.unwrap_or_default();
            (Record::Bad(BadRollout { rollout, reason }), Some(Arrival::Bad(rollout)))
        }
        Arrival::Abandoned { rollout, prompt, group_size, reason } => {
            let gone = AbandonedRollout { rollout, prompt, group_size, reason: reason.clone() };
            (Record::Abandoned(gone), Some(Arrival::Abandoned { rollout, prompt, group_size, reason }))
        }
    }
}

fn arrival_of(record: Record) -> Arrival {
    match record {
        Record::Consumed(scored) => Arrival::Scored(scored),
        other => unreachable!("only scored rollouts are carried by their record, not {other:?}"),
    }
}
