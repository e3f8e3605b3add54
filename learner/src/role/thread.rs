//! The training thread: recovers, then waits for nothing but rollouts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc as std_mpsc;
use std::time::{Duration, Instant};

use freewheel_types::{GroupOutcome, PolicyVersion};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Build;
use crate::LearnerError;
use crate::assembly::{Arrival, Ledger};
use crate::checkpoint::Checkpoints;
use crate::consumed::IdSet;
use crate::core::{Learner, Recovery, SharedJournal};
use crate::journal::Position;
use crate::publish::{Slot, Snapshot};
use crate::report::StepReport;

/// What the training thread says.
pub(super) enum Event {
    Recovered(Box<Recovered>),
    Step(Box<StepReport>, Vec<GroupOutcome>),
    Outcomes(Vec<GroupOutcome>),
    Ended(Result<Box<Ended>, LearnerError>),
}

pub(super) struct Recovered {
    pub(super) recovery: Recovery,
    pub(super) version: PolicyVersion,
    pub(super) seen: IdSet,
    pub(super) ledger: Ledger,
    pub(super) journal: SharedJournal,
    pub(super) outcomes: Vec<GroupOutcome>,
    pub(super) made_again: Vec<StepReport>,
}

pub(super) struct Ended {
    pub(super) version: PolicyVersion,
    pub(super) weights: String,
    pub(super) ledger: Ledger,
    pub(super) finished: bool,
}

/// The training thread's ends of the channels.
pub(super) struct Wires {
    pub(super) events: mpsc::UnboundedSender<Event>,
    pub(super) inbox: std_mpsc::Receiver<(Position, Arrival)>,
    pub(super) slot: Slot,
    pub(super) stop: CancellationToken,
    pub(super) step: Arc<AtomicU64>,
}

/// The training thread.
pub(super) fn train(build: Build, checkpoints: Checkpoints, epoch: u64, wires: Wires) {
    let result = train_to_end(build, checkpoints, epoch, &wires);
    wires.events.send(Event::Ended(result.map(Box::new))).ok();
}

fn train_to_end(
    build: Build,
    checkpoints: Checkpoints,
    epoch: u64,
    wires: &Wires,
) -> Result<Ended, LearnerError> {
    let (mut learner, recovery) = Learner::recover(build(), checkpoints, epoch)?;
    let publish_every = learner.config().publish_every;
    wires.step.store(learner.policy().step(), Ordering::Release);
    let mut published = publish(&learner, wires);
    let recovered = Recovered {
        recovery,
        version: learner.policy().version(),
        seen: learner.seen().clone(),
        ledger: *learner.ledger(),
        journal: learner.journal(),
        outcomes: learner.take_outcomes(),
        made_again: learner.take_made_again(),
    };
    wires.events.send(Event::Recovered(Box::new(recovered))).ok();
    while !learner.finished() && !wires.stop.is_cancelled() {
        take_arrivals(&mut learner, wires);
        let Some(report) = learner.try_step()? else {
            send_outcomes(&mut learner, wires);
            wait(&mut learner, wires);
            continue;
        };
        let step = report.version.step;
        wires.step.store(step, Ordering::Release);
        // An update that was skipped left the version that is out already.
        let new = learner.policy().version() != published;
        if new && (step.is_multiple_of(publish_every) || learner.finished()) {
            published = publish(&learner, wires);
        }
        let outcomes = learner.take_outcomes();
        wires.events.send(Event::Step(Box::new(report), outcomes)).ok();
        learner.checkpoint(false)?;
    }
    learner.checkpoint(true)?;
    Ok(Ended {
        version: learner.policy().version(),
        weights: learner.policy().digest().to_string(),
        ledger: *learner.ledger(),
        finished: learner.finished(),
    })
}

fn take_arrivals(learner: &mut Learner, wires: &Wires) {
    while let Ok((at, arrival)) = wires.inbox.try_recv() {
        learner.accept(arrival, at);
    }
}

/// Waits for an arrival, but looks up now and then.
fn wait(learner: &mut Learner, wires: &Wires) {
    let since = Instant::now();
    if let Ok((at, arrival)) = wires.inbox.recv_timeout(Duration::from_millis(50)) {
        learner.accept(arrival, at);
    }
    learner.waited(since.elapsed().as_secs_f64());
}

fn send_outcomes(learner: &mut Learner, wires: &Wires) {
    let outcomes = learner.take_outcomes();
    if !outcomes.is_empty() {
        wires.events.send(Event::Outcomes(outcomes)).ok();
    }
}

fn publish(learner: &Learner, wires: &Wires) -> PolicyVersion {
    let version = learner.policy().version();
    let snapshot = Snapshot { version, params: learner.policy().weights().clone() };
    wires.slot.send_replace(Some(Arc::new(snapshot)));
    version
}
