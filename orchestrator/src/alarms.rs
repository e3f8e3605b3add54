//! Alarms: signs that a reward is being gamed, and what is done about them.
//!
//! Each alarm compares two means of a metric over `window` steps: the first ones that this process saw, and the last ones. A run
//! that is resumed starts afresh: whoever resumes it accepts what there is. An alarm is raised once, when it has held for
//! `steps` steps in a row, and again only after it had passed.

use std::collections::VecDeque;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::Checks;
use crate::folder::StepLine;

/// One `[[alarms]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AlarmConfig {
    /// "length": completions get longer or shorter. "diversity": the runs of four tokens that are new within a group get rarer
    /// (`rollout/distinct_4`). "refusal": refusals get more or fewer. "judge": the reward rises while a judge that is not part of it falls.
    /// "disagreement": two reward models drift apart. "gap": `component` is above `against`, as a judge that is held out above the guard that is
    /// optimised. Default "length".
    pub watch: Watch,
    /// What is done: "log" (default), "pause": the run drains, writes a checkpoint and ends as if stopped; "stop": the same, and the
    /// run has failed (exit code 1). `--resume` goes on after either.
    pub action: AlarmAction,
    /// How much is too much: a share of the mean before for "length" (default 0.3) and "diversity" (default 0.3), a difference for "refusal"
    /// (default 0.05), "judge" (default 0.05) and "gap" (default 0.1), standard deviations of the first steps for "disagreement" (default 2).
    pub threshold: Option<f64>,
    /// Refusal: the component of kind "refusal". Judge: a component of weight 0. Disagreement: the first model's. Gap: the one that must not be
    /// higher.
    pub component: Option<String>,
    /// Disagreement: the second model's component. Gap: what it must not be higher than.
    pub against: Option<String>,
    /// Steps that each mean is over. 1 to 10,000, default 10.
    #[schemars(range(min = 1, max = 10_000))]
    pub window: usize,
    /// Steps in a row that it must hold for. 1 to 10,000, default 3.
    #[schemars(range(min = 1, max = 10_000))]
    pub steps: usize,
}

impl Default for AlarmConfig {
    fn default() -> Self {
        Self {
            watch: Watch::Length,
            action: AlarmAction::Log,
            threshold: None,
            component: None,
            against: None,
            window: 10,
            steps: 3,
        }
    }
}

/// What an alarm watches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Watch {
    /// Tokens of a completion.
    #[default]
    Length,
    /// Distinct runs of four tokens.
    Diversity,
    /// Refusals.
    Refusal,
    /// Reward against a judge.
    Judge,
    /// One reward model against another.
    Disagreement,
    /// One component above another.
    Gap,
}

impl Watch {
    fn name(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Diversity => "diversity",
            Self::Refusal => "refusal",
            Self::Judge => "judge",
            Self::Disagreement => "disagreement",
            Self::Gap => "gap",
        }
    }

    fn threshold(self) -> f64 {
        match self {
            Self::Length | Self::Diversity => 0.3,
            Self::Refusal | Self::Judge => 0.05,
            Self::Disagreement => 2.0,
            Self::Gap => 0.1,
        }
    }
}

/// What an alarm does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AlarmAction {
    /// It is told.
    #[default]
    Log,
    /// The run drains and ends.
    Pause,
    /// The run drains, ends and has failed.
    Stop,
}

/// An alarm that was raised; a line of `alarms.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Raised {
    /// Step it was raised after.
    pub step: u64,
    /// Its name: what it watches, and whose.
    pub alarm: String,
    /// What is done.
    pub action: AlarmAction,
    /// In words, with both means.
    pub what: String,
}

/// Notes what is wrong with the alarms.
pub fn check(alarms: &[AlarmConfig], components: &[String], checks: &mut Checks<'_>) {
    for alarm in alarms {
        let name = alarm.watch.name();
        let named = [&alarm.component, &alarm.against].map(Option::as_deref);
        let wanted = match alarm.watch {
            Watch::Length | Watch::Diversity => 0,
            Watch::Refusal | Watch::Judge => 1,
            Watch::Disagreement | Watch::Gap => 2,
        };
        for (key, component) in ["component", "against"].into_iter().zip(named) {
            let needed = if key == "component" { wanted >= 1 } else { wanted >= 2 };
            match component {
                None if needed => checks.note("alarms", format!("watching \"{name}\" needs `{key}`"), None),
                Some(_) if !needed => {
                    checks.note("alarms", format!("watching \"{name}\" has no `{key}`"), None)
                }
                Some(component) if !components.iter().any(|known| known == component) => {
                    checks.note(
                        "alarms",
                        format!("`{key}` is {component:?}, which is no component of the reward"),
                        None,
                    );
                }
                _ => {}
            }
        }
        let fine = alarm.threshold.is_none_or(|x| x.is_finite() && x > 0.0);
        checks.require(fine, "alarms", format!("the threshold of \"{name}\" must be above 0"), None);
    }
}

