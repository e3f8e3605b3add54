//! The encoder against itself: gradients are those of finite differences, and a sequence does not see its neighbours.

use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_kernels::pointwise::Pointwise;
use freewheel_types::CounterRng;

use super::*;
use crate::params::{ParamData, Params, TensorKind};
use crate::transformer::Purpose;

fn relative(buckets: Option<usize>, kinds: (bool, bool), shared: bool) -> Option<RelativeSpec> {
    Some(RelativeSpec {
        buckets,
        max_distance: 20,
        content_to_position: kinds.0,
        position_to_content: kinds.1,
        shared_projections: shared,
        normalised: shared,
    })
}

fn spec(family: EncoderFamily, relative: Option<RelativeSpec>) -> EncoderSpec {
    let bert = family == EncoderFamily::Bert;
    EncoderSpec {
        family,
        vocab_size: 31,
        hidden: 24,
        layers: 2,
        heads: 3,
        ffn_width: 40,
        activation: Pointwise::Gelu,
        norm_eps: 1e-6,
        positions: if bert { Positions::Absolute } else { Positions::None },
        token_types: if bert { 2 } else { 0 },
        relative,
        pooler: Some(PoolerSpec {
            width: 24,
            activation: if bert { Pointwise::Tanh } else { Pointwise::Gelu },
        }),
        labels: Some(3),
        max_positions: 40,
        architecture: "Test".into(),
    }
}

fn specs() -> Vec<EncoderSpec> {
    let deberta = |relative| spec(EncoderFamily::DebertaV2, relative);
    vec![
        spec(EncoderFamily::Bert, None),
        deberta(relative(Some(8), (true, true), true)),
        deberta(relative(None, (true, false), false)),
        deberta(relative(Some(6), (false, true), false)),
    ]
}

fn params(encoder: &Encoder) -> Params {
    let layout = encoder.layout().clone();
    let rng = CounterRng::new(11, 0);
    let mut values: Vec<f32> = (0..layout.total as u64).map(|i| rng.normal(i) as f32 * 0.3).collect();
    for tensor in layout.tensors.iter().filter(|t| t.kind == TensorKind::Norm) {
        values[tensor.range()].iter_mut().for_each(|x| *x += 1.0);
    }
    Params { layout, data: ParamData::F32(values) }
}

fn ids(seed: u64, len: usize, below: u64) -> Vec<u32> {
    (0..len as u64).map(|i| CounterRng::new(seed, 1).below(i, below) as u32).collect()
}

#[test]
fn a_sequence_has_the_same_bits_in_any_batch_and_on_any_threads() {
    for (index, spec) in specs().into_iter().enumerate() {
        let encoder = Encoder::new(spec);
        let pack = |purpose| EncoderWeights::pack(&encoder, &params(&encoder), purpose, &Threads::single());
        let (weights, trained) = (pack(Purpose::Sampling), pack(Purpose::Training));
        let (a, b) = (ids(1, 33, 31), ids(2, 9, 31));
        let types = ids(3, 42, 2);
        let alone = EncoderBatch { tokens: &a, token_types: Some(&types[9..]), lengths: &[33] };
        let want = weights.forward(&Threads::single(), &alone);
        let packed = [&b[..], &a[..]].concat();
        let batch = EncoderBatch { tokens: &packed, token_types: Some(&types), lengths: &[9, 33] };
        for threads in [Threads::single(), Threads::new(3)] {
            let got = weights.forward(&threads, &batch);
            assert!(got[9 * 24..] == want, "spec {index}: another batch, other bits");
            let tape = trained.forward_train(&threads, &batch);
            assert!(tape.hidden(2) == got, "spec {index}: training gives other bits");
            let scores = tape.scores(&threads, &trained);
            assert!(scores[3..] == weights.scores(&threads, &want, &[33]), "spec {index}: scores");
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for (index, spec) in specs().into_iter().enumerate() {
        let encoder = Encoder::new(spec);
        let start = params(&encoder);
        let (tokens, types) = (ids(4, 37, 31), ids(5, 37, 2));
        let batch = EncoderBatch { tokens: &tokens, token_types: Some(&types), lengths: &[14, 22, 1] };
        let d_scores: Vec<f32> = (0..9).map(|i| CounterRng::new(6, 2).normal(i) as f32).collect();
        let threads = Threads::new(2);
        let weights = EncoderWeights::pack(&encoder, &start, Purpose::Training, &threads);
        let mut grads = vec![0.0; encoder.layout().total];
        weights.forward_train(&threads, &batch).backward(&threads, &weights, &d_scores, &mut grads);
        let objective = |values: Vec<f32>| -> f64 {
            let moved = Params { layout: Arc::clone(encoder.layout()), data: ParamData::F32(values) };
            let weights = EncoderWeights::pack(&encoder, &moved, Purpose::Sampling, &threads);
            let scores = weights.scores(&threads, &weights.forward(&threads, &batch), batch.lengths);
            scores.iter().zip(&d_scores).map(|(s, d)| f64::from(*s) * f64::from(*d)).sum()
        };
        let values = start.to_f32();
        for tensor in &encoder.layout().tensors {
            // Along the gradient itself: the change must be its norm.
            let g = &grads[tensor.range()];
            let norm = g.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            // The bias of keys cancels in the softmax, unless positions read it too.
            if tensor.name.contains("key") && tensor.name.ends_with("bias") {
                continue;
            }
            assert!(norm > 1e-4, "spec {index}: {} has no gradient", tensor.name);
            let step = 2e-3;
            let moved = |sign: f64| {
                let mut values = values.clone();
                for (x, g) in values[tensor.range()].iter_mut().zip(g) {
                    *x += (sign * step * f64::from(*g) / norm) as f32;
                }
                objective(values)
            };
            let numeric = (moved(1.0) - moved(-1.0)) / (2.0 * step);
            assert!(
                (numeric - norm).abs() <= 0.01 * norm + 2e-3,
                "spec {index}: {} moves by {numeric}, gradient says {norm}",
                tensor.name
            );
        }
    }
}
