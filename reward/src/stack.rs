//! The reward stack: every component of `[reward]`, run on one rollout within the deadline.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use freewheel_types::{ComponentScore, CounterRng, Digest, FinishReason, Prompt, RewardRecord, Rollout};

use crate::ConfigProblem;
use crate::combine::{Part, PartRole, Rules, combine};
use crate::config::RewardConfig;
use crate::finish::{Finish, Odds};
use crate::validate::{Weights, build};
use crate::when::When;

/// What is judged: the part of a rollout that rewards may depend on.
#[derive(Clone, Copy, Debug)]
pub struct Completion<'a> {
    /// The prompt, with its reference answer and tags.
    pub prompt: &'a Prompt,
    /// The completion as text.
    pub text: &'a str,
    /// Sampled tokens.
    pub tokens: usize,
    /// Whether it was cut off.
    pub truncated: bool,
}

impl<'a> From<&'a Rollout> for Completion<'a> {
    fn from(rollout: &'a Rollout) -> Self {
        Self {
            prompt: &rollout.prompt,
            text: &rollout.text,
            tokens: rollout.len(),
            truncated: rollout.finish_reason == FinishReason::Length,
        }
    }
}

/// A component's value, and what it wants to say about it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Judgement {
    /// Raw value.
    pub value: f32,
    /// Parsed answer, categories hit.
    pub detail: Option<String>,
    /// The class chosen, for components that have classes.
    pub label: Option<String>,
    /// Its score as log-odds; then `value` is not looked at but made from them.
    pub odds: Option<Odds>,
}

/// A score before calibration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RawScore {
    /// ln p / (1 - p).
    LogOdds(f32),
    /// A value of the component's own scale.
    Value(f32),
}

/// A component could not judge; says why. Not a wrong answer: that is a value of 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unscored(pub String);

/// Something that judges completions. Must give the same answer to the same input, whatever was judged before.
pub trait Component: Send + Sync {
    /// The raw value of one completion.
    ///
    /// # Errors
    /// If the component itself failed: bad reference answer, missing data.
    fn judge(&self, completion: &Completion<'_>) -> Result<Judgement, Unscored>;

    /// Asks whatever it depends on whether it is fit to judge; once, before a run. A problem as (key, message).
    ///
    /// # Errors
    /// If it is not, or cannot be asked.
    fn check_at_start(&self) -> Result<(), (&'static str, String)> {
        Ok(())
    }

    /// For how long asking it is in vain, if it knows: its server has been away for long.
    fn away(&self) -> Option<Duration> {
        None
    }

    /// Identity of what judges beyond the configuration (a model's weights), part of the reward version.
    fn version(&self) -> Option<&str> {
        None
    }
}

/// A component in its place.
pub(crate) struct Slot {
    pub(crate) name: String,
    pub(crate) when: When,
    /// Of a judge that is never optimised: share of the rollouts that it judges.
    pub(crate) holdout: Option<f64>,
    pub(crate) role: PartRole,
    pub(crate) finish: Finish,
    pub(crate) component: Box<dyn Component>,
}

impl Slot {
    /// Whether the rollout is in its share; a function of prompt and text.
    fn draws(&self, completion: &Completion<'_>) -> bool {
        let Some(share) = self.holdout.filter(|share| *share < 1.0) else { return true };
        let text = [&completion.prompt.id.0[..], completion.text.as_bytes()].concat();
        let key = u64::from_le_bytes(Digest::of(&text).0[..8].try_into().expect("8 of 32 bytes"));
        CounterRng::new(key, 0).uniform(0) < share
    }
}

/// Judges rollouts as `[reward]` says. Shared between threads; holds no state that a rollout could change.
pub struct RewardStack {
    slots: Vec<Slot>,
    rules: Rules,
    deadline: Duration,
    version: String,
}

impl RewardStack {
    /// Looks for problems without loading the weights of models.
    ///
    /// # Errors
    /// Every problem of the configuration, at once.
    pub fn check(config: &RewardConfig) -> Result<(), Vec<ConfigProblem>> {
        build(config, Weights::Leave).map(drop)
    }

