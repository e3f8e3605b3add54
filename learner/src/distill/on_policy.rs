//! On-policy distillation: the student writes, the teacher says how likely that was.
//!
//! Agarwal et al., arXiv 2306.13649, with the reverse divergence: token by token the advantage is log π_T − log π, without gradient, and
//! the student follows A · ∇ log π. Its mean is −KL(π ‖ π_T) along what the student itself writes.

use freewheel_model::{LoadedModel, Params};
use serde_json::json;

use super::job::DistillConfig;
use crate::LearnerError;
use crate::fit::{BatchLoss, FitSummary, fit, policy, threads};
use crate::metrics::MetricsSink;
use crate::packing::TrainSequence;
use crate::policy::Policy;
use crate::sft::{SftExample, TokenisedExample, tokenise};
use crate::trainer::{PolicyTrainer, TokenGradients};
use crate::transformer::TransformerTrainer;

/// Draws a completion of each example's prompt with the weights given, in update `step`; at least one token each.
pub type Sampler<'a> = dyn FnMut(&Params, u64, &[&TokenisedExample]) -> Result<Vec<Vec<u32>>, String> + 'a;

/// Trains `student` in place on what it writes itself to the prompts of `examples`, as `teacher` likes it.
///
/// # Errors
/// If the config is bad, the two models have other tokenizers, an example is bad, nothing can be drawn, or the gradient stops being
/// finite.
pub fn run_on_policy(
    config: &DistillConfig,
    student: &mut LoadedModel,
    teacher: &LoadedModel,
    examples: impl IntoIterator<Item = SftExample>,
    sampler: &mut Sampler<'_>,
    metrics: &dyn MetricsSink,
) -> Result<FitSummary, LearnerError> {
    let section = ("distill", &config.fit);
    let mut pupil = policy(section, &config.optimizer, config.problems(), student, |threads| {
        Box::new(
            TransformerTrainer::new(&student.model, &student.params, threads).configured(&config.optimizer),
        )
    })?;
    if student.tokenizer.digest() != teacher.tokenizer.digest() {
        return Err(LearnerError::Config("teacher and student have different tokenizers".into()));
    }
    let limit = config.max_tokens.unwrap_or(student.model.spec().max_positions);
    let examples =
        tokenise(&student.tokenizer, student.generation.eos_ids.first().copied(), examples, limit)?;
    let teacher = TransformerTrainer::new(&teacher.model, &teacher.params, threads(config.threads));
    let summary = train(config, &mut pupil, &teacher, &examples, sampler, metrics)?;
    student.params = pupil.weights().clone();
    Ok(summary)
}

/// The loop, over any `PolicyTrainer`.
///
/// # Errors
/// If nothing can be drawn, or loss or gradient stop being finite.
pub fn train(
    config: &DistillConfig,
    policy: &mut Policy,
    teacher: &dyn PolicyTrainer,
    examples: &[TokenisedExample],
    sampler: &mut Sampler<'_>,
    metrics: &dyn MetricsSink,
) -> Result<FitSummary, LearnerError> {
    let mut failed = None;
    let result = fit(("distill", &config.fit), policy, examples.len(), metrics, |policy, step, picked| {
        let prompts: Vec<&TokenisedExample> = picked.iter().map(|&i| &examples[i]).collect();
        match sampler(policy.weights(), step, &prompts) {
            Ok(drawn) => accumulate(policy, teacher, &prompts, &drawn, config.micro_batch_tokens),
            Err(error) => {
                failed = Some(error);
                BatchLoss { loss: f64::NAN, ..Default::default() }
            }
        }
    });
    match failed {
        Some(error) => Err(LearnerError::Config(format!("the student cannot write: {error}"))),
        None => result,
    }
}

