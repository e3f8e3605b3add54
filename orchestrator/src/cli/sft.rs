//! `freewheel sft`: supervised fine-tuning of a given or a new model.

use std::path::Path;

use anyhow::Context as _;
use clap::Args;
use freewheel_learner::sft::{SftConfig, SftExample, run_sft};
use freewheel_model::{InitRequest, InitScale, LoadedModel, TokenizerChoice};
use freewheel_types::{MessageContent, PromptBody, WeightsDtype};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ConfigArgs;
use super::fail::Explain as _;
use super::jobs::{OutputSection, Work, prompt_of, size};
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
    /// JSONL with `prompt` or `messages`, and `completion`; or `messages` alone that end with the assistant's: every turn of the
    /// assistant is learnt then, and nothing else of the conversation. Give this or `generator`.
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
    let what = format!("{} demonstrations, {}", examples.len(), size(&model));
    let work = Work::begin(output, &what, &job.sft.fit);
    let summary = run_sft(&job.sft, &mut model, examples, &work.view)?;
    work.end(&summary, &model, &job.model.path)
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
    completion: Option<String>,
}

/// The demonstrations; `config` is the file that asks for them.
pub(super) fn examples_of(data: &DataSection, config: &Path) -> anyhow::Result<Vec<SftExample>> {
    if let Some(file) = &data.file {
        let check = |line: &Line| match (&line.prompt, &line.messages, &line.completion) {
            (Some(_), None, Some(_)) | (None, Some(_), _) => Ok(()),
            (Some(_), None, None) => Err("has no `completion`".to_owned()),
            _ => Err("must hold one of `prompt`, `messages`".to_owned()),
        };
        let path = crate::config::resolve(file, config);
        let folder = path.parent().unwrap_or(Path::new(""));
        let named = |(at, line)| {
            demonstrations(line, folder)
                .map_err(|what| anyhow::anyhow!("{}:{at}: {what}", path.display()))
                .input()
        };
        let all: Vec<Vec<SftExample>> =
            lines::read(&path, check)?.into_iter().map(named).collect::<anyhow::Result<_>>()?;
        return Ok(all.into_iter().flatten().collect());
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

/// What a line shows: one completion, or every turn of the assistant, each after what came before it. Paths of images start at
/// `folder`.
fn demonstrations(line: Line, folder: &Path) -> Result<Vec<SftExample>, String> {
    let mut prompt = prompt_of(line.prompt, line.messages, folder)?;
    if let Some(completion) = line.completion {
        return Ok(vec![SftExample { prompt, completion }]);
    }
    let PromptBody::Messages(turns) = &prompt.body else { return Err("has no `completion`".into()) };
    let turns = turns.clone();
    let mut found = Vec::new();
    for (at, turn) in turns.iter().enumerate().filter(|(_, turn)| turn.role == "assistant") {
        let MessageContent::Text(text) = &turn.content else {
            return Err(format!("`messages[{at}]`: what the assistant says must be text"));
        };
        if at == 0 {
            return Err("`messages` begin with the assistant, who answers nothing".into());
        }
        prompt.body = PromptBody::Messages(turns[..at].to_vec());
        found.push(SftExample { prompt: prompt.clone(), completion: text.clone() });
    }
    match turns.last().map(|turn| turn.role.as_str()) {
        Some("assistant") => Ok(found),
        _ => Err("has no `completion`, and its `messages` do not end with the assistant's".into()),
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(line: Value) -> Result<Vec<SftExample>, String> {
        demonstrations(serde_json::from_value(line).unwrap(), Path::new(""))
    }

    fn turn(role: &str, content: &str) -> Value {
        json!({ "role": role, "content": content })
    }

    #[test]
    fn every_turn_of_the_assistant_is_learnt_after_what_came_before() {
        let turns = [turn("user", "2?"), turn("assistant", "4"), turn("user", "3?"), turn("assistant", "9")];
        let found = read(json!({ "messages": turns })).unwrap();
        let before = |example: &SftExample| match &example.prompt.body {
            PromptBody::Messages(turns) => turns.len(),
            PromptBody::Text(_) => 0,
        };
        let seen: Vec<(usize, &str)> = found.iter().map(|e| (before(e), e.completion.as_str())).collect();
        assert_eq!(seen, [(1, "4"), (3, "9")]);
        let one = read(json!({ "messages": turns[..3], "completion": "9" })).unwrap();
        assert_eq!(
            (one.len(), before(&one[0])),
            (1, 3),
            "earlier turns are context where a completion is given"
        );
    }

    #[test]
    fn conversations_without_an_answer_are_refused() {
        for (line, what) in [
            (json!({ "messages": [turn("user", "2?")] }), "do not end with"),
            (json!({ "messages": [turn("assistant", "4")] }), "answers nothing"),
            (json!({ "prompt": "2?" }), "no `completion`"),
        ] {
            assert!(read(line.clone()).unwrap_err().contains(what), "{line}");
        }
    }
}