    /// Builds every component, models and all.
    ///
    /// # Errors
    /// Every problem of the configuration, at once.
    pub fn new(config: &RewardConfig) -> Result<Self, Vec<ConfigProblem>> {
        let (slots, rules) = build(config, Weights::Load)?;
        // The number of threads has no part in what a reward is, nor where files lie: what is in them is added below.
        let judged_by = RewardConfig { workers: 1, ..config.with_paths(|_| PathBuf::new()) };
        let mut canonical = serde_json::to_vec(&judged_by).map_err(|error| {
            vec![ConfigProblem::new("reward", format!("cannot be written as JSON: {error}"))]
        })?;
        let versions = slots.iter().flat_map(|slot| {
            [slot.component.version().map(str::to_owned), slot.finish.version()].into_iter().flatten()
        });
        for version in versions {
            canonical.push(b'\n');
            canonical.extend_from_slice(version.as_bytes());
        }
        let version = Digest::of(&canonical).to_string()[..16].to_owned();
        Ok(Self { slots, rules, deadline: Duration::from_millis(config.deadline_ms), version })
    }

    /// Asks servers whether they are fit to judge, see [`Component::check_at_start`]; may take as long as a hundred questions.
    ///
    /// # Errors
    /// Every component that is not.
    pub fn check_at_start(&self) -> Result<(), Vec<ConfigProblem>> {
        let unfit = |(i, slot): (usize, &Slot)| {
            let (field, message) = slot.component.check_at_start().err()?;
            Some(ConfigProblem::new(
                format!("reward.component[{i}].{field}"),
                format!("{:?} {message}", slot.name),
            ))
        };
        let problems: Vec<ConfigProblem> = self.slots.iter().enumerate().filter_map(unfit).collect();
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    /// Hash of the configuration that judges and of the weights of its models, 16 hex digits.
    pub fn reward_version(&self) -> &str {
        &self.version
    }

    /// Names of the components, in config order.
    pub fn component_names(&self) -> impl Iterator<Item = &str> {
        self.slots.iter().map(|slot| slot.name.as_str())
    }

    /// For how long rollouts had better wait: a component's server has been away for long.
    pub fn away(&self) -> Option<Duration> {
        self.slots.iter().filter_map(|slot| slot.component.away()).max()
    }

    /// Most time one rollout may take.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Judges one completion. Never fails: what goes wrong becomes an unscored record with the reason.
    ///
    /// Everything in the record but its latencies is a function of the input.
    pub fn score(&self, completion: &Completion<'_>) -> RewardRecord {
        let start = Instant::now();
        let results: Vec<_> = self.slots.iter().map(|slot| self.judge(slot, completion, start)).collect();
        let log_length = (completion.tokens as f64).ln_1p();
        let parts: Vec<_> = self
            .slots
            .iter()
            .zip(&results)
            .map(|(slot, (result, _))| Part {
                name: &slot.name,
                part: slot.role,
                // To the combination a hold-out is not there.
                value: result
                    .as_ref()
                    .filter(|_| slot.holdout.is_none())
                    .map(|r| r.as_ref().map(|j| j.value).map_err(|why| why.0.as_str())),
                label: result.as_ref().and_then(|r| r.as_ref().ok()?.label.as_deref()),
                log_length,
            })
            .collect();
        let combined = combine(&parts, &completion.prompt.tags, &self.rules);
        let components = self.slots.iter().zip(results).map(|(slot, (result, latency_ms))| {
            let (value, detail, label) = match result {
                None => (None, None, None),
                Some(Ok(judgement)) => (Some(judgement.value), judgement.detail, judgement.label),
                Some(Err(Unscored(why))) => (None, Some(why), None),
            };
            let version = slot.component.version().map(str::to_owned);
            ComponentScore { name: slot.name.clone(), value, detail, label, version, latency_ms }
        });
        RewardRecord {
            verdict: combined.verdict,
            components: components.collect(),
            costs: combined.costs,
            tier: combined.tier,
            reward_version: self.version.clone(),
            latency_ms: ms(start.elapsed()),
        }
    }

    /// What the component called `name` finds, before calibration; `None` if there is none of that name or it does not apply to the prompt.
    ///
    /// # Errors
    /// If the component could not judge.
    pub fn raw(&self, name: &str, completion: &Completion<'_>) -> Option<Result<RawScore, Unscored>> {
        let slot = self.slots.iter().find(|slot| slot.name == name)?;
        slot.when.applies(&completion.prompt.tags).then(|| {
            let Judgement { value, odds, .. } = slot.component.judge(completion)?;
            Ok(odds.map_or(RawScore::Value(value), |odds| RawScore::LogOdds(odds.logit)))
        })
    }

    /// Version of the model of the component called `name`, if it has one.
    pub fn model_version(&self, name: &str) -> Option<&str> {
        self.slots.iter().find(|slot| slot.name == name)?.component.version()
    }

    /// The record of a rollout that could not be judged at all.
    pub fn unscored(&self, reason: impl Into<String>) -> RewardRecord {
        RewardRecord::unscored(reason, &*self.version)
    }

    fn judge(
        &self,
        slot: &Slot,
        completion: &Completion<'_>,
        start: Instant,
    ) -> (Option<Result<Judgement, Unscored>>, f32) {
        if !slot.when.applies(&completion.prompt.tags) || !slot.draws(completion) {
            return (None, 0.0);
        }
        let late = || Unscored(format!("not done within deadline_ms = {}", self.deadline.as_millis()));
        if start.elapsed() > self.deadline {
            return (Some(Err(late())), 0.0);
        }
        let begin = Instant::now();
        // A bug in one verifier costs one rollout its reward, not the run its reward worker.
        let result = catch_unwind(AssertUnwindSafe(|| slot.component.judge(completion)))
            .unwrap_or_else(|_| {
                Err(Unscored("the component panicked; please report this prompt and answer".into()))
            })
            .and_then(|judgement| match judgement.odds.map_or(judgement.value, |odds| odds.logit) {
                score if score.is_finite() => Ok(slot.finish.apply(judgement)),
                score => Err(Unscored(format!("the component gave {score}, which is not a finite number"))),
            });
        let result = if start.elapsed() > self.deadline { Err(late()) } else { result };
        (Some(result), ms(begin.elapsed()))
    }

    /// A stack of ready-made components with weight 1, for tests.
    #[cfg(test)]
    pub(crate) fn of(components: Vec<(&str, Box<dyn Component>)>, deadline: Duration) -> Self {
        let base = Self::new(&RewardConfig::default()).unwrap();
        let slots = components.into_iter().map(|(name, component)| Slot {
            name: name.into(),
            when: When::Always,
            holdout: None,
            role: PartRole { factor: 1.0, norm: None, decides: true, gate: None },
            finish: Finish::default(),
            component,
        });
        Self { slots: slots.collect(), deadline, ..base }
    }
}

fn ms(duration: Duration) -> f32 {
    duration.as_secs_f32() * 1e3
}

#[cfg(test)]
pub(crate) mod tests {
    use freewheel_types::{PromptBody, PromptId, Verdict};

