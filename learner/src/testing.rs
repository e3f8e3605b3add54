//! A model small enough to see through, and deliveries that follow a script.

use std::path::Path;
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_model::vision::ImageTile;
use freewheel_model::{ParamData, ParamLayout, Params, TensorKind, TensorSpec};
use freewheel_types::{
    ActorId, CounterRng, Digest, ExpertTrace, FinishReason, PolicyVersion, Prompt, PromptBody, PromptId,
    RewardRecord, Rollout, SamplingParams, ScoredRollout, TaskId, Verdict, VersionSpan, WeightsDtype,
};

use crate::LearnerError;
use crate::assembly::Arrival;
use crate::checkpoint::ModelWriter;
use crate::config::LearnerConfig;
use crate::core::LearnerParts;
use crate::critic::Critic;
use crate::disk::Disk;
use crate::dual::DualConfig;
use crate::metrics::NoMetrics;
use crate::policy::Policy;
use crate::trainer::{PackedBatch, PolicyTrainer, PromptImages, TokenGradients, TokenLogProbs};

/// Vocabulary of the bigram model.
pub const VOCAB: usize = 8;

/// A table of logits: the next token depends on the one before.
pub struct Bigram {
    layout: Arc<ParamLayout>,
    logits: Vec<f32>,
}

/// Its initial parameters.
pub fn params(dtype: WeightsDtype) -> Params {
    let tensor =
        TensorSpec { name: "table".into(), shape: vec![VOCAB, VOCAB], offset: 0, kind: TensorKind::Mlp };
    let layout = Arc::new(ParamLayout { tensors: vec![tensor], total: VOCAB * VOCAB });
    let rng = CounterRng::new(1, 0);
    let values = (0..layout.total as u64).map(|i| rng.normal(i) as f32).collect();
    Params { layout, data: ParamData::F32(values) }.cast(dtype)
}

/// Tensors `t0`, `t1`, … of the shapes given.
pub fn layout_of(shapes: &[&[usize]]) -> Arc<ParamLayout> {
    let mut total = 0;
    let mut tensor = |(i, shape): (usize, &&[usize])| {
        let offset = total;
        total += shape.iter().product::<usize>();
        TensorSpec { name: format!("t{i}"), shape: shape.to_vec(), offset, kind: TensorKind::Mlp }
    };
    let tensors = shapes.iter().enumerate().map(&mut tensor).collect();
    Arc::new(ParamLayout { tensors, total })
}

impl Bigram {
    pub fn new(params: &Params) -> Self {
        Self { layout: params.layout.clone(), logits: params.to_f32() }
    }

    /// Log-probs of all tokens after `token`.
    pub fn row(&self, token: u32) -> Vec<f64> {
        let row = &self.logits[token as usize * VOCAB..][..VOCAB];
        let top = row.iter().copied().fold(f32::MIN, f32::max);
        let log_sum = row.iter().map(|x| f64::from(x - top).exp()).sum::<f64>().ln() + f64::from(top);
        row.iter().map(|x| f64::from(*x) - log_sum).collect()
    }
}

impl PolicyTrainer for Bigram {
    fn layout(&self) -> &Arc<ParamLayout> {
        &self.layout
    }

    fn load(&mut self, params: &Params, _version: PolicyVersion) {
        self.logits = params.to_f32();
    }

    fn log_probs(&self, batch: &PackedBatch) -> TokenLogProbs {
        let mut found = TokenLogProbs::default();
        for target in &batch.targets {
            let row = self.row(batch.tokens[target.row]);
            found.logprobs.push(row[target.token as usize] as f32);
            found.entropies.push(-row.iter().map(|l| l.exp() * l).sum::<f64>() as f32);
        }
        found
    }

    fn accumulate(
        &self,
        batch: &PackedBatch,
        loss: &mut dyn FnMut(&TokenLogProbs) -> TokenGradients,
        grads: &mut [f32],
    ) {
        let gradients = loss(&self.log_probs(batch));
        for (t, (target, d)) in batch.targets.iter().zip(&gradients.d_logprobs).enumerate() {
            let (token, row) = (batch.tokens[target.row], self.row(batch.tokens[target.row]));
            let d_entropy = gradients.d_entropies.as_ref().map_or(0.0, |d| f64::from(d[t]));
            let entropy = -row.iter().map(|l| l.exp() * l).sum::<f64>();
            for (v, log_p) in row.iter().enumerate() {
                let one = f64::from(u8::from(v == target.token as usize));
                let slope = f64::from(*d) * (one - log_p.exp()) - d_entropy * log_p.exp() * (log_p + entropy);
                grads[token as usize * VOCAB + v] += slope as f32;
            }
        }
    }
}

/// Writes the weights as one file.
pub struct PlainWriter(pub Arc<dyn Disk>);

impl ModelWriter for PlainWriter {
    fn write(&self, dir: &Path, weights: &Params) -> Result<(), LearnerError> {
        let path = dir.join("model.bin");
        self.0
            .write(&path, &mut |out| out.write_all(weights.as_bytes()))
            .map_err(LearnerError::disk(&path, "write"))
    }
}

