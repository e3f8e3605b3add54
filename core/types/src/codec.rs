//! Bytes on the wire: a fixed header, fixed-layout per-token arrays, then metadata.
//!
//! ```text
//! 0   8          10       12     16          20            24          28          32
//! │magic FWRL\r\n│ schema │ kind │ prompt len│ output len  │ expert ids│ meta len  │ body … │ crc32c
//! ```
//!
//! Expert ids, which are most of a rollout of a mixture of experts, take a byte each where all are below 256 (the top bit
//! of the kind says so), else two.
//!
//! The length of the whole is implied by the header and must equal the bytes received;
//! no length inside is trusted beyond that. Little-endian throughout.

use serde::{Deserialize, Serialize};

use crate::{
    ActorId, ExpertTrace, FinishReason, Prompt, RewardRecord, Rollout, RolloutId, SamplingParams,
    ScoredRollout, Task, TypesError, VersionSpan,
};

/// Largest envelope accepted.
pub const MAX_ENVELOPE_BYTES: usize = 16 << 20;
/// Version of the layout; a reader refuses any other and names both.
pub const SCHEMA_VERSION: u16 = 2;

const MAGIC: [u8; 8] = *b"FWRL\r\n\x1a\n";
/// In the kind's place: expert ids take one byte each.
const NARROW_EXPERTS: u16 = 1 << 15;
const HEADER: usize = 28;
const TRAILER: usize = 4;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
enum Kind {
    Rollout = 1,
    Scored = 2,
    Task = 3,
}

/// Metadata of a rollout: what is not a per-token array.
#[derive(Serialize, Deserialize)]
struct RolloutMeta {
    id: RolloutId,
    group_size: u32,
    prompt: Prompt,
    versions: Vec<VersionSpan>,
    expert_layers: u16,
    expert_top_k: u16,
    text: String,
    finish_reason: FinishReason,
    sampling: SamplingParams,
    actor: ActorId,
    generation_s: f32,
    reward: Option<RewardRecord>,
}

/// Encodes a task.
///
/// # Errors
/// If it does not fit [`MAX_ENVELOPE_BYTES`].
pub fn encode_task(task: &Task) -> Result<Vec<u8>, TypesError> {
    seal(Kind::Task, &[], &[], &[], &[], &postcard::to_allocvec(task)?)
}

/// Decodes a task.
///
/// # Errors
/// If the bytes are not exactly one sound task.
pub fn decode_task(bytes: &[u8]) -> Result<Task, TypesError> {
    let parts = open(Kind::Task, bytes)?;
    Ok(postcard::from_bytes(parts.meta)?)
}

/// Encodes a rollout.
///
/// # Errors
/// If it does not fit [`MAX_ENVELOPE_BYTES`].
pub fn encode_rollout(rollout: &Rollout) -> Result<Vec<u8>, TypesError> {
    encode(Kind::Rollout, rollout, None)
}

/// Decodes a rollout. Its contents are still to be checked by [`Rollout::validate`].
///
/// # Errors
/// If the bytes are not exactly one sound rollout.
pub fn decode_rollout(bytes: &[u8]) -> Result<Rollout, TypesError> {
    Ok(decode(Kind::Rollout, bytes)?.0)
}

/// Encodes a scored rollout.
///
/// # Errors
/// If it does not fit [`MAX_ENVELOPE_BYTES`].
pub fn encode_scored(scored: &ScoredRollout) -> Result<Vec<u8>, TypesError> {
    encode(Kind::Scored, &scored.rollout, Some(scored.reward.clone()))
}

/// Decodes a scored rollout. Its contents are still to be checked by [`Rollout::validate`].
///
/// # Errors
/// If the bytes are not exactly one sound scored rollout.
pub fn decode_scored(bytes: &[u8]) -> Result<ScoredRollout, TypesError> {
    let (rollout, reward) = decode(Kind::Scored, bytes)?;
    let reward = reward.ok_or_else(|| TypesError::Envelope("a scored rollout without a reward".into()))?;
    if let Some(cost) = reward.costs.iter().find(|cost| cost.value.is_some_and(|c| !c.is_finite())) {
        return Err(TypesError::OutOfRange {
            field: "cost",
            value: format!("{:?} for {:?}", cost.value, cost.name),
            limit: "finite".into(),
        });
    }
    if reward.reward().is_some_and(|r| !r.is_finite()) {
        return Err(TypesError::OutOfRange {
            field: "reward",
            value: format!("{:?}", reward.reward()),
            limit: "finite".into(),
        });
    }
    Ok(ScoredRollout { rollout, reward })
}

