//! `freewheel explain`: one rollout from its prompt to the step that used it, out of what the run wrote.

use std::path::PathBuf;

use clap::Args;
use freewheel_learner::LearnerError;
use freewheel_learner::core::journal_dir;
use freewheel_learner::disk::SystemDisk;
use freewheel_learner::journal::{self, Position, Record};
use freewheel_types::{MAX_GROUP_SIZE, RolloutId, ScoredRollout, TaskId};
use serde_json::{Value, json};

use super::fail::Explain as _;
use super::score::reward_json;
use crate::config::{Loaded, pool_params};
use crate::folder::{RunFolder, names};
use crate::prompts::{PoolLog, PoolRecord, PromptPool};
use crate::run::prepare;
use crate::run::roles::POOL_LOG;

/// Tell everything a run knows of one rollout: its prompt, why that was chosen, who drew it with which weights, every part of its reward, what became of it.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  freewheel explain runs/quickstart 17.3")]
pub struct ExplainArgs {
    /// The run's folder, or its name below runs/.
    run: PathBuf,
    /// The rollout, as in logs and samples: TASK.INDEX.
    rollout: String,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// What the journal says of it.
#[derive(Default)]
struct Found {
    scored: Option<ScoredRollout>,
    lost: Option<String>,
    /// Updates it was in: step of the weights trained, whether it was applied.
    steps: Vec<(u64, bool)>,
    dropped: Option<(u64, String)>,
}

impl ExplainArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let folder = RunFolder::open(&self.run)?;
        let id = parse(&self.rollout).map_err(anyhow::Error::msg).input()?;
        let loaded = crate::config::load(&folder.file(names::CONFIG), &[])?;
        let found = look(&folder, id)?;
        if found.scored.is_none() && found.lost.is_none() {
            return Err(anyhow::anyhow!(
                "the journal of {} holds no rollout {}",
                folder.path().display(),
                self.rollout
            ))
            .input_hint("ids are TASK.INDEX; samples of a run are in its rollouts/ folder");
        }
        let told = json!({
            "rollout": self.rollout,
            "choice": choice(&folder, &loaded, id)?,
            "drawn": found.scored.as_ref().map(drawn),
            "reward": found.scored.as_ref().map(|scored| reward_json(&scored.reward)),
            "lost": found.lost,
            "used": used(&found),
            "limits": limits(&folder, &found),
        });
        if self.json {
            println!("{}", serde_json::to_string_pretty(&told)?);
        } else {
            print(&told, 0);
        }
        Ok(())
    }
}

fn parse(text: &str) -> Result<RolloutId, String> {
    let wrong = || format!("{text:?} is no rollout id; give TASK.INDEX, for example 17.3");
    let (task, index) = text.split_once('.').ok_or_else(wrong)?;
    let (task, index): (u64, u32) = (task.parse().map_err(|_| wrong())?, index.parse().map_err(|_| wrong())?);
    if task > TaskId::MAX.0 || index >= MAX_GROUP_SIZE {
        return Err(wrong());
    }
    Ok(TaskId(task).rollout(index))
}

fn look(folder: &RunFolder, id: RolloutId) -> anyhow::Result<Found> {
    let mut found = Found::default();
    let dir = journal_dir(folder.path());
    if !dir.is_dir() {
        return Err(anyhow::anyhow!("{} holds no journal", folder.path().display())).input();
    }
    let each = &mut |_: Position, record: Record| -> Result<(), LearnerError> {
        match record {
            Record::Consumed(scored) if scored.rollout.id == id => found.scored = Some(*scored),
            Record::Bad(bad) if bad.rollout == id => found.lost = Some(bad.reason),
            Record::Abandoned(gone) if gone.rollout == id => found.lost = Some(gone.reason),
            Record::StepFormed(step) => {
                if step.rollouts.contains(&id) {
                    found.steps.push((step.from_step, step.applied));
                }
                if let Some((_, reason)) = step.dropped.iter().find(|(task, _)| *task == id.task()) {
                    found.dropped = Some((step.from_step, reason.name().to_owned()));
                }
            }
            _ => {}
        }
        Ok(())
    };
    journal::read(&SystemDisk, &dir, journal::start(&SystemDisk, &dir)?, each)?;
    Ok(found)
}

