//! DPO, IPO, KTO and relatives on files of preferences.

use std::collections::{BTreeMap, BTreeSet};

use freewheel_model::LoadedModel;
use freewheel_types::Prompt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::loss::{Preference, PreferenceLoss, Summed};
use crate::LearnerError;
use crate::fit::{BatchLoss, FitConfig, FitSummary, fit, policy};
use crate::flat::flat_section;
use crate::metrics::MetricsSink;
use crate::optim::OptimizerConfig;
use crate::packing::{TrainSequence, pack};
use crate::policy::Policy;
use crate::sft::{TokenisedExample, tokenise_one};
use crate::trainer::TokenGradients;
use crate::transformer::TransformerTrainer;

/// The loss of `[dpo]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PreferenceConfig {
    /// `dpo` (default), `ipo`, `hinge`, `robust`, `dpo_norm`, `kto` or `apo_zero_unpaired`.
    pub loss: PreferenceLoss,
    /// How firmly the policy is held to where it starts; less lets it go further. Above 0. Default 0.1.
    #[schemars(range(min = 0))]
    pub beta: f64,
    /// Share of preferences taken to be the wrong way round (`dpo`, `robust`). In [0, 0.5). Default 0.
    #[schemars(range(min = 0, max = 0.5))]
    pub label_smoothing: f64,
    /// Weight of wanted completions in `kto`. 0 or more. Default 1.
    #[schemars(range(min = 0))]
    pub desirable_weight: f64,
    /// Weight of unwanted completions in `kto`. 0 or more. Default 1.
    #[schemars(range(min = 0))]
    pub undesirable_weight: f64,
    /// Weight of the mean cross-entropy on chosen (wanted) completions, added to the loss. 0 or more. Default 0.
    #[schemars(range(min = 0))]
    pub sft_coef: f64,
}

impl Default for PreferenceConfig {
    fn default() -> Self {
        Self {
            loss: PreferenceLoss::Dpo,
            beta: 0.1,
            label_smoothing: 0.0,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
            sft_coef: 0.0,
        }
    }
}

/// The `[dpo]` section, written flat.
#[derive(Clone, Debug, PartialEq)]
pub struct DpoConfig {
    /// The loop. Its fields are also reached directly: `config.steps`.
    pub fit: FitConfig,
    /// How the weights move.
    pub optimizer: OptimizerConfig,
    /// The loss.
    pub preference: PreferenceConfig,
}

flat_section!(DpoConfig { fit: FitConfig, optimizer: OptimizerConfig, preference: PreferenceConfig });

impl Default for DpoConfig {
    fn default() -> Self {
        Self {
            fit: FitConfig { learning_rate: 1e-6, weight_decay: 0.0, ..Default::default() },
            optimizer: OptimizerConfig::default(),
            preference: PreferenceConfig::default(),
        }
    }
}

impl DpoConfig {
    /// Everything wrong with the section, one line each. Empty: all is well.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = [self.fit.problems("dpo"), self.optimizer.problems("dpo")].concat();
        let p = &self.preference;
        if !(p.beta.is_finite() && p.beta > 0.0) {
            problems.push(format!("dpo.beta is {}, outside finite values above 0", p.beta));
        }
        if !(0.0..0.5).contains(&p.label_smoothing) {
            problems.push(format!("dpo.label_smoothing is {}, outside 0 to below 0.5", p.label_smoothing));
        }
        for (key, weight) in [
            ("desirable_weight", p.desirable_weight),
            ("undesirable_weight", p.undesirable_weight),
            ("sft_coef", p.sft_coef),
        ] {
            if !(weight.is_finite() && weight >= 0.0) {
                problems.push(format!("dpo.{key} is {weight}, outside finite values of 0 or more"));
            }
        }
        problems
    }

    fn settings(&self) -> Preference {
        let p = &self.preference;
        Preference {
            loss: p.loss,
            beta: p.beta,
            label_smoothing: p.label_smoothing,
            desirable_weight: p.desirable_weight,
            undesirable_weight: p.undesirable_weight,
        }
    }
}

