//! `freewheel guard`: guards from labelled examples.

mod calibrate;
mod fit;
mod rules;

use clap::{Args, Subcommand};
use serde::Deserialize;

use super::score::Line;

/// Guards from labelled examples: fit one on sentence embeddings, calibrate one that exists.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  freewheel guard fit labelled.jsonl --model models/minilm --out canary.head.json\n  \
    freewheel guard rules styled.toml ranked.jsonl --component style --out style.json\n  \
    freewheel guard calibrate guarded.toml labelled.jsonl --component guard --out guard.cal.json"
)]
pub struct GuardArgs {
    #[command(subcommand)]
    tool: GuardTool,
}

#[derive(Debug, Subcommand)]
enum GuardTool {
    Fit(fit::FitArgs),
    Rules(rules::RulesArgs),
    Calibrate(calibrate::CalibrateArgs),
}

impl GuardArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self.tool {
            GuardTool::Fit(args) => args.run(),
            GuardTool::Rules(args) => args.run(),
            GuardTool::Calibrate(args) => args.run(),
        }
    }
}

/// A line of labelled examples.
#[derive(Debug, Deserialize)]
struct Labelled {
    #[serde(flatten)]
    line: Line,
    label: Option<bool>,
    labels: Option<Vec<String>>,
}

impl Labelled {
    fn check(&self) -> Result<(), String> {
        self.line.check()?;
        match (&self.label, &self.labels) {
            (None, None) => {
                Err("holds neither `label` (true or false) nor `labels` (a list of names)".into())
            }
            (Some(_), Some(_)) => Err("holds both `label` and `labels`".into()),
            (None, Some(names)) if names.iter().any(String::is_empty) => Err("holds an empty label".into()),
            _ => Ok(()),
        }
    }

    /// Whether anything is to be found in it.
    fn positive(&self) -> bool {
        self.label.unwrap_or_else(|| self.labels.as_ref().is_some_and(|names| !names.is_empty()))
    }
}
