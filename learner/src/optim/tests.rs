//! Tests of the update and of its state, for every optimiser and every type of state.

use std::collections::BTreeMap;
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_model::{ParamData, ParamLayout, Params, TensorKind, TensorSpec};
use freewheel_types::SamplingParams;

use super::*;
use crate::packing::{TrainSequence, pack};
use crate::trainer::ExpertLoad;

fn params() -> Params {
    let tensor = |name: &str, shape: &[usize], offset| TensorSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        offset,
        kind: TensorKind::Mlp,
    };
    let tensors = vec![tensor("w", &[2, 2], 0), tensor("norm", &[2], 4), tensor("v", &[1, 3], 6)];
    let layout = Arc::new(ParamLayout { tensors, total: 9 });
    Params { layout, data: ParamData::F32((0..9).map(|i| 0.1 * (i + 1) as f32).collect()) }
}

/// Tensors of all kinds and awkward lengths, the third more than one piece of work.
fn large() -> Params {
    let kinds = [
        ("embed", vec![33, 8], TensorKind::Embedding),
        ("router", vec![7], TensorKind::Router),
        ("mlp", vec![300, 301], TensorKind::Mlp),
        ("experts", vec![3, 5, 7], TensorKind::Expert),
        ("correction", vec![3], TensorKind::RouterBias),
    ];
    let mut total = 0;
    let tensors = kinds.map(|(name, shape, kind)| {
        let tensor = TensorSpec { name: name.to_owned(), shape, offset: total, kind };
        total += tensor.len();
        tensor
    });
    let layout = Arc::new(ParamLayout { tensors: tensors.to_vec(), total });
    Params { layout, data: ParamData::F32((0..total).map(|i| (i as f32 * 0.37).sin()).collect()) }
}

fn gradient(total: usize, step: u64) -> Vec<f32> {
    (0..total)
        .map(|i| ((i as f32 + 13.0 * step as f32) * 0.11).cos() * 1.1f32.powi((i % 40) as i32 - 20))
        .collect()
}

/// Every optimiser with every type of state.
fn all() -> Vec<OptimizerSettings> {
    let kinds = [OptimizerKind::Adamw, OptimizerKind::Muon, OptimizerKind::Lion, OptimizerKind::Sgd];
    let states = [StateType::F32, StateType::Bf16, StateType::EightBit];
    let settings = |kind, state, momentum| OptimizerSettings {
        config: OptimizerConfig { optimizer: kind, optimizer_state: state, momentum, ..Default::default() },
        weight_decay: 0.1,
        ..Default::default()
    };
    let with_momentum = |kind| if kind == OptimizerKind::Sgd { Some(0.9) } else { None };
    let pairs = kinds.into_iter().flat_map(|kind| states.map(|state| (kind, state)));
    let plain = settings(OptimizerKind::Sgd, StateType::F32, None);
    pairs.map(|(kind, state)| settings(kind, state, with_momentum(kind))).chain([plain]).collect()
}

fn applied(optimizer: &mut Optimizer, threads: &Threads, step: u64) {
    let mut grads = gradient(optimizer.masters().len(), step);
    let outcome = optimizer.step(threads, &mut grads, 1e-2);
    assert!(matches!(outcome, StepOutcome::Applied { .. }), "{outcome:?}");
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    let mut optimiser = Optimizer::new(OptimizerSettings::default(), &params());
    let before = optimiser.clone();
    for bad in [f32::NAN, f32::INFINITY] {
        let mut grads = vec![0.5; 9];
        grads[7] = bad;
        let outcome = optimiser.step(&Threads::single(), &mut grads, 1e-3);
        assert!(matches!(outcome, StepOutcome::Refused { .. }), "{outcome:?}");
    }
    assert_eq!(optimiser, before);
}

