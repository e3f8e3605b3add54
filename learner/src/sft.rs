//! Supervised fine-tuning: the same transformer, optimiser and packing, with cross-entropy on completions.
//!
//! Loss = mean over the completion tokens of a batch of −log p, the end-of-sequence token included. The order of the examples is a
//! function of the seed alone, so the same data and seed give the same bytes again.

use freewheel_kernels::Threads;
use freewheel_model::vision::{EncodedPrompt, ImageTile};
use freewheel_model::{LoadedModel, Tokenizer};
use freewheel_types::{CounterRng, Prompt, SamplingParams};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::LearnerError;
use crate::metrics::MetricsSink;
use crate::optim::{AdamWConfig, Schedule, ScheduleConfig, ScheduleKind, StepOutcome};
use crate::packing::{TrainSequence, pack};
use crate::policy::Policy;
use crate::trainer::TokenGradients;
use crate::transformer::TransformerTrainer;

/// The `[sft]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SftConfig {
    /// Optimiser updates to make; data is gone through again when it ends. 1 or more. Default 1000.
    #[schemars(range(min = 1))]
    pub steps: u64,
    /// Examples in one update. 1 or more. Default 64.
    #[schemars(range(min = 1))]
    pub batch_size: usize,
    /// Peak learning rate. 0 or more. Default 1e-4.
    #[schemars(range(min = 0))]
    pub learning_rate: f64,
    /// Updates over which the learning rate rises from 0. Default 0.
    pub warmup_steps: u64,
    /// Course of the learning rate: "constant", "linear", "cosine" (default), "wsd" and the others of `[learner]`.
    pub schedule: ScheduleKind,
    /// The learning rate's end as a share of `learning_rate`. In [0, 1]. Default 0.1.
    #[schemars(range(min = 0, max = 1))]
    pub min_lr_ratio: f64,
    /// AdamW's decay of the first moment. In [0, 1). Default 0.9.
    pub beta1: f64,
    /// AdamW's decay of the second moment. In [0, 1). Default 0.95.
    pub beta2: f64,
    /// Decoupled weight decay; not applied to norms and biases. 0 or more. Default 0.01.
    pub weight_decay: f64,
    /// Largest global norm of the gradient. Above 0. Default 1.
    pub max_grad_norm: f64,
    /// Tokens in one forward and backward pass; bounds memory. Default 16384.
    #[schemars(range(min = 1))]
    pub micro_batch_tokens: usize,
    /// Longest example, prompt and completion together; longer ones are refused. Tokens. Default: the model's context.
    pub max_tokens: Option<usize>,
    /// Seed of the order of examples. Default 0.
    pub seed: u64,
    /// Whether the image encoder keeps its weights; the projector behind it is trained. Only matters for models that read
    /// images. Default false.
    pub freeze_vision: bool,
    /// Compute threads; 0 takes all cores. No result depends on it. Default 0.
    pub threads: usize,
}

impl Default for SftConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch_size: 64,
            learning_rate: 1e-4,
            warmup_steps: 0,
            schedule: ScheduleKind::Cosine,
            min_lr_ratio: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            micro_batch_tokens: 16_384,
            max_tokens: None,
            seed: 0,
            freeze_vision: false,
            threads: 0,
        }
    }
}

impl SftConfig {
    fn schedule(&self) -> ScheduleConfig {
        ScheduleConfig {
            schedule: self.schedule,
            warmup_steps: self.warmup_steps,
            min_lr_ratio: self.min_lr_ratio,
            ..Default::default()
        }
    }

    fn optimizer(&self) -> AdamWConfig {
        AdamWConfig {
            betas: [self.beta1, self.beta2],
            weight_decay: self.weight_decay,
            max_grad_norm: Some(self.max_grad_norm),
            freeze_vision: self.freeze_vision,
            ..Default::default()
        }
    }