fn encode(kind: Kind, rollout: &Rollout, reward: Option<RewardRecord>) -> Result<Vec<u8>, TypesError> {
    let meta = RolloutMeta {
        id: rollout.id,
        group_size: rollout.group_size,
        prompt: rollout.prompt.clone(),
        versions: rollout.versions.clone(),
        expert_layers: rollout.experts.layers,
        expert_top_k: rollout.experts.top_k,
        text: rollout.text.clone(),
        finish_reason: rollout.finish_reason,
        sampling: rollout.sampling,
        actor: rollout.actor.clone(),
        generation_s: rollout.generation_s,
        reward,
    };
    seal(
        kind,
        &rollout.prompt_ids,
        &rollout.output_ids,
        &rollout.behaviour_logprobs,
        &rollout.experts.ids,
        &postcard::to_allocvec(&meta)?,
    )
}

fn decode(kind: Kind, bytes: &[u8]) -> Result<(Rollout, Option<RewardRecord>), TypesError> {
    let parts = open(kind, bytes)?;
    let meta: RolloutMeta = postcard::from_bytes(parts.meta)?;
    let rollout = Rollout {
        id: meta.id,
        group_size: meta.group_size,
        prompt: meta.prompt,
        prompt_ids: parts.prompt_ids,
        output_ids: parts.output_ids,
        behaviour_logprobs: parts.logprobs,
        versions: meta.versions,
        experts: ExpertTrace { layers: meta.expert_layers, top_k: meta.expert_top_k, ids: parts.experts },
        text: meta.text,
        finish_reason: meta.finish_reason,
        sampling: meta.sampling,
        actor: meta.actor,
        generation_s: meta.generation_s,
    };
    Ok((rollout, meta.reward))
}

fn seal(
    kind: Kind,
    prompt_ids: &[u32],
    output_ids: &[u32],
    logprobs: &[f32],
    experts: &[u16],
    meta: &[u8],
) -> Result<Vec<u8>, TypesError> {
    let narrow = !experts.is_empty() && experts.iter().all(|&id| id < 256);
    let width = if narrow { 1 } else { 2 };
    let len =
        envelope_len(prompt_ids.len(), output_ids.len(), experts.len().saturating_mul(width), meta.len());
    if len > MAX_ENVELOPE_BYTES {
        return Err(TypesError::OutOfRange {
            field: "envelope bytes",
            value: len.to_string(),
            limit: format!("at most {MAX_ENVELOPE_BYTES}"),
        });
    }
    assert_eq!(output_ids.len(), logprobs.len(), "one log-prob for each sampled token");
    let mut bytes = Vec::with_capacity(len);
    bytes.extend(MAGIC);
    bytes.extend(SCHEMA_VERSION.to_le_bytes());
    bytes.extend((kind as u16 | if narrow { NARROW_EXPERTS } else { 0 }).to_le_bytes());
    for n in [prompt_ids.len(), output_ids.len(), experts.len(), meta.len()] {
        bytes.extend((n as u32).to_le_bytes());
    }
    prompt_ids.iter().chain(output_ids).for_each(|id| bytes.extend(id.to_le_bytes()));
    logprobs.iter().for_each(|x| bytes.extend(x.to_le_bytes()));
    match narrow {
        true => bytes.extend(experts.iter().map(|&id| id as u8)),
        false => experts.iter().for_each(|id| bytes.extend(id.to_le_bytes())),
    }
    bytes.extend(meta);
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    Ok(bytes)
}

struct Parts<'a> {
    prompt_ids: Vec<u32>,
    output_ids: Vec<u32>,
    logprobs: Vec<f32>,
    experts: Vec<u16>,
    meta: &'a [u8],
}

fn open(kind: Kind, bytes: &[u8]) -> Result<Parts<'_>, TypesError> {
    let bad = |what: String| Err(TypesError::Envelope(what));
    if bytes.len() < HEADER + TRAILER || bytes.len() > MAX_ENVELOPE_BYTES {
        return bad(format!("{} bytes, expected {} to {MAX_ENVELOPE_BYTES}", bytes.len(), HEADER + TRAILER));
    }
    if bytes[..8] != MAGIC {
        return bad("wrong magic number".into());
    }
    let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
    if u16_at(8) != SCHEMA_VERSION {
        return bad(format!("schema version {}, this build speaks {SCHEMA_VERSION}", u16_at(8)));
    }
    let (received, narrow) = (u16_at(10) & !NARROW_EXPERTS, u16_at(10) & NARROW_EXPERTS != 0);
    if received != kind as u16 {
        return bad(format!("kind {received}, expected {kind:?}"));
    }
    let (prompt, output, experts, meta) = (u32_at(12), u32_at(16), u32_at(20), u32_at(24));
    let expert_bytes = experts.saturating_mul(if narrow { 1 } else { 2 });
    let len = envelope_len(prompt, output, expert_bytes, meta);
    if len != bytes.len() {
        return bad(format!("header describes {len} bytes, {} received", bytes.len()));
    }
    let (body, trailer) = bytes.split_at(len - TRAILER);
    if crc32c::crc32c(body).to_le_bytes() != trailer {
        return bad("checksum does not match: damaged on the way".into());
    }
    let (ids, rest) = body[HEADER..].split_at((prompt + output) * 4);
    let (logprobs, rest) = rest.split_at(output * 4);
    let (experts, meta) = rest.split_at(expert_bytes);
    let mut ids: Vec<u32> = words(ids).map(u32::from_le_bytes).collect();
    let output_ids = ids.split_off(prompt);
    Ok(Parts {
        prompt_ids: ids,
        output_ids,
        logprobs: words(logprobs).map(f32::from_le_bytes).collect(),
        experts: match narrow {
            true => experts.iter().map(|&id| u16::from(id)).collect(),
            false => experts.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect(),
        },
        meta,
    })
}

