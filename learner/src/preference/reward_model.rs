//! A reward model from pairs: a score for each text, so that better answers score higher (Bradley and Terry 1952).

use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_model::{
    LoadedModel, ParamLayout, Params, PolicyWeights, Purpose, RenderOptions, Tape, TileRows, Tokenizer,
    TrainBatch, Transformer, score_row,
};
use freewheel_types::{Message, PolicyVersion, Prompt, PromptBody, SamplingParams};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::loss::bradley_terry;
use crate::LearnerError;
use crate::fit::{BatchLoss, FitConfig, FitSummary, fit, policy};
use crate::flat::flat_section;
use crate::metrics::MetricsSink;
use crate::optim::OptimizerConfig;
use crate::packing::{TrainSequence, pack};
use crate::policy::Policy;
use crate::trainer::{ExpertLoad, PackedBatch, PolicyTrainer, TokenGradients, TokenLogProbs};
use crate::transformer::expert_load;

/// The loss of `[reward_model]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ScoreConfig {
    /// Weight of the mean squared sum of a pair's scores, which keeps scores around 0. 0 or more. Default 0.01.
    #[schemars(range(min = 0))]
    pub center_coef: f64,
}

impl Default for ScoreConfig {
    fn default() -> Self {
        Self { center_coef: 0.01 }
    }
}

/// The `[reward_model]` section, written flat.
#[derive(Clone, Debug, PartialEq)]
pub struct RewardModelConfig {
    /// The loop. Its fields are also reached directly: `config.steps`.
    pub fit: FitConfig,
    /// How the weights move.
    pub optimizer: OptimizerConfig,
    /// The loss.
    pub score: ScoreConfig,
}

flat_section!(RewardModelConfig { fit: FitConfig, optimizer: OptimizerConfig, score: ScoreConfig });

impl Default for RewardModelConfig {
    fn default() -> Self {
        Self {
            fit: FitConfig { learning_rate: 1e-5, weight_decay: 0.0, ..Default::default() },
            optimizer: OptimizerConfig::default(),
            score: ScoreConfig::default(),
        }
    }
}

impl RewardModelConfig {
    /// Everything wrong with the section, one line each. Empty: all is well.
    pub fn problems(&self) -> Vec<String> {
        let mut problems =
            [self.fit.problems("reward_model"), self.optimizer.problems("reward_model")].concat();
        let coef = self.score.center_coef;
        if !(coef.is_finite() && coef >= 0.0) {
            problems.push(format!("reward_model.center_coef is {coef}, outside finite values of 0 or more"));
        }
        problems
    }
}

/// Two texts as the model reads them, the better one first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScoredPair {
    /// Ids of the better text.
    pub chosen: Vec<u32>,
    /// Ids of the worse text.
    pub rejected: Vec<u32>,
    /// By how much the better one is to score higher; 0 where nothing is known.
    pub margin: f64,
}

/// How a model judges pairs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairReport {
    /// Pairs.
    pub pairs: usize,
    /// Share of pairs whose better text scores higher; equal scores count half.
    pub accuracy: f64,
    /// Mean of −log σ(difference).
    pub loss: f64,
    /// Mean difference of the scores.
    pub margin: f64,
}

/// Trains the classifier `model` (one label) in place on `pairs`, one metrics line a step.
///
/// # Errors
/// If the config is bad, there are no pairs, or the gradient stops being finite.
///
/// # Panics
/// If the model is no classifier, or a text has no tokens.
pub fn run_reward_model(
    config: &RewardModelConfig,
    model: &mut LoadedModel,
    pairs: &[ScoredPair],
    metrics: &dyn MetricsSink,
) -> Result<FitSummary, LearnerError> {
    if pairs.is_empty() {
        return Err(LearnerError::Config("no examples to train on".into()));
    }
    let mut policy =
        policy(("reward_model", &config.fit), &config.optimizer, config.problems(), model, |threads| {
            Box::new(ScoreTrainer::new(&model.model, &model.params, threads).configured(&config.optimizer))
        })?;
    let summary = train(config, &mut policy, pairs, metrics)?;
    model.params = policy.weights().clone();
    Ok(summary)
}