/// A preference as people write it.
#[derive(Clone, Debug, PartialEq)]
pub struct PreferenceExample {
    /// What is asked.
    pub prompt: Prompt,
    /// What is said about answers to it.
    pub judgement: Judgement,
}

/// What is said about answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Judgement {
    /// One is better than another.
    Pair {
        /// The better one.
        chosen: String,
        /// The worse one.
        rejected: String,
    },
    /// One is wanted or not.
    Label {
        /// The answer.
        completion: String,
        /// Whether it is wanted.
        desirable: bool,
    },
}

/// Preferences as the model sees them: completions, and what is said about them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Preferences {
    /// All completions with their prompts.
    pub completions: Vec<TokenisedExample>,
    /// One entry an example: indices of completions.
    pub units: Vec<Unit>,
}

/// One example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Chosen, rejected.
    Pair(usize, usize),
    /// A completion and whether it is wanted.
    Single(usize, bool),
}

/// Trains `model` in place on `examples`, one metrics line a step. Saving it is the caller's: `freewheel_model::save`.
///
/// # Errors
/// If the config is bad, an example does not suit the loss, cannot be tokenised or is too long, or the gradient stops being finite.
pub fn run_dpo(
    config: &DpoConfig,
    model: &mut LoadedModel,
    examples: impl IntoIterator<Item = PreferenceExample>,
    metrics: &dyn MetricsSink,
) -> Result<FitSummary, LearnerError> {
    let preferences = tokenise(config, model, examples)?;
    let mut policy = policy(("dpo", &config.fit), &config.optimizer, config.problems(), model, |threads| {
        let trainer = TransformerTrainer::new(&model.model, &model.params, threads);
        Box::new(trainer.configured(&config.optimizer))
    })?;
    let summary = train(config, &mut policy, &preferences, metrics)?;
    model.params = policy.weights().clone();
    Ok(summary)
}

fn tokenise(
    config: &DpoConfig,
    model: &LoadedModel,
    examples: impl IntoIterator<Item = PreferenceExample>,
) -> Result<Preferences, LearnerError> {
    let limit = config.max_tokens.unwrap_or(model.model.spec().max_positions);
    let eos = model.generation.eos_ids.first().copied();
    let paired = config.preference.loss.is_paired();
    let mut found = Preferences::default();
    for (index, example) in examples.into_iter().enumerate() {
        let mut add = |completion: &str| {
            let tokenised = tokenise_one(&model.tokenizer, eos, &example.prompt, completion, limit, index)?;
            found.completions.push(tokenised);
            Ok::<usize, LearnerError>(found.completions.len() - 1)
        };
        match (&example.judgement, paired) {
            (Judgement::Pair { chosen, rejected }, true) => {
                let pair = Unit::Pair(add(chosen)?, add(rejected)?);
                found.units.push(pair);
            }
            (Judgement::Pair { chosen, rejected }, false) => {
                let (wanted, unwanted) =
                    (Unit::Single(add(chosen)?, true), Unit::Single(add(rejected)?, false));
                found.units.extend([wanted, unwanted]);
            }
            (Judgement::Label { completion, desirable }, false) => {
                let single = Unit::Single(add(completion)?, *desirable);
                found.units.push(single);
            }
            (Judgement::Label { .. }, true) => {
                let what = "has `completion` and `label`; this loss needs `chosen` and `rejected` \
                            (dpo.loss = \"kto\" takes labels)";
                return Err(LearnerError::Example { index, what: what.into() });
            }
        }
    }
    if found.units.is_empty() {
        return Err(LearnerError::Config("no examples to train on".into()));
    }
    Ok(found)
}

