//! From component values to one reward. Pure: a rollout's reward depends on nothing but its own values.

use freewheel_types::Verdict;

/// One component's result as the combination sees it.
#[derive(Clone, Debug)]
pub(crate) struct Part<'a> {
    /// Name from the config.
    pub(crate) name: &'a str,
    /// What it is to the combination.
    pub(crate) part: PartRole,
    /// `None`: does not apply to this prompt. `Err`: could not be scored, and why.
    pub(crate) value: Option<Result<f32, &'a str>>,
}

/// How a component takes part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct PartRole {
    /// Signed factor in the sum; a guard's is negative.
    pub(crate) factor: f32,
    /// Whether it decides if the answer is right.
    pub(crate) decides: bool,
    /// Set for a gate: what makes it fail.
    pub(crate) gate: Option<Gate>,
}

/// When a gate fails.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Gate {
    /// Verifiers: the value is below the threshold.
    Below(f32),
    /// Guards: the probability of harm is above the threshold.
    Above(f32),
}

impl Gate {
    fn fails(self, value: f32) -> bool {
        match self {
            Self::Below(threshold) => value < threshold,
            Self::Above(threshold) => value > threshold,
        }
    }
}

/// Limits of the result.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) floor: f32,
    pub(crate) clip: [f32; 2],
}

/// The verdict on one rollout.
///
/// A gate without a value leaves the rollout unscored; a failed gate gives `floor` whatever the rest says;
/// otherwise every part with a non-zero factor must have a finite value, else the rollout is unscored.
pub(crate) fn combine(parts: &[Part<'_>], bounds: Bounds) -> Verdict {
    let unscored = |name: &str, why: &str| Verdict::Unscored { reason: format!("{name}: {why}") };
    let mut gated_by = None;
    for part in parts {
        let Some(gate) = part.part.gate else { continue };
        match part.value {
            None => {}
            Some(Err(why)) => return unscored(part.name, why),
            Some(Ok(value)) if gate.fails(value) => {
                gated_by.get_or_insert(part.name);
            }
            Some(Ok(_)) => {}
        }
    }
    let correct = correctness(parts);
    if let Some(name) = gated_by {
        return Verdict::Scored { reward: bounds.floor, correct, gated_by: Some(name.to_owned()) };
    }
    if parts.iter().all(|part| part.value.is_none()) {
        return Verdict::Unscored { reason: "no component applies to the tags of this prompt".into() };
    }
    // f64 and config order: the sum has the same bits wherever it is made.
    let mut sum = 0.0_f64;
    for part in parts.iter().filter(|part| part.part.gate.is_none() && part.part.factor != 0.0) {
        match part.value {
            None => {}
            Some(Err(why)) => return unscored(part.name, why),
            Some(Ok(value)) => sum += f64::from(part.part.factor) * f64::from(value),
        }
    }
    let reward = (sum as f32).clamp(bounds.clip[0], bounds.clip[1]);
    if reward.is_nan() {
        return Verdict::Unscored { reason: "the weighted sum is not a number".into() };
    }
    // -0 and 0 are the same reward and must be the same bytes.
    Verdict::Scored { reward: reward + 0.0, correct, gated_by: None }
}

/// Right only if every answer verifier that applies says so; `None` when none applies or one could not tell.
fn correctness(parts: &[Part<'_>]) -> Option<bool> {
    let mut deciding = parts.iter().filter(|part| part.part.decides && part.value.is_some()).peekable();
    deciding.peek()?;
    deciding.try_fold(true, |right, part| match part.value {
        Some(Ok(value)) => Some(right && value >= 0.5),
        _ => None,
    })
}
