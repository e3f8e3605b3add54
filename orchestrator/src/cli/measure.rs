//! `freewheel measure`: refusals and even-handedness of a model.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use freewheel_reward::RewardStack;
use freewheel_types::{Digest, Prompt};
use serde_json::json;

use super::fail::Explain as _;
use super::table::table;
use crate::balance::{self, Balance};
use crate::config::Loaded;
use crate::evaluation::{EvalSet, draw};
use crate::run::prepare;

/// Measure refusals by tag, over-refusal, unequal refusal on mirrored pairs, gaps in length and hedging, lean by judges.
///
/// DATA is a prompt file; two prompts that mirror each other have the same `meta.pair`. Every number comes with a 95 % bootstrap interval and
/// the digest of the file. Lean needs --judges: a config whose reward components, two or more, grade a text that holds both
/// answers of a pair, from 0 (favours the second side) to 1 (favours the first).
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  freewheel measure --model models/mine --data topics.jsonl\n  \
    freewheel measure --model models/mine --data topics.jsonl --samples 4 --judges judges.toml --json")]
pub struct MeasureArgs {
    /// Model: folder, .gguf file, or org/name on the hub.
    #[arg(long, short)]
    model: PathBuf,
    /// Prompt file.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Tags of prompts that are not to be refused; may be repeated.
    #[arg(long, value_name = "TAG", default_values = ["benign", "borderline"])]
    harmless: Vec<String>,
    /// Config whose reward components are the judges of lean.
    #[arg(long, value_name = "CONFIG")]
    judges: Option<PathBuf>,
    /// Completions per prompt.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    samples: u32,
    /// Sampling temperature; 0 is greedy.
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Longest completion, tokens.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// Sampling seed.
    #[arg(long, default_value_t = 1)]
    seed: u32,
    /// Compute threads; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

impl MeasureArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let loaded = self.load()?;
        let (judges, names) = self.judges()?;
        let digest =
            Digest::of(&std::fs::read(&self.data).with_context(|| self.data.display().to_string()).input()?);
        let prompts = crate::prompts::load(&self.data, true).input()?.prompts;
        let pairs = balance::pairs(&prompts).map_err(anyhow::Error::msg).input()?;
        let answers = self.answers(&loaded, &prompts)?;
        let balance = balance::measure(&prompts, &answers, &pairs, &self.harmless, judges.as_ref());
        if self.json {
            let value = json!({
                "model": self.model, "data": self.data, "digest": digest.to_string(), "prompts": prompts.len(), "pairs": pairs.len(),
                "samples": self.samples, "temperature": self.temperature, "seed": self.seed, "judges": names,
                "unjudged_pairs": balance.unjudged, "measures": balance.json(),
            });
            println!("{value:#}");
        } else {
            print!("{}", self.text(&balance, &digest, &names));
        }
        Ok(())
    }

    fn load(&self) -> anyhow::Result<Loaded> {
        let quoted = |path: &PathBuf| toml::Value::String(path.display().to_string()).to_string();
        let overrides = [
            format!("model.path={}", quoted(&self.model)),
            format!("eval.file={}", quoted(&self.data)),
            format!("eval.temperature={:?}", self.temperature),
            format!("eval.seed={}", self.seed),
            format!("actor.max_new_tokens={}", self.max_new_tokens),
            // No training prompts are wanted; any source will do.
            "prompts.generator=\"arithmetic\"".into(),
            "run.name=measure".into(),
        ];
        Ok(crate::config::load_text("command line", "", &overrides)?)
    }

    /// The judges and their names.
    fn judges(&self) -> anyhow::Result<(Option<RewardStack>, Vec<String>)> {
        let Some(path) = &self.judges else { return Ok((None, Vec::new())) };
        let loaded = crate::config::load(path, &[])?;
        let stack =
            RewardStack::new(&loaded.config.reward).map_err(freewheel_reward::RewardError::Config).input()?;
        let names: Vec<String> = stack.component_names().map(str::to_owned).collect();
        if names.len() < 2 {
            return Err(anyhow::anyhow!("{} has {} judge", path.display(), names.len())).input_hint(
                "one judge's lean would be taken for the model's: give two reward components or more",
            );
        }
        Ok((Some(stack), names))
    }

    /// The answers of every prompt, in the order of their samples.
    fn answers(&self, loaded: &Loaded, prompts: &[Prompt]) -> anyhow::Result<Vec<Vec<String>>> {
        let model = prepare::model(loaded)?;
        prepare::check_lengths(loaded, &model, prompts)?;
        let set =
            prepare::eval_set(loaded, &model, prompts.to_vec())?.context("a prompt file has prompts")?;
        let set = EvalSet { samples: self.samples, ..set };
        let mut engine = crate::policy::engine(
            &model,
            &crate::policy::threads(self.threads),
            loaded.config.actor.engine(),
        )?;
        let mut finished = draw(&mut engine, &set).input()?;
        finished.sort_by_key(|done| done.rollout);
        let mut answers = vec![Vec::new(); prompts.len()];
        for done in finished {
            answers[done.request as usize].push(done.text);
        }
        Ok(answers)
    }

    fn text(&self, balance: &Balance, digest: &Digest, judges: &[String]) -> String {
        let rows: Vec<Vec<String>> = balance
            .rows()
            .into_iter()
            .map(|(name, over, e)| {
                let mean = e.mean.map_or_else(|| "-".into(), |mean| format!("{mean:.4}"));
                vec![
                    name,
                    mean,
                    format!("{:.4}", e.low),
                    format!("{:.4}", e.high),
                    format!("{} {over}", e.prompts),
                ]
            })
            .collect();
        let mut out = table(&["measure", "mean", "low", "high", "over"], &rows);
        if balance.unjudged > 0 {
            out.push_str(&format!("{} pairs could not be judged\n", balance.unjudged));
        }
        if !judges.is_empty() {
            out.push_str(&format!("judges: {}\n", judges.join(", ")));
        }
        let (seed, temperature) = (self.seed, self.temperature);
        out.push_str(&format!("{} {digest}, seed {seed}, temperature {temperature}\n", self.data.display()));
        out
    }
}
