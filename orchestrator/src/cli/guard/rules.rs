//! `freewheel guard rules`: weights of a rule-based reward.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use freewheel_reward::ComponentKind;
use freewheel_reward::fit::hinge::{self, Ranked};
use freewheel_reward::rbr::RuleBased;
use serde::Deserialize;
use serde_json::json;

use crate::cli::ConfigArgs;
use crate::cli::fail::Explain as _;
use crate::cli::score::Line;
use crate::lines;

/// Fit the weights of a rule-based reward (kind = "rbr") to ranked answers: its model grades every answer, then weights are sought that rank them as given.
///
/// A line holds what `freewheel score` reads, `group`, a name that answers to be compared share, and `rank`, higher for better; and `base`, what the rest of
/// the reward says of it (default 0).
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  freewheel guard rules styled.toml ranked.jsonl --component style --out style.json\n\nA line:\n  \
    {\"prompt\": \"Hello\", \"completion\": \"Hello, how can I help?\", \"group\": \"hello\", \"rank\": 2}"
)]
pub(super) struct RulesArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// JSONL file; `-` reads standard input.
    #[arg(value_name = "FILE")]
    ranked: PathBuf,
    /// The component.
    #[arg(long)]
    component: String,
    /// Penalty of the squared weights; above 0.
    #[arg(long, default_value_t = 0.05)]
    l2: f64,
    /// File to write: the component's statements with the new weights.
    #[arg(long)]
    out: PathBuf,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Deserialize)]
struct RankedLine {
    #[serde(flatten)]
    line: Line,
    group: String,
    rank: f64,
    #[serde(default)]
    base: f64,
}

impl RulesArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let loaded = self.config.load()?;
        let reward = &loaded.config.reward;
        let found =
            reward.component.iter().find(|c| c.name == self.component && c.kind == ComponentKind::Rbr);
        let Some(component) = found else {
            return Err(anyhow::anyhow!("the config has no component {:?} of kind \"rbr\"", self.component))
                .input();
        };
        let judge = RuleBased::new(component, Duration::from_millis(reward.deadline_ms));
        let judge = judge.map_err(|problems| anyhow::anyhow!("{problems:?}")).input()?;
        let lines = lines::read(&self.ranked, |ranked: &RankedLine| ranked.line.check())?;
        let mut examples = Vec::new();
        let mut missing = 0;
        for (at, ranked) in &lines {
            match ranked.line.judged(|completion| judge.grade(completion)) {
                Ok(truths) => examples.push(Ranked {
                    group: ranked.group.clone(),
                    rank: ranked.rank,
                    base: ranked.base,
                    x: truths.into_iter().map(|truth| f64::from(u8::from(truth))).collect(),
                }),
                Err(why) => {
                    tracing::warn!(line = at, why, "not graded");
                    missing += 1;
                }
            }
        }
        let fitted = hinge::fit(&examples, self.l2)
            .map_err(|why| anyhow::anyhow!("{why} ({missing} lines not graded)"));
        let fitted = fitted.input()?;
        let mut rules = judge.rules().clone();
        for (statement, weight) in rules.statements.iter_mut().zip(&fitted.weights) {
            statement.weight = *weight as f32;
        }
        std::fs::write(&self.out, serde_json::to_string_pretty(&rules)? + "\n")
            .map_err(|e| anyhow::anyhow!("{} cannot be written: {e}", self.out.display()))?;
        if self.json {
            let weights: serde_json::Map<_, _> =
                rules.statements.iter().map(|s| (s.name.clone(), json!(s.weight))).collect();
            println!(
                "{}",
                json!({"file": self.out, "examples": examples.len(), "missing": missing, "pairs": fitted.pairs,
                    "right_before": fitted.right_before, "right_after": fitted.right_after, "weights": weights})
            );
            return Ok(());
        }
        println!(
            "{} answers, {missing} not graded; of {} pairs {} are in order without the rules, {} with them",
            examples.len(),
            fitted.pairs,
            fitted.right_before,
            fitted.right_after
        );
        let rows: Vec<Vec<String>> =
            rules.statements.iter().map(|s| vec![s.name.clone(), format!("{:.3}", s.weight)]).collect();
        print!("{}", crate::cli::table(&["statement", "weight"], &rows));
        println!("wrote {}", self.out.display());
        Ok(())
    }
}
