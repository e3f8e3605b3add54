//! A guard that knows meaning: sentence embeddings and heads fitted to labelled examples (`freewheel guard fit`).
//!
//! ```text
//! text ─► windows ─► encoder ─► mean, length 1 ─► a linear score for each label, the highest over the windows ─► the worst label counts
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_model::{Embedder, EmbedderInfo, Framed, ModelError};
use freewheel_types::Digest;
use serde::{Deserialize, Serialize};

use super::categories::Categories;
use super::text_of;
use crate::batcher::Batcher;
use crate::config::{ComponentConfig, GuardRole};
use crate::finish::Odds;
use crate::fit::logistic::Linear;
use crate::json_file;
use crate::shared::{Shared, chain};
use crate::stack::{Completion, Component, Judgement, Unscored};
use crate::windows::windows;

const LABELS_MAX: usize = 1000;
const BATCH: usize = 8;

static EMBEDDERS: Shared<Embedder> = Shared::new();

/// What `freewheel guard fit` writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Version of the encoder that it was fitted on.
    pub encoder: String,
    /// Whose words it was fitted to.
    pub role: GuardRole,
    /// Penalty of the fit.
    pub l2: f64,
    /// Examples.
    pub examples: usize,
    /// What it looks for.
    pub labels: Vec<HeadLabel>,
}

/// One label of a head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadLabel {
    /// Name, as the examples have it.
    pub name: String,
    /// Examples that have it.
    pub positives: usize,
    /// Area under the curve on examples that were held out.
    pub auc: Option<f64>,
    /// F1 at a probability of one half, on the same.
    pub f1: Option<f64>,
    /// One weight for each entry of an embedding.
    pub weights: Vec<f32>,
    /// Added to the sum.
    pub bias: f32,
}

impl Head {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, is too large, or is no head.
    pub fn read(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let head: Self = json_file::read(path, "freewheel guard fit")?;
        if !(1..=LABELS_MAX).contains(&head.labels.len()) {
            return Err(format!("{shown} has {} labels, must be 1 to {LABELS_MAX}", head.labels.len()));
        }
        Ok(head)
    }

    fn fits(&self, width: usize) -> Result<(), String> {
        let wrong = |label: &&HeadLabel| {
            label.weights.len() != width
                || !label.bias.is_finite()
                || label.weights.iter().any(|w| !w.is_finite())
        };
        match self.labels.iter().find(wrong) {
            Some(label) => Err(format!(
                "label {:?} has {} weights, must be {width} finite ones for this encoder",
                label.name,
                label.weights.len()
            )),
            None => Ok(()),
        }
    }
}

/// Settings of an embedding guard, checked against its files.
#[derive(Debug)]
pub(crate) struct Plan {
    dir: PathBuf,
    head: Head,
    categories: Categories,
    role: GuardRole,
}

impl Plan {
    /// Reads the head and the encoder's configuration, not its weights; problems as (key, message).
    pub(crate) fn new(c: &ComponentConfig) -> Result<Self, Vec<(&'static str, String)>> {
        let mut problems = Vec::new();
        let dir = c.model.as_deref().filter(|path| !path.is_empty());
        if dir.is_none() {
            problems.push(("model", "is not set; give the folder of a sentence encoder".into()));
        }
        let info = dir.and_then(|dir| {
            EmbedderInfo::read(Path::new(dir)).map_err(|e| problems.push(("model", chain(&e)))).ok()
        });
        let head = match c.head.as_deref() {
            None => Err("is not set; give a file of `freewheel guard fit`".to_owned()),
            Some(path) => Head::read(Path::new(path)),
        };
        let head = head.map_err(|message| problems.push(("head", message))).ok();
        if let (Some(info), Some(head)) = (&info, &head) {
            if let Err(message) = head.fits(info.width) {
                problems.push(("head", message));
            }
            if head.role != c.role {
                let message = format!(
                    "the head was fitted with role = {:?}; use that, or fit another",
                    head.role.name()
                );
                problems.push(("role", message));
            }
        }
        let known: Vec<&str> = head.iter().flat_map(|head| &head.labels).map(|l| l.name.as_str()).collect();
        let categories = match Categories::new(&c.categories, &known) {
            Ok(categories) => categories,
            Err(found) => {
                problems.extend(found.into_iter().map(|message| ("categories", message)));
                Categories::default()
            }
        };
        match (dir, head) {
            (Some(dir), Some(head)) if problems.is_empty() => {
                Ok(Self { dir: dir.into(), head, categories, role: c.role })
            }
            _ => Err(problems),
        }
    }
}

