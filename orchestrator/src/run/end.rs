//! First and last words of a run.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::progress::clock;
use super::{Ended, Prepared};
use crate::alarms::{AlarmAction, Raised};
use crate::cli::table;
use crate::folder::{RunFolder, RunState, StepLine, names};

/// Says what is about to happen.
pub fn greet(prepared: &Prepared, folder: &RunFolder) {
    let config = &prepared.loaded.config;
    let parameters = prepared.model.model.layout().total as f64;
    let size = if parameters >= 1e9 {
        format!("{:.2} B", parameters / 1e9)
    } else {
        format!("{:.2} M", parameters / 1e6)
    };
    let held_out = prepared.eval.as_ref().map_or(0, |set| set.prompts.len());
    eprintln!(
        "{}: {} parameters, {} prompts, {held_out} held out; {} steps of {} groups of {}; staleness up to {}; {} actor{}",
        folder.path().display(),
        size,
        prepared.prompts.len(),
        config.learner.steps,
        config.learner.groups_per_step,
        config.prompts.group_size,
        config.learner.max_staleness,
        config.actor.processes,
        if config.actor.processes == 1 { "" } else { "s" },
    );
}

/// Writes `report.html`; a report that fails costs no run.
pub fn report(folder: &RunFolder) -> Option<PathBuf> {
    if !folder.file(names::METRICS).exists() {
        return None;
    }
    crate::report::write(folder.path())
        .map_err(|error| tracing::error!(error = %format!("{error:#}"), "no report"))
        .ok()
}

/// Says how it went.
///
/// # Errors
/// If standard output is gone.
pub fn summary(
    folder: &RunFolder,
    ended: &Ended,
    took: Duration,
    report: Option<&Path>,
    json: bool,
) -> anyhow::Result<()> {
    let last = folder.last_line(names::METRICS).unwrap_or_default();
    if json {
        let value = json!({
            "run": folder.path(),
            "state": ended.state,
            "seconds": took.as_secs_f64(),
            "metrics": last,
            "eval": ended.eval.as_ref().map(|eval| eval.metrics()),
            "report": report,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    let first = first_eval(folder);
    print!("{}", text(folder, ended, took, report, &last, first.as_ref()));
    Ok(())
}

fn first_eval(folder: &RunFolder) -> Option<StepLine> {
    let text = std::fs::read_to_string(folder.file(names::EVAL)).ok()?;
    serde_json::from_str(text.lines().next()?).ok()
}

fn text(
    folder: &RunFolder,
    ended: &Ended,
    took: Duration,
    report: Option<&Path>,
    last: &StepLine,
    first: Option<&StepLine>,
) -> String {
    let number = |key: &str| last.get(key).and_then(Value::as_f64);
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row =
        |name: &str, value: Option<String>| rows.extend(value.map(|value| vec![name.to_owned(), value]));
    let state = match ended.state {
        RunState::Finished => "finished",
        RunState::Stopped => "stopped early; --resume goes on",
        RunState::Running | RunState::Failed => "failed",
    };
    row("state", Some(state.into()));
    row("steps", number("step").map(|step| format!("{step}")));
    row("time", Some(clock(took)));
    if let Some(eval) = &ended.eval {
        let key = format!("eval/{}/accuracy", eval.name);
        let before = first.and_then(|line| line.get(&key)?.as_f64());
        let from = before.map_or_else(String::new, |x| format!("{x:.3} -> "));
        let Some(mean) = eval.overall.mean else { return String::new() };
        row(
            &format!("accuracy on {}", eval.name),
            Some(format!(
                "{from}{mean:.3}  [{:.3}, {:.3}] over {} prompts",
                eval.overall.low, eval.overall.high, eval.overall.prompts
            )),
        );
    }
    for (name, cost) in ended.eval.iter().flat_map(|eval| &eval.costs) {
        let Some(mean) = cost.mean else { continue };
        let of = format!("[{:.3}, {:.3}] over {} prompts", cost.low, cost.high, cost.prompts);
        row(&format!("limited cost {name}"), Some(format!("{mean:.3}  {of}")));
    }
    row("reward, last step", number("reward/mean").map(|x| format!("{x:.3}")));
    row(
        "staleness, last step",
        number("staleness/mean")
            .map(|x| format!("{x:.2} mean, {:.0} max", number("staleness/max").unwrap_or(0.0))),
    );
    row("same-version log-prob gap", number("mismatch/same_version_abs_max").map(|x| format!("{x}")));
    row(
        "rollouts",
        number("accounting/issued").map(|issued| {
            let dropped: f64 = last
                .iter()
                .filter(|(k, _)| k.starts_with("accounting/dropped_"))
                .filter_map(|(_, x)| x.as_f64())
                .sum();
            format!(
                "{issued:.0} issued = {:.0} trained + {dropped:.0} dropped + {:.0} queued + {:.0} in flight",
                number("accounting/trained").unwrap_or(0.0),
                number("accounting/queued").unwrap_or(0.0),
                number("accounting/in_flight").unwrap_or(0.0)
            )
        }),
    );
    row("checkpoint", latest_checkpoint(folder).map(|path| path.display().to_string()));
    row("report", report.map(|path| path.display().to_string()));
    let mut out = String::new();
    let _ = write!(out, "{}", table(&["run", &folder.path().display().to_string()], &rows));
    out
}

/// The alarms of a run, oldest first.
pub fn raised(folder: &RunFolder) -> Vec<Raised> {
    let text = std::fs::read_to_string(folder.file(names::ALARMS)).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Says which alarms were raised since there were `before`.
///
/// # Errors
/// If one of them was to stop the run.
pub fn alarms(folder: &RunFolder, before: usize) -> anyhow::Result<()> {
    let raised = raised(folder);
    let new = raised.get(before..).unwrap_or_default();
    for alarm in new {
        eprintln!("alarm at step {}: {}", alarm.step, alarm.what);
    }
    match new.iter().find(|alarm| alarm.action == AlarmAction::Stop) {
        Some(alarm) => Err(anyhow::anyhow!("the alarm {} stopped the run: {}", alarm.alarm, alarm.what)
            .context(format!("{} failed at step {}", folder.path().display(), alarm.step))),
        None => Ok(()),
    }
}

/// The newest committed checkpoint of a run.
pub fn latest_checkpoint(folder: &RunFolder) -> Option<PathBuf> {
    let dir = folder.file(names::CHECKPOINTS);
    let name = std::fs::read_to_string(dir.join("LATEST")).ok()?;
    Some(dir.join(name.trim())).filter(|path| path.is_dir())
}