    /// Everything wrong with the section, one line each. Empty: all is well.
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = self
            .schedule()
            .problems(self.steps)
            .iter()
            .map(|line| line.replace("learner.", "sft."))
            .collect();
        let mut check = |good: bool, key: &str, value: String, limit: &str| {
            if !good {
                problems.push(format!("sft.{key} is {value}, outside {limit}"));
            }
        };
        check(self.steps >= 1, "steps", self.steps.to_string(), "values of 1 or more");
        check(self.batch_size >= 1, "batch_size", self.batch_size.to_string(), "values of 1 or more");
        check(
            self.micro_batch_tokens >= 1,
            "micro_batch_tokens",
            self.micro_batch_tokens.to_string(),
            "values of 1 or more",
        );
        let rate = self.learning_rate;
        check(
            rate.is_finite() && rate >= 0.0,
            "learning_rate",
            rate.to_string(),
            "finite values of 0 or more",
        );
        for (key, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            check((0.0..1.0).contains(&beta), key, beta.to_string(), "0 to below 1");
        }
        check(self.weight_decay >= 0.0, "weight_decay", self.weight_decay.to_string(), "values of 0 or more");
        check(self.max_grad_norm > 0.0, "max_grad_norm", self.max_grad_norm.to_string(), "values above 0");
        problems
    }
}

/// One example as people write it.
#[derive(Clone, Debug, PartialEq)]
pub struct SftExample {
    /// What is asked.
    pub prompt: Prompt,
    /// The answer to learn; the end-of-sequence token is added.
    pub completion: String,
}

/// One example as the model sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenisedExample {
    /// Not trained on.
    pub prompt_ids: Vec<u32>,
    /// Tiles of the prompt's images.
    pub tiles: Vec<ImageTile>,
    /// Trained on.
    pub output_ids: Vec<u32>,
}

/// What a run of fine-tuning did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SftSummary {
    /// Updates made.
    pub steps: u64,
    /// Loss of the last batch, nats per token.
    pub loss: f64,
    /// Completion tokens trained on, all steps together.
    pub tokens: u64,
}

/// Fine-tunes `model` in place on `examples`, one metrics line a step. Saving it is the caller's: `freewheel_model::save`.
///
/// # Errors
/// If the config is bad, an example cannot be tokenised or is too long, or the gradient stops being finite.
pub fn run_sft(
    config: &SftConfig,
    model: &mut LoadedModel,
    examples: impl IntoIterator<Item = SftExample>,
    metrics: &dyn MetricsSink,
) -> Result<SftSummary, LearnerError> {
    let problems = config.problems();
    if !problems.is_empty() {
        return Err(LearnerError::Config(problems.join("\n")));
    }
    let limit = config.max_tokens.unwrap_or(model.model.spec().max_positions);
    let eos = model.generation.eos_ids.first().copied();
    let examples = tokenise(&model.tokenizer, eos, examples, limit)?;
    let threads = threads(config.threads);
    let trainer = TransformerTrainer::new(&model.model, &model.params, threads.clone())
        .freeze_vision(config.freeze_vision);
    let mut policy = Policy::new(Box::new(trainer), model.params.clone(), config.optimizer(), threads);
    let summary = train(config, &mut policy, &examples, metrics)?;
    model.params = policy.weights().clone();
    Ok(summary)
}

/// A pool of `count` threads; 0 takes all cores.
pub fn threads(count: usize) -> Threads {
    let all = || std::thread::available_parallelism().map_or(1, usize::from);
    Threads::new(if count == 0 { all() } else { count })
}

fn tokenise(
    tokenizer: &Tokenizer,
    eos: Option<u32>,
    examples: impl IntoIterator<Item = SftExample>,
    limit: usize,
) -> Result<Vec<TokenisedExample>, LearnerError> {
    let bad = |index: usize, what: String| LearnerError::Example { index, what };
    let mut tokenised = Vec::new();
    for (index, example) in examples.into_iter().enumerate() {
        let EncodedPrompt { ids: prompt_ids, tiles } =
            tokenizer.encode_prompt(&example.prompt.body).map_err(|e| bad(index, e.to_string()))?;
        let mut output_ids = tokenizer.encode(&example.completion).map_err(|e| bad(index, e.to_string()))?;
        output_ids.extend(eos);
        let tokens = prompt_ids.len() + output_ids.len();
        if prompt_ids.is_empty() || output_ids.is_empty() {
            return Err(bad(index, "prompt and completion need at least one token each".into()));
        }
        if tokens > limit {
            return Err(bad(index, format!("{tokens} tokens, more than max_tokens ({limit})")));
        }
        tokenised.push(TokenisedExample { prompt_ids, tiles, output_ids });
    }
    if tokenised.is_empty() {
        return Err(LearnerError::Config("no examples to train on".into()));
    }
    Ok(tokenised)
}