/// The loop on tokenised preferences, over any `PolicyTrainer`. The reference is `policy` as it comes.
///
/// # Errors
/// If loss or gradient stop being finite.
pub fn train(
    config: &DpoConfig,
    policy: &mut Policy,
    data: &Preferences,
    metrics: &dyn MetricsSink,
) -> Result<FitSummary, LearnerError> {
    let kto = config.preference.loss == PreferenceLoss::Kto;
    let mismatched = if kto { mismatched(data) } else { Vec::new() };
    let budget = config.micro_batch_tokens;
    let reference =
        summed(policy, &data.completions.iter().map(TokenisedExample::sequence).collect::<Vec<_>>(), budget);
    let mismatched_reference =
        summed(policy, &mismatched.iter().map(TokenisedExample::sequence).collect::<Vec<_>>(), budget);
    fit(("dpo", &config.fit), policy, data.units.len(), metrics, |policy, _, picked| {
        let divergence = if kto {
            let rows: Vec<TrainSequence> = picked.iter().map(|&i| mismatched[i].sequence()).collect();
            let now = summed(policy, &rows, budget);
            let gaps = picked.iter().zip(now).map(|(&i, now)| now - mismatched_reference[i]);
            (gaps.sum::<f64>() / picked.len() as f64).max(0.0)
        } else {
            0.0
        };
        let batch = Batch { config, data, reference: &reference, divergence };
        batch.accumulate(policy, picked)
    })
}

/// The prompt of each example with the completion of the next one that has another prompt, for the divergence of KTO. (The two
/// answers of a pair have the same: neither is a mismatch for the other.)
fn mismatched(data: &Preferences) -> Vec<TokenisedExample> {
    let of = |unit: &Unit| match unit {
        Unit::Single(index, _) | Unit::Pair(index, _) => &data.completions[*index],
    };
    let units: Vec<&TokenisedExample> = data.units.iter().map(of).collect();
    let n = units.len();
    let differ = |i: usize| units[i].prompt_ids != units[(i + 1) % n].prompt_ids;
    // Backwards from where the prompt changes; if it never does, the next has to do.
    let change = (0..n).find(|&i| differ(i));
    let mut other: Vec<usize> = (0..n).map(|i| (i + 1) % n).collect();
    for back in (1..n).filter(|_| change.is_some()) {
        let i = (change.unwrap_or(0) + n - back) % n;
        if !differ(i) {
            other[i] = other[(i + 1) % n];
        }
    }
    let mismatch = |(unit, &other): (&&TokenisedExample, &usize)| TokenisedExample {
        output_ids: units[other].output_ids.clone(),
        ..(*unit).clone()
    };
    units.iter().zip(&other).map(mismatch).collect()
}

/// Σ log-probs of each sequence.
fn summed(policy: &Policy, sequences: &[TrainSequence<'_>], budget: usize) -> Vec<f64> {
    let mut sums = vec![0.0; sequences.len()];
    for packed in pack(sequences, budget) {
        let found = policy.log_probs(&packed);
        for sequence in &packed.sequences {
            sums[sequence.index] = sum(&found.logprobs[sequence.targets.clone()]);
        }
    }
    sums
}

fn sum(logprobs: &[f32]) -> f64 {
    logprobs.iter().map(|&x| f64::from(x)).sum()
}

struct Batch<'a> {
    config: &'a DpoConfig,
    data: &'a Preferences,
    reference: &'a [f64],
    divergence: f64,
}

