//! The loop of distillation and codistillation.

use std::path::Path;

use freewheel_kernels::Threads;
use freewheel_model::LoadedModel;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::loss::{SoftToken, soft_loss};
use super::teacher::{SoftTargets, Teacher, TopK};
use crate::LearnerError;
use crate::fit::{BatchLoss, FitConfig, FitSummary, fit, policy, threads};
use crate::flat::flat_section;
use crate::metrics::MetricsSink;
use crate::optim::{OptimizerConfig, StepOutcome};
use crate::packing::TrainSequence;
use crate::policy::Policy;
use crate::sft::{SftExample, TokenisedExample, tokenise};
use crate::trainer::{PackedBatch, PackedTarget, TokenGradients};
use crate::transformer::TransformerTrainer;

/// Logits of the student that are held at once: 512 MiB.
const LOGITS: usize = 128 << 20;

/// How the weight a of the soft loss is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Weighting {
    /// It stays at `soft_weight`.
    Constant,
    /// From `soft_weight` to `soft_weight_end` along half a cosine.
    #[default]
    Schedule,
    /// s/(s + h), the recent progress of the soft loss over that of both: whichever still falls has the say.
    Progress,
    /// Token by token: `soft_weight` times the teacher's probability of its favourite where that is what is written, 0 elsewhere.
    Confidence,
}

/// The loss of `[distill]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DistillKeys {
    /// How soft and hard targets are weighed: `constant`, `schedule` (default), `progress` or `confidence`.
    pub weighting: Weighting,
    /// Weight of soft targets, at the start where it changes. In [0, 1]. Default 0.9.
    #[schemars(range(min = 0, max = 1))]
    pub soft_weight: f64,
    /// Weight of soft targets at the end of `schedule`. In [0, 1]. Default 0.1.
    #[schemars(range(min = 0, max = 1))]
    pub soft_weight_end: f64,
    /// Tokens of the teacher's distribution that are kept at each position. 1 or more. Default 32.
    #[schemars(range(min = 1))]
    pub top_k: usize,
    /// Whether the student learns from what it writes itself: token by token the advantage is log teacher − log student. The data
    /// gives the prompts then, and the keys above are of no use. Default false.
    pub on_policy: bool,
    /// Longest completion that the student writes, tokens. 1 or more. Default 256.
    #[schemars(range(min = 1))]
    pub max_new_tokens: usize,
}

impl Default for DistillKeys {
    fn default() -> Self {
        Self {
            weighting: Weighting::Schedule,
            soft_weight: 0.9,
            soft_weight_end: 0.1,
            top_k: 32,
            on_policy: false,
            max_new_tokens: 256,
        }
    }
}

/// The `[distill]` section, written flat.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DistillConfig {
    /// The loop. Its fields are also reached directly: `config.steps`.
    pub fit: FitConfig,
    /// How the weights move.
    pub optimizer: OptimizerConfig,
    /// The loss.
    pub keys: DistillKeys,
}

flat_section!(DistillConfig { fit: FitConfig, optimizer: OptimizerConfig, keys: DistillKeys });

impl DistillConfig {
    /// Everything wrong with the section, one line each. Empty: all is well.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = [self.fit.problems("distill"), self.optimizer.problems("distill")].concat();
        for (key, weight) in
            [("soft_weight", self.keys.soft_weight), ("soft_weight_end", self.keys.soft_weight_end)]
        {
            if !(0.0..=1.0).contains(&weight) {
                problems.push(format!("distill.{key} is {weight}, outside 0 to 1"));
            }
        }
        for (key, value) in [("top_k", self.keys.top_k), ("max_new_tokens", self.keys.max_new_tokens)] {
            if value == 0 {
                problems.push(format!("distill.{key} is 0, outside values of 1 or more"));
            }
        }
        problems
    }
}

/// Where soft targets come from.
enum Source {
    Stored(SoftTargets),
    Online(Box<Teacher>),
    /// A teacher that learns too.
    Learning(Box<Teacher>, Box<Policy>),
}