fn words(bytes: &[u8]) -> impl Iterator<Item = [u8; 4]> + '_ {
    bytes.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]])
}

/// Saturating, so that no header can make it wrap.
fn envelope_len(prompt: usize, output: usize, expert_bytes: usize, meta: usize) -> usize {
    (HEADER + TRAILER)
        .saturating_add(prompt.saturating_mul(4))
        .saturating_add(output.saturating_mul(8))
        .saturating_add(expert_bytes)
        .saturating_add(meta)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{PolicyVersion, PromptBody, PromptId, TaskId, Verdict};

    fn sample(
        prompt_ids: Vec<u32>,
        output: Vec<(u32, f32)>,
        experts: Vec<u16>,
        text: String,
    ) -> ScoredRollout {
        let tokens = output.len() as u32;
        let (output_ids, behaviour_logprobs) = output.into_iter().unzip();
        ScoredRollout {
            rollout: Rollout {
                id: TaskId(7).rollout(3),
                group_size: 8,
                prompt: Prompt {
                    id: PromptId::of(text.as_bytes()),
                    name: None,
                    body: PromptBody::Text(text.clone()),
                    answer: Some("4".into()),
                    tags: vec!["math".into()],
                    verifier: None,
                    meta: None,
                },
                prompt_ids,
                output_ids,
                behaviour_logprobs,
                versions: vec![VersionSpan { version: PolicyVersion::new(1, 2), tokens }],
                experts: ExpertTrace { layers: 1, top_k: 1, ids: experts },
                text,
                finish_reason: FinishReason::Stop,
                sampling: SamplingParams::default(),
                actor: ActorId("actor-0".into()),
                generation_s: 0.5,
            },
            reward: RewardRecord {
                verdict: Verdict::Scored { reward: 1.0, correct: Some(true), gated_by: None },
                components: vec![],
                costs: vec![],
                tier: None,
                reward_version: "r".into(),
                latency_ms: 0.1,
            },
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_comes_back(
            prompt_ids in prop::collection::vec(any::<u32>(), 0..40),
            output in prop::collection::vec((any::<u32>(), -50f32..0.0), 0..40),
            experts in prop_oneof![
                prop::collection::vec(any::<u16>(), 0..40),
                prop::collection::vec(0..256u16, 0..40),
            ],
            text in ".{0,40}",
        ) {
            let scored = sample(prompt_ids, output, experts, text);
            let bytes = encode_scored(&scored).unwrap();
            prop_assert_eq!(decode_scored(&bytes).unwrap(), scored);
        }

        #[test]
        fn one_flipped_bit_is_found(at in 0usize..200, bit in 0u8..8) {
            let mut bytes = encode_scored(&sample(vec![1, 2], vec![(3, -0.5)], vec![0], "x".into())).unwrap();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(decode_scored(&bytes).is_err());
        }

        #[test]
        fn rubbish_is_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(decode_scored(&bytes).is_err());
            prop_assert!(decode_task(&bytes).is_err());
        }
    }

    #[test]
    fn expert_ids_take_a_byte_where_they_fit_one() {
        let len = |experts: Vec<u16>| {
            encode_scored(&sample(vec![1], vec![(2, -1.0)], experts, "x".into())).unwrap().len()
        };
        let none = len(vec![]);
        assert_eq!(len(vec![0, 255, 7]), none + 3);
        assert_eq!(len(vec![0, 256, 7]), none + 6);
    }

    #[test]
    fn a_rollout_is_not_a_scored_rollout() {
        let scored = sample(vec![1], vec![(2, -1.0)], vec![], "x".into());
        let bytes = encode_rollout(&scored.rollout).unwrap();
        assert!(decode_scored(&bytes).unwrap_err().to_string().contains("kind 1"));
        assert_eq!(decode_rollout(&bytes).unwrap(), scored.rollout);
    }
}
