//! A recipe: jobs one after the other, each starting from the model that the one before made.
//!
//! ```text
//! [[stage]]            [[stage]]                  [[stage]]
//! job = "sft"    ──►   job = "run"          ──►   job = "dpo"
//! [stage.init] …       [stage.prompts] …          [stage.data] …
//! [stage.sft] …        [stage.learner] …          [stage.dpo] …
//! runs/NAME/1-sft/     runs/NAME/2-run/           runs/NAME/3-dpo/
//! ```
//!
//! A stage's tables are those of its job's own config, below `stage`. Where its model comes from and where its result goes follows from
//! its place; a stage may still name another `model.path`. A stage is done when `DONE` is in its folder: `--resume` begins with the
//! first that is not.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::ConfigArgs;
use super::fail::Explain as _;
use super::run::runtime;
use super::{dpo, sft};
use crate::config::Loaded;
use crate::folder::{IfExists, names};

/// Marks the folder of a stage that is done.
const DONE: &str = "DONE";

/// What a stage does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Sft,
    Run,
    Dpo,
}

impl Job {
    fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Run => "run",
            Self::Dpo => "dpo",
        }
    }
}

/// One stage as written: its own lines of the file, every other line blank.
#[derive(Clone, Debug, PartialEq)]
struct Stage {
    line: usize,
    text: String,
}

/// A stage whose config is good.
enum Ready {
    Sft(Box<Loaded<sft::SftJob>>),
    Run(Box<Loaded>),
    Dpo(Box<Loaded<dpo::DpoJob>>),
}

/// Checks every stage of a recipe, for tests of the files in `configs/`.
///
/// # Errors
/// All problems of the first stage that has some.
pub fn check_file(path: &Path) -> anyhow::Result<()> {
    let args = ConfigArgs { config: path.to_owned(), overrides: Vec::new() };
    let recipe = Recipe::read(&args)?.with_context(|| format!("{} has no [[stage]]", path.display()))?;
    (0..recipe.stages.len()).try_for_each(|i| recipe.ready(i, None).map(drop))
}

/// Jobs one after the other.
#[derive(Debug)]
pub(super) struct Recipe {
    path: PathBuf,
    folder: PathBuf,
    stages: Vec<(Job, Stage)>,
    overrides: Vec<String>,
}

impl Recipe {
    /// The recipe in the file, `None` if it has no `[[stage]]`.
    ///
    /// # Errors
    /// If a stage has no job, or something stands outside of the stages.
    pub(super) fn read(args: &ConfigArgs) -> anyhow::Result<Option<Self>> {
        let path = &args.config;
        // What cannot be read is told when the file is read as a config.
        let Ok(text) = std::fs::read_to_string(path) else { return Ok(None) };
        let bad = |line: usize, what: &str| Err(anyhow::anyhow!("{}:{line}: {what}", path.display())).input();
        let (before, stages) = split(&text);
        if stages.is_empty() {
            return Ok(None);
        }
        if let Some(line) = before {
            return bad(line, "a recipe holds nothing but [[stage]]s and their tables ([stage.…])");
        }
        let mut jobs = Vec::new();
        for mut stage in stages {
            let Some((job, text)) = take_job(&stage.text) else {
                return bad(
                    stage.line,
                    "the stage has no `job`: \"sft\", \"run\" or \"dpo\" before its tables",
                );
            };
            stage.text = text;
            jobs.push((job, stage));
        }
        let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("recipe");
        let folder = Path::new("runs").join(name);
        Ok(Some(Self { path: path.clone(), folder, stages: jobs, overrides: args.overrides.clone() }))
    }