/// Trains `student` in place on `examples` and on what `teacher` says about them; with `store` that is kept in a file, or taken from
/// it. With `codistil` the teacher learns the examples by itself, in place too.
///
/// # Errors
/// If the config is bad, the two models have other tokenizers, an example is bad, or the gradient stops being finite.
pub fn run_distill(
    config: &DistillConfig,
    student: &mut LoadedModel,
    teacher: &mut LoadedModel,
    store: Option<&Path>,
    codistil: bool,
    examples: impl IntoIterator<Item = SftExample>,
    metrics: &dyn MetricsSink,
) -> Result<FitSummary, LearnerError> {
    let fresh = |model: &LoadedModel, threads: Threads| -> Box<TransformerTrainer> {
        Box::new(TransformerTrainer::new(&model.model, &model.params, threads).configured(&config.optimizer))
    };
    let section = ("distill", &config.fit);
    let mut pupil = policy(section, &config.optimizer, config.problems(), student, |t| fresh(student, t))?;
    if student.tokenizer.digest() != teacher.tokenizer.digest() {
        return Err(LearnerError::Config("teacher and student have different tokenizers".into()));
    }
    let positions = student.model.spec().max_positions.min(teacher.model.spec().max_positions);
    let limit = config.max_tokens.unwrap_or(positions);
    let examples =
        tokenise(&student.tokenizer, student.generation.eos_ids.first().copied(), examples, limit)?;
    let threads = threads(config.threads);
    let k = config.keys.top_k;
    let online =
        |model: &LoadedModel| Box::new(Teacher::new(&model.model, &model.params, k, threads.clone()));
    let mut source = match store {
        _ if codistil => {
            let learning = policy(section, &config.optimizer, Vec::new(), teacher, |t| fresh(teacher, t))?;
            Source::Learning(online(teacher), Box::new(learning))
        }
        Some(path) if path.exists() => Source::Stored(SoftTargets::load(path, &examples)?),
        Some(path) => {
            let budget = config.micro_batch_tokens;
            let targets = SoftTargets::compute(teacher, &examples, k, budget, &threads);
            targets.save(path, &examples)?;
            Source::Stored(targets)
        }
        None => Source::Online(online(teacher)),
    };
    let vocabulary = student.model.spec().vocab_size as u32;
    if let Source::Stored(targets) = &source
        && targets.examples.iter().any(|said| said.ids.iter().any(|id| *id >= vocabulary))
    {
        return Err(LearnerError::Config(
            "the stored targets hold tokens that the student does not know".into(),
        ));
    }
    let budget = config.micro_batch_tokens.min(LOGITS / vocabulary as usize).max(1);
    let summary = run(config, &mut pupil, &mut source, &examples, budget, metrics)?;
    student.params = pupil.weights().clone();
    if let Source::Learning(_, learning) = source {
        teacher.params = learning.weights().clone();
    }
    Ok(summary)
}

/// The loop on stored targets, over any `PolicyTrainer`.
///
/// # Errors
/// If loss or gradient stop being finite.
pub fn train(
    config: &DistillConfig,
    policy: &mut Policy,
    targets: SoftTargets,
    examples: &[TokenisedExample],
    metrics: &dyn MetricsSink,
) -> Result<FitSummary, LearnerError> {
    run(config, policy, &mut Source::Stored(targets), examples, config.micro_batch_tokens, metrics)
}

fn run(
    config: &DistillConfig,
    policy: &mut Policy,
    source: &mut Source,
    examples: &[TokenisedExample],
    budget: usize,
    metrics: &dyn MetricsSink,
) -> Result<FitSummary, LearnerError> {
    let mut progress = Progress::default();
    let diverged = || BatchLoss { loss: f64::NAN, ..Default::default() };
    fit(("distill", &config.fit), policy, examples.len(), metrics, |policy, step, picked| {
        let batch: Vec<&TokenisedExample> = picked.iter().map(|&i| &examples[i]).collect();
        let mut teacher_loss = None;
        let said = match source {
            Source::Stored(targets) => picked.iter().map(|&i| targets.examples[i].clone()).collect(),
            Source::Online(teacher) => teacher.say(&batch, config.micro_batch_tokens),
            Source::Learning(teacher, learning) => {
                let said = teacher.say(&batch, config.micro_batch_tokens);
                let sequences: Vec<TrainSequence> = batch.iter().map(|example| example.sequence()).collect();
                let learnt = crate::sft::accumulate(learning, &sequences, config.micro_batch_tokens);
                teacher_loss = match learning.update(config.rate(step)) {
                    StepOutcome::Applied { .. } => Some(learnt.loss),
                    StepOutcome::Refused { .. } => return diverged(),
                };
                teacher.load(learning.weights());
                said
            }
        };
        let weight = weight_of(config, step, &progress);
        let found = Batch { config, examples: &batch, said: &said, weight, budget }.accumulate(policy);
        progress.add(found.soft, found.hard);
        found.report(teacher_loss)
    })
}

/// The weight of soft targets in update `step`, before any token's own.
fn weight_of(config: &DistillConfig, step: u64, progress: &Progress) -> f64 {
    let keys = &config.keys;
    match keys.weighting {
        Weighting::Constant | Weighting::Confidence => keys.soft_weight,
        Weighting::Schedule => {
            let done = step as f64 / config.steps.max(1) as f64;
            let left = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
            keys.soft_weight_end + (keys.soft_weight - keys.soft_weight_end) * left
        }
        Weighting::Progress => progress.weight().unwrap_or(keys.soft_weight),
    }
}

