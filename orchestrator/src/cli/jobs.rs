//! What the jobs on a fixed set of examples share: their sections, their lines of data, their progress.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use freewheel_learner::fit::{FitConfig, FitSummary};
use freewheel_learner::metrics::MetricsSink;
use freewheel_model::{LoadedModel, SaveOptions};
use freewheel_types::{Prompt, PromptBody, PromptId};
use indicatif::{ProgressBar, ProgressStyle};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fail::Explain as _;
use crate::config::Checks;
use crate::folder::StepLine;
use crate::prompts::messages_of;

/// The `[output]` section.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OutputSection {
    /// Folder of the result, Hugging Face layout, with the metrics of its training in `metrics.jsonl`. Required.
    pub dir: String,
}

impl OutputSection {
    /// Notes that the folder is missing.
    pub(super) fn check(&self, checks: &mut Checks<'_>) {
        let example = Some("output.dir = \"models/mine\"");
        checks.require(!self.dir.is_empty(), "output.dir", "is not set", example);
    }

    /// The folder; it must not hold a model unless `force`.
    pub(super) fn folder(&self, force: bool) -> anyhow::Result<PathBuf> {
        let folder = PathBuf::from(&self.dir);
        if folder.join("config.json").exists() && !force {
            return Err(anyhow::anyhow!("{} already holds a model", folder.display()))
                .input_hint("--force overwrites it, --set output.dir=DIR writes elsewhere");
        }
        Ok(folder)
    }
}

/// A job at work: where its result goes, since when, and what watches it.
pub(super) struct Work {
    output: PathBuf,
    began: Instant,
    /// Told of every step.
    pub view: View,
}

impl Work {
    /// Begins: `what` says on what data and with which models.
    pub(super) fn begin(output: PathBuf, what: &str, fit: &FitConfig) -> Self {
        eprintln!("{what}, {} steps of {}", fit.steps, fit.batch_size);
        Self { output, began: Instant::now(), view: View::new(fit.steps) }
    }

    /// Writes `model`, its adapter to `base` if it has one (into `adapter/`), metrics and report, and says what came of it.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub(super) fn end(self, summary: &FitSummary, model: &LoadedModel, base: &str) -> anyhow::Result<()> {
        freewheel_model::save(&self.output, model, &model.params, &SaveOptions::default())?;
        if let Some(adapter) = &summary.adapter {
            adapter.save(&self.output.join("adapter"), base)?;
        }
        self.view.finish(&self.output)?;
        println!(
            "{}: loss {:.4} after {} steps, {} tokens, {:.1} s",
            self.output.display(),
            summary.loss,
            summary.steps,
            summary.tokens,
            self.began.elapsed().as_secs_f64()
        );
        println!("weights {}", model.params.digest());
        Ok(())
    }
}

/// Its size, for people.
pub(super) fn size(model: &LoadedModel) -> String {
    format!("{:.2} M parameters", model.model.layout().total as f64 / 1e6)
}

/// The prompt of a line of data; paths of images start at `folder`.
///
/// # Errors
/// What is wrong with its turns.
pub(super) fn prompt_of(
    prompt: Option<String>,
    messages: Option<Value>,
    folder: &Path,
) -> Result<Prompt, String> {
    let body = match messages {
        Some(turns) => PromptBody::Messages(messages_of(turns, folder)?),
        None => PromptBody::Text(prompt.unwrap_or_default()),
    };
    // A prompt that is only its text: nothing scores or chooses it.
    Ok(Prompt {
        id: PromptId([0; 16]),
        name: None,
        body,
        answer: None,
        tags: vec![],
        verifier: None,
        meta: None,
    })
}

/// A progress bar and `metrics.jsonl`, fed by metrics lines.
pub(super) struct View {
    bar: ProgressBar,
    lines: Mutex<Vec<String>>,
    last: Mutex<Option<Instant>>,
}

impl View {
    fn new(steps: u64) -> Self {
        let style = ProgressStyle::with_template("{bar:28.cyan/dim} {pos}/{len}  {msg}  {eta} left")
            .expect("the template is fixed")
            .progress_chars("━╸─");
        let bar = ProgressBar::new(steps).with_style(style);
        Self { bar, lines: Mutex::new(Vec::new()), last: Mutex::new(None) }
    }

    /// Ends the bar and writes the metrics and the report over them into `folder`.
    ///
    /// # Errors
    /// If the file cannot be written.
    fn finish(&self, folder: &Path) -> anyhow::Result<()> {
        self.bar.finish_and_clear();
        let text = self.lines.lock().expect("no holder of the lock panics").concat();
        std::fs::write(folder.join("metrics.jsonl"), text)?;
        crate::report::write(folder)?;
        Ok(())
    }
}

impl MetricsSink for View {
    fn step(&self, line: &StepLine) {
        let number = |key: &str| line.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN);
        let (step, loss) = (number("step"), number("train/loss"));
        self.bar.set_position(step as u64);
        let accuracy = line.get("preference/accuracy").and_then(Value::as_f64);
        let accuracy = accuracy.map_or_else(String::new, |share| format!("  accuracy {share:.3}"));
        self.bar.set_message(format!("loss {loss:.4}{accuracy}  {:.0} tok/s", number("train/tokens_per_s")));
        let text = serde_json::to_string(line).expect("plain data always serialises");
        self.lines.lock().expect("no holder of the lock panics").push(text + "\n");
        let mut last = self.last.lock().expect("no holder of the lock panics");
        if self.bar.is_hidden() && last.is_none_or(|at| at.elapsed().as_secs() >= 10) {
            eprintln!("step {step:>6}  loss {loss:.4}{accuracy}");
            *last = Some(Instant::now());
        }
    }
}