#[test]
fn a_learning_rate_of_zero_leaves_the_weights_alone() {
    for settings in all() {
        let start = large();
        let mut optimiser = Optimizer::new(settings, &start);
        let mut grads = gradient(start.layout.total, 0);
        optimiser.step(&Threads::single(), &mut grads, 0.0);
        assert_eq!(optimiser.masters(), start.to_f32(), "{:?}", optimiser.steps());
        assert_eq!(optimiser.steps(), 1);
    }
}

#[test]
fn vectors_do_not_decay() {
    let settings = OptimizerSettings { weight_decay: 0.5, ..Default::default() };
    let mut optimiser = Optimizer::new(settings, &params());
    optimiser.step(&Threads::single(), &mut [0.0; 9], 0.1);
    let (old, new) = (params().to_f32(), optimiser.masters());
    assert_eq!(new[4..6], old[4..6]);
    assert!((new[0] - 0.95 * old[0]).abs() <= 1e-7 && (new[8] - 0.95 * old[8]).abs() <= 1e-7);
}

#[test]
fn corrections_of_a_router_are_left_alone() {
    let start = large();
    let correction = start.layout.get("correction").unwrap().range();
    for settings in all() {
        let mut optimiser = Optimizer::new(OptimizerSettings { decay_1d: true, ..settings }, &start);
        applied(&mut optimiser, &Threads::single(), 0);
        let (old, new) = (start.to_f32(), optimiser.masters());
        assert_eq!(new[correction.clone()], old[correction.clone()]);
        assert!((0..correction.start).all(|i| new[i] != old[i]), "the others move");
    }
}

#[test]
fn groups_have_their_own_rates_and_the_frozen_do_not_count() {
    let group =
        |params: &str, lr_scale, weight_decay| ParamGroup { params: params.into(), lr_scale, weight_decay };
    let config = OptimizerConfig {
        optimizer: OptimizerKind::Sgd,
        param_groups: vec![group("v", 3.0, None), group("*", 0.5, Some(1.0))],
        freeze: vec!["no*".into()],
        ..Default::default()
    };
    assert_eq!(config.problems("learner").len(), 1, "`v` is neither a kind nor looks like a name");
    let config =
        OptimizerConfig { param_groups: vec![group("v*", 3.0, None), group("*", 0.5, Some(1.0))], ..config };
    assert_eq!(config.problems("learner"), Vec::<String>::new());
    let settings = OptimizerSettings { config, max_grad_norm: None, ..Default::default() };
    let mut optimiser = Optimizer::new(settings, &params());
    let mut grads = [1.0; 9];
    let outcome = optimiser.step(&Threads::single(), &mut grads, 0.1);
    // Seven of nine gradients count.
    assert_eq!(outcome, StepOutcome::Applied { grad_norm: 7f64.sqrt(), clip_factor: 1.0 });
    let (old, new) = (params().to_f32(), optimiser.masters());
    for i in 0..9 {
        let want = match i {
            0..4 => old[i] * (1.0 - 0.05) - 0.05,
            4..6 => old[i],
            _ => old[i] - 0.3,
        };
        assert!((new[i] - want).abs() <= 1e-6, "{i}: {}, not {want}", new[i]);
    }
}

#[test]
fn a_resumed_optimiser_goes_on_to_the_bit_whatever_its_state_and_threads() {
    for settings in all() {
        let start = large();
        let mut straight = Optimizer::new(settings.clone(), &start);
        (0..3).for_each(|step| applied(&mut straight, &Threads::single(), step));
        let state: BTreeMap<String, Vec<u8>> =
            straight.state().map(|t| (t.name, t.values.as_bytes().to_vec())).collect();
        let mut resumed = Optimizer::new(settings, &start);
        for mut tensor in resumed.state_mut() {
            tensor.values.as_bytes_mut().copy_from_slice(&state[&tensor.name]);
        }
        resumed.set_steps(straight.steps());
        assert_eq!(resumed, straight);
        let three = Threads::new(3);
        (3..5).for_each(|step| applied(&mut straight, &Threads::single(), step));
        (3..5).for_each(|step| applied(&mut resumed, &three, step));
        assert_eq!(resumed, straight);
    }
}

