//! `freewheel guard fit`: heads of an embedding guard.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use freewheel_reward::GuardRole;
use freewheel_reward::fit::calibration::logistic;
use freewheel_reward::fit::{Counts, auc, folds, logistic as regression};
use freewheel_reward::guard::embedding::{Head, HeadLabel, Texts};
use freewheel_reward::guard::text_of;
use serde_json::json;

use super::Labelled;
use crate::cli::fail::Explain as _;
use crate::lines;

/// Name of what lines with `label` instead of `labels` are about.
const HARM: &str = "harm";

/// Fit a guard to labelled examples: logistic regressions on the embeddings of a sentence encoder, one for each label.
///
/// A line holds what `freewheel score` reads, and `labels`, a list of names (empty where there is nothing to find), or `label`, true or false. The
/// same examples give the same file. Printed are area under the curve and F1 on examples that were held out; a text longer than the encoder reads is
/// fitted by its beginning.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  freewheel guard fit labelled.jsonl --model models/minilm --out canary.head.json\n\nA line:\n  \
    {\"prompt\": \"Tell me about birds\", \"completion\": \"The code word is BLUEBIRD\", \"labels\": [\"canary\"]}"
)]
pub(super) struct FitArgs {
    /// JSONL file; `-` reads standard input.
    #[arg(value_name = "FILE")]
    labelled: PathBuf,
    /// Folder of a BERT or DeBERTa-v2 encoder in Hugging Face layout.
    #[arg(long)]
    model: PathBuf,
    /// What it reads: response, prompt or both.
    #[arg(long, default_value = "response")]
    role: GuardRole,
    /// Penalty of the squared weights; above 0. More where there are few examples.
    #[arg(long, default_value_t = 0.1)]
    l2: f64,
    /// Parts into which the examples are split to measure on what was held out; 2 to 100.
    #[arg(long, default_value_t = 5)]
    folds: usize,
    /// File to write.
    #[arg(long)]
    out: PathBuf,
    /// Threads of the encoder.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// Examples as the fit sees them.
struct Examples {
    embeddings: Vec<Vec<f32>>,
    fold: Vec<usize>,
    /// Names of each.
    labels: Vec<Vec<String>>,
    cut: usize,
}

impl FitArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if !(2..=100).contains(&self.folds) {
            return Err(anyhow::anyhow!("--folds must be 2 to 100, is {}", self.folds)).input();
        }
        if !(1..=256).contains(&self.threads) {
            return Err(anyhow::anyhow!("--threads must be 1 to 256, is {}", self.threads)).input();
        }
        let lines = lines::read(&self.labelled, Labelled::check)?;
        let texts = Texts::load(&self.model, self.threads).input()?;
        let examples = self.embed(&texts, &lines)?;
        let mut counted = BTreeMap::<&str, usize>::new();
        examples.labels.iter().flatten().for_each(|name| *counted.entry(name).or_default() += 1);
        if counted.is_empty() {
            return Err(anyhow::anyhow!("no example has a label; both kinds are needed")).input();
        }
        let labels: Result<Vec<HeadLabel>, String> = counted
            .into_iter()
            .map(|(name, positives)| {
                self.label(&examples, name, positives).map_err(|why| format!("label {name:?}: {why}"))
            })
            .collect();
        let head = Head {
            encoder: texts.version().to_owned(),
            role: self.role,
            l2: self.l2,
            examples: lines.len(),
            labels: labels.map_err(anyhow::Error::msg).input()?,
        };
        std::fs::write(&self.out, serde_json::to_string(&head)? + "\n")
            .map_err(|e| anyhow::anyhow!("{} cannot be written: {e}", self.out.display()))?;
        self.report(&head, examples.cut);
        Ok(())
    }

    fn embed(&self, texts: &Texts, lines: &[(usize, Labelled)]) -> anyhow::Result<Examples> {
        let read: Vec<(String, Vec<String>)> = lines
            .iter()
            .map(|(_, labelled)| {
                let text = labelled.line.judged(|completion| text_of(completion, self.role));
                let names = match (&labelled.labels, labelled.label) {
                    (Some(names), _) => names.clone(),
                    (None, Some(true)) => vec![HARM.to_owned()],
                    (None, _) => Vec::new(),
                };
                (text, names)
            })
            .collect();
        let mut embeddings = Vec::with_capacity(read.len());
        let mut cut = 0;
        for ((at, _), (text, _)) in lines.iter().zip(&read) {
            let mut windows =
                texts.embeddings(text).map_err(|why| anyhow::anyhow!("line {at}: {}", why.0)).input()?;
            cut += usize::from(windows.len() > 1);
            embeddings.push(windows.swap_remove(0));
        }
        let strata: Vec<String> = read.iter().map(|(_, names)| names.join("\n")).collect();
        let items: Vec<(&str, &str)> =
            read.iter().zip(&strata).map(|((text, _), stratum)| (text.as_str(), stratum.as_str())).collect();
        let fold = folds(&items, self.folds);
        Ok(Examples { embeddings, fold, labels: read.into_iter().map(|(_, names)| names).collect(), cut })
    }

    /// Fits one label on all examples, and measures on each fold what the others give.
    fn label(&self, examples: &Examples, name: &str, positives: usize) -> Result<HeadLabel, String> {
        let is: Vec<bool> = examples.labels.iter().map(|names| names.iter().any(|n| n == name)).collect();
        let fit = |of: &dyn Fn(usize) -> bool| {
            let (xs, ys): (Vec<&[f32]>, Vec<bool>) =
                (0..is.len()).filter(|i| of(*i)).map(|i| (examples.embeddings[i].as_slice(), is[i])).unzip();
            regression::fit(&xs, &ys, self.l2)
        };
        let linear = fit(&|_| true)?;
        let mut held_out = Vec::with_capacity(is.len());
        for fold in 0..self.folds {
            if !examples.fold.contains(&fold) {
                continue;
            }
            let others = fit(&|i| examples.fold[i] != fold)
                .map_err(|why| format!("without fold {fold}: {why}; give more examples or fewer --folds"))?;
            for i in (0..is.len()).filter(|i| examples.fold[*i] == fold) {
                held_out.push((f64::from(others.score(&examples.embeddings[i])), is[i]));
            }
        }
        let counts = Counts::of(held_out.iter().map(|(score, label)| (logistic(*score) > 0.5, *label)));
        Ok(HeadLabel {
            name: name.to_owned(),
            positives,
            auc: auc(&held_out),
            f1: counts.f1(),
            weights: linear.weights,
            bias: linear.bias,
        })
    }

    fn report(&self, head: &Head, cut: usize) {
        if self.json {
            let labels: Vec<_> = head
                .labels
                .iter()
                .map(|l| json!({"name": l.name, "positives": l.positives, "auc": l.auc, "f1": l.f1}))
                .collect();
            let row = json!({"file": self.out, "examples": head.examples, "cut": cut, "encoder": head.encoder, "labels": labels});
            return println!("{row}");
        }
        let shown = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.4}"));
        let rows: Vec<Vec<String>> = head
            .labels
            .iter()
            .map(|l| vec![l.name.clone(), l.positives.to_string(), shown(l.auc), shown(l.f1)])
            .collect();
        println!(
            "{} examples, {cut} of them longer than the encoder reads; held out, in {} folds:",
            head.examples, self.folds
        );
        print!("{}", crate::cli::table(&["label", "examples", "AUC", "F1"], &rows));
        println!("wrote {}", self.out.display());
    }
}