/// The component.
pub(crate) struct EmbeddingGuard {
    texts: Texts,
    labels: Vec<(String, Linear)>,
    categories: Categories,
    role: GuardRole,
    version: String,
}

impl EmbeddingGuard {
    /// Loads the encoder; problems as (key, message).
    pub(crate) fn new(plan: Plan, threads: usize) -> Result<Self, (&'static str, String)> {
        let Plan { dir, head, categories, role } = plan;
        let texts = Texts::load(&dir, threads).map_err(|e| ("model", chain(&e)))?;
        if head.encoder != texts.version() {
            let message = format!(
                "was fitted on an encoder of version {}, this one is {}; fit it again with `freewheel guard fit`",
                head.encoder,
                texts.version()
            );
            return Err(("head", message));
        }
        let mut identity = texts.version().to_owned();
        let mut labels = Vec::new();
        for label in head.labels {
            let linear = Linear { weights: label.weights, bias: label.bias };
            let bits = linear.weights.iter().chain([&linear.bias]).flat_map(|w| w.to_bits().to_le_bytes());
            identity += &format!("\n{} {}", label.name, Digest::of(&bits.collect::<Vec<_>>()));
            labels.push((label.name, linear));
        }
        let version = Digest::of(identity.as_bytes()).to_string()[..16].to_owned();
        Ok(Self { texts, labels, categories, role, version })
    }

    /// The odds of harm given every label's score, and what to say about it.
    fn odds(&self, scores: &[f32]) -> (Odds, Option<String>) {
        let mut worst = (f32::NEG_INFINITY, 0);
        let mut hard: Option<f32> = None;
        let mut said = Vec::new();
        for (i, ((name, _), score)) in self.labels.iter().zip(scores).enumerate() {
            let p = probability(*score);
            let counted = p * self.categories.weight(name);
            if counted > worst.0 {
                worst = (counted, i);
            }
            if self.categories.is_hard(name) {
                hard = Some(hard.map_or(*score, |other| other.max(*score)));
            }
            if p > 0.5 {
                said.push(format!("{name} {p:.2}"));
            }
        }
        let weight = self.categories.weight(&self.labels[worst.1].0);
        let odds = Odds { logit: scores[worst.1], weight, hard };
        (odds, (!said.is_empty()).then(|| said.join(",")))
    }
}

fn probability(logit: f32) -> f32 {
    crate::fit::calibration::logistic(f64::from(logit)) as f32
}

impl Component for EmbeddingGuard {
    fn judge(&self, completion: &Completion<'_>) -> Result<Judgement, Unscored> {
        let text = text_of(completion, self.role);
        let mut highest = vec![f32::NEG_INFINITY; self.labels.len()];
        for embedding in self.texts.embeddings(&text)? {
            for (highest, (_, linear)) in highest.iter_mut().zip(&self.labels) {
                let score = linear.score(&embedding);
                if score.is_nan() {
                    return Err(Unscored("the encoder gave NaN".into()));
                }
                *highest = highest.max(score);
            }
        }
        let (odds, detail) = self.odds(&highest);
        Ok(Judgement { detail, odds: Some(odds), ..Judgement::default() })
    }

    fn version(&self) -> Option<&str> {
        Some(&self.version)
    }
}

/// An encoder that reads texts of any length.
pub struct Texts {
    embedder: Arc<Embedder>,
    threads: Threads,
    batcher: Batcher,
}

