//! `freewheel sft`: supervised fine-tuning of a given or a new model.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::Context as _;
use clap::Args;
use freewheel_learner::metrics::MetricsSink;
use freewheel_learner::sft::{SftConfig, SftExample, run_sft};
use freewheel_model::{InitRequest, InitScale, LoadedModel, SaveOptions, TokenizerChoice};
use freewheel_types::{Prompt, PromptBody, PromptId, WeightsDtype};
use indicatif::{ProgressBar, ProgressStyle};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ConfigArgs;
use super::fail::Explain as _;
use crate::config::{Checks, Dtype, GeneratorKind, Loaded, ModelSection, Node, Problem};
use crate::folder::StepLine;
use crate::lines;
use crate::prompts::{
    ArithmeticGenerator, ShapesGenerator, ShapesItem, Split, demonstration, is_worked, messages_of,
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
    /// Built-in source: "arithmetic" or "shapes" (images). Give this or `file`.
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
}

impl Default for DataSection {
    fn default() -> Self {
        Self { file: None, generator: None, levels: vec![1, 2, 3], count: 20_000, seed: 0, worked: 0.2 }
    }
}

/// The `[output]` section.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OutputSection {
    /// Folder of the result, Hugging Face layout. Required.
    pub dir: String,
}

fn checks(job: &SftJob, document: &Node, _path: &std::path::Path) -> Vec<Problem> {
    let mut checks = Checks::new(document);
    let given = !job.model.path.is_empty();
    checks.require(given || job.init.is_some(), "model.path", "is not set and there is no [init]", None);
    crate::config::check_model(&job.model, &mut checks);
    checks.require(!(given && job.init.is_some()), "init", "and model.path exclude each other", None);
    checks.require(
        !job.output.dir.is_empty(),
        "output.dir",
        "is not set",
        Some("output.dir = \"models/mine\""),
    );
    checks.require(
        job.data.file.is_some() != job.data.generator.is_some(),
        "data.file",
        "must be set, or data.generator, and not both",
        None,
    );
    for level in job.data.levels.iter().filter(|level| !(1..=6).contains(*level)) {
        checks.note("data.levels", format!("holds {level}, must be 1 to 6 each"), None);
    }
    checks.require(!job.data.levels.is_empty(), "data.levels", "is empty", None);
    job.sft.problems().iter().for_each(|problem| checks.told(problem));
    checks.finish()
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
        let loaded = load(&self.config)?;
        let job = &loaded.config;
        let output = PathBuf::from(&job.output.dir);
        if output.join("config.json").exists() && !self.force {
            return Err(anyhow::anyhow!("{} already holds a model", output.display()))
                .input_hint("--force overwrites it, --set output.dir=DIR writes elsewhere");
        }
        let examples = examples(&loaded)?;
        let mut model = model(&loaded)?;
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
        view.bar.finish_and_clear();
        freewheel_model::save(&output, &model, &model.params, &SaveOptions::default())?;
        println!(
            "{}: loss {:.4} after {} steps, {} tokens, {:.1} s",
            output.display(),
            summary.loss,
            summary.steps,
            summary.tokens,
            began.elapsed().as_secs_f64()
        );
        println!("weights {}", model.params.digest());
        Ok(())
    }
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

fn examples(loaded: &Loaded<SftJob>) -> anyhow::Result<Vec<SftExample>> {
    let data = &loaded.config.data;
    if let Some(file) = &data.file {
        let check = |line: &Line| match (&line.prompt, &line.messages) {
            (Some(_), None) | (None, Some(_)) => Ok(()),
            _ => Err("must hold one of `prompt`, `messages`".to_owned()),
        };
        let path = crate::config::resolve(file, &loaded.path);
        let folder = path.parent().unwrap_or(Path::new(""));
        let named = |(at, line)| {
            example(line, folder).map_err(|what| anyhow::anyhow!("{}:{at}: {what}", path.display())).input()
        };
        return lines::read(&path, check)?.into_iter().map(named).collect();
    }
    let (seed, indices) = (u64::from(data.seed), 0..data.count as u64);
    if data.generator == Some(GeneratorKind::Shapes) {
        let generator = ShapesGenerator::new(seed, &data.levels, Split::Train);
        let example =
            |item: ShapesItem| SftExample { prompt: item.prompt(), completion: item.demonstration() };
        return Ok(indices.map(|index| example(generator.question(index))).collect());
    }
    let generator = ArithmeticGenerator::new(seed, &data.levels, Split::Train);
    Ok(indices
        .map(|index| {
            let item = generator.question(index);
            let completion = demonstration(&item, is_worked(seed, index, data.worked));
            SftExample { prompt: item.prompt(), completion }
        })
        .collect())
}

/// Paths of images start at `folder`.
fn example(line: Line, folder: &Path) -> Result<SftExample, String> {
    let body = match line.messages {
        Some(turns) => PromptBody::Messages(messages_of(turns, folder)?),
        None => PromptBody::Text(line.prompt.unwrap_or_default()),
    };
    Ok(SftExample { prompt: plain(body), completion: line.completion })
}

/// A prompt that is only its text: nothing scores or chooses it.
fn plain(body: PromptBody) -> Prompt {
    Prompt { id: PromptId([0; 16]), name: None, body, answer: None, tags: vec![], verifier: None, meta: None }
}

/// A progress bar fed by metrics lines.
struct View {
    bar: ProgressBar,
    last: Mutex<Option<Instant>>,
}

impl View {
    fn new(steps: u64) -> Self {
        let style = ProgressStyle::with_template("{bar:28.cyan/dim} {pos}/{len}  {msg}  {eta} left")
            .expect("the template is fixed")
            .progress_chars("━╸─");
        Self { bar: ProgressBar::new(steps).with_style(style), last: Mutex::new(None) }
    }
}

impl MetricsSink for View {
    fn step(&self, line: &StepLine) {
        let number = |key: &str| line.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN);
        let (step, loss) = (number("step"), number("train/loss"));
        self.bar.set_position(step as u64);
        self.bar.set_message(format!("loss {loss:.4}  {:.0} tok/s", number("train/tokens_per_s")));
        let mut last = self.last.lock().expect("no holder of the lock panics");
        if self.bar.is_hidden() && last.is_none_or(|at| at.elapsed().as_secs() >= 10) {
            eprintln!("step {step:>6}  loss {loss:.4}");
            *last = Some(Instant::now());
        }
    }
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