    /// Runs the stages that are not done. All configs are checked before the first begins.
    ///
    /// # Errors
    /// Those of the stages.
    pub(super) fn run(mut self, if_exists: IfExists, json: bool) -> anyhow::Result<()> {
        self.take_own_overrides()?;
        let plan = (0..self.stages.len()).map(|i| self.ready(i, None)).collect::<anyhow::Result<Vec<_>>>()?;
        drop(plan);
        match (self.folder.exists(), if_exists) {
            (true, IfExists::Refuse) => {
                return Err(anyhow::anyhow!("{} is there already", self.folder.display())).input_hint(
                    "--resume goes on with it, --force deletes it, --set recipe.dir=DIR writes elsewhere",
                );
            }
            (true, IfExists::Replace) => std::fs::remove_dir_all(&self.folder)
                .with_context(|| format!("{} cannot be deleted", self.folder.display()))?,
            _ => {}
        }
        std::fs::create_dir_all(&self.folder)
            .with_context(|| format!("{} cannot be made", self.folder.display()))?;
        crate::logging::to_file(&self.folder.join(names::LOG), "info")?;
        let mut model = None;
        for (i, (job, _)) in self.stages.iter().enumerate() {
            let folder = self.stage_folder(i);
            if folder.join(DONE).exists() {
                eprintln!("stage {} ({}): done before", i + 1, job.name());
            } else {
                eprintln!("stage {} ({}): {}", i + 1, job.name(), folder.display());
                self.stage(i, model.as_deref(), json)?;
                std::fs::write(folder.join(DONE), "")?;
            }
            model = Some(result_of(*job, &folder)?);
        }
        if let Some(model) = model {
            println!("{}: the result of all {} stages", model.display(), self.stages.len());
        }
        Ok(())
    }

    /// `recipe.dir=DIR` is the recipe's own; all other flags must name a stage.
    fn take_own_overrides(&mut self) -> anyhow::Result<()> {
        let mut rest = Vec::new();
        for flag in std::mem::take(&mut self.overrides) {
            let number = || -> Option<usize> {
                let key = flag.split('=').next()?.trim().strip_prefix("stage")?;
                key.split('.').next()?.parse().ok()
            };
            match (flag.strip_prefix("recipe.dir="), number()) {
                (Some(dir), _) => self.folder = PathBuf::from(dir.trim().trim_matches('"')),
                (None, Some(n)) if (1..=self.stages.len()).contains(&n) => rest.push(flag),
                _ => {
                    return Err(anyhow::anyhow!("--set {flag}: names no stage of the recipe"))
                        .input_hint("--set stage2.learner.steps=10, or --set recipe.dir=DIR");
                }
            }
        }
        self.overrides = rest;
        Ok(())
    }

    fn stage_folder(&self, i: usize) -> PathBuf {
        self.folder.join(format!("{}-{}", i + 1, self.stages[i].0.name()))
    }

    /// Checks stage `i` with `model` as its start (while planning, with a name that stands for it).
    fn ready(&self, i: usize, model: Option<&Path>) -> anyhow::Result<Ready> {
        let (job, stage) = &self.stages[i];
        let mut flags = Vec::new();
        let quoted = |path: &Path| toml::Value::String(path.display().to_string()).to_string();
        let own = stage.text.lines().any(|line| line.trim() == "[init]") || names_model(&stage.text);
        if i > 0 && !own {
            let model = model.map_or_else(|| self.stage_folder(i - 1), Path::to_owned);
            flags.push(format!("model.path={}", quoted(&model)));
        }
        let folder = self.stage_folder(i);
        match job {
            Job::Sft | Job::Dpo => flags.push(format!("output.dir={}", quoted(&folder))),
            Job::Run => {
                let parent = folder.parent().unwrap_or(Path::new("."));
                let name = folder.file_name().unwrap_or_default();
                flags.push(format!("run.dir={}", quoted(parent)));
                flags.push(format!("run.name={}", quoted(Path::new(name))));
            }
        }
        let prefix = format!("stage{}.", i + 1);
        flags.extend(self.overrides.iter().filter_map(|flag| flag.strip_prefix(&prefix)).map(str::to_owned));
        let (path, text) = (&self.path, &stage.text);
        Ok(match job {
            Job::Sft => Ready::Sft(Box::new(sft::load_part(path, text, &flags)?)),
            Job::Dpo => Ready::Dpo(Box::new(dpo::load_part(path, text, &flags)?)),
            Job::Run => {
                let loaded = crate::config::load_run_part(path, text, &flags)?;
                if loaded.config.queue.backend != freewheel_queue::Backend::Memory {
                    return Err(anyhow::anyhow!(
                        "{}: stage {}: queue.backend is not \"memory\"",
                        path.display(),
                        i + 1
                    ))
                    .input_hint("a stage runs in one process; a run over Redis has a config of its own");
                }
                Ready::Run(Box::new(loaded))
            }
        })
    }