/// How fast the two losses have fallen lately: means of their falls with weights 0.9, 0.9², …
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Progress {
    last: Option<(f64, f64)>,
    soft: f64,
    hard: f64,
}

impl Progress {
    fn add(&mut self, soft: f64, hard: f64) {
        if let Some((last_soft, last_hard)) = self.last {
            self.soft = 0.9 * self.soft + 0.1 * (last_soft - soft).max(0.0);
            self.hard = 0.9 * self.hard + 0.1 * (last_hard - hard).max(0.0);
        }
        self.last = Some((soft, hard));
    }

    fn weight(&self) -> Option<f64> {
        let sum = self.soft + self.hard;
        (sum > 1e-12).then(|| self.soft / sum)
    }
}

struct Batch<'a> {
    config: &'a DistillConfig,
    examples: &'a [&'a TokenisedExample],
    said: &'a [TopK],
    weight: f64,
    /// Rows of the student in one pass.
    budget: usize,
}

/// Means over the tokens of a batch.
#[derive(Clone, Copy, Debug, Default)]
struct Found {
    loss: f64,
    soft: f64,
    hard: f64,
    weight: f64,
    tokens: u64,
}

impl Found {
    /// `teacher_loss` is that of a teacher that learns, on what is written.
    fn report(&self, teacher_loss: Option<f64>) -> BatchLoss {
        let mut out = BatchLoss { loss: self.loss, tokens: self.tokens, ..Default::default() };
        for (key, value) in [
            ("distill/weight", self.weight),
            ("distill/soft_loss", self.soft),
            ("distill/hard_loss", self.hard),
        ] {
            out.extra.insert(key.into(), json!(value));
        }
        if let Some(loss) = teacher_loss {
            out.extra.insert("distill/teacher_loss".into(), json!(loss));
        }
        out
    }
}

impl Batch<'_> {
    fn accumulate(&self, policy: &mut Policy) -> Found {
        let sequences: Vec<TrainSequence> = self.examples.iter().map(|example| example.sequence()).collect();
        let tokens: usize = sequences.iter().map(|s| s.output_ids.len()).sum();
        let share = 1.0 / tokens as f64;
        let mut out = Found { tokens: tokens as u64, ..Default::default() };
        for packed in policy.micro_batches(&sequences, self.budget) {
            let expanded = self.expand(&packed);
            policy.accumulate(&expanded, &mut |found| {
                let mut d_logprobs = vec![0.0f32; found.logprobs.len()];
                let mut at = 0;
                for sequence in &packed.sequences {
                    let said = &self.said[sequence.index];
                    let k = said.ids.len() / sequence.targets.len();
                    for (token, target) in packed.targets[sequence.targets.clone()].iter().enumerate() {
                        let range = at..at + 1 + k;
                        at = range.end;
                        let teacher = token * k..(token + 1) * k;
                        let said = (&said.ids[teacher.clone()], &said.logprobs[teacher]);
                        let (student, slopes) = (&found.logprobs[range.clone()], &mut d_logprobs[range]);
                        self.token(target.token, said, student, share, slopes, &mut out);
                    }
                }
                TokenGradients { d_logprobs, d_entropies: None }
            });
        }
        out
    }

    /// Targets of each position: the token written, then what the teacher kept.
    fn expand(&self, packed: &PackedBatch) -> PackedBatch {
        let mut expanded = PackedBatch { targets: Vec::new(), soft: true, ..packed.clone() };
        for sequence in &mut expanded.sequences {
            let (said, first) = (&self.said[sequence.index], expanded.targets.len());
            let k = said.ids.len() / sequence.targets.len();
            let targets = packed.targets[sequence.targets.clone()].iter();
            for (target, ids) in targets.zip(said.ids.chunks_exact(k)) {
                expanded.targets.push(*target);
                expanded.targets.extend(ids.iter().map(|&token| PackedTarget { row: target.row, token }));
            }
            sequence.targets = first..expanded.targets.len();
        }
        expanded
    }

    /// One position: `student` and `slopes` are of the token written, then of what the teacher kept.
    fn token(
        &self,
        written: u32,
        (ids, logprobs): (&[u32], &[f32]),
        student: &[f32],
        share: f64,
        slopes: &mut [f32],
        out: &mut Found,
    ) {
        let mut soft_slopes = vec![0.0; ids.len()];
        let soft = soft_loss(SoftToken { logprobs }, &student[1..], &mut soft_slopes);
        let hard = -f64::from(student[0]);
        let weight = match self.config.keys.weighting {
            Weighting::Confidence if ids[0] == written => self.weight * f64::from(logprobs[0]).exp(),
            Weighting::Confidence => 0.0,
            _ => self.weight,
        };
        slopes[0] = (-share * (1.0 - weight)) as f32;
        for (slope, soft) in slopes[1..].iter_mut().zip(soft_slopes) {
            *slope = (share * weight * soft) as f32;
        }
        out.loss += share * (weight * soft + (1.0 - weight) * hard);
        out.soft += share * soft;
        out.hard += share * hard;
        out.weight += share * weight;
    }
}

