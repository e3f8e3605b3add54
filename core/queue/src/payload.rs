//! What both backends make of the bytes they carry.
//!
//! A payload is opened where it leaves the queue. One that cannot be opened is no error of the call: it goes on
//! as a bad delivery, so that its rollout id is accounted for like any other.

use freewheel_types::{PromptId, RewardRecord, Rollout, RolloutId, ScoredRollout, TaskId, TypesError, codec};

use crate::{DeliveryBody, QueueError};

/// Longest reason that travels.
const REASON_CHARS_MAX: usize = 400;

/// One entry of the scored stream, as stored.
#[derive(Clone, Debug)]
pub(crate) enum ScoredEntry {
    /// An encoded scored rollout.
    Payload(Vec<u8>),
    /// What was wrong with what should have been here.
    Bad(String),
    /// A rollout that will never come.
    Abandoned { prompt: PromptId, group_size: u32, reason: String },
}

impl ScoredEntry {
    /// Payload bytes that count against the cap.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Payload(payload) => payload.len() as u64,
            Self::Bad(_) | Self::Abandoned { .. } => 0,
        }
    }
}

/// A payload that was put aside, with the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// Where it was found.
    pub source: String,
    /// Rollout it belongs to, if known.
    pub rollout: Option<RolloutId>,
    /// What was wrong with it.
    pub reason: String,
}

/// Opens a leased rollout; `beside` is the id that stands beside the payload.
///
/// # Errors
/// What takes its place in the scored stream: a bad entry if it is damaged, an unscored one if the id beside it is (the payload
/// has a checksum, the id has none), or if so many reward workers died over it that it must be what kills them.
pub(crate) fn open_rollout(
    payload: &[u8],
    beside: Option<RolloutId>,
    deliveries: u32,
    max_deliveries: u32,
) -> Result<Rollout, ScoredEntry> {
    let bad = |error: TypesError| ScoredEntry::Bad(error.to_string());
    let rollout = codec::decode_rollout(payload).map_err(bad)?;
    let reason = if beside != Some(rollout.id) {
        "the id beside it is damaged".to_owned()
    } else if deliveries > max_deliveries {
        format!("no reward worker finished it: {}", too_often(max_deliveries))
    } else {
        return Ok(rollout);
    };
    let reward = RewardRecord::unscored(reason, "");
    Err(codec::encode_scored(&ScoredRollout { rollout, reward }).map_or_else(bad, ScoredEntry::Payload))
}

/// Opens an entry of the scored stream; `beside` is the id that stands beside the payload, if it parses.
///
/// A payload that passes its checksum says itself which rollout it is. So one damage loses nothing: either the payload is
/// sound, or the id beside it is and the rollout is known to be bad. Only an entry damaged in both has no name any more.
pub(crate) fn open_scored(entry: &ScoredEntry, beside: Option<RolloutId>) -> DeliveryBody {
    match (entry, beside) {
        (ScoredEntry::Payload(payload), _) => match codec::decode_scored(payload) {
            Ok(scored) => DeliveryBody::Scored(Box::new(scored)),
            Err(error) => DeliveryBody::Bad { rollout: beside, error },
        },
        (ScoredEntry::Bad(what), _) => {
            DeliveryBody::Bad { rollout: beside, error: TypesError::Envelope(what.clone()) }
        }
        (ScoredEntry::Abandoned { prompt, group_size, reason }, Some(rollout)) => {
            let (prompt, group_size, reason) = (*prompt, *group_size, reason.clone());
            DeliveryBody::Abandoned { rollout, prompt, group_size, reason }
        }
        (ScoredEntry::Abandoned { .. }, None) => DeliveryBody::Bad {
            rollout: None,
            error: TypesError::Envelope("an abandoned rollout without its id".into()),
        },
    }
}

/// Consumer name of the learner of an epoch.
pub(crate) fn learner_name(epoch: u64) -> String {
    format!("L-{epoch}")
}

/// A reason in somebody else's words, bounded.
pub(crate) fn bounded(reason: &str) -> String {
    reason.chars().take(REASON_CHARS_MAX).collect()
}

/// Why something was given up.
pub(crate) fn too_often(max_deliveries: u32) -> String {
    format!("handed out more than {max_deliveries} times")
}

/// A task that was to end before all its samples had been accepted.
pub(crate) fn unfinished(task: TaskId, index: u32, group_size: u32) -> QueueError {
    QueueError::Config(format!(
        "task {task} cannot be finished: sample {index} of {group_size} was never accepted; \
         leave the task, its lease will run out and another actor redoes what is missing"
    ))
}

/// A lease that belongs to another rollout.
pub(crate) fn wrong_lease(lease: &str, rollout: RolloutId) -> QueueError {
    QueueError::Config(format!("lease {lease} is not a lease of rollout {rollout}"))
}