    fn stage(&self, i: usize, model: Option<&Path>, json: bool) -> anyhow::Result<()> {
        match self.ready(i, model)? {
            // A job on examples that was cut short begins anew.
            Ready::Sft(loaded) => sft::train(&loaded, true),
            Ready::Dpo(loaded) => dpo::train(&loaded, true),
            Ready::Run(loaded) => {
                let begun = self.stage_folder(i).join(names::RUN).exists();
                let if_exists = if begun { IfExists::Resume } else { IfExists::Refuse };
                runtime()?.block_on(crate::run::run(*loaded, if_exists, json))
            }
        }
    }
}

/// The model that a stage made.
fn result_of(job: Job, folder: &Path) -> anyhow::Result<PathBuf> {
    if job != Job::Run {
        return Ok(folder.to_owned());
    }
    let checkpoints = folder.join("checkpoints");
    let latest = std::fs::read_to_string(checkpoints.join("LATEST"))
        .with_context(|| format!("{} holds no checkpoint", checkpoints.display()))?;
    Ok(checkpoints.join(latest.trim()))
}

/// The first line that belongs to no stage, if there is one, and the stages. Headers lose their `stage.`.
fn split(text: &str) -> (Option<usize>, Vec<Stage>) {
    let (mut before, mut stages): (Option<usize>, Vec<Stage>) = (None, Vec::new());
    for (i, line) in text.lines().enumerate() {
        let plain = line.split('#').next().unwrap_or_default().trim();
        if plain.replace(' ', "") == "[[stage]]" {
            stages.push(Stage { line: i + 1, text: "\n".repeat(i + 1) });
            continue;
        }
        let Some(stage) = stages.last_mut() else {
            before = before.or((!plain.is_empty()).then_some(i + 1));
            continue;
        };
        let header = plain.starts_with('[') && plain.ends_with(']');
        let renamed = match header {
            true => line.replacen("[stage.", "[", 1),
            false => line.to_owned(),
        };
        if header && renamed == line {
            before = before.or(Some(i + 1));
        }
        stage.text.push_str(&renamed);
        stage.text.push('\n');
    }
    (before, stages)
}

/// The stage's job, and its text without that line.
fn take_job(text: &str) -> Option<(Job, String)> {
    let mut found = None;
    let mut rest = String::with_capacity(text.len());
    let mut in_table = false;
    for line in text.lines() {
        in_table |= line.trim_start().starts_with('[');
        let value = line.split_once('=').filter(|(key, _)| key.trim() == "job").map(|(_, value)| value);
        match value {
            Some(value) if !in_table && found.is_none() => {
                let name = value.split('#').next().unwrap_or_default().trim().trim_matches(['"', '\'']);
                found = Some([Job::Sft, Job::Run, Job::Dpo].into_iter().find(|job| job.name() == name)?);
            }
            _ => rest.push_str(line),
        }
        rest.push('\n');
    }
    Some((found?, rest))
}

/// Whether the text sets `model.path`.
fn names_model(text: &str) -> bool {
    let value: Option<toml::Table> = text.parse().ok();
    value.and_then(|table| table.get("model")?.get("path").cloned()).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECIPE: &str = "# three stages\n\n[[stage]]\njob = \"sft\"  # first\n[stage.init]\narch = \"llama\"\n\n\
        [[ stage ]]\njob = 'run'\n[[stage.reward.component]]\nname = \"a\"\n";

    #[test]
    fn stages_keep_their_lines_and_lose_their_prefix() {
        let (before, stages) = split(RECIPE);
        assert_eq!(before, None);
        let lines: Vec<usize> = stages.iter().map(|stage| stage.line).collect();
        assert_eq!(lines, [3, 8]);
        let (job, text) = take_job(&stages[0].text).unwrap();
        assert_eq!((job, text.lines().nth(4)), (Job::Sft, Some("[init]")));
        assert_eq!(text.lines().nth(3), Some(""), "the job's line is blank");
        let (job, text) = take_job(&stages[1].text).unwrap();
        assert_eq!((job, text.lines().nth(9)), (Job::Run, Some("[[reward.component]]")));
    }

    #[test]
    fn what_belongs_to_no_stage_is_found() {
        assert_eq!(split("[model]\npath = \"x\"\n[[stage]]\n").0, Some(1));
        assert_eq!(split("[[stage]]\njob = \"sft\"\n[sft]\nsteps = 1\n").0, Some(3));
        assert_eq!(split("[model]\n").1, []);
        assert_eq!(take_job("job = \"dance\"\n"), None);
        assert_eq!(take_job("[a]\njob = \"sft\"\n"), None);
    }
}