impl Batch<'_> {
    /// Log-probs of all completions first, then the gradient: the two of a pair may lie in different micro-batches.
    fn accumulate(&self, policy: &mut Policy, picked: &[usize]) -> BatchLoss {
        let mut indices = Vec::with_capacity(2 * picked.len());
        for &i in picked {
            match self.data.units[i] {
                Unit::Pair(chosen, rejected) => indices.extend([chosen, rejected]),
                Unit::Single(index, _) => indices.push(index),
            }
        }
        // An example picked twice is computed once, with both shares of the gradient.
        let mut seen = BTreeSet::new();
        indices.retain(|&index| seen.insert(index));
        let sequences: Vec<TrainSequence> =
            indices.iter().map(|&i| self.data.completions[i].sequence()).collect();
        let budget = self.config.micro_batch_tokens;
        let now: BTreeMap<usize, f64> =
            indices.iter().copied().zip(summed(policy, &sequences, budget)).collect();
        let (mut out, slopes) = self.terms(picked, &now);
        for packed in policy.micro_batches(&sequences, budget) {
            policy.accumulate(&packed, &mut |found| {
                let mut d_logprobs = vec![0.0; found.logprobs.len()];
                for sequence in &packed.sequences {
                    let slope = slopes[&indices[sequence.index]];
                    d_logprobs[sequence.targets.clone()].fill(slope as f32);
                }
                TokenGradients { d_logprobs, d_entropies: None }
            });
        }
        out.tokens = sequences.iter().map(|s| s.output_ids.len() as u64).sum();
        out
    }

    /// Loss with its metrics, and its derivative by each completion's summed log-probs.
    fn terms(&self, picked: &[usize], now: &BTreeMap<usize, f64>) -> (BatchLoss, BTreeMap<usize, f64>) {
        let (settings, share) = (self.config.settings(), 1.0 / picked.len() as f64);
        let at = |index: usize| Summed {
            policy: now[&index],
            reference: self.reference[index],
            tokens: self.data.completions[index].output_ids.len(),
        };
        let mut slopes: BTreeMap<usize, f64> = BTreeMap::new();
        let (mut loss, mut right, mut sft) = (0.0, 0.0, 0.0);
        let (mut good, mut bad) = ((0.0, 0u32), (0.0, 0u32));
        let mut imitate = |index: usize, slopes: &mut BTreeMap<usize, f64>| {
            let (completion, weight) = (at(index), share * self.config.preference.sft_coef);
            sft -= share * completion.policy / completion.tokens as f64;
            *slopes.entry(index).or_default() -= weight / completion.tokens as f64;
        };
        for &i in picked {
            match self.data.units[i] {
                Unit::Pair(chosen, rejected) => {
                    let (c, r) = (at(chosen), at(rejected));
                    let term = settings.pair(&c, &r);
                    loss += share * term.loss;
                    *slopes.entry(chosen).or_default() += share * term.d_chosen;
                    *slopes.entry(rejected).or_default() += share * term.d_rejected;
                    right += share * f64::from(u8::from(c.log_ratio() > r.log_ratio()));
                    good = (good.0 + c.log_ratio(), good.1 + 1);
                    bad = (bad.0 + r.log_ratio(), bad.1 + 1);
                    imitate(chosen, &mut slopes);
                }
                Unit::Single(index, desirable) => {
                    let completion = at(index);
                    let (term, slope) = settings.single(&completion, desirable, self.divergence);
                    loss += share * term;
                    *slopes.entry(index).or_default() += share * slope;
                    let side = if desirable { &mut good } else { &mut bad };
                    *side = (side.0 + completion.log_ratio(), side.1 + 1);
                    let wanted = (completion.log_ratio() > self.divergence) == desirable;
                    right += share * f64::from(u8::from(wanted));
                    if desirable {
                        imitate(index, &mut slopes);
                    }
                }
            }
        }
        let mut out = BatchLoss { loss: loss + self.config.preference.sft_coef * sft, ..Default::default() };
        let mut put = |key: &str, value: f64| drop(out.extra.insert(key.into(), json!(value)));
        put("preference/accuracy", right);
        for (key, (sum, count)) in [("preference/chosen_reward", good), ("preference/rejected_reward", bad)] {
            if count > 0 {
                put(key, settings.beta * sum / f64::from(count));
            }
        }
        if self.config.preference.loss == PreferenceLoss::Kto {
            put("preference/kl", self.divergence);
        }
        (out, slopes)
    }
}

#[cfg(test)]
mod tests {
    use freewheel_kernels::Threads;
    use freewheel_types::WeightsDtype;

    use super::*;
    use crate::metrics::MemoryMetrics;
    use crate::testing::{Bigram, params};

