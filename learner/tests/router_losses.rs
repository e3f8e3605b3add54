//! Losses of routers are over a whole update: how it is split into micro-batches changes nothing but the order of sums.

use freewheel_kernels::Threads;
use freewheel_learner::optim::{OptimizerConfig, OptimizerKind, OptimizerSettings};
use freewheel_learner::packing::{TrainSequence, pack};
use freewheel_learner::policy::Policy;
use freewheel_learner::trainer::{PackedBatch, TokenGradients};
use freewheel_learner::transformer::TransformerTrainer;
use freewheel_model::{InitRequest, InitScale, LoadedModel, TokenizerChoice, init_model};
use freewheel_types::{CounterRng, SamplingParams, WeightsDtype};
use serde_json::json;

/// Qwen3-MoE with six experts, two of them a token, and a router that prefers some of them.
fn model() -> LoadedModel {
    let sizes = [
        ("hidden_size", 32),
        ("num_hidden_layers", 2),
        ("num_attention_heads", 2),
        ("head_dim", 16),
        ("moe_intermediate_size", 16),
        ("num_experts", 6),
        ("num_experts_per_tok", 2),
    ];
    let request = InitRequest {
        arch: "qwen3_moe".into(),
        overrides: sizes.map(|(key, value)| (key.to_owned(), json!(value))).to_vec(),
        seed: 3,
        scale: InitScale::FanIn,
        dtype: WeightsDtype::F32,
        tokenizer: TokenizerChoice::Bytes,
    };
    init_model(&request).expect("a tiny model")
}

/// Two groups of four rollouts; with their experts recorded, `[rows, layers, top_k]`, where `replay`.
struct Rollouts {
    prompts: [Vec<u32>; 2],
    outputs: Vec<Vec<u32>>,
    experts: Option<Vec<Vec<u16>>>,
}

impl Rollouts {
    fn new(replay: bool) -> Self {
        let rng = CounterRng::new(7, 0);
        let ids = |from: u64, len: u64| -> Vec<u32> {
            (from..from + len).map(|i| rng.below(i, 200) as u32).collect()
        };
        let outputs: Vec<Vec<u32>> = (0..8u64).map(|i| ids(100 * (i + 1), 3 + i % 4)).collect();
        // The prompt's rows are routed alike in a whole group, as they are when it is sampled.
        let experts = |i: usize, output: &Vec<u32>| -> Vec<u16> {
            let rows = 5 + output.len() - 1;
            let choice = |at: usize| {
                let group = if at < 5 * 4 { i / 4 } else { 10 + i };
                rng.below((group * 1000 + at) as u64, 3) as u16 + 3 * (at % 2) as u16
            };
            (0..rows * 4).map(choice).collect()
        };
        let experts = replay.then(|| outputs.iter().enumerate().map(|(i, o)| experts(i, o)).collect());
        Self { prompts: [ids(0, 5), ids(50, 5)], outputs, experts }
    }

    fn sequences(&self) -> Vec<TrainSequence<'_>> {
        let sequence = |i: usize| TrainSequence {
            prompt_ids: &self.prompts[i / 4],
            output_ids: &self.outputs[i],
            tiles: &[],
            experts: self.experts.as_ref().map(|experts| &experts[i][..]),
            sampling: SamplingParams::default(),
        };
        (0..8).map(sequence).collect()
    }
}

fn policy(model: &LoadedModel) -> Policy {
    let config = OptimizerConfig {
        optimizer: OptimizerKind::Sgd,
        balance_coef: 5.0,
        router_z_coef: 0.5,
        ..Default::default()
    };
    let trainer = TransformerTrainer::new(&model.model, &model.params, Threads::single()).configured(&config);
    let settings = OptimizerSettings { config, max_grad_norm: None, ..Default::default() };
    Policy::new(Box::new(trainer), model.params.clone(), settings, Threads::single())
}

/// The gradient of the routers' losses alone: what SGD at rate 1 takes away.
fn gradient(model: &LoadedModel, micro_batches: impl Fn(&Policy) -> Vec<PackedBatch>) -> Vec<f64> {
    let mut policy = policy(model);
    for batch in micro_batches(&policy) {
        policy.accumulate(&batch, &mut |found| TokenGradients {
            d_logprobs: vec![0.0; found.logprobs.len()],
            d_entropies: None,
        });
    }
    policy.update(1.0);
    let (before, after) = (model.params.to_f32(), policy.weights().to_f32());
    before.iter().zip(after).map(|(before, after)| f64::from(*before) - f64::from(after)).collect()
}

/// Length of the difference over that of `a`.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    length(&mut a.iter().zip(b).map(|(a, b)| a - b)) / length(&mut a.iter().copied())
}

#[test]
fn the_split_changes_nothing() {
    let model = model();
    for replay in [false, true] {
        let rollouts = Rollouts::new(replay);
        let sequences = rollouts.sequences();
        let whole = gradient(&model, |policy| policy.micro_batches(&sequences, 1000));
        assert!(whole.iter().any(|x| x.abs() > 1e-3), "the routers' losses have a gradient");
        for budget in [30, 17, 1] {
            let split = gradient(&model, |policy| policy.micro_batches(&sequences, budget));
            let error = distance(&whole, &split);
            println!("replay {replay}, micro-batches of {budget} rows: {error:.1e}");
            assert!(error <= 2e-4, "replay {replay}, budget {budget}: {error}");
            // Counts of a micro-batch alone would give something else.
            let alone = distance(&whole, &gradient(&model, |_| pack(&sequences, budget)));
            assert!(alone >= 20.0 * error.max(1e-4), "replay {replay}, budget {budget}: {alone}");
        }
    }
}