    use super::*;

    pub(crate) fn prompt(answer: &str) -> Prompt {
        Prompt {
            id: PromptId::of(answer.as_bytes()),
            name: None,
            body: PromptBody::Text("?".into()),
            answer: Some(serde_json::to_string(answer).unwrap()),
            tags: vec!["math".into()],
            verifier: None,
            meta: None,
        }
    }

    struct Fixed(f32, u64);

    impl Component for Fixed {
        fn judge(&self, _: &Completion<'_>) -> Result<Judgement, Unscored> {
            std::thread::sleep(Duration::from_millis(self.1));
            assert!(self.0 != 13.0, "a planted bug");
            Ok(Judgement { value: self.0, ..Judgement::default() })
        }
    }

    fn verdict_of(value: f32, sleep_ms: u64, deadline_ms: u64) -> Verdict {
        let stack = RewardStack::of(
            vec![("x", Box::new(Fixed(value, sleep_ms)))],
            Duration::from_millis(deadline_ms),
        );
        let prompt = prompt("1");
        stack.score(&Completion { prompt: &prompt, text: "1", tokens: 1, truncated: false }).verdict
    }

    #[test]
    fn what_fails_itself_is_unscored_with_the_reason_and_never_zero() {
        let cases = [
            (verdict_of(f32::NAN, 0, 1000), "NaN"),
            (verdict_of(f32::INFINITY, 0, 1000), "inf"),
            (verdict_of(1.0, 30, 5), "deadline_ms = 5"),
            (verdict_of(13.0, 0, 1000), "panicked"),
        ];
        for (verdict, expected) in cases {
            match verdict {
                Verdict::Unscored { reason } => {
                    assert!(reason.contains(expected), "{reason:?} lacks {expected:?}")
                }
                scored => panic!("expected unscored because of {expected}, got {scored:?}"),
            }
        }
        assert!(matches!(verdict_of(0.5, 0, 1000), Verdict::Scored { reward, .. } if reward == 0.5));
    }
}
