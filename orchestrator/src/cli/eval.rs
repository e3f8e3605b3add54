//! `freewheel eval`: accuracy of a model on held-out prompts.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::fail::Explain as _;
use super::table::table;
use crate::config::Loaded;
use crate::evaluation::{Estimate, EvalReport, evaluate};
use crate::run::prepare;

/// Accuracy, avg@k and pass@k with 95 % intervals, over all prompts and per tag.
///
/// With a config: its held-out prompts, reward stack and sampling. Without: a model and a prompt file, judged by the verifier that
/// each prompt names.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  freewheel eval configs/quickstart.toml\n  \
    freewheel eval configs/quickstart.toml --model runs/quickstart/checkpoints/step-100-e1 --samples 8 --temperature 1\n  \
    freewheel eval --model models/smollm2 --data questions.jsonl --json")]
pub struct EvalArgs {
    /// Config file of a run.
    #[arg(required_unless_present_all = ["model", "data"])]
    config: Option<PathBuf>,
    /// Change one value: `--set eval.count=500`. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Judge this model instead of the config's.
    #[arg(long, short)]
    model: Option<PathBuf>,
    /// Prompt file to use instead of the config's.
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Completions per prompt.
    #[arg(long)]
    samples: Option<u32>,
    /// Sampling temperature; 0 is greedy.
    #[arg(long)]
    temperature: Option<f32>,
    /// Prompts to use, from the first.
    #[arg(long)]
    count: Option<usize>,
    /// Compute threads; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

impl EvalArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let loaded = self.load()?;
        let prompts = prepare::held_out_prompts(&loaded)?;
        let model = prepare::model(&loaded)?;
        prepare::check_lengths(&loaded, &model, &prompts)?;
        let Some(set) = prepare::eval_set(&loaded, &model, prompts)? else {
            return Err(anyhow::anyhow!("there are no held-out prompts"))
                .input_hint("set eval.file, or give --data FILE");
        };
        let stack = prepare::reward_stack(&loaded)?;
        let threads = crate::policy::threads(self.threads);
        let mut engine = crate::policy::engine(&model, &threads, loaded.config.actor.engine())?;
        let report = evaluate(&mut engine, &stack, &set).input()?;
        if self.json {
            println!("{}", json_report(&report, &loaded));
        } else {
            print!("{}", text(&report));
        }
        Ok(())
    }

    fn load(&self) -> anyhow::Result<Loaded> {
        let mut overrides = self.overrides.clone();
        let mut set =
            |key: &str, value: Option<String>| overrides.extend(value.map(|value| format!("{key}={value}")));
        let quoted = |path: &PathBuf| toml::Value::String(path.display().to_string()).to_string();
        set("model.path", self.model.as_ref().map(quoted));
        set("eval.file", self.data.as_ref().map(quoted));
        set("eval.samples", self.samples.map(|n| n.to_string()));
        set("eval.temperature", self.temperature.map(|t| format!("{t:?}")));
        set("eval.count", self.count.map(|n| n.to_string()));
        match &self.config {
            Some(config) => Ok(crate::config::load(config, &overrides)?),
            // No training prompts are wanted; any source will do.
            None => {
                overrides.push("prompts.generator=\"arithmetic\"".into());
                overrides.push("run.name=eval".into());
                Ok(crate::config::load_text("command line", "", &overrides)?)
            }
        }
    }
}

fn json_report(report: &EvalReport, loaded: &Loaded) -> Value {
    let one = |accuracy: &Estimate| json!({"accuracy": accuracy.mean, "low": accuracy.low, "high": accuracy.high, "prompts": accuracy.prompts});
    let tags: serde_json::Map<String, Value> =
        report.per_tag.iter().map(|(tag, accuracy)| (tag.clone(), one(accuracy))).collect();
    let costs: serde_json::Map<String, Value> = report
        .costs
        .iter()
        .map(|(name, cost)| {
            (
                name.clone(),
                json!({"mean": cost.mean, "low": cost.low, "high": cost.high, "prompts": cost.prompts}),
            )
        })
        .collect();
    let pass: serde_json::Map<String, Value> =
        report.pass_at.iter().map(|(k, value)| (format!("pass@{k}"), json!(value))).collect();
    json!({
        "name": report.name, "model": loaded.config.model.path, "overall": one(&report.overall), "pass": pass, "tags": tags,
        "costs": costs,
        "length_mean": report.length_mean, "truncated": report.truncated, "unscored": report.unscored,
        "samples": loaded.config.eval.samples, "temperature": loaded.config.eval.temperature,
    })
}

fn text(report: &EvalReport) -> String {
    let row = |name: &str, accuracy: &Estimate| {
        let mean = accuracy.mean.map_or_else(|| "-".into(), |x| format!("{x:.4}"));
        vec![
            name.to_owned(),
            mean,
            format!("{:.4}", accuracy.low),
            format!("{:.4}", accuracy.high),
            accuracy.prompts.to_string(),
        ]
    };
    let mut rows = vec![row(&report.name, &report.overall)];
    rows.extend(report.per_tag.iter().map(|(tag, accuracy)| row(&format!("  {tag}"), accuracy)));
    let mut out = table(&["prompts", "accuracy", "low", "high", "n"], &rows);
    if !report.costs.is_empty() {
        let rows: Vec<_> = report.costs.iter().map(|(name, cost)| row(name, cost)).collect();
        out.push_str(&table(&["limited costs", "mean", "low", "high", "n"], &rows));
    }
    for (k, value) in report.pass_at.iter().filter(|(k, _)| *k > 1) {
        out.push_str(&format!("pass@{k}  {value:.4}\n"));
    }
    out.push_str(&format!(
        "completions: {:.1} tokens on average, {:.1} % cut off, {} unscored\n",
        report.length_mean,
        report.truncated * 100.0,
        report.unscored
    ));
    out
}
