//! `freewheel reward check`: a table of completions with what they should score, like unit tests.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use freewheel_reward::{RewardError, RewardStack};
use freewheel_types::{RewardRecord, Verdict};
use serde::Deserialize;
use serde_json::{Value, json};

use super::ConfigArgs;
use super::fail::Explain as _;
use super::score::{Line, reward_json};
use crate::lines;

/// Largest difference between a reward and the number it should be.
const TOLERANCE: f32 = 1e-4;

/// Score a table of completions and compare with what is expected of each; exit code 1 if one differs.
///
/// A line holds what `freewheel score` reads, and `expect`: `reward` (a number, or [low, high]), `correct`, `unscored` (true, or a
/// part of the reason), `tier`, `gated_by`, `components` and `costs` by name (a number, [low, high], a class, or null), `above` and `below`
/// (the `id` of another line whose reward it must beat, or lose to).
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  freewheel reward check configs/quickstart.toml cases.jsonl\n\nA line:\n  \
    {\"id\": \"right\", \"completion\": \"so 7\", \"answer\": 7, \"expect\": {\"reward\": 1, \"correct\": true}}"
)]
pub struct RewardCheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// JSONL file; `-` reads standard input.
    #[arg(value_name = "FILE")]
    cases: PathBuf,
    /// Print JSON lines, one a case, with the whole record.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Deserialize)]
