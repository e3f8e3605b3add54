//! `freewheel dpo`: a model trained on preferences, against itself as it was.

use std::path::Path;

use clap::Args;
use freewheel_learner::preference::dpo::{DpoConfig, Judgement, PreferenceExample, run_dpo};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ConfigArgs;
use super::fail::Explain as _;
use super::jobs::{OutputSection, Work, prompt_of, size};
use crate::config::{Checks, Loaded, ModelSection, Node, Problem};
use crate::lines;

/// Train on preferences: DPO, IPO, KTO and relatives, the same bytes again from the same seed.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  freewheel dpo my-dpo.toml\n  \
    freewheel dpo my-dpo.toml --set dpo.loss=kto --set output.dir=models/try\n\n\
    Lines of data: {\"prompt\": …, \"chosen\": …, \"rejected\": …}; for kto also {\"prompt\": …, \"completion\": …, \"label\": true}")]
pub struct DpoArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Overwrite the output folder.
    #[arg(long)]
    force: bool,
}

/// The config of a job on preferences.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DpoJob {
    /// The model to start from; it is the reference too.
    pub model: ModelSection,
    /// Preferences.
    pub data: PreferenceSection,
    /// Training.
    pub dpo: DpoConfig,
    /// Where the result goes.
    pub output: OutputSection,
}

/// The `[data]` section: preferences.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PreferenceSection {
    /// JSONL with `prompt` or `messages`, and `chosen` and `rejected`, or `completion` and `label`. Required.
    pub file: String,
}

impl PreferenceSection {
    pub(super) fn check(&self, checks: &mut Checks<'_>) {
        checks.require(!self.file.is_empty(), "data.file", "is not set", Some("data.file = \"pairs.jsonl\""));
    }

    /// Reads the file; `config` is the file that names it.
    pub(super) fn read(&self, config: &Path) -> anyhow::Result<Vec<PreferenceExample>> {
        read(&crate::config::resolve(&self.file, config))
    }
}

/// One line of preferences.
#[derive(Clone, Debug, Deserialize)]
struct Line {
    prompt: Option<String>,
    messages: Option<Value>,
    chosen: Option<String>,
    rejected: Option<String>,
    completion: Option<String>,
    label: Option<bool>,
}

impl Line {
    fn judgement(&self) -> Option<Judgement> {
        match (&self.chosen, &self.rejected, &self.completion, self.label) {
            (Some(chosen), Some(rejected), None, None) => {
                Some(Judgement::Pair { chosen: chosen.clone(), rejected: rejected.clone() })
            }
            (None, None, Some(completion), Some(desirable)) => {
                Some(Judgement::Label { completion: completion.clone(), desirable })
            }
            _ => None,
        }
    }

    fn check(&self) -> Result<(), String> {
        if self.prompt.is_some() == self.messages.is_some() {
            return Err("must hold one of `prompt`, `messages`".into());
        }
        match self.judgement() {
            Some(_) => Ok(()),
            None => Err("must hold `chosen` and `rejected`, or `completion` and `label`".into()),
        }
    }
}

/// Reads a file of preferences.
///
/// # Errors
/// The bad lines, together, as bad input.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<PreferenceExample>> {
    let folder = path.parent().unwrap_or(Path::new(""));
    lines::read(path, Line::check)?
        .into_iter()
        .map(|(at, line)| {
            let judgement = line.judgement().expect("just checked");
            let prompt = prompt_of(line.prompt, line.messages, folder)
                .map_err(|what| anyhow::anyhow!("{}:{at}: {what}", path.display()))
                .input()?;
            Ok(PreferenceExample { prompt, judgement })
        })
        .collect()
}

fn checks(job: &DpoJob, document: &Node, _path: &Path) -> Vec<Problem> {
    let mut checks = Checks::new(document);
    let path = Some("model.path = \"models/mine\"");
    checks.require(!job.model.path.is_empty(), "model.path", "is not set", path);
    job.data.check(&mut checks);
    job.output.check(&mut checks);
    job.dpo.problems().iter().for_each(|problem| checks.told(problem));
    checks.finish()
}

impl DpoArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        super::super::logging::to_terminal();
        let loaded = crate::config::load_as(&self.config.config, &self.config.overrides, &[], checks)?;
        train(&loaded, self.force)
    }
}

/// Reads the job out of a part of a recipe.
///
/// # Errors
/// All problems together.
pub(super) fn load_part(
    path: &Path,
    text: &str,
    overrides: &[String],
) -> Result<Loaded<DpoJob>, crate::config::ConfigError> {
    crate::config::load_part(path, text, overrides, checks)
}

/// Does the job.
///
/// # Errors
/// Bad inputs, or a failure of the work.
pub(super) fn train(loaded: &Loaded<DpoJob>, force: bool) -> anyhow::Result<()> {
    let job = &loaded.config;
    let output = job.output.folder(force)?;
    let examples = job.data.read(&loaded.path)?;
    let path = crate::config::resolve(&job.model.path, &loaded.path);
    let mut model = crate::policy::open(&path, job.model.dtype.requested())?;
    let what = format!("{} preferences, {}", examples.len(), size(&model));
    let work = Work::begin(output, &what, &job.dpo.fit);
    let summary = run_dpo(&job.dpo, &mut model, examples, &work.view)?;
    work.end(&summary, &model, &job.model.path)
}
