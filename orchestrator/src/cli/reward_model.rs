//! `freewheel reward-model`: a scoring model from pairs of answers, and how well one judges pairs.

use std::path::{Path, PathBuf};

use clap::Args;
use freewheel_learner::preference::dpo::{Judgement, PreferenceExample};
use freewheel_learner::preference::reward_model::{
    PairReport, RewardModelConfig, ScoredPair, judge, run_reward_model, tokenise_pair,
};
use freewheel_model::LoadedModel;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::dpo::PreferenceSection;
use super::fail::Explain as _;
use super::jobs::{OutputSection, Work, size};
use crate::config::{Checks, Loaded, ModelSection, Node, Problem};

/// Train a reward model on pairs of answers (Bradley–Terry), or tell how well one judges pairs.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  freewheel reward-model my-reward-model.toml\n  \
    freewheel reward-model --model models/judge --data heldout-pairs.jsonl --json")]
pub struct RewardModelArgs {
    /// Config file (TOML) of a training.
    #[arg(required_unless_present = "model", conflicts_with = "model")]
    config: Option<PathBuf>,
    /// Change one value of the config: `--set reward_model.steps=100`. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "model")]
    overrides: Vec<String>,
    /// Overwrite the output folder.
    #[arg(long)]
    force: bool,
    /// Judge with this reward model instead of training one.
    #[arg(long, short, requires = "data")]
    model: Option<PathBuf>,
    /// Pairs to judge: JSONL with `prompt` or `messages`, `chosen` and `rejected`.
    #[arg(long, requires = "model")]
    data: Option<PathBuf>,
    /// The verdict as JSON.
    #[arg(long, requires = "model")]
    json: bool,
}

/// The config of a reward model's training.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RewardModelJob {
    /// The language model, or the reward model, to start from.
    pub model: ModelSection,
    /// Pairs to learn.
    pub data: PreferenceSection,
    /// Pairs to judge before and after.
    pub heldout: Option<PreferenceSection>,
    /// Training.
    pub reward_model: RewardModelConfig,
    /// Where the result goes.
    pub output: OutputSection,
}

fn checks(job: &RewardModelJob, document: &Node, _path: &Path) -> Vec<Problem> {
    let mut checks = Checks::new(document);
    let path = Some("model.path = \"models/mine\"");
    checks.require(!job.model.path.is_empty(), "model.path", "is not set", path);
    job.data.check(&mut checks);
    job.output.check(&mut checks);
    job.reward_model.problems().iter().for_each(|problem| checks.told(problem));
    checks.finish()
}

impl RewardModelArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        super::super::logging::to_terminal();
        match (&self.config, &self.model, &self.data) {
            (Some(config), ..) => self.train(config),
            (None, Some(model), Some(data)) => self.judge(model, data),
            _ => unreachable!("clap asks for a config, or a model and data"),
        }
    }

    fn train(&self, config: &Path) -> anyhow::Result<()> {
        let loaded: Loaded<RewardModelJob> = crate::config::load_as(config, &self.overrides, &[], checks)?;
        let job = &loaded.config;
        let output = job.output.folder(self.force)?;
        let path = crate::config::resolve(&job.model.path, &loaded.path);
        let mut model = open(&path, job)?;
        let limit = job.reward_model.max_tokens.unwrap_or(model.model.spec().max_positions);
        let pairs = pairs(&model, job.data.read(&loaded.path)?, limit)?;
        let heldout = match &job.heldout {
            Some(section) => pairs_of(&model, section, &loaded.path, limit)?,
            None => Vec::new(),
        };
        let threads = crate::policy::threads(job.reward_model.threads);
        let budget = job.reward_model.micro_batch_tokens;
        let verdict = |when: &str, model: &LoadedModel| {
            if !heldout.is_empty() {
                println!("{when} {}", describe(&judge(model, &heldout, budget, &threads)));
            }
        };
        verdict("before:", &model);
        let what = format!("{} pairs, {}", pairs.len(), size(&model));
        let work = Work::begin(output, &what, &job.reward_model.fit);
        let summary = run_reward_model(&job.reward_model, &mut model, &pairs, &work.view)?;
        work.end(&summary, &model, &job.model.path)?;
        verdict("after: ", &model);
        Ok(())
    }

    fn judge(&self, model: &Path, data: &Path) -> anyhow::Result<()> {
        let model = freewheel_model::load_classifier(model, None).input()?;
        let limit = model.model.spec().max_positions;
        let pairs = pairs(&model, super::dpo::read(data)?, limit)?;
        let report = judge(&model, &pairs, 16_384, &crate::policy::threads(0));
        if self.json {
            let PairReport { pairs, accuracy, loss, margin } = report;
            println!("{}", json!({ "pairs": pairs, "accuracy": accuracy, "loss": loss, "margin": margin }));
        } else {
            println!("{}", describe(&report));
        }
        Ok(())
    }
}

fn describe(report: &PairReport) -> String {
    let PairReport { pairs, accuracy, loss, margin } = report;
    format!("accuracy {accuracy:.3} over {pairs} pairs, loss {loss:.4}, mean margin {margin:.3}")
}

/// A reward model goes on from its own head; a language model gets a new one.
fn open(path: &Path, job: &RewardModelJob) -> anyhow::Result<LoadedModel> {
    let dtype = job.model.dtype.requested();
    if let Ok(model) = freewheel_model::load_classifier(path, dtype) {
        return Ok(model);
    }
    let body = crate::policy::open(path, dtype)?;
    freewheel_model::classifier_from(&body, "reward", job.reward_model.seed).input()
}

fn pairs_of(
    model: &LoadedModel,
    section: &PreferenceSection,
    config: &Path,
    limit: usize,
) -> anyhow::Result<Vec<ScoredPair>> {
    pairs(model, section.read(config)?, limit)
}

fn pairs(
    model: &LoadedModel,
    examples: Vec<PreferenceExample>,
    limit: usize,
) -> anyhow::Result<Vec<ScoredPair>> {
    let pad_id = model.generation.pad_id;
    let pair = |(index, example): (usize, PreferenceExample)| match &example.judgement {
        Judgement::Pair { chosen, rejected } => {
            let texts = (chosen.as_str(), rejected.as_str());
            tokenise_pair(&model.tokenizer, pad_id, &example.prompt, texts, limit, index).input()
        }
        Judgement::Label { .. } => {
            Err(anyhow::anyhow!("example {}: a reward model needs `chosen` and `rejected`", index + 1))
                .input()
        }
    };
    examples.into_iter().enumerate().map(pair).collect()
}
