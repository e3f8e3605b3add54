//! MetaP's coordinate check: activations stay as large at every width, at the start and while training.

use freewheel_kernels::Threads;
use freewheel_learner::fit::FitConfig;
use freewheel_learner::optim::{Optimizer, OptimizerConfig, StepOutcome};
use freewheel_model::{
    InitRequest, InitScale, LoadedModel, MetaP, PolicyWeights, Purpose, Target, TokenizerChoice, TrainBatch,
    TrainSeq, init_model,
};
use freewheel_types::{CounterRng, PolicyVersion, SamplingParams, WeightsDtype};
use serde_json::json;

const BASE: MetaP = MetaP { width: 64, layers: 2 };
const STEPS: usize = 5;

fn model(width: usize, scale: InitScale) -> LoadedModel {
    let overrides = [
        ("hidden_size", width),
        ("num_hidden_layers", BASE.layers),
        ("head_dim", 16),
        ("num_attention_heads", width / 16),
        ("num_key_value_heads", width / 16),
        ("moe_intermediate_size", width / 2),
        ("num_experts", 4),
    ];
    let request = InitRequest {
        arch: "qwen3_moe".into(),
        overrides: overrides.map(|(key, value)| (key.to_owned(), json!(value))).to_vec(),
        seed: 5,
        scale,
        dtype: WeightsDtype::F32,
        tokenizer: TokenizerChoice::Bytes,
    };
    init_model(&request).expect("a small model")
}

/// Root mean squares of the residual stream behind each layer and of the logits: at the start, and how far they have moved after
/// some updates.
fn activations(width: usize, metap: bool) -> (Vec<f64>, Vec<f64>) {
    let scale = if metap { InitScale::MetaP(BASE) } else { InitScale::FanIn };
    let loaded = model(width, scale);
    let (model, threads) = (&loaded.model, Threads::new(2));
    let mut params = loaded.params.clone();
    let optimizer = OptimizerConfig {
        metap_base_width: metap.then_some(BASE.width),
        metap_base_layers: metap.then_some(BASE.layers),
        ..Default::default()
    };
    let fit = FitConfig { weight_decay: 0.0, ..Default::default() };
    let mut optimizer = Optimizer::new(fit.optimizer_settings(&optimizer), &params);
    let rng = CounterRng::new(1, 1);
    let tokens: Vec<u32> = (0..48).map(|i| rng.below(i, 200) as u32).collect();
    let seqs = [TrainSeq::whole(24), TrainSeq::whole(24)];
    let targets: Vec<Target> =
        (0..48).filter(|row| row % 24 != 23).map(|row| Target { row, token: tokens[row + 1] }).collect();
    let rows: Vec<usize> = (0..48).collect();
    let (mut first, mut last) = (Vec::new(), Vec::new());
    for step in 0..=STEPS {
        let version = PolicyVersion::default();
        let weights = PolicyWeights::pack(model, &params, version, Purpose::Training, &threads);
        let batch = TrainBatch { tokens: &tokens, seqs: &seqs, replay: None, tiles: &[] };
        let tape = weights.forward_train(&threads, &batch);
        let logits: Vec<f64> = tape.logits(&threads, &weights, &rows).iter().map(|&x| f64::from(x)).collect();
        let mut rms = tape.residual_rms();
        if step == 0 {
            rms.push((logits.iter().map(|x| x * x).sum::<f64>() / logits.len() as f64).sqrt());
            first = rms;
            last = logits;
        } else if step == STEPS {
            let moved = logits.iter().zip(&last).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
            rms.push((moved / logits.len() as f64).sqrt());
            return (first, rms);
        }
        let mut grads = vec![0.0; params.layout.total];
        let slope = vec![-1.0 / targets.len() as f32; targets.len()];
        tape.backward(&threads, &weights, &targets, &SamplingParams::default(), &slope, None, &mut grads);
        let outcome = optimizer.step(&threads, &mut grads, 4e-3);
        assert!(matches!(outcome, StepOutcome::Applied { .. }), "{outcome:?}");
        optimizer.write_weights(&threads, &mut params);
    }
    unreachable!("the last step returns");
}

/// Largest over smallest among widths, of each activation.
fn spread(of: &[Vec<f64>]) -> Vec<f64> {
    let columns = 0..of[0].len();
    let column = |i: usize| of.iter().map(move |row| row[i]);
    columns.map(|i| column(i).fold(0.0, f64::max) / column(i).fold(f64::INFINITY, f64::min)).collect()
}

#[test]
fn activations_are_as_large_at_every_width() {
    let widths = [64, 128, 256, 512];
    let run = |metap: bool| -> (Vec<f64>, Vec<f64>) {
        let all: Vec<_> = widths.map(|width| activations(width, metap)).to_vec();
        for (width, (first, last)) in widths.iter().zip(&all) {
            println!("metap {metap}, width {width}: {first:.3?} then {last:.3?}");
        }
        let (first, last): (Vec<_>, Vec<_>) = all.into_iter().unzip();
        (spread(&first), spread(&last))
    };
    let ((first, last), (_, plain)) = (run(true), run(false));
    let logits = first.len() - 1;
    assert!(first[..logits].iter().all(|ratio| *ratio <= 1.15), "at the start {first:?}");
    assert!(last[..logits].iter().all(|ratio| *ratio <= 1.15), "after {STEPS} updates {last:?}");
    // How far logits move falls a little: the random part of the head, which they move along too, shrinks with the width.
    assert!(last[logits] <= 2.5, "after {STEPS} updates {last:?}");
    assert!(plain[1] >= 3.0 && plain[2] >= 2.5, "without MetaP activations grow with the width: {plain:?}");
}

#[test]
fn at_the_base_it_is_the_usual_start_and_rates_are_one() {
    let (usual, metap) = (model(64, InitScale::FanIn), model(64, InitScale::MetaP(BASE)));
    assert_eq!(usual.params, metap.params);
    let growth = BASE.growth(&metap.params.layout).unwrap();
    assert!(metap.params.layout.tensors.iter().all(|tensor| growth.rate(tensor) == 1.0));
    let growth = MetaP { width: 16, layers: 1 }.growth(&metap.params.layout).unwrap();
    let rate =
        |end: &str| growth.rate(metap.params.layout.tensors.iter().find(|t| t.name.ends_with(end)).unwrap());
    for (end, want) in [
        ("embed_tokens.weight", 1.0),
        ("input_layernorm.weight", 1.0),
        ("q_proj.weight", 0.25),
        ("o_proj.weight", 0.125),
        ("mlp.gate.weight", 0.25),
        ("lm_head.weight", 0.25),
    ] {
        assert_eq!(rate(end), want, "{end}");
    }
}