struct Case {
    #[serde(flatten)]
    line: Line,
    expect: Expect,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Expect {
    reward: Option<Wanted>,
    correct: Option<bool>,
    unscored: Option<Unscored>,
    tier: Option<String>,
    gated_by: Option<String>,
    #[serde(default)]
    components: BTreeMap<String, Option<Wanted>>,
    #[serde(default)]
    costs: BTreeMap<String, Option<Wanted>>,
    above: Option<Value>,
    below: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Wanted {
    Number(f32),
    Range([f32; 2]),
    Class(String),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Unscored {
    Flag(bool),
    Reason(String),
}

impl Case {
    fn check(&self) -> Result<(), String> {
        self.line.check()?;
        if matches!(self.expect.reward, Some(Wanted::Class(_))) {
            return Err("`expect.reward` must be a number or [low, high]".into());
        }
        Ok(())
    }
}

impl RewardCheckArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let loaded = self.config.load()?;
        let stack = RewardStack::new(&loaded.config.reward).map_err(RewardError::Config).input()?;
        let cases = lines::read(&self.cases, Case::check)?;
        stack.check_at_start().map_err(RewardError::Config).input()?;
        let records: Vec<RewardRecord> = cases.iter().map(|(_, case)| case.line.score(&stack)).collect();
        let by_id: BTreeMap<String, &RewardRecord> = cases
            .iter()
            .zip(&records)
            .filter_map(|((_, case), record)| Some((case.line.id.as_ref()?.to_string(), record)))
            .collect();
        let mut failed = 0;
        for ((at, case), record) in cases.iter().zip(&records) {
            let differences = differences(&case.expect, record, &by_id);
            failed += usize::from(!differences.is_empty());
            if self.json {
                let mut row = reward_json(record);
                row["line"] = json!(at);
                row["differences"] = json!(differences);
                println!("{row}");
            } else if !differences.is_empty() {
                let id = case.line.id.as_ref().map_or(String::new(), |id| format!(" ({id})"));
                println!("{}:{at}{id}: {}", self.cases.display(), differences.join("; "));
            }
        }
        let passed = cases.len() - failed;
        if failed > 0 {
            anyhow::bail!("{failed} of {} cases differ from what is expected, {passed} agree", cases.len());
        }
        if !self.json {
            println!("{passed} cases, all as expected (reward version {})", stack.reward_version());
        }
        Ok(())
    }
}

/// What is not as expected, each with both sides.
fn differences(
    expect: &Expect,
    record: &RewardRecord,
    by_id: &BTreeMap<String, &RewardRecord>,
) -> Vec<String> {
    let mut found = Vec::new();
    let reward = record.reward();
    let why = || match &record.verdict {
        Verdict::Unscored { reason } => format!("unscored ({reason})"),
        Verdict::Scored { reward, .. } => reward.to_string(),
    };
    if let Some(wanted) = &expect.reward
        && !wanted.admits(reward, None)
    {
        found.push(format!("reward is {}, expected {wanted}", why()));
    }
    if let Some(wanted) = expect.correct
        && record.correct() != Some(wanted)
    {
        let is = record.correct().map_or("unknown".into(), |correct| correct.to_string());
        found.push(format!("correct is {is}, expected {wanted}"));
    }
    check_unscored(expect.unscored.as_ref(), record, &mut found);
    let tier = record.tier.as_ref().map(|hit| hit.name.as_str());
    let gate = match &record.verdict {
        Verdict::Scored { gated_by, .. } => gated_by.as_deref(),
        Verdict::Unscored { .. } => None,
    };
    for (key, wanted, is) in [("tier", &expect.tier, tier), ("gated_by", &expect.gated_by, gate)] {
        // The empty text asks for none.
        if let Some(wanted) = wanted
            && is.unwrap_or("") != wanted
        {
            found.push(format!("{key} is {:?}, expected {wanted:?}", is.unwrap_or("")));
        }
    }
    for (name, wanted) in &expect.components {
        let part = record.components.iter().find(|part| part.name == *name);
        let is = part.map(|part| (part.value, part.label.as_deref()));
        check_named("component", name, is, wanted.as_ref(), &mut found);
    }
    for (name, wanted) in &expect.costs {
        let is = record.costs.iter().find(|cost| cost.name == *name).map(|cost| (cost.value, None));
        check_named("cost", name, is, wanted.as_ref(), &mut found);
    }
    for (wanted, must_beat) in [(&expect.above, true), (&expect.below, false)] {
        let Some(id) = wanted else { continue };
        let word = if must_beat { "above" } else { "below" };
        match (reward, by_id.get(&id.to_string()).map(|other| other.reward())) {
            (_, None) => found.push(format!("no line has the id {id}")),
            (Some(own), Some(Some(other))) if own != other && (own > other) == must_beat => {}
            (_, Some(other)) => {
                let other = other.map_or("unscored".into(), |other| other.to_string());
                found.push(format!("reward {} is not {word} that of {id}, {other}", why()));
            }
        }
    }
    found
}

fn check_unscored(wanted: Option<&Unscored>, record: &RewardRecord, found: &mut Vec<String>) {
    let reason = match &record.verdict {
        Verdict::Unscored { reason } => Some(reason),
        Verdict::Scored { .. } => None,
    };
    match (wanted, reason) {
        (None, _) | (Some(Unscored::Flag(true)), Some(_)) | (Some(Unscored::Flag(false)), None) => {}
        (Some(Unscored::Reason(part)), Some(reason)) if reason.contains(part) => {}
        (Some(Unscored::Flag(false)), Some(reason)) => found.push(format!("is unscored: {reason}")),
        (Some(Unscored::Reason(part)), Some(reason)) => {
            found.push(format!("is unscored because {reason:?}, expected {part:?}"));
        }
        (Some(_), None) => found.push("is scored, expected unscored".into()),
    }
}

fn check_named(
    what: &str,
    name: &str,
    is: Option<(Option<f32>, Option<&str>)>,
    wanted: Option<&Wanted>,
    found: &mut Vec<String>,
) {
    let Some((value, label)) = is else {
        return found.push(format!("there is no {what} {name:?}"));
    };
    let fine = wanted.map_or(value.is_none(), |wanted| wanted.admits(value, label));
    if !fine {
        let mut shown = value.map_or("nothing".into(), |value| value.to_string());
        if let Some(label) = label {
            let _ = write!(shown, " ({label})");
        }
        let wanted = wanted.map_or("nothing".into(), ToString::to_string);
        found.push(format!("{what} {name} is {shown}, expected {wanted}"));
    }
}

impl Wanted {
    fn admits(&self, value: Option<f32>, label: Option<&str>) -> bool {
        match (self, value) {
            (Self::Number(wanted), Some(value)) => (value - wanted).abs() <= TOLERANCE,
            (Self::Range([low, high]), Some(value)) => (*low..=*high).contains(&value),
            (Self::Class(wanted), _) => label == Some(wanted),
            (_, None) => false,
        }
    }
}

impl std::fmt::Display for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(wanted) => write!(f, "{wanted}"),
            Self::Range([low, high]) => write!(f, "{low} to {high}"),
            Self::Class(wanted) => write!(f, "{wanted:?}"),
        }
    }
}
