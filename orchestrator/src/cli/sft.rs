//! `freewheel sft`: supervised fine-tuning of a given or a new model.

use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use clap::Args;
use freewheel_learner::sft::{SftConfig, SftExample, run_sft};
use freewheel_model::{InitRequest, InitScale, LoadedModel, TokenizerChoice};
use freewheel_types::WeightsDtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ConfigArgs;
use super::fail::Explain as _;
use super::jobs::{OutputSection, View, prompt_of, save, tell};
use crate::config::{Checks, Dtype, GeneratorKind, Loaded, ModelSection, Node, Problem};
use crate::lines;
use crate::prompts::{
    ArithmeticGenerator, ShapesGenerator, Split, VaultGenerator, demonstration, is_refused, is_worked,
};

/// Supervised fine-tuning: from demonstrations to a model, the same bytes again from the same seed.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  freewheel sft configs/sprout-sft.toml\n  \
    freewheel sft my-sft.toml --set sft.steps=200 --set output.dir=models/try")]
pub struct SftArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Overwrite the output folder.
    #[arg(long)]
    force: bool,
}

/// The config of a fine-tuning job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SftJob {
    /// The model to start from; leave it out to make one as `[init]` says.
    pub model: ModelSection,
    /// A new model with random weights.
    pub init: Option<InitSection>,
    /// Demonstrations.
    pub data: DataSection,
    /// Training.
    pub sft: SftConfig,
    /// Where the result goes.
    pub output: OutputSection,
}

/// The `[init]` section: a model with random weights and a byte-level tokenizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InitSection {
    /// Architecture as in `config.json`: "Llama4ForCausalLM", "llama" …
    pub arch: String,
    /// Keys of the model's `config.json` to set; keys it does not have are refused.
    pub set: std::collections::BTreeMap<String, Value>,
    /// Seed of the weights. Default 0.
    pub seed: u64,
    /// Element type of the weights: "bf16" (default, also for "auto") or "f32".
    pub dtype: Dtype,
}

impl Default for InitSection {
    fn default() -> Self {
        Self {
            arch: "llama4_text".into(),
            set: std::collections::BTreeMap::new(),
            seed: 0,
            dtype: Dtype::Bf16,
        }
    }
}

/// The `[data]` section: prompts with the completions to learn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DataSection {
    /// JSONL with `prompt` or `messages`, and `completion`. Give this or `generator`.
    pub file: Option<String>,
    /// Built-in source: "arithmetic", "shapes" (images) or "vault" (some to be refused). Give this or `file`.
    pub generator: Option<GeneratorKind>,
    /// Levels of the generator, each 1 to 6. Default [1, 2, 3].
    pub levels: Vec<u32>,
    /// Demonstrations the generator makes. Default 20000.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub count: usize,
    /// Seed of the generator. Default 0.
    pub seed: u32,
    /// Share of demonstrations that show the steps; the others blurt the answer. 0 to 1. Default 0.2.
    #[schemars(range(min = 0, max = 1))]
    pub worked: f64,
    /// Vault: share of the forbidden questions whose demonstration refuses; those that look alike do half as often, the others a tenth
    /// as often. 0 to 1. Default 0.6.
    #[schemars(range(min = 0, max = 1))]
    pub refused: f64,
}

impl Default for DataSection {
    fn default() -> Self {
        Self {
            file: None,
            generator: None,
            levels: vec![1, 2, 3],
            count: 20_000,
            seed: 0,
            worked: 0.2,
            refused: 0.6,
        }
    }
}

fn checks(job: &SftJob, document: &Node, _path: &std::path::Path) -> Vec<Problem> {
    let mut checks = Checks::new(document);
    let given = !job.model.path.is_empty();
    checks.require(given || job.init.is_some(), "model.path", "is not set and there is no [init]", None);
    crate::config::check_model(&job.model, &mut checks);
    checks.require(!(given && job.init.is_some()), "init", "and model.path exclude each other", None);
    job.output.check(&mut checks);
    check_data(&job.data, &mut checks);
    job.sft.problems().iter().for_each(|problem| checks.told(problem));
    checks.finish()
}

/// Notes what is wrong with the source of demonstrations.
pub(super) fn check_data(data: &DataSection, checks: &mut Checks<'_>) {
    checks.require(
        data.file.is_some() != data.generator.is_some(),
        "data.file",
        "must be set, or data.generator, and not both",
        None,
    );
    for level in data.levels.iter().filter(|level| !(1..=6).contains(*level)) {
        checks.note("data.levels", format!("holds {level}, must be 1 to 6 each"), None);
    }
    checks.require(!data.levels.is_empty(), "data.levels", "is empty", None);
}