/// All alarms of a run.
#[derive(Debug, Default)]
pub struct Alarms(Vec<Alarm>);

impl Alarms {
    /// Alarms that have seen nothing.
    pub fn new(configs: &[AlarmConfig]) -> Self {
        Self(configs.iter().cloned().map(Alarm::new).collect())
    }

    /// Takes in a step: adds `alarm/<name>`, the change so far as a part of what is too much (1 and more: it holds), and gives the alarms
    /// that are raised by it.
    pub fn step(&mut self, line: &mut StepLine) -> Vec<Raised> {
        let step = line.get("step").and_then(Value::as_u64).unwrap_or(0);
        let mut raised = Vec::new();
        for alarm in &mut self.0 {
            let Some(seen) = alarm.seen(line) else { continue };
            alarm.take(seen);
            let Some((severity, what)) = alarm.severity() else { continue };
            line.insert(format!("alarm/{}", alarm.name()), severity.into());
            alarm.held = if severity >= 1.0 { alarm.held + 1 } else { 0 };
            if alarm.held == alarm.config.steps {
                let (alarm, action) = (alarm.name(), alarm.config.action);
                raised.push(Raised { step, alarm, action, what });
            }
        }
        raised
    }
}

#[derive(Debug)]
struct Alarm {
    config: AlarmConfig,
    /// The first `window` steps: what is watched, and the reward.
    first: Vec<(f64, f64)>,
    /// The last ones.
    last: VecDeque<(f64, f64)>,
    /// Steps in a row that it held for.
    held: usize,
}

impl Alarm {
    fn new(config: AlarmConfig) -> Self {
        Self { config, first: Vec::new(), last: VecDeque::new(), held: 0 }
    }

