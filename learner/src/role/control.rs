//! The asynchronous side's own loop: what the training thread says goes out, what the run is told comes in, and every step
//! accounts for every rollout.

use std::sync::atomic::AtomicU64;
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use freewheel_queue::{QueueError, RunControl};
use freewheel_types::{Accounting, GroupOutcome};
use serde_json::{Map, Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::thread::{Ended, Event, Recovered};
use super::{LearnerEnd, LearnerSummary, Outside};
use crate::LearnerError;
use crate::assembly::{Arrival, Ledger};
use crate::core::Recovery;
use crate::intake::{Door, Intake, Reading};
use crate::journal::Position;
use crate::report::StepReport;

/// The asynchronous side's own loop.
pub(super) struct Control {
    pub(super) outside: Outside,
    pub(super) epoch: u64,
    pub(super) step: Arc<AtomicU64>,
    pub(super) stats: Arc<Mutex<Option<crate::publish::PublishStats>>>,
    pub(super) stop: CancellationToken,
    pub(super) shutdown: CancellationToken,
    pub(super) inbox: Option<std_mpsc::Sender<(Position, Arrival)>>,
    pub(super) readings: Option<mpsc::UnboundedSender<oneshot::Sender<Reading>>>,
    pub(super) last: Option<Accounting>,
}

impl Control {
    pub(super) async fn run(
        &mut self,
        mut events: mpsc::UnboundedReceiver<Event>,
        tasks: &mut JoinSet<Result<(), LearnerError>>,
    ) -> Result<LearnerSummary, LearnerError> {
        let started = Instant::now();
        let mut poll = tokio::time::interval(Duration::from_millis(200));
        let mut why = LearnerEnd::StepsDone;
        let mut recovery = Recovery::default();
        let shutdown = self.shutdown.clone();
        loop {
            tokio::select! {
                event = events.recv() => match event.expect("the training thread says when it ends") {
                    Event::Recovered(recovered) => {
                        recovery = recovered.recovery.clone();
                        self.recovered(*recovered, tasks).await?;
                    }
                    Event::Step(report, outcomes) => self.step(*report, outcomes).await?,
                    Event::Outcomes(outcomes) => self.report(&outcomes).await?,
                    Event::Ended(ended) => {
                        let ended = ended?;
                        let end = if ended.finished { LearnerEnd::StepsDone } else { why };
                        let Ended { version, weights, ledger, .. } = *ended;
                        return Ok(LearnerSummary { version, weights, ledger, accounting: self.last, recovery, end });
                    }
                },
                Some(ended) = tasks.join_next() => {
                    ended.expect("no task panics")?;
                }
                () = shutdown.cancelled(), if !self.stop.is_cancelled() => {
                    why = LearnerEnd::Shutdown;
                    self.stop.cancel();
                }
                _ = poll.tick(), if !self.stop.is_cancelled() => {
                    if self.outside.time_limit.is_some_and(|limit| started.elapsed() >= limit) {
                        why = LearnerEnd::TimeLimit;
                        self.stop.cancel();
                    } else if matches!(self.outside.queue.control().await, Ok(RunControl::Drain | RunControl::Finished)) {
                        why = LearnerEnd::Drained;
                        self.stop.cancel();
                    }
                }
            }
        }
    }

    /// The training thread is where the last learner was: tell everyone, open the door.
    async fn recovered(
        &mut self,
        recovered: Recovered,
        tasks: &mut JoinSet<Result<(), LearnerError>>,
    ) -> Result<(), LearnerError> {
        let version = recovered.version;
        tracing::info!(%version, ?recovered.recovery, "learner is ready");
        self.retry("report progress", || self.outside.queue.set_progress(self.epoch, version)).await?;
        self.report(&recovered.outcomes).await?;
        let (ask, readings) = mpsc::unbounded_channel();
        self.readings = Some(ask);
        let intake = Intake {
            queue: self.outside.queue.clone(),
            epoch: self.epoch,
            door: Door::new(&self.outside.spec, version, self.step.clone(), self.outside.images.clone()),
            journal: recovered.journal,
            seen: recovered.seen,
            received: recovered.ledger.received,
            inbox: self.inbox.take().expect("recovery happens once"),
            readings,
            stop: self.stop.clone(),
        };
        tasks.spawn(intake.run());
        for report in recovered.made_again {
            let line = self.line(report).await;
            self.outside.metrics.made_again(&line);
        }
        Ok(())
    }

    async fn step(&mut self, report: StepReport, outcomes: Vec<GroupOutcome>) -> Result<(), LearnerError> {
        // Progress first: a task issued because a slot came free is to be sampled by the new weights.
        let version = report.version;
        self.retry("report progress", || self.outside.queue.set_progress(self.epoch, version)).await?;
        self.report(&outcomes).await?;
        let line = self.line(report).await;
        self.outside.metrics.step(&line);
        Ok(())
    }

    /// What the training thread told of a step, and where every rollout is.
    async fn line(&mut self, report: StepReport) -> Map<String, Value> {
        let mut line = report.line;
        if let Some(stats) = *self.stats.lock().expect("no holder of the lock panics") {
            stats.write(&mut line);
        }
        if let Some(reading) = self.reading().await {
            self.last = Some(account(&reading, &report.ledger));
            write_accounting(&mut line, &reading, self.last.as_ref().expect("just set"));
        }
        line
    }

    async fn report(&self, outcomes: &[GroupOutcome]) -> Result<(), LearnerError> {
        for outcome in outcomes {
            self.retry("report an outcome", || self.outside.queue.report(self.epoch, outcome)).await?;
        }
        Ok(())
    }

    async fn reading(&self) -> Option<Reading> {
        let (reply, answer) = oneshot::channel();
        self.readings.as_ref()?.send(reply).ok()?;
        answer.await.ok()
    }

    /// Repeats a call while the queue is away. Refused by a newer epoch, it is an error.
    pub(super) async fn retry<F, R>(&self, what: &'static str, call: F) -> Result<(), LearnerError>
    where
        F: Fn() -> R,
        R: Future<Output = Result<(), QueueError>>,
    {
        let mut pause = Duration::from_millis(50);
        loop {
            match call().await {
                Ok(()) => return Ok(()),
                Err(error @ (QueueError::Unavailable { .. } | QueueError::DataLost { .. })) => {
                    tracing::warn!(%error, what, "queue is away");
                    tokio::select! {
                        () = self.shutdown.cancelled() => return Ok(()),
                        () = tokio::time::sleep(pause) => pause = (2 * pause).min(Duration::from_secs(5)),
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Where every rollout is, at one moment.
fn account(reading: &Reading, ledger: &Ledger) -> Accounting {
    let counts = &reading.counts;
    // What the door let in and the training thread has not settled is held here.
    let held = reading.received - ledger.trained - ledger.dropped.total();
    Accounting {
        issued: counts.issued,
        trained: ledger.trained,
        dropped: ledger.dropped,
        queued: counts.rollouts + counts.scored + held,
        in_flight: counts.issued.saturating_sub(counts.delivered),
    }
}

fn write_accounting(line: &mut Map<String, Value>, reading: &Reading, accounting: &Accounting) {
    line.insert("queue/depth".into(), json!(reading.counts.rollouts + reading.counts.scored));
    line.insert("queue/bytes".into(), json!(reading.counts.bytes));
    line.insert("queue/duplicates".into(), json!(reading.duplicates));
    line.insert("accounting/issued".into(), json!(accounting.issued));
    line.insert("accounting/trained".into(), json!(accounting.trained));
    for reason in freewheel_types::DropReason::ALL {
        line.insert(format!("accounting/dropped_{}", reason.name()), json!(accounting.dropped.get(reason)));
    }
    line.insert("accounting/queued".into(), json!(accounting.queued));
    line.insert("accounting/in_flight".into(), json!(accounting.in_flight));
    line.insert("accounting/imbalance".into(), json!(accounting.imbalance()));
    if accounting.imbalance() != 0 {
        tracing::error!(
            ?accounting,
            imbalance = accounting.imbalance(),
            "rollouts are missing or counted twice"
        );
    }
}