/// The loop on tokenised examples, over any `PolicyTrainer`.
///
/// # Errors
/// If loss or gradient stop being finite.
pub fn train(
    config: &SftConfig,
    policy: &mut Policy,
    examples: &[TokenisedExample],
    metrics: &dyn MetricsSink,
) -> Result<SftSummary, LearnerError> {
    let schedule = Schedule::new(config.schedule(), config.steps);
    let started = std::time::Instant::now();
    let mut summary = SftSummary { steps: 0, loss: f64::NAN, tokens: 0 };
    for step in 0..config.steps {
        let step_started = std::time::Instant::now();
        let batch: Vec<TrainSequence> = (0..config.batch_size as u64)
            .map(|k| sequence(&examples[pick(config, examples.len(), step, k)]))
            .collect();
        let learning_rate = config.learning_rate * schedule.factor(step);
        let (loss, outcome, tokens) = update(policy, &batch, config.micro_batch_tokens, learning_rate);
        let StepOutcome::Applied { grad_norm, .. } = outcome else {
            return Err(LearnerError::Config(format!(
                "step {step}: the gradient is not finite; lower sft.learning_rate"
            )));
        };
        policy.advance();
        summary = SftSummary { steps: step + 1, loss, tokens: summary.tokens + tokens };
        let step_s = step_started.elapsed().as_secs_f64();
        let mut line = Map::new();
        line.insert("step".into(), json!(step + 1));
        line.insert("train/loss".into(), json!(loss));
        line.insert("train/grad_norm".into(), json!(grad_norm));
        line.insert("train/lr".into(), json!(learning_rate));
        line.insert("train/tokens_per_s".into(), json!(tokens as f64 / step_s));
        line.insert("time/step_s".into(), json!(step_s));
        line.insert("time/wall_s".into(), Value::from(started.elapsed().as_secs_f64()));
        metrics.step(&line);
    }
    Ok(summary)
}

/// Example `k` of batch `step`: every pass over the data is a shuffle of its own.
fn pick(config: &SftConfig, examples: usize, step: u64, k: u64) -> usize {
    let at = step * config.batch_size as u64 + k;
    let (pass, place) = (at / examples as u64, at % examples as u64);
    permuted(CounterRng::new(config.seed, pass), place, examples as u64) as usize
}

/// Where `place` goes in a pseudo-random permutation of `0..n`: a Feistel network on the next power of four, walked until the value
/// is inside (Black and Rogaway 2002). Needs no table.
fn permuted(rng: CounterRng, place: u64, n: u64) -> u64 {
    let half_bits = (64 - (n - 1).max(1).leading_zeros()).div_ceil(2);
    let mask = (1u64 << half_bits) - 1;
    let mut value = place;
    loop {
        let (mut left, mut right) = (value >> half_bits, value & mask);
        for round in 0..4 {
            (left, right) = (right, left ^ (rng.u64(round << 32 | right) & mask));
        }
        value = left << half_bits | right;
        if value < n {
            return value;
        }
    }
}

fn sequence(example: &TokenisedExample) -> TrainSequence<'_> {
    TrainSequence {
        prompt_ids: &example.prompt_ids,
        output_ids: &example.output_ids,
        tiles: &example.tiles,
        experts: None,
        sampling: SamplingParams::default(),
    }
}