/// Adds the gradient of −mean A · log π over all drawn tokens.
fn accumulate(
    policy: &mut Policy,
    teacher: &dyn PolicyTrainer,
    prompts: &[&TokenisedExample],
    drawn: &[Vec<u32>],
    budget: usize,
) -> BatchLoss {
    let written: Vec<TokenisedExample> = prompts
        .iter()
        .zip(drawn)
        .map(|(prompt, ids)| TokenisedExample { output_ids: ids.clone(), ..(*prompt).clone() })
        .collect();
    let sequences: Vec<TrainSequence> = written.iter().map(TokenisedExample::sequence).collect();
    let tokens: usize = drawn.iter().map(Vec::len).sum();
    let share = 1.0 / tokens.max(1) as f64;
    let mut divergence = 0.0;
    for packed in policy.micro_batches(&sequences, budget) {
        let likes = teacher.log_probs(&packed).logprobs;
        policy.accumulate(&packed, &mut |found| {
            let gaps =
                found.logprobs.iter().zip(&likes).map(|(student, teacher)| f64::from(student - teacher));
            divergence += share * gaps.clone().sum::<f64>();
            let d_logprobs = gaps.map(|gap| (share * gap) as f32).collect();
            TokenGradients { d_logprobs, d_entropies: None }
        });
    }
    let mut out = BatchLoss { loss: divergence, tokens: tokens as u64, ..Default::default() };
    out.extra.insert("distill/reverse_kl".into(), json!(divergence));
    out.extra.insert("rollout/length_mean".into(), json!(tokens as f64 / drawn.len().max(1) as f64));
    out
}

#[cfg(test)]
mod tests {
    use freewheel_kernels::Threads;
    use freewheel_types::{CounterRng, WeightsDtype};

    use super::*;
    use crate::metrics::MemoryMetrics;
    use crate::testing::{Bigram, VOCAB, params};

    /// Four tokens after each prompt, drawn from the weights' own distribution.
    fn draw(weights: &Params, step: u64, prompts: &[&TokenisedExample]) -> Result<Vec<Vec<u32>>, String> {
        let model = Bigram::new(weights);
        let one = |(i, prompt): (usize, &&TokenisedExample)| {
            let (rng, mut last) = (CounterRng::new(step, i as u64), prompt.prompt_ids[0]);
            let next = |at: u64| {
                let mut left = rng.uniform(at);
                let row = model.row(last);
                let token = row.iter().position(|log_p| {
                    left -= log_p.exp();
                    left < 0.0
                });
                last = token.unwrap_or(VOCAB - 1) as u32;
                last
            };
            (0..4).map(next).collect()
        };
        Ok(prompts.iter().enumerate().map(one).collect())
    }

    fn divergence(student: &Params, teacher: &Bigram) -> f64 {
        let student = Bigram::new(student);
        let of = |token: u32| -> f64 {
            let rows = student.row(token).into_iter().zip(teacher.row(token));
            rows.map(|(s, t)| s.exp() * (s - t)).sum()
        };
        (0..VOCAB as u32).map(of).sum::<f64>() / VOCAB as f64
    }

    #[test]
    fn a_student_that_writes_comes_to_its_teacher() {
        let start = params(WeightsDtype::F32);
        let mut other = start.clone();
        if let freewheel_model::ParamData::F32(values) = &mut other.data {
            values.reverse();
        }
        let teacher = Bigram::new(&other);
        let mut config = DistillConfig::default();
        (config.steps, config.batch_size, config.learning_rate, config.weight_decay) = (120, 16, 0.1, 0.0);
        let settings = config.optimizer_settings(&config.optimizer);
        let mut policy =
            Policy::new(Box::new(Bigram::new(&start)), start.clone(), settings, Threads::single());
        let examples: Vec<TokenisedExample> = (0..VOCAB as u32)
            .map(|i| TokenisedExample { prompt_ids: vec![i], output_ids: vec![0], ..Default::default() })
            .collect();
        let metrics = MemoryMetrics::default();
        train(&config, &mut policy, &teacher, &examples, &mut draw, &metrics).unwrap();
        let (before, after) = (divergence(&start, &teacher), divergence(policy.weights(), &teacher));
        assert!(after <= 0.1 * before, "from {before} to {after}");
        let refused =
            train(&config, &mut policy, &teacher, &examples, &mut |_, _, _| Err("no room".into()), &metrics);
        assert!(refused.unwrap_err().to_string().contains("no room"));
    }
}