/// `texts`, the better one first, as answers to `prompt` in the model's chat template; of each the part that decides its score.
///
/// # Errors
/// If they cannot be rendered, or one is longer than `limit`; `index` names the example.
pub fn tokenise_pair(
    tokenizer: &Tokenizer,
    pad_id: Option<u32>,
    prompt: &Prompt,
    texts: (&str, &str),
    limit: usize,
    index: usize,
) -> Result<ScoredPair, LearnerError> {
    let bad = |what: String| LearnerError::Example { index, what };
    let turns = match &prompt.body {
        PromptBody::Messages(messages) => messages.clone(),
        PromptBody::Text(text) => vec![Message::text("user", text)],
    };
    let ids = |answer: &str| {
        let mut turns = turns.clone();
        turns.push(Message::text("assistant", answer));
        let options = RenderOptions { add_generation_prompt: false, ..RenderOptions::default() };
        let mut ids = tokenizer.encode_messages(&turns, &options).map_err(|e| bad(e.to_string()))?.ids;
        ids.truncate(score_row(&ids, pad_id) + 1);
        match ids.len() {
            0 => Err(bad("a text has no tokens".into())),
            len if len > limit => Err(bad(format!("{len} tokens, more than max_tokens ({limit})"))),
            _ => Ok(ids),
        }
    };
    Ok(ScoredPair { chosen: ids(texts.0)?, rejected: ids(texts.1)?, margin: 0.0 })
}

/// The loop, over any trainer whose values are scores.
///
/// # Errors
/// If loss or gradient stop being finite.
pub fn train(
    config: &RewardModelConfig,
    policy: &mut Policy,
    pairs: &[ScoredPair],
    metrics: &dyn MetricsSink,
) -> Result<FitSummary, LearnerError> {
    fit(("reward_model", &config.fit), policy, pairs.len(), metrics, |policy, _, picked| {
        let picked: Vec<&ScoredPair> = picked.iter().map(|&i| &pairs[i]).collect();
        accumulate(policy, &picked, config.score.center_coef, config.micro_batch_tokens)
    })
}

/// Scores of all texts first, then the gradient: the two of a pair may lie in different micro-batches.
fn accumulate(policy: &mut Policy, pairs: &[&ScoredPair], center_coef: f64, budget: usize) -> BatchLoss {
    let sequences = sequences(pairs);
    let scores = scores(&|packed| policy.log_probs(packed), &sequences, budget);
    let share = 1.0 / pairs.len() as f64;
    let mut slopes = vec![0.0; sequences.len()];
    let (mut loss, mut right, mut difference) = (0.0, 0.0, 0.0);
    for (i, pair) in pairs.iter().enumerate() {
        let (chosen, rejected) = (scores[2 * i], scores[2 * i + 1]);
        let (term, slope) = bradley_terry(chosen, rejected, pair.margin);
        let sum = chosen + rejected;
        loss += share * (term + center_coef * sum * sum);
        slopes[2 * i] = share * (slope + 2.0 * center_coef * sum);
        slopes[2 * i + 1] = share * (-slope + 2.0 * center_coef * sum);
        right += share * ordered(chosen, rejected);
        difference += share * (chosen - rejected);
    }
    for packed in policy.micro_batches(&sequences, budget) {
        policy.accumulate(&packed, &mut |found| {
            let mut d_logprobs = vec![0.0; found.logprobs.len()];
            for sequence in &packed.sequences {
                d_logprobs[sequence.targets.clone()].fill(slopes[sequence.index] as f32);
            }
            TokenGradients { d_logprobs, d_entropies: None }
        });
    }
    let mut out = BatchLoss { loss, ..Default::default() };
    out.tokens = sequences.iter().map(|s| s.rows() as u64).sum();
    out.extra.insert("preference/accuracy".into(), json!(right));
    out.extra.insert("preference/margin".into(), json!(difference));
    out
}

fn ordered(chosen: f64, rejected: f64) -> f64 {
    match chosen.total_cmp(&rejected) {
        std::cmp::Ordering::Greater => 1.0,
        std::cmp::Ordering::Equal => 0.5,
        std::cmp::Ordering::Less => 0.0,
    }
}

/// How `model` judges `pairs`.
pub fn judge(model: &LoadedModel, pairs: &[ScoredPair], budget: usize, threads: &Threads) -> PairReport {
    let trainer = ScoreTrainer::new(&model.model, &model.params, threads.clone());
    let pairs: Vec<&ScoredPair> = pairs.iter().collect();
    let scores = scores(&|packed| trainer.log_probs(packed), &sequences(&pairs), budget);
    let mut report = PairReport { pairs: pairs.len(), accuracy: 0.0, loss: 0.0, margin: 0.0 };
    let share = 1.0 / pairs.len().max(1) as f64;
    for pair in scores.chunks_exact(2) {
        report.accuracy += share * ordered(pair[0], pair[1]);
        report.loss += share * bradley_terry(pair[0], pair[1], 0.0).0;
        report.margin += share * (pair[0] - pair[1]);
    }
    report
}