fn update(
    policy: &mut Policy,
    batch: &[TrainSequence<'_>],
    budget: usize,
    learning_rate: f64,
) -> (f64, StepOutcome, u64) {
    let tokens: u64 = batch.iter().map(|s| s.output_ids.len() as u64).sum();
    let mut loss = 0.0;
    for packed in pack(batch, budget) {
        policy.accumulate(&packed, &mut |found| {
            loss -= found.logprobs.iter().map(|&x| f64::from(x)).sum::<f64>();
            let gradient = (-1.0 / tokens as f64) as f32;
            TokenGradients { d_logprobs: vec![gradient; found.logprobs.len()], d_entropies: None }
        });
    }
    (loss / tokens as f64, policy.update(learning_rate), tokens)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use freewheel_types::WeightsDtype;
    use proptest::prelude::*;

    use super::*;
    use crate::metrics::MemoryMetrics;
    use crate::testing::{Bigram, params};

    fn run(config: &SftConfig) -> (SftSummary, String, Vec<f64>) {
        let examples: Vec<TokenisedExample> = (0..4)
            .map(|i| TokenisedExample {
                prompt_ids: vec![i],
                output_ids: vec![i + 1, i + 2, 7],
                ..Default::default()
            })
            .collect();
        let params = params(WeightsDtype::Bf16);
        let trainer = Box::new(Bigram::new(&params));
        let mut policy = Policy::new(trainer, params, config.optimizer(), Threads::single());
        let metrics = MemoryMetrics::default();
        let summary = train(config, &mut policy, &examples, &metrics).unwrap();
        let losses = metrics.lines().iter().map(|line| line["train/loss"].as_f64().unwrap()).collect();
        (summary, policy.digest().to_string(), losses)
    }

    fn config() -> SftConfig {
        SftConfig { steps: 60, batch_size: 3, learning_rate: 0.1, weight_decay: 0.0, ..Default::default() }
    }

    #[test]
    fn the_loss_is_the_mean_cross_entropy_and_falls() {
        let (summary, _, losses) = run(&config());
        assert!(losses[59] <= 0.7 * losses[0], "from {} to {}", losses[0], losses[59]);
        assert_eq!((summary.steps, summary.tokens), (60, 60 * 3 * 3));
        // By hand: the first batch holds examples pick(0..3).
        let table = Bigram::new(&params(WeightsDtype::Bf16));
        let batch = (0..3).map(|k| pick(&config(), 4, 0, k) as u32);
        let terms = batch.flat_map(|i| [(i, i + 1), (i + 1, i + 2), (i + 2, 7)]);
        let nll: Vec<f64> = terms.map(|(from, to)| -table.row(from)[to as usize]).collect();
        let mean = nll.iter().sum::<f64>() / 9.0;
        assert!((losses[0] - mean).abs() <= 1e-6, "{} is not {mean}", losses[0]);
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes_and_micro_batches_do_not_matter_to_the_loss() {
        let (_, digest, losses) = run(&config());
        assert_eq!(run(&config()).1, digest);
        assert_ne!(run(&SftConfig { seed: 1, ..config() }).1, digest);
        let (_, _, split) = run(&SftConfig { micro_batch_tokens: 1, ..config() });
        losses.iter().zip(&split).for_each(|(a, b)| assert!((a - b).abs() <= 1e-2, "{a} and {b}"));
        assert!((losses[0] - split[0]).abs() <= 1e-9);
    }

    #[test]
    fn problems_name_their_section() {
        let bad = SftConfig { steps: 5, warmup_steps: 9, beta2: 1.0, ..Default::default() };
        let problems = bad.problems().join("\n");
        assert!(
            problems.contains("sft.warmup_steps (9)") && problems.contains("sft.beta2 is 1"),
            "{problems}"
        );
    }

    proptest! {
        #[test]
        fn every_pass_sees_every_example_once(seed in any::<u64>(), n in 1usize..70, pass in 0u64..4) {
            let config = SftConfig { seed, batch_size: 1, ..Default::default() };
            let order: Vec<usize> = (0..n as u64).map(|k| pick(&config, n, pass * n as u64 + k, 0)).collect();
            prop_assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), n);
            prop_assert!(order.iter().all(|&i| i < n));
        }
    }
}
