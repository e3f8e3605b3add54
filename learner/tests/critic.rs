//! The critic on a real transformer: values of 0 at first, and the gradient of what it answers.

use std::path::PathBuf;

use freewheel_kernels::Threads;
use freewheel_learner::critic::TransformerCritic;
use freewheel_learner::packing::{TrainSequence, pack};
use freewheel_learner::trainer::{PackedBatch, PolicyTrainer, TokenGradients};
use freewheel_model::{LoadedModel, ParamData, Params};
use freewheel_types::{CounterRng, PolicyVersion, SamplingParams};

fn model() -> LoadedModel {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/llama3");
    freewheel_model::load(&folder, None).expect("a fixture")
}

/// Three rollouts of one prompt, which share the row before their first token, and one of another.
fn batch() -> PackedBatch {
    let ids: Vec<u32> = (5..40).collect();
    let sequence = |prompt: std::ops::Range<usize>, output: std::ops::Range<usize>| TrainSequence {
        prompt_ids: &ids[prompt],
        output_ids: &ids[output],
        tiles: &[],
        experts: None,
        sampling: SamplingParams::default(),
    };
    let sequences =
        [sequence(0..4, 6..10), sequence(0..4, 12..13), sequence(0..4, 20..26), sequence(9..14, 30..34)];
    let mut packed = pack(&sequences, 1000);
    assert_eq!(packed.len(), 1);
    packed.remove(0)
}

/// The critic at weights whose score head is not zero.
fn started() -> (TransformerCritic, Params) {
    let (mut critic, mut params) = TransformerCritic::new(&model(), Threads::single());
    let head = params.layout.get("score.weight").expect("a score head").range();
    let ParamData::F32(values) = &mut params.data else { panic!("the fixture is f32") };
    let rng = CounterRng::new(3, 0);
    values[head].iter_mut().enumerate().for_each(|(i, x)| *x = 0.3 * rng.normal(i as u64) as f32);
    critic.load(&params, PolicyVersion::default());
    (critic, params)
}

/// Σ c·v over the targets.
fn weighted(critic: &TransformerCritic, batch: &PackedBatch, weights: &[f32]) -> f64 {
    let values = critic.log_probs(batch).logprobs;
    values.iter().zip(weights).map(|(v, w)| f64::from(*v) * f64::from(*w)).sum()
}

#[test]
fn values_are_zero_at_first_and_alike_where_rollouts_branch() {
    let (critic, _) = TransformerCritic::new(&model(), Threads::single());
    assert!(critic.log_probs(&batch()).logprobs.iter().all(|v| *v == 0.0));
    let (critic, _) = started();
    let (batch, values) = (batch(), critic.log_probs(&batch()).logprobs);
    let first = |i: usize| values[batch.sequences[i].targets.start];
    assert!(first(0) != 0.0 && first(0) == first(1) && first(0) == first(2), "one prompt, one value");
    assert_ne!(first(0), first(3));
}

#[test]
fn the_gradient_is_that_of_finite_differences() {
    let (mut critic, params) = started();
    let batch = batch();
    let weights: Vec<f32> = (0..batch.targets.len()).map(|t| 0.5 - 0.15 * t as f32).collect();
    let mut grads = vec![0.0; params.layout.total];
    critic.accumulate(
        &batch,
        &mut |_| TokenGradients { d_logprobs: weights.clone(), d_entropies: None },
        &mut grads,
    );
    let start = params.to_f32();
    let rng = CounterRng::new(8, 1);
    for tensor in &params.layout.tensors {
        // Along a random direction within the tensor: one number for all of its gradient.
        let direction: Vec<f32> =
            (0..tensor.len()).map(|i| if rng.u64(i as u64) & 1 == 0 { 1.0 } else { -1.0 }).collect();
        let slope: f64 =
            grads[tensor.range()].iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        let scale = grads[tensor.range()].iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let mut at = |h: f32| {
            let mut moved = start.clone();
            moved[tensor.range()].iter_mut().zip(&direction).for_each(|(x, d)| *x += h * d);
            critic.load(
                &Params { layout: params.layout.clone(), data: ParamData::F32(moved) },
                PolicyVersion::default(),
            );
            weighted(&critic, &batch, &weights)
        };
        let h = 2e-4;
        let numeric = (at(h) - at(-h)) / (2.0 * f64::from(h));
        let tolerance = 2e-2 * scale.max(slope.abs()) + 5e-3;
        assert!((numeric - slope).abs() <= tolerance, "{}: {numeric} vs {slope} (|g| {scale})", tensor.name);
    }
}