/// Each text once, with one target at its last token.
fn sequences<'a>(pairs: &[&'a ScoredPair]) -> Vec<TrainSequence<'a>> {
    // The token to predict is never read: it stands for the score.
    const SCORE: &[u32] = &[0];
    let text = |ids: &'a [u32]| TrainSequence {
        prompt_ids: ids,
        output_ids: SCORE,
        tiles: &[],
        experts: None,
        sampling: SamplingParams::default(),
    };
    pairs.iter().flat_map(|pair| [text(&pair.chosen), text(&pair.rejected)]).collect()
}

fn scores(
    values: &dyn Fn(&PackedBatch) -> TokenLogProbs,
    sequences: &[TrainSequence<'_>],
    budget: usize,
) -> Vec<f64> {
    let mut scores = vec![0.0; sequences.len()];
    for packed in pack(sequences, budget) {
        let found = values(&packed);
        for sequence in &packed.sequences {
            scores[sequence.index] = f64::from(found.logprobs[sequence.targets.start]);
        }
    }
    scores
}

/// A classifier with one label behind [`PolicyTrainer`]: its value at a target is the score of the target's row.
pub struct ScoreTrainer {
    weights: PolicyWeights,
    threads: Threads,
    /// Whether the load-balancing loss is on.
    balances: bool,
}

impl ScoreTrainer {
    /// Packs `params`.
    pub fn new(model: &Arc<Transformer>, params: &Params, threads: Threads) -> Self {
        let version = PolicyVersion::default();
        let weights = PolicyWeights::pack(model, params, version, Purpose::Training, &threads);
        Self { weights, threads, balances: false }
    }

    /// Trains as `config` asks: losses of routers, recomputation.
    pub fn configured(mut self, config: &OptimizerConfig) -> Self {
        self.weights.set_train_options(config.train_options());
        let routes = self.weights.model().spec().moe_layers() > 0;
        self.balances = routes && config.balance_coef > 0.0;
        self
    }

    /// Rows that are asked for, each once, and which of them each target's is.
    fn rows(batch: &PackedBatch) -> (Vec<usize>, Vec<usize>) {
        let mut rows: Vec<usize> = batch.targets.iter().map(|target| target.row).collect();
        rows.sort_unstable();
        rows.dedup();
        let place = |row: usize| rows.binary_search(&row).expect("every target's row is among them");
        let places = batch.targets.iter().map(|target| place(target.row)).collect();
        (rows, places)
    }

    fn tape(&self, batch: &PackedBatch) -> Tape {
        let tiles: Vec<TileRows> =
            batch.tiles.iter().filter_map(|tile| tile.rows_in(0, batch.tokens.len())).collect();
        let train = TrainBatch { tokens: &batch.tokens, seqs: &batch.seqs, replay: None, tiles: &tiles };
        self.weights.forward_train(&self.threads, &train)
    }
}

impl PolicyTrainer for ScoreTrainer {
    fn layout(&self) -> &Arc<ParamLayout> {
        self.weights.model().layout()
    }

    fn load(&mut self, params: &Params, version: PolicyVersion) {
        self.weights.repack(params, version, &self.threads);
    }

    fn foresee_experts(&self, batches: &[PackedBatch]) -> Option<ExpertLoad> {
        let ask = self.balances && batches.len() > 1;
        ask.then(|| expert_load(&self.weights, batches, |batch| self.tape(batch)))
    }

    fn log_probs(&self, batch: &PackedBatch) -> TokenLogProbs {
        let (rows, places) = Self::rows(batch);
        let scores = self.tape(batch).logits(&self.threads, &self.weights, &rows);
        let logprobs: Vec<f32> = places.iter().map(|&place| scores[place]).collect();
        TokenLogProbs { entropies: vec![0.0; logprobs.len()], logprobs }
    }

    fn accumulate(
        &self,
        batch: &PackedBatch,
        loss: &mut dyn FnMut(&TokenLogProbs) -> TokenGradients,
        grads: &mut [f32],
    ) {
        let (rows, places) = Self::rows(batch);
        let mut tape = self.tape(batch);
        tape.set_part(batch.part.clone());
        let scores = tape.logits(&self.threads, &self.weights, &rows);
        let logprobs: Vec<f32> = places.iter().map(|&place| scores[place]).collect();
        let gradients = loss(&TokenLogProbs { entropies: vec![0.0; logprobs.len()], logprobs });
        let mut d_scores = vec![0.0; rows.len()];
        for (&place, d) in places.iter().zip(&gradients.d_logprobs) {
            d_scores[place] += d;
        }
        tape.backward_logits(&self.threads, &self.weights, &rows, &d_scores, grads);
    }
}