    /// The first answer to a question is better than the second.
    fn preferences(paired: bool) -> Preferences {
        let mut data = Preferences::default();
        for prompt in 0..4 {
            for output_ids in [vec![prompt + 1, 7], vec![prompt + 2, 6, 7]] {
                data.completions.push(TokenisedExample {
                    prompt_ids: vec![prompt],
                    output_ids,
                    ..Default::default()
                });
            }
            let chosen = data.completions.len() - 2;
            match paired {
                true => data.units.push(Unit::Pair(chosen, chosen + 1)),
                false => data.units.extend([Unit::Single(chosen, true), Unit::Single(chosen + 1, false)]),
            }
        }
        data
    }

    #[test]
    fn a_mismatch_has_the_answer_to_another_question() {
        let data = preferences(false);
        let found = mismatched(&data);
        assert_eq!(found.len(), data.units.len());
        for (i, example) in found.iter().enumerate() {
            assert_eq!(example.prompt_ids, data.completions[i].prompt_ids);
            let next = &data.completions[2 * ((i / 2 + 1) % 4)];
            assert_eq!(example.output_ids, next.output_ids, "{i}: the first answer to the next question");
        }
        let mut same = data;
        same.completions.iter_mut().for_each(|completion| completion.prompt_ids = vec![0]);
        assert_eq!(mismatched(&same)[7].output_ids, same.completions[0].output_ids, "there is no other");
    }

    fn run(config: &DpoConfig) -> (Vec<f64>, Vec<f64>, String) {
        let params = params(WeightsDtype::F32);
        let trainer = Box::new(Bigram::new(&params));
        let settings = config.optimizer_settings(&config.optimizer);
        let mut policy = Policy::new(trainer, params, settings, Threads::single());
        let metrics = MemoryMetrics::default();
        let data = preferences(config.preference.loss.is_paired());
        train(config, &mut policy, &data, &metrics).unwrap();
        let column = |key: &str| metrics.lines().iter().map(|line| line[key].as_f64().unwrap()).collect();
        (column("train/loss"), column("preference/accuracy"), policy.digest().to_string())
    }

    fn config(loss: PreferenceLoss) -> DpoConfig {
        let mut config = DpoConfig::default();
        (config.steps, config.batch_size, config.learning_rate) = (60, 8, 0.02);
        (config.preference.loss, config.preference.beta) = (loss, 0.5);
        config
    }

    #[test]
    fn every_loss_falls_and_the_preferences_are_learnt() {
        for loss in [
            PreferenceLoss::Dpo,
            PreferenceLoss::Ipo,
            PreferenceLoss::Hinge,
            PreferenceLoss::Robust,
            PreferenceLoss::DpoNorm,
            PreferenceLoss::Kto,
            PreferenceLoss::ApoZeroUnpaired,
        ] {
            let (losses, accuracies, _) = run(&config(loss));
            assert!(losses[59] < 0.9 * losses[0], "{loss:?}: from {} to {}", losses[0], losses[59]);
            assert!(accuracies[59] >= 0.99, "{loss:?}: {accuracies:?}");
        }
    }

    #[test]
    fn the_first_loss_is_that_of_a_policy_equal_to_its_reference() {
        for (loss, at_start) in
            [(PreferenceLoss::Dpo, 2f64.ln()), (PreferenceLoss::Ipo, 1.0), (PreferenceLoss::Kto, 0.5)]
        {
            let (losses, ..) = run(&config(loss));
            assert!((losses[0] - at_start).abs() <= 1e-6, "{loss:?}: {}", losses[0]);
        }
    }

    #[test]
    fn micro_batches_do_not_matter_and_the_same_seed_gives_the_same_bytes() {
        let whole = run(&config(PreferenceLoss::Dpo));
        assert_eq!(run(&config(PreferenceLoss::Dpo)).2, whole.2);
        let mut split = config(PreferenceLoss::Dpo);
        split.micro_batch_tokens = 1;
        let split = run(&split);
        whole.0.iter().zip(&split.0).for_each(|(a, b)| assert!((a - b).abs() <= 1e-4, "{a} and {b}"));
    }
}
