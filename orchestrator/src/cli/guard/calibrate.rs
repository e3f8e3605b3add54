//! `freewheel guard calibrate`: the curve that turns a component's score into a probability.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use freewheel_reward::fit::calibration::{Curve, logistic};
use freewheel_reward::fit::{Counts, auc, calibration_error, folds};
use freewheel_reward::{Calibration, RawScore, RewardConfig, RewardError, RewardStack, Unscored};
use serde_json::json;

use super::Labelled;
use crate::cli::ConfigArgs;
use crate::cli::fail::Explain as _;
use crate::lines;

/// Fit a calibration for one component of a config to labelled completions, and write it as a file for its key `calibrate`.
///
/// A line holds what `freewheel score` reads, and `label`: true where the component should fire (harm, for a guard); or `labels`, a list that is not
/// empty there. Printed are the calibration error before and after, both on examples that were held out of the fit.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  freewheel guard calibrate guarded.toml labelled.jsonl --component guard --out guard.cal.json\n\nA line:\n  \
    {\"prompt\": \"Hello\", \"completion\": \"You blockhead!\", \"label\": true}"
)]
pub(super) struct CalibrateArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// JSONL file; `-` reads standard input.
    #[arg(value_name = "FILE")]
    labelled: PathBuf,
    /// The component.
    #[arg(long)]
    component: String,
    /// Platt's two constants, or a curve with as many points as the examples ask for (needs about a thousand of them).
    #[arg(long, value_enum, default_value_t = Method::Platt)]
    method: Method,
    /// Parts into which the examples are split to measure the error on what was held out; 2 to 100.
    #[arg(long, default_value_t = 5)]
    folds: usize,
    /// File to write.
    #[arg(long)]
    out: PathBuf,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Method {
    Platt,
    Isotonic,
}

impl Method {
    fn fit(self, samples: &[(f64, bool)]) -> Result<Curve, String> {
        match self {
            Self::Platt => Curve::platt(samples),
            Self::Isotonic => Curve::isotonic(samples),
        }
    }
}

/// The scores of a file's examples.
#[derive(Default)]
struct Scored {
    samples: Vec<(f64, bool)>,
    /// The probability that the score was before calibration.
    before: Vec<f64>,
    texts: Vec<String>,
    unscored: usize,
    /// Why the first unscored one is.
    why: Option<String>,
}