#[cfg(test)]
mod tests {
    use freewheel_types::WeightsDtype;

    use super::*;
    use crate::metrics::MemoryMetrics;
    use crate::testing::{Bigram, VOCAB, params};

    fn examples() -> Vec<TokenisedExample> {
        let example = |i: u32| TokenisedExample {
            prompt_ids: vec![i],
            output_ids: vec![(i + 1) % 8, (i + 2) % 8, (i + 3) % 8],
            ..Default::default()
        };
        (0..4).map(example).collect()
    }

    /// A teacher that is sure of what is written, and a little of the token after it.
    fn targets(k: usize) -> SoftTargets {
        let said = |example: &TokenisedExample| {
            let mut said = TopK::default();
            for &token in &example.output_ids {
                said.ids.extend((0..k as u32).map(|i| (token + i) % VOCAB as u32));
                said.logprobs.extend([0.7f32.ln(), 0.2f32.ln(), 0.05f32.ln()].iter().take(k));
            }
            said
        };
        SoftTargets { k, examples: examples().iter().map(said).collect() }
    }

    fn run(weighting: Weighting) -> Vec<serde_json::Map<String, serde_json::Value>> {
        let params = params(WeightsDtype::F32);
        let mut config = DistillConfig::default();
        (config.steps, config.batch_size, config.learning_rate, config.weight_decay) = (60, 3, 0.2, 0.0);
        config.keys.weighting = weighting;
        let settings = config.optimizer_settings(&config.optimizer);
        let mut policy = Policy::new(Box::new(Bigram::new(&params)), params, settings, Threads::single());
        let metrics = MemoryMetrics::default();
        train(&config, &mut policy, targets(3), &examples(), &metrics).unwrap();
        metrics.lines()
    }

    #[test]
    fn both_losses_fall_and_weights_follow_their_rule() {
        for weighting in
            [Weighting::Constant, Weighting::Schedule, Weighting::Progress, Weighting::Confidence]
        {
            let lines = run(weighting);
            let at = |i: usize, key: &str| lines[i][key].as_f64().unwrap();
            for key in ["distill/soft_loss", "distill/hard_loss", "train/loss"] {
                assert!(
                    at(59, key) < at(0, key),
                    "{weighting:?}: {key} from {} to {}",
                    at(0, key),
                    at(59, key)
                );
            }
            let (first, last) = (at(0, "distill/weight"), at(59, "distill/weight"));
            match weighting {
                Weighting::Constant => assert!((first - 0.9).abs() + (last - 0.9).abs() <= 1e-6),
                Weighting::Schedule => assert!((first - 0.9).abs() <= 1e-6 && last < 0.11, "{first} {last}"),
                Weighting::Progress => assert!((0.05..0.95).contains(&at(20, "distill/weight"))),
                // The teacher's favourite is what is written, everywhere, at 0.7.
                Weighting::Confidence => assert!((first - 0.63).abs() <= 1e-6, "{first}"),
            }
        }
    }

    #[test]
    fn a_student_comes_to_its_teacher_and_not_to_certainty() {
        let lines = run(Weighting::Constant);
        let soft = lines[59]["distill/soft_loss"].as_f64().unwrap();
        assert!(soft <= 0.15, "{soft}");
        let hard = lines[59]["distill/hard_loss"].as_f64().unwrap();
        assert!(hard >= 0.1, "the teacher leaves room: {hard}");
    }

    #[test]
    fn stored_targets_come_back_and_those_of_other_examples_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("soft.safetensors");
        let (targets, mut examples) = (targets(3), examples());
        targets.save(&path, &examples).unwrap();
        assert_eq!(SoftTargets::load(&path, &examples).unwrap(), targets);
        examples[0].output_ids[1] = 5;
        let error = SoftTargets::load(&path, &examples).unwrap_err().to_string();
        assert!(error.contains("other examples"), "{error}");
        std::fs::write(&path, b"short").unwrap();
        assert!(SoftTargets::load(&path, &examples).is_err());
    }
}