/// Why its prompt was asked: what the pool believed when it issued the task.
fn choice(folder: &RunFolder, loaded: &Loaded, id: RolloutId) -> anyhow::Result<Value> {
    let path = folder.file(POOL_LOG);
    if !path.exists() {
        return Ok(Value::Null);
    }
    let records = PoolLog::read(&path)?;
    let params = pool_params(&loaded.config);
    let mut pool = PromptPool::new(prepare::training_prompts(loaded)?, params)?;
    for record in &records {
        if let PoolRecord::Issued { task, prompt, group_size, min_version, chosen } = record
            && *task == id.task()
        {
            let reason = pool.why(*prompt);
            return Ok(json!({
                "prompt": prompt.to_string(), "group_size": group_size, "oldest_weights_allowed": min_version.to_string(),
                "learner_then": pool.learner().to_string(), "rule": chosen, "why": reason,
            }));
        }
        pool.replay(record)?;
    }
    Ok(Value::Null)
}

fn drawn(scored: &ScoredRollout) -> Value {
    let rollout = &scored.rollout;
    let version = |version: Option<freewheel_types::PolicyVersion>| version.map(|v| v.to_string());
    json!({
        "name": rollout.prompt.name, "tags": rollout.prompt.tags, "question": rollout.prompt.question(),
        "answer": rollout.prompt.answer.as_ref().and_then(|a| serde_json::from_str::<Value>(a).ok()),
        "text": rollout.text, "tokens": rollout.len(), "finish_reason": rollout.finish_reason, "actor": rollout.actor.to_string(),
        "weights_oldest": version(rollout.version_oldest()), "weights_newest": version(rollout.version_newest()),
        "seconds": rollout.generation_s, "sampling": rollout.sampling,
    })
}

fn used(found: &Found) -> Value {
    match (found.steps.as_slice(), &found.dropped) {
        ([], None) => json!("not yet: its group waits for a batch"),
        ([], Some((step, reason))) => json!({"dropped": reason, "learner_at_step": step}),
        (steps, _) => steps
            .iter()
            .map(|(step, applied)| json!({"trained_on_weights": step, "made_step": applied.then_some(step + 1), "applied": applied}))
            .collect(),
    }
}

/// Multipliers of limited costs after the update it was in.
fn limits(folder: &RunFolder, found: &Found) -> Value {
    let Some((step, _)) = found.steps.last() else { return Value::Null };
    let text = std::fs::read_to_string(folder.file(names::METRICS)).unwrap_or_default();
    let line = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Map<String, Value>>(line).ok())
        .find(|line| line.get("step").and_then(Value::as_u64) == Some(step + 1));
    let costs: serde_json::Map<String, Value> =
        line.into_iter().flatten().filter(|(key, _)| key.starts_with("cost/")).collect();
    if costs.is_empty() { Value::Null } else { costs.into() }
}

/// Nested lists of `name: value`; what is not known is left out.
fn print(value: &Value, depth: usize) {
    let Value::Object(map) = value else { return println!("{:1$}{value}", "", depth * 2) };
    for (name, value) in map.iter().filter(|(_, value)| !value.is_null()) {
        match value {
            Value::Object(inner) if inner.is_empty() => {}
            Value::Object(_) => {
                println!("{:1$}{name}", "", depth * 2);
                print(value, depth + 1);
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                println!("{:1$}{name}", "", depth * 2);
                items.iter().for_each(|item| print(item, depth + 1));
            }
            Value::String(text) => println!("{:1$}{name}: {text}", "", depth * 2),
            other => println!("{:1$}{name}: {other}", "", depth * 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_they_are_written() {
        let id = TaskId(17).rollout(3);
        assert_eq!(parse(&id.to_string()), Ok(id));
        for bad in ["", "17", "17.", ".3", "17.99999", "x.1", "99999999999999999999.0", "-1.0"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