#[test]
fn narrow_states_take_less_room_and_follow_the_wide_one() {
    let start = large();
    let run = |state| {
        let config = OptimizerConfig { optimizer_state: state, ..Default::default() };
        let settings = OptimizerSettings { config, ..Default::default() };
        let mut optimiser = Optimizer::new(settings, &start);
        (0..20).for_each(|step| applied(&mut optimiser, &Threads::single(), step));
        let moved: Vec<f64> =
            optimiser.masters().iter().zip(start.to_f32()).map(|(a, b)| f64::from(a - b)).collect();
        (optimiser.bytes(), moved)
    };
    let (wide_bytes, wide) = run(StateType::F32);
    let length = wide.iter().map(|x| x * x).sum::<f64>().sqrt();
    for (state, share, near) in [(StateType::Bf16, 0.67, 0.01), (StateType::EightBit, 0.51, 0.12)] {
        let (bytes, moved) = run(state);
        assert!(bytes as f64 <= share * wide_bytes as f64, "{state:?}: {bytes} of {wide_bytes} bytes");
        let gap = wide.iter().zip(&moved).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt() / length;
        assert!(gap <= near && gap > 0.0, "{state:?}: {gap} of the way off");
    }
}

fn sequence<'a>(prompt_ids: &'a [u32], output_ids: &'a [u32]) -> TrainSequence<'a> {
    let sampling = SamplingParams::default();
    TrainSequence { prompt_ids, output_ids, tiles: &[], experts: None, sampling }
}

#[test]
fn corrections_move_towards_balance() {
    let start = large();
    let mut optimiser = Optimizer::new(OptimizerSettings::default(), &start);
    let mut load = ExpertLoad::default();
    // Two rows, one layer, two of three experts each: 2, 1, 1.
    let rows = [sequence(&[1, 2], &[3])];
    load.add(&pack(&rows, 9)[0], &[0, 1, 0, 2], 1, 3);
    assert_eq!(load.counts, [2, 1, 1]);
    assert!((load.max_violation().unwrap() - 0.5).abs() <= 1e-12);
    optimiser.balance(&load, 0.25);
    let correction = start.layout.get("correction").unwrap().range();
    let moved: Vec<f32> = optimiser.masters()[correction.clone()]
        .iter()
        .zip(&start.to_f32()[correction])
        .map(|(a, b)| a - b)
        .collect();
    assert_eq!(moved, [-0.25, 0.25, 0.25]);
    assert_eq!(ExpertLoad::default().max_violation(), None);
}

#[test]
fn one_pass_writes_what_two_did() {
    let threads = Threads::new(3);
    for settings in all() {
        for dtype in [freewheel_types::WeightsDtype::F32, freewheel_types::WeightsDtype::Bf16] {
            let start = large().cast(dtype);
            let (mut apart, mut fused) =
                (Optimizer::new(settings.clone(), &start), Optimizer::new(settings.clone(), &start));
            let (mut expected, mut weights) = (start.clone(), start.clone());
            for step in 0..3 {
                applied(&mut apart, &threads, step);
                apart.write_weights(&threads, &mut expected);
                let mut grads = gradient(start.layout.total, step);
                let outcome = fused.update(&threads, &mut grads, 1e-2, &mut weights);
                assert!(matches!(outcome, StepOutcome::Applied { .. }), "{outcome:?}");
                assert!(grads.iter().all(|g| *g == 0.0), "the gradient is used up");
            }
            assert_eq!(fused, apart);
            assert_eq!(weights, expected, "{dtype:?}");
            assert_ne!(weights, start);
            let mut bad = vec![f32::NAN; start.layout.total];
            fused.update(&threads, &mut bad, 1e-2, &mut weights);
            assert_eq!((fused, weights), (apart, expected), "a refused gradient moves nothing");
            assert!(bad.iter().all(|g| *g == 0.0));
        }
    }
}