/// Prompts without images.
pub struct TextOnly;

impl PromptImages for TextOnly {
    fn tiles_of(&self, _: &PromptBody, _: &[u32]) -> Result<Vec<ImageTile>, String> {
        Ok(Vec::new())
    }
}

/// Settings of a small run in strict issue order.
pub fn config(steps: u64) -> LearnerConfig {
    let mut config = LearnerConfig::default();
    (config.steps, config.groups_per_step, config.learning_rate) = (steps, 2, 0.05);
    (config.max_staleness, config.window, config.checkpoint_every) = (1000, 0, 2);
    config
}

/// A learner's parts around the bigram model.
pub fn parts(config: &LearnerConfig, run_dir: &Path, disk: Arc<dyn Disk>) -> LearnerParts {
    let params = params(WeightsDtype::Bf16);
    let trainer = Box::new(Bigram::new(&params));
    let reference =
        (config.loss.kl_coef > 0.0).then(|| Box::new(Bigram::new(&params)) as Box<dyn PolicyTrainer>);
    // Any model that answers with a number a target will do for a critic.
    let critic = config.loss.needs_critic().then(|| {
        let trainer = Box::new(Bigram::new(&params));
        let model = Policy::new(trainer, params.clone(), config.optimizer_settings(), Threads::single());
        Critic { model, clip: Some(0.2) }
    });
    LearnerParts {
        policy: Policy::new(trainer, params, config.optimizer_settings(), Threads::single()),
        config: config.clone(),
        reference,
        critic,
        group_size: 3,
        max_new_tokens: 8,
        tokenizer: Digest::of(b"tokenizer"),
        images: Arc::new(TextOnly),
        base: "base".into(),
        run_dir: run_dir.to_owned(),
        writer: Arc::new(PlainWriter(disk.clone())),
        disk,
        curriculum: None,
        duals: DualConfig::default(),
        metrics: Arc::new(NoMetrics),
    }
}

/// Sample `index` of `task`, drawn by `version`, with a reward.
pub fn scored(task: u64, index: u32, version: PolicyVersion, reward: f32) -> ScoredRollout {
    let rng = CounterRng::new(7, TaskId(task).rollout(index).0);
    let len = 2 + rng.below(0, 5);
    let output_ids: Vec<u32> = (0..len).map(|t| rng.below(1 + t, VOCAB as u64) as u32).collect();
    let name = format!("prompt {}", task % 5);
    ScoredRollout {
        rollout: Rollout {
            id: TaskId(task).rollout(index),
            group_size: 3,
            prompt: Prompt {
                id: PromptId::of(name.as_bytes()),
                name: None,
                body: PromptBody::Text(name),
                answer: None,
                tags: vec![],
                verifier: None,
                meta: None,
            },
            prompt_ids: vec![(task % VOCAB as u64) as u32],
            behaviour_logprobs: output_ids.iter().map(|&id| -1.0 - id as f32 * 0.25).collect(),
            versions: vec![VersionSpan { version, tokens: len as u32 }],
            output_ids,
            experts: ExpertTrace::default(),
            text: String::new(),
            finish_reason: FinishReason::Stop,
            sampling: SamplingParams::default(),
            actor: ActorId("actor-0".into()),
            generation_s: 0.1,
        },
        reward: RewardRecord {
            verdict: Verdict::Scored { reward, correct: Some(reward > 0.5), gated_by: None },
            components: vec![],
            costs: vec![],
            tier: None,
            reward_version: "test".into(),
            latency_ms: 0.0,
        },
    }
}

/// Makes it unscored.
pub fn unscored(mut rollout: ScoredRollout) -> ScoredRollout {
    rollout.reward.verdict = Verdict::Unscored { reason: "the verifier was away".into() };
    rollout
}

/// An arrival of version 0 whose reward teaches something within its group.
pub fn arrival(task: u64, index: u32) -> Arrival {
    Arrival::Scored(Box::new(scored(task, index, PolicyVersion::default(), index as f32)))
}

/// Arrivals of `tasks` groups, neighbours mixed up; every fifth group teaches nothing, every seventh has a bad member.
pub fn script(tasks: u64) -> Vec<Arrival> {
    let rng = CounterRng::new(11, 0);
    let mut keyed: Vec<(u64, Arrival)> = Vec::new();
    for task in 0..tasks {
        for index in 0..3 {
            let arrival = match (task % 5, task % 7, index) {
                (4, _, _) => Arrival::Scored(Box::new(scored(task, index, PolicyVersion::default(), 1.0))),
                (_, 6, 0) => Arrival::Bad(TaskId(task).rollout(0)),
                _ => arrival(task, index),
            };
            keyed.push((3 * task + rng.below(3 * task + u64::from(index), 9), arrival));
        }
    }
    keyed.sort_by_key(|(key, arrival)| (*key, arrival.rollout()));
    keyed.into_iter().map(|(_, arrival)| arrival).collect()
}
