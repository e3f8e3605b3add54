//! Supervised fine-tuning: the same transformer, optimiser and packing, with cross-entropy on completions.
//!
//! Loss = mean over the completion tokens of a batch of −log p, the end-of-sequence token included. The order of the examples is a
//! function of the seed alone, so the same data and seed give the same bytes again.

use freewheel_model::vision::{EncodedPrompt, ImageTile};
use freewheel_model::{LoadedModel, Tokenizer};
use freewheel_types::{Prompt, SamplingParams};

use crate::LearnerError;
use crate::fit::{BatchLoss, FitConfig, FitSummary, fit, policy};
use crate::flat::flat_section;
use crate::metrics::MetricsSink;
use crate::optim::OptimizerConfig;
use crate::packing::TrainSequence;
use crate::policy::Policy;
use crate::trainer::TokenGradients;
use crate::transformer::TransformerTrainer;

/// The `[sft]` section, written flat.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SftConfig {
    /// The loop. Its fields are also reached directly: `config.steps`.
    pub fit: FitConfig,
    /// How the weights move.
    pub optimizer: OptimizerConfig,
}

flat_section!(SftConfig { fit: FitConfig, optimizer: OptimizerConfig });

impl SftConfig {
    /// Everything wrong with the section, one line each. Empty: all is well.
    pub fn problems(&self) -> Vec<String> {
        [self.fit.problems("sft"), self.optimizer.problems("sft")].concat()
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

impl TokenisedExample {
    /// As the packer takes it.
    pub fn sequence(&self) -> TrainSequence<'_> {
        TrainSequence {
            prompt_ids: &self.prompt_ids,
            output_ids: &self.output_ids,
            tiles: &self.tiles,
            experts: None,
            sampling: SamplingParams::default(),
        }
    }
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
) -> Result<FitSummary, LearnerError> {
    let limit = config.max_tokens.unwrap_or(model.model.spec().max_positions);
    let eos = model.generation.eos_ids.first().copied();
    let examples = tokenise(&model.tokenizer, eos, examples, limit)?;
    let mut policy = policy(("sft", &config.fit), &config.optimizer, config.problems(), model, |threads| {
        let trainer = TransformerTrainer::new(&model.model, &model.params, threads);
        Box::new(trainer.configured(&config.optimizer))
    })?;
    let summary = train(config, &mut policy, &examples, metrics)?;
    model.params = policy.weights().clone();
    Ok(summary)
}

pub(crate) fn tokenise(
    tokenizer: &Tokenizer,
    eos: Option<u32>,
    examples: impl IntoIterator<Item = SftExample>,
    limit: usize,
) -> Result<Vec<TokenisedExample>, LearnerError> {
    let tokenised: Vec<TokenisedExample> = examples
        .into_iter()
        .enumerate()
        .map(|(index, e)| tokenise_one(tokenizer, eos, &e.prompt, &e.completion, limit, index))
        .collect::<Result<_, _>>()?;
    if tokenised.is_empty() {
        return Err(LearnerError::Config("no examples to train on".into()));
    }
    Ok(tokenised)
}

/// One prompt with a completion and the end-of-sequence token; `index` names the example in errors.
pub(crate) fn tokenise_one(
    tokenizer: &Tokenizer,
    eos: Option<u32>,
    prompt: &Prompt,
    completion: &str,
    limit: usize,
    index: usize,
) -> Result<TokenisedExample, LearnerError> {
    let bad = |what: String| LearnerError::Example { index, what };
    let EncodedPrompt { ids: prompt_ids, tiles } =
        tokenizer.encode_prompt(&prompt.body).map_err(|e| bad(e.to_string()))?;
    let mut output_ids = tokenizer.encode(completion).map_err(|e| bad(e.to_string()))?;
    output_ids.extend(eos);
    let tokens = prompt_ids.len() + output_ids.len();
    if prompt_ids.is_empty() || output_ids.is_empty() {
        return Err(bad("prompt and completion need at least one token each".into()));
    }
    if tokens > limit {
        return Err(bad(format!("{tokens} tokens, more than max_tokens ({limit})")));
    }
    Ok(TokenisedExample { prompt_ids, tiles, output_ids })
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
) -> Result<FitSummary, LearnerError> {
    fit(("sft", &config.fit), policy, examples.len(), metrics, |policy, _, picked| {
        let batch: Vec<TrainSequence> = picked.iter().map(|&i| examples[i].sequence()).collect();
        accumulate(policy, &batch, config.micro_batch_tokens)
    })
}

/// Adds the gradient of the mean cross-entropy of `batch`.
pub(crate) fn accumulate(policy: &mut Policy, batch: &[TrainSequence<'_>], budget: usize) -> BatchLoss {
    let tokens: u64 = batch.iter().map(|s| s.output_ids.len() as u64).sum();
    let mut loss = 0.0;
    for packed in policy.micro_batches(batch, budget) {
        policy.accumulate(&packed, &mut |found| {
            loss -= found.logprobs.iter().map(|&x| f64::from(x)).sum::<f64>();
            let gradient = (-1.0 / tokens as f64) as f32;
            TokenGradients { d_logprobs: vec![gradient; found.logprobs.len()], d_entropies: None }
        });
    }
    BatchLoss { loss: loss / tokens as f64, tokens, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use freewheel_kernels::Threads;
    use freewheel_types::WeightsDtype;

    use super::*;
    use crate::metrics::MemoryMetrics;
    use crate::testing::{Bigram, params};

    fn run(config: &SftConfig) -> (FitSummary, String, Vec<f64>) {
        let examples: Vec<TokenisedExample> = (0..4)
            .map(|i| TokenisedExample {
                prompt_ids: vec![i],
                output_ids: vec![i + 1, i + 2, 7],
                ..Default::default()
            })
            .collect();
        let params = params(WeightsDtype::Bf16);
        let trainer = Box::new(Bigram::new(&params));
        let settings = config.optimizer_settings(&config.optimizer);
        let mut policy = Policy::new(trainer, params, settings, Threads::single());
        let metrics = MemoryMetrics::default();
        let summary = train(config, &mut policy, &examples, &metrics).unwrap();
        let losses = metrics.lines().iter().map(|line| line["train/loss"].as_f64().unwrap()).collect();
        (summary, policy.digest().to_string(), losses)
    }

    fn config() -> SftConfig {
        let fit = FitConfig {
            steps: 60,
            batch_size: 3,
            learning_rate: 0.1,
            weight_decay: 0.0,
            ..Default::default()
        };
        SftConfig { fit, ..Default::default() }
    }

    #[test]
    fn the_loss_is_the_mean_cross_entropy_and_falls() {
        let (summary, _, losses) = run(&config());
        assert!(losses[59] <= 0.7 * losses[0], "from {} to {}", losses[0], losses[59]);
        assert_eq!((summary.steps, summary.tokens), (60, 60 * 3 * 3));
        // By hand: the first batch holds examples pick(4, 0, 0..3).
        let table = Bigram::new(&params(WeightsDtype::Bf16));
        let batch = (0..3).map(|k| config().pick(4, 0, k) as u32);
        let terms = batch.flat_map(|i| [(i, i + 1), (i + 1, i + 2), (i + 2, 7)]);
        let nll: Vec<f64> = terms.map(|(from, to)| -table.row(from)[to as usize]).collect();
        let mean = nll.iter().sum::<f64>() / 9.0;
        assert!((losses[0] - mean).abs() <= 1e-6, "{} is not {mean}", losses[0]);
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes_and_micro_batches_do_not_matter_to_the_loss() {
        let (_, digest, losses) = run(&config());
        assert_eq!(run(&config()).1, digest);
        let with = |change: fn(&mut FitConfig)| {
            let mut config = config();
            change(&mut config.fit);
            run(&config)
        };
        assert_ne!(with(|fit| fit.seed = 1).1, digest);
        let (_, _, split) = with(|fit| fit.micro_batch_tokens = 1);
        losses.iter().zip(&split).for_each(|(a, b)| assert!((a - b).abs() <= 1e-2, "{a} and {b}"));
        assert!((losses[0] - split[0]).abs() <= 1e-9);
    }
}