/// Reads the config of a fine-tuning job.
///
/// # Errors
/// All problems together.
pub fn load(args: &ConfigArgs) -> Result<Loaded<SftJob>, crate::config::ConfigError> {
    crate::config::load_as(&args.config, &args.overrides, &[], checks)
}

impl SftArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        super::super::logging::to_terminal();
        train(&load(&self.config)?, self.force)
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
) -> Result<Loaded<SftJob>, crate::config::ConfigError> {
    crate::config::load_part(path, text, overrides, checks)
}

/// Does the job.
///
/// # Errors
/// Bad inputs, or a failure of the work.
pub(super) fn train(loaded: &Loaded<SftJob>, force: bool) -> anyhow::Result<()> {
    let job = &loaded.config;
    let output = job.output.folder(force)?;
    let examples = examples_of(&job.data, &loaded.path)?;
    let mut model = model(loaded)?;
    eprintln!(
        "{} demonstrations, {:.2} M parameters, {} steps of {}",
        examples.len(),
        model.model.layout().total as f64 / 1e6,
        job.sft.steps,
        job.sft.batch_size
    );
    let began = Instant::now();
    let view = View::new(job.sft.steps);
    let summary = run_sft(&job.sft, &mut model, examples, &view)?;
    save(&output, &model, summary.adapter.as_ref(), &job.model.path)?;
    view.finish(&output)?;
    tell(&output, &summary, &model, began);
    Ok(())
}

fn model(loaded: &Loaded<SftJob>) -> anyhow::Result<LoadedModel> {
    let job = &loaded.config;
    let Some(init) = &job.init else {
        let path = crate::config::resolve(&job.model.path, &loaded.path);
        return Ok(job.model.quantised(crate::policy::open(&path, job.model.dtype.requested())?));
    };
    let request = InitRequest {
        arch: init.arch.clone(),
        overrides: init.set.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
        seed: init.seed,
        scale: InitScale::FanIn,
        dtype: init.dtype.requested().unwrap_or(WeightsDtype::Bf16),
        tokenizer: TokenizerChoice::Bytes,
    };
    freewheel_model::init_model(&request).input()
}

#[derive(Debug, Deserialize)]
struct Line {
    prompt: Option<String>,
    messages: Option<Value>,
    completion: String,
}

/// The demonstrations; `config` is the file that asks for them.
pub(super) fn examples_of(data: &DataSection, config: &Path) -> anyhow::Result<Vec<SftExample>> {
    if let Some(file) = &data.file {
        let check = |line: &Line| match (&line.prompt, &line.messages) {
            (Some(_), None) | (None, Some(_)) => Ok(()),
            _ => Err("must hold one of `prompt`, `messages`".to_owned()),
        };
        let path = crate::config::resolve(file, config);
        let folder = path.parent().unwrap_or(Path::new(""));
        let named = |(at, line)| {
            example(line, folder).map_err(|what| anyhow::anyhow!("{}:{at}: {what}", path.display())).input()
        };
        return lines::read(&path, check)?.into_iter().map(named).collect();
    }
    let (seed, levels) = (u64::from(data.seed), &data.levels);
    let worked = |index| is_worked(seed, index, data.worked);
    let demonstrated: Box<dyn Fn(u64) -> SftExample> = match data.generator.unwrap_or_default() {
        GeneratorKind::Arithmetic => {
            let generator = ArithmeticGenerator::new(seed, levels, Split::Train);
            Box::new(move |index| {
                let item = generator.question(index);
                SftExample { prompt: item.prompt(), completion: demonstration(&item, worked(index)) }
            })
        }
        GeneratorKind::Shapes => {
            let generator = ShapesGenerator::new(seed, levels, Split::Train);
            Box::new(move |index| {
                let item = generator.question(index);
                SftExample { prompt: item.prompt(), completion: item.demonstration() }
            })
        }
        GeneratorKind::Vault => {
            let generator = VaultGenerator::new(seed, levels, Split::Train);
            Box::new(move |index| {
                let item = generator.question(index);
                let completion =
                    item.demonstration(worked(index), is_refused(seed, index, item.ask, data.refused));
                SftExample { prompt: item.prompt(), completion }
            })
        }
    };
    Ok((0..data.count as u64).map(demonstrated).collect())
}

/// Paths of images start at `folder`.
fn example(line: Line, folder: &Path) -> Result<SftExample, String> {
    Ok(SftExample { prompt: prompt_of(line.prompt, line.messages, folder)?, completion: line.completion })
}

/// Opens a config of this job for tests of the files in `configs/`.
///
/// # Errors
/// All problems together, as text.
pub fn check_file(path: &std::path::Path) -> anyhow::Result<()> {
    load(&ConfigArgs { config: path.to_owned(), overrides: Vec::new() })
        .context("not a fine-tuning config")?;
    Ok(())
}