    fn name(&self) -> String {
        let parts = [
            Some(self.config.watch.name()),
            self.config.component.as_deref(),
            self.config.against.as_deref(),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join("_")
    }

    /// What it watches in a step, and the reward; `None` where the step does not have it.
    fn seen(&self, line: &StepLine) -> Option<(f64, f64)> {
        let number = |key: &str| line.get(key).and_then(Value::as_f64).filter(|x| x.is_finite());
        let component = |name: &Option<String>| number(&format!("reward/{}/mean", name.as_deref()?));
        let watched = match self.config.watch {
            Watch::Length => number("rollout/length_mean")?,
            Watch::Diversity => number("rollout/distinct_4")?,
            Watch::Refusal | Watch::Judge => component(&self.config.component)?,
            Watch::Disagreement | Watch::Gap => {
                component(&self.config.component)? - component(&self.config.against)?
            }
        };
        Some((watched, number("reward/mean")?))
    }

    fn take(&mut self, seen: (f64, f64)) {
        if self.first.len() < self.config.window {
            self.first.push(seen);
        }
        if self.last.len() == self.config.window {
            self.last.pop_front();
        }
        self.last.push_back(seen);
    }

    /// The change as a part of what is too much, and in words; `None` before both means are whole.
    fn severity(&self) -> Option<(f64, String)> {
        if self.first.len() < self.config.window {
            return None;
        }
        let first: Vec<f64> = self.first.iter().map(|seen| seen.0).collect();
        let last: Vec<f64> = self.last.iter().map(|seen| seen.0).collect();
        let (before, now) = (mean(&first), mean(&last));
        let rewards = [
            mean(&self.first.iter().map(|s| s.1).collect::<Vec<_>>()),
            mean(&self.last.iter().map(|s| s.1).collect::<Vec<_>>()),
        ];
        let change = match self.config.watch {
            Watch::Length => ((now - before) / before.abs().max(1e-9)).abs(),
            Watch::Diversity => ((before - now) / before.abs().max(1e-9)).max(0.0),
            Watch::Refusal => (now - before).abs(),
            Watch::Judge if rewards[1] > rewards[0] => (before - now).max(0.0),
            Watch::Judge => 0.0,
            Watch::Disagreement => (now - before).abs() / deviation(&first, before).max(1e-9),
            // Wherever it began: a hold-out that finds more from the start is no better than one that comes to.
            Watch::Gap => now.max(0.0),
        };
        let threshold = self.config.threshold.unwrap_or_else(|| self.config.watch.threshold());
        let mut what = format!("{} went from {before:.4} to {now:.4}", self.name());
        if self.config.watch == Watch::Judge {
            what.push_str(&format!(" while the reward went from {:.4} to {:.4}", rewards[0], rewards[1]));
        }
        Some((change / threshold, what))
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn deviation(values: &[f64], mean: f64) -> f64 {
    let sum: f64 = values.iter().map(|x| (x - mean) * (x - mean)).sum();
    (sum / values.len().max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(watch: Watch) -> AlarmConfig {
        AlarmConfig { watch, window: 2, steps: 2, ..AlarmConfig::default() }
    }

    /// Feeds lines of (watched keys, reward); gives the steps at which an alarm was raised.
    fn raised(config: AlarmConfig, lines: &[Value]) -> Vec<u64> {
        let mut alarms = Alarms::new(&[config]);
        let of = |(i, line): (usize, &Value)| {
            let mut line = line.as_object().cloned().expect("an object");
            line.insert("step".into(), json!(i));
            line.entry("reward/mean").or_insert(json!(0.5));
            alarms.step(&mut line).into_iter().map(|r| r.step).collect::<Vec<_>>()
        };
        lines.iter().enumerate().flat_map(of).collect()
    }

    #[test]
    fn a_length_that_grows_by_a_third_is_told_once_until_it_has_passed() {
        let lengths = [10.0, 10.0, 12.0, 14.0, 14.0, 14.0, 14.0, 10.0, 10.0, 14.0, 14.0, 14.0];
        let lines = lengths.map(|x| json!({"rollout/length_mean": x}));
        // Means of two: 11 at 2, 13 at 3 (30 % more), 14 at 4; below at 8; 12 at 9, 14 at 10 and 11.
        assert_eq!(raised(config(Watch::Length), &lines), [4, 11]);
        let steady = [10.0, 12.9, 10.0, 12.9].map(|x| json!({"rollout/length_mean": x}));
        assert!(raised(config(Watch::Length), &steady).is_empty());
    }

    #[test]
    fn a_judge_that_falls_counts_only_while_the_reward_rises() {
        let judge = AlarmConfig { component: Some("held".into()), ..config(Watch::Judge) };
        let line = |held: f64, reward: f64| json!({"reward/held/mean": held, "reward/mean": reward});
        let hacked = [line(0.8, 0.2), line(0.8, 0.2), line(0.6, 0.4), line(0.6, 0.5), line(0.6, 0.6)];
        assert_eq!(raised(judge.clone(), &hacked), [3]);
        let worse = [line(0.8, 0.5), line(0.8, 0.5), line(0.6, 0.4), line(0.6, 0.3), line(0.6, 0.2)];
        assert!(raised(judge, &worse).is_empty(), "both fall: the policy got worse, nobody is fooled");
    }

    #[test]
    fn diversity_refusals_and_models_that_drift_apart() {
        let distinct = [0.9, 0.9, 0.5, 0.5, 0.5].map(|x| json!({"rollout/distinct_4": x}));
        assert_eq!(raised(config(Watch::Diversity), &distinct), [4]);
        let refusal = AlarmConfig { component: Some("refusal".into()), ..config(Watch::Refusal) };
        let fewer = [0.30, 0.30, 0.10, 0.10, 0.10].map(|x| json!({"reward/refusal/mean": x}));
        assert_eq!(raised(refusal, &fewer), [3]);
        let apart = AlarmConfig {
            component: Some("a".into()),
            against: Some("b".into()),
            ..config(Watch::Disagreement)
        };
        let line = |a: f64| json!({"reward/a/mean": a, "reward/b/mean": 1.0});
        // Differences 0.1 and -0.1: a deviation of 0.1, two of them are 0.2.
        assert_eq!(raised(apart.clone(), &[line(1.1), line(0.9), line(1.4), line(1.4), line(1.4)]), [4]);
        assert!(raised(apart, &[line(1.1), line(0.9), line(1.1), line(1.1), line(1.1)]).is_empty());
    }

    #[test]
    fn a_hold_out_that_finds_more_than_the_guard_is_told_wherever_it_began() {
        let gap = AlarmConfig {
            component: Some("held".into()),
            against: Some("guard".into()),
            window: 1,
            steps: 3,
            ..config(Watch::Gap)
        };
        let line = |held: f64, guard: f64| json!({"reward/held/mean": held, "reward/guard/mean": guard});
        let apart = [line(0.3, 0.1), line(0.1, 0.1), line(0.3, 0.1), line(0.35, 0.2), line(0.3, 0.1)];
        assert_eq!(raised(gap.clone(), &apart), [4], "three steps in a row");
        let [guarded, near] = [line(0.0, 0.9), line(0.19, 0.1)];
        for fine in [guarded, near] {
            assert!(raised(gap.clone(), &[fine.clone(), fine.clone(), fine.clone(), fine]).is_empty());
        }
    }

    #[test]
    fn a_step_without_what_is_watched_changes_nothing() {
        let mut alarms = Alarms::new(&[config(Watch::Length)]);
        let mut line = StepLine::from_iter([("step".to_owned(), json!(1))]);
        assert!(alarms.step(&mut line).is_empty());
        assert_eq!(line.len(), 1);
    }
}