impl CalibrateArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if !(2..=100).contains(&self.folds) {
            return Err(anyhow::anyhow!("--folds must be 2 to 100, is {}", self.folds)).input();
        }
        let stack = self.stack()?;
        let lines = lines::read(&self.labelled, Labelled::check)?;
        let scored = self.score(&stack, &lines);
        let curve = self.method.fit(&scored.samples).map_err(|why| {
            let first = scored.why.as_deref().map(|why| format!("; the first: {why}")).unwrap_or_default();
            anyhow::anyhow!(
                "{:?} cannot be calibrated: {why} ({} unscored{first})",
                self.component,
                scored.unscored
            )
        });
        let curve = curve.input()?;
        let after = self.held_out(&scored).map_err(anyhow::Error::msg).input()?;
        let labels = || scored.samples.iter().map(|(_, label)| *label);
        let calibration = Calibration {
            curve,
            component: self.component.clone(),
            model_version: stack.model_version(&self.component).map(str::to_owned),
            samples: scored.samples.len(),
            positives: labels().filter(|label| *label).count(),
            error_before: calibration_error(scored.before.iter().copied().zip(labels())),
            error_after: calibration_error(after.iter().copied().zip(labels())),
        };
        std::fs::write(&self.out, serde_json::to_string_pretty(&calibration)? + "\n")
            .map_err(|e| anyhow::anyhow!("{} cannot be written: {e}", self.out.display()))?;
        self.report(&calibration, &scored, &after);
        Ok(())
    }

    /// The component alone, its score as it is.
    fn stack(&self) -> anyhow::Result<RewardStack> {
        let loaded = self.config.load()?;
        let reward = &loaded.config.reward;
        let Some(component) = reward.component.iter().find(|c| c.name == self.component) else {
            let names: Vec<_> = reward.component.iter().map(|c| c.name.as_str()).collect();
            return Err(anyhow::anyhow!(
                "the config has no component {:?}; it has {}",
                self.component,
                names.join(", ")
            ))
            .input();
        };
        let mut alone = component.clone();
        (alone.calibrate, alone.margin, alone.weight) = (None, 0.0, None);
        let alone = RewardConfig {
            component: vec![alone],
            combine: freewheel_reward::CombineConfig::default(),
            ..reward.clone()
        };
        RewardStack::new(&alone).map_err(RewardError::Config).input()
    }

    fn score(&self, stack: &RewardStack, lines: &[(usize, Labelled)]) -> Scored {
        let mut scored = Scored::default();
        let mut plain = Vec::new();
        for (_, labelled) in lines {
            let found = labelled.line.judged(|completion| {
                let found = stack.raw(&self.component, completion)?;
                Some(found.map(|score| (score, format!("{:?}\n{}", completion.prompt.body, completion.text))))
            });
            match found {
                Some(Ok((score, text))) => {
                    let (x, log_odds) = match score {
                        RawScore::LogOdds(x) => (f64::from(x), true),
                        RawScore::Value(x) => (f64::from(x), false),
                    };
                    scored.samples.push((x, labelled.positive()));
                    scored.texts.push(text);
                    plain.push(!log_odds);
                }
                Some(Err(Unscored(why))) => {
                    scored.unscored += 1;
                    scored.why.get_or_insert(why);
                }
                None => scored.unscored += 1,
            }
        }
        // A value outside of 0 to 1 cannot have been a probability.
        let probabilities =
            plain.iter().all(|plain| *plain) && scored.samples.iter().all(|(x, _)| (0.0..=1.0).contains(x));
        scored.before =
            scored.samples.iter().map(|(x, _)| if probabilities { *x } else { logistic(*x) }).collect();
        scored
    }

    /// The calibrated probability of every example, by a curve that did not see it.
    fn held_out(&self, scored: &Scored) -> Result<Vec<f64>, String> {
        let items: Vec<(&str, &str)> = scored
            .texts
            .iter()
            .zip(&scored.samples)
            .map(|(text, (_, label))| (text.as_str(), if *label { "true" } else { "false" }))
            .collect();
        let fold_of = folds(&items, self.folds);
        let mut found = vec![0.0; items.len()];
        for fold in 0..self.folds {
            let seen: Vec<_> =
                scored.samples.iter().zip(&fold_of).filter(|(_, f)| **f != fold).map(|(s, _)| *s).collect();
            if !fold_of.contains(&fold) {
                continue;
            }
            let curve = self
                .method
                .fit(&seen)
                .map_err(|why| format!("without fold {fold}: {why}; give more examples or fewer --folds"))?;
            for (i, p) in found.iter_mut().enumerate().filter(|(i, _)| fold_of[*i] == fold) {
                *p = curve.probability(scored.samples[i].0);
            }
        }
        Ok(found)
    }

    fn report(&self, calibration: &Calibration, scored: &Scored, after: &[f64]) {
        let decisions = |probabilities: &[f64]| {
            Counts::of(probabilities.iter().zip(&scored.samples).map(|(p, (_, label))| (*p > 0.5, *label)))
        };
        let (counts_before, counts_after) = (decisions(&scored.before), decisions(after));
        let auc = auc(&scored.samples);
        if self.json {
            let row = json!({
                "file": self.out, "samples": calibration.samples, "positives": calibration.positives, "unscored": scored.unscored, "auc": auc,
                "error_before": calibration.error_before, "error_after": calibration.error_after,
                "f1_before": counts_before.f1(), "f1_after": counts_after.f1(),
            });
            return println!("{row}");
        }
        let shown = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.4}"));
        println!(
            "{} examples, {} of them true, {} unscored; AUC {}",
            calibration.samples,
            calibration.positives,
            scored.unscored,
            shown(auc)
        );
        let row = |name: &str, error: f64, counts: &Counts| {
            vec![
                name.to_owned(),
                format!("{error:.4}"),
                shown(counts.f1()),
                shown(counts.recall()),
                shown(counts.false_positive_rate()),
            ]
        };
        let rows = [
            row("before", calibration.error_before, &counts_before),
            row("after, held out", calibration.error_after, &counts_after),
        ];
        print!("{}", crate::cli::table(&["", "calibration error", "F1", "recall", "false positives"], &rows));
        println!("wrote {}", self.out.display());
    }
}
