//! Prompt Guard 2 and other classifiers of attacks: any sequence classifier, read in overlapping windows so that an attack is found wherever it stands.
//!
//! The reference scanner cuts its input at 512 tokens, so that what comes later is never seen. Here text is read in windows of what the model
//! takes, 512 tokens with the special ones, that overlap by 128; the first begins with the text, the last ends with it, and the highest score counts.
//! "Malicious" means an attempt to override instructions, not a harmful topic: tag and watch prompts with it, do not throw them away.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_model::{Framed, ModelError, Scorer, ScorerInfo};

use super::text_of;
use crate::batcher::Batcher;
use crate::config::{ComponentConfig, GuardRole};
use crate::finish::Odds;
use crate::model::{SCORERS, choose_label};
use crate::shared::chain;
use crate::stack::{Completion, Component, Judgement, Unscored};
use crate::windows::windows;

/// Tokens of a window, special ones included, where the model takes more.
const WINDOW: usize = 512;
const OVERLAP: usize = 128;
const BATCH: usize = 8;

/// Settings, checked against the model's configuration.
#[derive(Debug)]
pub(crate) struct Plan {
    dir: PathBuf,
    label: usize,
    role: GuardRole,
    window: usize,
}

impl Plan {
    /// Reads configuration and tokenizer, not weights; problems as (key, message).
    pub(crate) fn new(c: &ComponentConfig) -> Result<Self, Vec<(&'static str, String)>> {
        let Some(dir) = c.model.as_deref().filter(|path| !path.is_empty()) else {
            return Err(vec![("model", "is not set; give the folder of a sequence classifier".into())]);
        };
        let info = ScorerInfo::read(Path::new(dir)).map_err(|e| vec![("model", chain(&e))])?;
        let mut problems = Vec::new();
        // The last label, as the reference scanner takes it.
        let label = match &c.label {
            None => info.labels.len().saturating_sub(1),
            asked => choose_label(asked.as_deref(), &info.labels).unwrap_or_else(|message| {
                problems.push(("label", message));
                0
            }),
        };
        let around = info.tokenizer.frame(&[], None).map_or(0, |framed| framed.ids.len());
        let window = c.max_tokens.map_or(WINDOW.min(info.max_tokens), |n| n as usize);
        if !(around + 2..=info.max_tokens).contains(&window) {
            let message = format!(
                "must be {} to {} (what the model was made for), is {window}",
                around + 2,
                info.max_tokens
            );
            problems.push(("max_tokens", message));
        }
        if problems.is_empty() {
            Ok(Self { dir: dir.into(), label, role: c.role, window })
        } else {
            Err(problems)
        }
    }
}

/// The component.
pub(crate) struct PromptGuard {
    scorer: Arc<Scorer>,
    plan: Plan,
    threads: Threads,
    batcher: Batcher,
}

impl PromptGuard {
    /// Loads the model.
    pub(crate) fn new(plan: Plan, threads: usize) -> Result<Self, String> {
        let threads = Threads::new(threads);
        let scorer = SCORERS.load(&plan.dir, |dir| Scorer::load(dir, &threads)).map_err(|e| chain(&e))?;
        Ok(Self { scorer, plan, threads, batcher: Batcher::new(BATCH) })
    }
}

/// Log-odds of one label against all others; of a single label its score.
fn log_odds(scores: &[f32], label: usize) -> f32 {
    let others =
        || scores.iter().enumerate().filter(|(i, _)| *i != label).map(|(_, score)| f64::from(*score));
    let top = others().fold(f64::NEG_INFINITY, f64::max);
    let rest = if top == f64::NEG_INFINITY {
        0.0
    } else {
        top + others().map(|x| (x - top).exp()).sum::<f64>().ln()
    };
    (f64::from(scores[label]) - rest) as f32
}

impl Component for PromptGuard {
    fn judge(&self, completion: &Completion<'_>) -> Result<Judgement, Unscored> {
        let tokenizer = &self.scorer.info().tokenizer;
        let failed = |e: ModelError| Unscored(e.to_string());
        let ids = tokenizer.encode(&text_of(completion, self.plan.role)).map_err(failed)?;
        let room = self.plan.window - tokenizer.frame(&[], None).map_err(failed)?.ids.len();
        let parts = windows(ids.len(), room, OVERLAP.min(room / 2));
        let framed: Result<Vec<Framed>, ModelError> =
            parts.iter().map(|part| tokenizer.frame(&ids[part.clone()], None)).collect();
        let scores = self
            .batcher
            .score_all(framed.map_err(failed)?, |batch| self.scorer.score(&self.threads, batch))?;
        let odds: Vec<f32> = scores.iter().map(|scores| log_odds(scores, self.plan.label)).collect();
        if odds.iter().any(|odds| odds.is_nan()) {
            return Err(Unscored("the model gave NaN".into()));
        }
        let worst = (0..odds.len()).fold(0, |worst, i| if odds[i] > odds[worst] { i } else { worst });
        let part = &parts[worst];
        let detail = (parts.len() > 1)
            .then(|| format!("{} windows, the worst from token {} to {}", parts.len(), part.start, part.end));
        Ok(Judgement { detail, odds: Some(Odds::of(odds[worst])), ..Judgement::default() })
    }

    fn version(&self) -> Option<&str> {
        Some(self.scorer.version())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_odds_of_a_label() {
        let p = |odds: f32| 1.0 / (1.0 + f64::from(-odds).exp());
        assert_eq!(log_odds(&[1.5], 0), 1.5);
        assert!((log_odds(&[1.0, 3.0], 1) - 2.0).abs() <= 1e-6);
        // Softmax of (1, 2, 3) at the last is 0.66524.
        assert!((p(log_odds(&[1.0, 2.0, 3.0], 2)) - 0.665_241).abs() <= 1e-5);
        assert!(log_odds(&[-2000.0, 2000.0], 1).is_finite());
    }
}