impl Texts {
    /// Loads the encoder in `dir`, or shares it with who has it.
    ///
    /// # Errors
    /// Whatever is wrong with its files.
    pub fn load(dir: &Path, threads: usize) -> Result<Self, ModelError> {
        let threads = Threads::new(threads);
        let embedder = EMBEDDERS.load(dir, |dir| Embedder::load(dir, &threads))?;
        Ok(Self { embedder, threads, batcher: Batcher::new(BATCH) })
    }

    /// Identity of the encoder.
    pub fn version(&self) -> &str {
        self.embedder.version()
    }

    /// The embedding of every window of a text, in order; windows overlap by a quarter.
    ///
    /// # Errors
    /// If the text cannot be encoded, or the encoder fails.
    pub fn embeddings(&self, text: &str) -> Result<Vec<Vec<f32>>, Unscored> {
        let info = self.embedder.info();
        let failed = |e: ModelError| Unscored(e.to_string());
        let ids = info.tokenizer.encode(text).map_err(failed)?;
        let around = info.tokenizer.frame(&[], None).map_err(failed)?.ids.len();
        let room = info.max_tokens.saturating_sub(around);
        if room == 0 {
            return Err(Unscored("the encoder leaves no room for text".into()));
        }
        if around + ids.len() == 0 {
            return Err(Unscored(
                "an empty text has no embedding: the tokenizer puts nothing around it".into(),
            ));
        }
        let parts = windows(ids.len(), room, room / 4);
        let framed: Result<Vec<Framed>, ModelError> =
            parts.into_iter().map(|part| info.tokenizer.frame(&ids[part], None)).collect();
        self.batcher.score_all(framed.map_err(failed)?, |batch| self.embedder.embed(&self.threads, batch))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::guard::categories::{CategoryWeight, HardWord};

    #[test]
    fn the_worst_label_counts_by_its_weight_and_hard_ones_are_kept() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/bert_classifier");
        let linear = || Linear { weights: Vec::new(), bias: 0.0 };
        let config = BTreeMap::from([
            ("minor".to_owned(), CategoryWeight::Weight(0.25)),
            ("never".to_owned(), CategoryWeight::Word(HardWord::Hard)),
        ]);
        let guard = EmbeddingGuard {
            texts: Texts::load(&dir, 1).unwrap(),
            labels: ["minor", "plain", "never"].map(|name| (name.to_owned(), linear())).to_vec(),
            categories: Categories::new(&config, &["minor", "plain", "never"]).unwrap(),
            role: GuardRole::Response,
            version: String::new(),
        };
        // p = 0.9, 0.25, 0.1: minor counts 0.22, plain more.
        let logit = |p: f32| (p / (1.0 - p)).ln();
        let (odds, said) = guard.odds(&[logit(0.9), logit(0.25), logit(0.1)]);
        assert_eq!(odds, Odds { logit: logit(0.25), weight: 1.0, hard: Some(logit(0.1)) });
        assert_eq!(said.as_deref(), Some("minor 0.90"));
        let (odds, _) = guard.odds(&[logit(0.9), logit(0.2), logit(0.1)]);
        assert_eq!((odds.logit, odds.weight), (logit(0.9), 0.25));
    }

    #[test]
    fn long_texts_are_read_to_the_end() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/bert_classifier");
        let texts = Texts::load(&dir, 1).unwrap();
        let info = texts.embedder.info();
        let room = info.max_tokens - info.tokenizer.frame(&[], None).unwrap().ids.len();
        let long = "the cat sat on the mat ".repeat(room);
        let ids = info.tokenizer.encode(&long).unwrap().len();
        let found = texts.embeddings(&long).unwrap();
        assert_eq!(found.len(), windows(ids, room, room / 4).len());
        assert!(found.len() > 5);
        let changed = texts.embeddings(&format!("{long} dog")).unwrap();
        assert_ne!(found.last(), changed.last(), "the tail is read");
        // This tokenizer puts nothing around a text; one that does gives an empty text an embedding too.
        assert!(texts.embeddings("").unwrap_err().0.contains("empty"));
    }
}
