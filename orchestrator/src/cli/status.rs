//! `freewheel status`, `stop` and `report`: looking at a run's folder, and asking the run to end.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use serde_json::{Value, json};

use super::fail::Explain as _;
use super::table::table;
use crate::alarms::Raised;
use crate::folder::{RunFolder, RunState, StepLine, names};
use crate::run::raised;

/// Show where a run stands.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  freewheel status runs/quickstart --json")]
pub struct StatusArgs {
    /// The run's folder, or its name below runs/.
    run: PathBuf,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// Ask a run to end well: it finishes its step, writes a checkpoint and a report; `run --resume` goes on.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  freewheel stop runs/quickstart")]
pub struct StopArgs {
    /// The run's folder, or its name below runs/.
    run: PathBuf,
    /// Do not wait for rollouts in flight.
    #[arg(long)]
    now: bool,
    /// Return at once instead of waiting for the end.
    #[arg(long)]
    no_wait: bool,
}

/// Write the self-contained HTML report of a run.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  freewheel report runs/quickstart")]
pub struct ReportArgs {
    /// The run's folder, or its name below runs/.
    run: PathBuf,
}

/// What is shown of the last step.
const SHOWN: [&str; 14] = [
    "reward/mean",
    "reward/std",
    "rollout/length_mean",
    "rollout/tokens_per_s",
    "train/tokens_per_s",
    "train/loss",
    "train/entropy",
    "staleness/mean",
    "staleness/max",
    "mismatch/same_version_abs_max",
    "prompts/zero_signal",
    "bubble/actor",
    "bubble/learner",
    "time/wall_s",
];

impl StatusArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let folder = RunFolder::open(&self.run)?;
        let (file, alive) = (folder.read_run(), folder.alive());
        let state = match (&file, alive) {
            (Some(file), None) if file.state == RunState::Running => {
                "killed (`run --resume` goes on)".to_owned()
            }
            (Some(file), _) => json!(file.state).as_str().unwrap_or_default().to_owned(),
            (None, _) => "unknown".to_owned(),
        };
        let line = folder.last_line(names::METRICS).unwrap_or_default();
        let eval = folder.last_line(names::EVAL).unwrap_or_default();
        let alarms = raised(&folder);
        if self.json {
            let value = json!({
                "run": folder.path(), "state": state, "pid": alive, "steps": file.as_ref().map(|file| file.steps),
                "error": file.as_ref().and_then(|file| file.error.clone()), "metrics": line, "eval": eval,
                "alarms": alarms,
            });
            println!("{}", serde_json::to_string_pretty(&value)?);
            return Ok(());
        }
        let mut rows = vec![vec!["state".to_owned(), state]];
        rows.extend(alive.map(|pid| vec!["process".into(), pid.to_string()]));
        if let Some(file) = &file {
            let step = line.get("step").and_then(Value::as_u64).unwrap_or(0);
            rows.push(vec!["step".into(), format!("{step} of {}", file.steps)]);
            rows.extend(file.error.as_ref().map(|error| vec!["error".into(), error.clone()]));
        }
        rows.extend(SHOWN.iter().filter_map(|key| Some(vec![(*key).to_owned(), number(line.get(*key)?)])));
        rows.extend(accuracy_rows(&eval));
        rows.extend(alarms.iter().map(alarm_row));
        print!("{}", table(&["run", &folder.path().display().to_string()], &rows));
        Ok(())
    }
}

fn alarm_row(raised: &Raised) -> Vec<String> {
    let action = json!(raised.action);
    let action = action.as_str().unwrap_or_default();
    vec![format!("alarm (step {})", raised.step), format!("{}; action: {action}", raised.what)]
}

fn number(value: &Value) -> String {
    value.as_f64().map_or_else(
        || value.to_string(),
        |x| if x.fract() == 0.0 { format!("{x}") } else { format!("{x:.4}") },
    )
}

fn accuracy_rows(eval: &StepLine) -> Vec<Vec<String>> {
    let step = eval.get("step").map(ToString::to_string).unwrap_or_default();
    let overall = eval.iter().filter(|(key, _)| key.ends_with("/accuracy") && !key.contains("/tag/"));
    overall.map(|(key, value)| vec![key.clone(), format!("{} (step {step})", number(value))]).collect()
}

impl StopArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let folder = RunFolder::open(&self.run)?;
        let Some(pid) = folder.alive() else {
            println!("{} is not running", folder.path().display());
            return Ok(());
        };
        folder.write(names::CONTROL, if self.now { "now\n" } else { "drain\n" })?;
        if self.no_wait {
            println!("asked process {pid} to end {}", folder.path().display());
            return Ok(());
        }
        eprintln!("waiting for process {pid} to end {} …", folder.path().display());
        let began = Instant::now();
        while folder.alive().is_some() {
            std::thread::sleep(Duration::from_millis(200));
        }
        println!("{} ended after {:.1} s", folder.path().display(), began.elapsed().as_secs_f64());
        Ok(())
    }
}

impl ReportArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let folder = RunFolder::open(&self.run)?;
        if !folder.file(names::METRICS).exists() {
            return Err(anyhow::anyhow!("{} holds no metrics yet", folder.path().display()))
                .input_hint("wait for the first learner step");
        }
        let path = crate::report::write(folder.path()).context("the report cannot be written")?;
        println!("{}", path.display());
        Ok(())
    }
}
