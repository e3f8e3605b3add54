//! The transformer against itself: one token has one set of bits, and gradients are those of finite differences.

use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_model::sampling::{SampleScratch, log_prob_of};
use freewheel_model::{
    Activation, AttentionSpec, BatchSeq, ExpertNames, FfnSpec, ForwardBatch, KvCache, LatentSpec, ModelSpec,
    MoeSpec, OutputHead, ParamData, Params, PolicyWeights, Purpose, QkNorm, RopeSpec, RopeStyle, RouterKind,
    Target, TemperatureTuning, TensorKind, TensorNames, TrainBatch, TrainOptions, TrainSeq, Transformer,
};
use freewheel_types::{CounterRng, PolicyVersion, SamplingParams, WeightsDtype};

const VOCAB: usize = 37;

const LLAMA: TensorNames = TensorNames::LLAMA;
const FUSED: TensorNames = TensorNames { experts: ExpertNames::Fused, ..LLAMA };

fn attention(qk_norm: QkNorm, style: Option<RopeStyle>, chunk: Option<usize>, bias: bool) -> AttentionSpec {
    AttentionSpec {
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        scale: 8f32.powf(-0.5),
        rope: style.map(|style| RopeSpec {
            inv_freq: (0..4).map(|i| 10_000f32.powf(-i as f32 / 4.0)).collect(),
            attention_factor: 1.0,
            style,
        }),
        qk_norm,
        chunk,
        window: None,
        sinks: false,
        temperature: style.is_none().then_some(TemperatureTuning { attn_scale: 0.1, floor_scale: 4.0 }),
        qkv_bias: bias,
        out_bias: bias,
        latent: None,
    }
}

/// Heads of 5 dimensions without and 6 with position; values of 7.
fn latent(q_rank: Option<usize>, style: RopeStyle, bias: bool) -> AttentionSpec {
    AttentionSpec {
        kv_heads: 4,
        head_dim: 11,
        scale: 11f32.powf(-0.5),
        rope: Some(RopeSpec { inv_freq: vec![1.0, 0.2, 0.05], attention_factor: 1.1, style }),
        latent: Some(LatentSpec { q_rank, kv_rank: 10, nope_dim: 5, value_dim: 7, norm_eps: 1e-6 }),
        ..attention(QkNorm::None, Some(style), None, bias)
    }
}

fn moe(router: RouterKind, top_k: usize, shared_width: Option<usize>) -> FfnSpec {
    let activation = Activation::Silu;
    FfnSpec::Moe(MoeSpec { experts: 5, top_k, width: 24, router, shared_width, activation, bias: false })
}

/// Top 2 of 6 experts in 3 groups.
fn grouped(groups_kept: usize, renormalise: bool) -> FfnSpec {
    let router = RouterKind::SigmoidGrouped { groups: 3, groups_kept, renormalise, scale: 1.5 };
    match moe(router, 2, Some(20)) {
        FfnSpec::Moe(moe) => FfnSpec::Moe(MoeSpec { experts: 6, ..moe }),
        dense => dense,
    }
}

fn dense() -> FfnSpec {
    FfnSpec::Dense { width: 40, activation: Activation::Silu }
}

fn spec(names: TensorNames, layers: Vec<(AttentionSpec, FfnSpec)>, tied_embeddings: bool) -> ModelSpec {
    ModelSpec {
        names,
        vocab_size: VOCAB,
        hidden: 32,
        layers,
        norm_eps: 1e-5,
        norm_offset: 0.0,
        sandwich_norms: false,
        embedding_scale: 1.0,
        tied_embeddings,
        head: OutputHead::LanguageModel,
        max_positions: 128,
        architecture: "Test".into(),
        vision: None,
    }
}

/// One spec of each kind of layer this crate knows.
fn specs() -> Vec<ModelSpec> {
    let half = Some(RopeStyle::Half);
    vec![
        spec(LLAMA, vec![(attention(QkNorm::None, half, None, true), dense()); 2], true),
        spec(
            LLAMA,
            vec![
                (
                    attention(QkNorm::PerHead, half, None, false),
                    moe(RouterKind::Softmax { renormalise: true }, 2, None)
                );
                2
            ],
            false,
        ),
        spec(
            LLAMA,
            vec![(
                attention(QkNorm::WholeProjection, half, None, false),
                moe(RouterKind::Softmax { renormalise: false }, 3, None),
            )],
            true,
        ),
        spec(
            FUSED,
            vec![
                (
                    attention(QkNorm::WeightlessAfterRope, Some(RopeStyle::Interleaved), Some(12), false),
                    dense(),
                ),
                (attention(QkNorm::None, None, None, false), moe(RouterKind::SigmoidOnInput, 1, Some(24))),
            ],
            false,
        ),
        gpt_oss_like(),
        gemma_like(),
        spec(
            LLAMA,
            vec![
                (latent(Some(12), RopeStyle::Interleaved, true), dense()),
                (latent(None, RopeStyle::Half, false), grouped(2, true)),
                (latent(Some(12), RopeStyle::Half, false), grouped(1, false)),
            ],
            false,
        ),
    ]
}

/// Sinks, a window in every other layer, biases everywhere, clamped SwiGLU with a limit that is met.
fn gpt_oss_like() -> ModelSpec {
    let layer = |window| {
        let attention = attention(QkNorm::None, Some(RopeStyle::Half), None, true);
        let ffn = FfnSpec::Moe(MoeSpec {
            experts: 5,
            top_k: 2,
            width: 24,
            router: RouterKind::Softmax { renormalise: true },
            shared_width: None,
            activation: Activation::ClampedSwiglu { alpha: 1.702, limit: 1.5 },
            bias: true,
        });
        (AttentionSpec { sinks: true, window, ..attention }, ffn)
    };
    spec(FUSED, vec![layer(Some(6)), layer(None)], false)
}

/// Norms on both sides of each block with gains of 1 + weight, scaled embeddings.
fn gemma_like() -> ModelSpec {
    let layer = |window| {
        let attention = attention(QkNorm::PerHead, Some(RopeStyle::Half), None, false);
        let ffn = FfnSpec::Dense { width: 40, activation: Activation::GeluTanh };
        (AttentionSpec { window, ..attention }, ffn)
    };
    ModelSpec {
        norm_offset: 1.0,
        sandwich_norms: true,
        embedding_scale: 32f32.sqrt(),
        ..spec(LLAMA, vec![layer(Some(6)), layer(None)], true)
    }
}

fn params(model: &Transformer, seed: u64, dtype: WeightsDtype) -> Params {
    let layout = model.layout().clone();
    let rng = CounterRng::new(seed, 0);
    let mut values: Vec<f32> = (0..layout.total as u64).map(|i| rng.normal(i) as f32 * 0.2).collect();
    for tensor in layout.tensors.iter().filter(|t| t.kind == TensorKind::Norm) {
        values[tensor.range()].iter_mut().for_each(|x| *x += 1.0);
    }
    Params { layout, data: ParamData::F32(values) }.cast(dtype)
}

fn tokens(seed: u64, n: usize) -> Vec<u32> {
    (0..n as u64).map(|i| CounterRng::new(seed, 1).below(i, VOCAB as u64) as u32).collect()
}

fn whole(lengths: &[usize]) -> Vec<TrainSeq> {
    lengths.iter().map(|&rows| TrainSeq::whole(rows)).collect()
}

fn targets_of(tokens: &[u32], lengths: &[usize]) -> Vec<Target> {
    let mut first = 0;
    let mut targets = Vec::new();
    for &len in lengths {
        targets.extend((first + 1..first + len).map(|at| Target { row: at - 1, token: tokens[at] }));
        first += len;
    }
    targets
}

fn pack(model: &Arc<Transformer>, params: &Params, purpose: Purpose, threads: &Threads) -> PolicyWeights {
    PolicyWeights::pack(model, params, PolicyVersion::default(), purpose, threads)
}

/// Log-probs of one sequence, sampled step by step: prefill of `prompt` tokens in chunks, then one token a step, together with
/// another sequence that shares the batch.
fn stepwise(
    weights: &PolicyWeights,
    sequence: &[u32],
    prompt: usize,
    chunk: usize,
    other: &[u32],
) -> Vec<u32> {
    let mut kv = KvCache::new(weights, 40);
    let (pages_a, pages_b): (Vec<u32>, Vec<u32>) =
        ((0..20).map(|i| 39 - 2 * i).collect(), (0..20).map(|i| 2 * i).collect());
    let mut scratch = SampleScratch::default();
    let (mut done, mut done_other, mut bits) = (0, 0, Vec::new());
    while done < sequence.len() - 1 {
        let rows = if done < prompt { chunk.min(prompt - done) } else { 1 };
        let rows_other = (1 + done % 3).min(other.len() - done_other);
        let batch_tokens: Vec<u32> =
            [&other[done_other..done_other + rows_other], &sequence[done..done + rows]].concat();
        let seqs = [
            BatchSeq { rows: rows_other, position: done_other, pages: &pages_b },
            BatchSeq { rows, position: done, pages: &pages_a },
        ];
        let logit_rows: Vec<usize> = (rows_other..rows_other + rows).collect();
        let batch = ForwardBatch { tokens: &batch_tokens, seqs: &seqs, logit_rows: &logit_rows, tiles: &[] };
        let out = weights.forward(&Threads::single(), &mut kv, &batch);
        for (row, logits) in out.logits.chunks_exact(VOCAB).enumerate() {
            if let Some(&next) = sequence.get(done + row + 1) {
                let stats = log_prob_of(logits, &SamplingParams::default(), next, &mut scratch);
                bits.push(stats.logprob.to_bits());
            }
        }
        done += rows;
        done_other += rows_other;
    }
    bits
}

#[test]
fn prefill_decode_and_training_give_the_same_bits() {
    for (index, spec) in specs().into_iter().enumerate() {
        let model = Transformer::new(spec);
        for dtype in [WeightsDtype::F32, WeightsDtype::Bf16] {
            let params = params(&model, 11, dtype);
            let weights = pack(&model, &params, Purpose::Sampling, &Threads::single());
            let (a, b) = (tokens(1, 50), tokens(2, 61));
            let packed = [&b[..], &a[..], &b[..7]].concat();
            let batch = TrainBatch { tokens: &packed, seqs: &whole(&[61, 50, 7]), replay: None, tiles: &[] };
            for threads in [Threads::single(), Threads::new(2)] {
                let tape = weights.forward_train(&threads, &batch);
                let targets: Vec<_> = (0..49).map(|i| Target { row: 61 + i, token: a[i + 1] }).collect();
                let trained: Vec<u32> = tape
                    .log_probs(&threads, &weights, &targets, &SamplingParams::default())
                    .logprobs
                    .iter()
                    .map(|x| x.to_bits())
                    .collect();
                for (prompt, chunk) in [(1, 1), (20, 20), (33, 7), (49, 16)] {
                    let sampled = stepwise(&weights, &a, prompt, chunk, &b);
                    assert_eq!(
                        sampled, trained,
                        "spec {index} {dtype:?} prompt {prompt} in chunks of {chunk}"
                    );
                }
            }
        }
    }
}

#[test]
fn replaying_the_routers_own_choice_changes_nothing() {
    for spec in specs().into_iter().filter(|spec| spec.moe_layers() > 0) {
        let model = Transformer::new(spec);
        let weights =
            pack(&model, &params(&model, 5, WeightsDtype::F32), Purpose::Training, &Threads::single());
        let sequence = tokens(3, 30);
        let targets = targets_of(&sequence, &[30]);
        let run = |replay: Option<&[u16]>| {
            let batch = TrainBatch { tokens: &sequence, seqs: &whole(&[30]), replay, tiles: &[] };
            let tape = weights.forward_train(&Threads::single(), &batch);
            let found = tape.log_probs(&Threads::single(), &weights, &targets, &SamplingParams::default());
            (tape.experts().to_vec(), found)
        };
        let (experts, free) = run(None);
        assert_eq!(run(Some(&experts)), (experts.clone(), free.clone()));
        let other: Vec<u16> = experts.iter().map(|e| (e + 1) % 5).collect();
        assert_ne!(run(Some(&other)).1, free, "replayed experts were ignored");
    }
}

#[test]
fn branches_give_the_bits_of_whole_sequences_and_the_sum_of_their_gradients() {
    for (index, spec) in specs().into_iter().enumerate() {
        let model = Transformer::new(spec);
        let weights =
            pack(&model, &params(&model, 23, WeightsDtype::F32), Purpose::Training, &Threads::single());
        let prompt = tokens(6, 21);
        let outputs = [tokens(7, 12), tokens(8, 30), tokens(9, 1)];
        let threads = Threads::new(2);
        let run = |batch: &[u32], seqs: &[TrainSeq], targets: &[Target], replay: Option<&[u16]>| {
            let sampling = SamplingParams::default();
            let tape =
                weights.forward_train(&threads, &TrainBatch { tokens: batch, seqs, replay, tiles: &[] });
            let found = tape.log_probs(&threads, &weights, targets, &sampling);
            let experts = tape.experts().to_vec();
            let d: Vec<f32> = targets.iter().map(|t| 0.1 + (t.token % 7) as f32).collect();
            let mut grads = vec![0.0; model.layout().total];
            tape.backward(&threads, &weights, targets, &sampling, &d, None, &mut grads);
            (found, grads, experts)
        };
        let targets_from = |before: usize, first: usize, output: &[u32]| -> Vec<Target> {
            let rows = std::iter::once(before).chain(first..);
            output.iter().zip(rows).map(|(&token, row)| Target { row, token }).collect()
        };
        let (mut apart_logprobs, mut apart_grads) = (Vec::new(), vec![0.0; model.layout().total]);
        let (mut packed, mut seqs, mut targets) = (prompt.clone(), Vec::new(), Vec::new());
        for (i, output) in outputs.iter().enumerate() {
            let inputs = &output[..output.len() - 1];
            let whole = [&prompt[..], inputs].concat();
            let whole_seq = [TrainSeq::whole(whole.len())];
            let (found, grads, _) = run(&whole, &whole_seq, &targets_from(20, 21, output), None);
            apart_logprobs.extend(found.logprobs);
            apart_grads.iter_mut().zip(grads).for_each(|(sum, x)| *sum += x);
            targets.extend(targets_from(20, packed.len(), output));
            packed.extend(inputs);
            match (i, inputs.len()) {
                (0, _) => seqs.push(whole_seq[0]),
                (_, 0) => {}
                (_, rows) => seqs.push(TrainSeq { position: 21, rows }),
            }
        }
        let (found, grads, experts) = run(&packed, &seqs, &targets, None);
        assert_eq!(found.logprobs, apart_logprobs, "spec {index}");
        assert_eq!(run(&packed, &seqs, &targets, Some(&experts)).1, grads, "spec {index}: replay");
        let scale = apart_grads.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        for (i, (a, b)) in grads.iter().zip(&apart_grads).enumerate() {
            assert!((a - b).abs() <= 1e-5 * scale, "spec {index}: gradient {i} is {a}, apart {b}");
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for (index, spec) in specs().into_iter().enumerate() {
        let model = Transformer::new(spec);
        let start = params(&model, 17, WeightsDtype::F32);
        let packed = tokens(4, 40);
        let lengths = [23, 17];
        let targets = targets_of(&packed, &lengths);
        let sampling = SamplingParams { temperature: 0.8, ..SamplingParams::default() };
        let d_logprobs: Vec<f32> =
            (0..targets.len()).map(|i| CounterRng::new(1, 2).normal(i as u64) as f32).collect();
        let d_entropies: Vec<f32> = d_logprobs.iter().map(|d| 0.3 * d).collect();
        let threads = Threads::single();
        let weights = pack(&model, &start, Purpose::Training, &threads);
        // Experts are held fixed, so that the loss is smooth.
        let tape = weights.forward_train(
            &threads,
            &TrainBatch { tokens: &packed, seqs: &whole(&lengths), replay: None, tiles: &[] },
        );
        let experts = tape.experts().to_vec();
        let mut grads = vec![0.0; model.layout().total];
        tape.backward(&threads, &weights, &targets, &sampling, &d_logprobs, Some(&d_entropies), &mut grads);

        let objective = |values: Vec<f32>| {
            let moved = Params { layout: model.layout().clone(), data: ParamData::F32(values) };
            let weights = pack(&model, &moved, Purpose::Sampling, &threads);
            let batch =
                TrainBatch { tokens: &packed, seqs: &whole(&lengths), replay: Some(&experts), tiles: &[] };
            let found =
                weights.forward_train(&threads, &batch).log_probs(&threads, &weights, &targets, &sampling);
            let each = d_logprobs.iter().zip(&found.logprobs).chain(d_entropies.iter().zip(&found.entropies));
            each.map(|(d, x)| f64::from(*d) * f64::from(*x)).sum::<f64>()
        };
        let values = start.to_f32();
        for tensor in &model.layout().tensors {
            // Along the gradient itself: the change must be its squared norm.
            let g = &grads[tensor.range()];
            let norm = g.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            if norm < 1e-6 {
                let none = matches!(tensor.kind, TensorKind::Expert | TensorKind::RouterBias);
                assert!(none, "spec {index}: {} has no gradient", tensor.name);
                continue;
            }
            assert_ne!(tensor.kind, TensorKind::RouterBias, "spec {index}: {}", tensor.name);
            let step = 2e-3;
            let moved = |sign: f64| {
                let mut values = values.clone();
                for (x, g) in values[tensor.range()].iter_mut().zip(g) {
                    *x += (sign * step * f64::from(*g) / norm) as f32;
                }
                objective(values)
            };
            let numeric = (moved(1.0) - moved(-1.0)) / (2.0 * step);
            let error = (numeric - norm).abs();
            assert!(
                error <= 0.02 * norm + 2e-2,
                "spec {index}: {} moves by {numeric}, gradient says {norm}",
                tensor.name
            );
        }
    }
}

#[test]
fn recomputed_layers_give_the_same_bits_and_hold_less() {
    for (index, spec) in specs().into_iter().enumerate() {
        let model = Transformer::new(spec);
        for dtype in [WeightsDtype::F32, WeightsDtype::Bf16] {
            let threads = Threads::new(2);
            let mut weights = pack(&model, &params(&model, 29, dtype), Purpose::Training, &threads);
            let packed = tokens(5, 40);
            let lengths = [23, 17];
            let targets = targets_of(&packed, &lengths);
            let d_logprobs: Vec<f32> = (0..targets.len()).map(|i| 0.1 + (i % 5) as f32).collect();
            let mut run = |recompute_layers: bool, replay: Option<&[u16]>| {
                let options = TrainOptions { recompute_layers, balance_coef: 0.1, z_coef: 0.01 };
                weights.set_train_options(options);
                let batch = TrainBatch { tokens: &packed, seqs: &whole(&lengths), replay, tiles: &[] };
                let tape = weights.forward_train(&threads, &batch);
                let (experts, held) = (tape.experts().to_vec(), tape.held_values());
                let mut grads = vec![0.0; model.layout().total];
                let sampling = SamplingParams::default();
                tape.backward(&threads, &weights, &targets, &sampling, &d_logprobs, None, &mut grads);
                let bits: Vec<u32> = grads.iter().map(|x| x.to_bits()).collect();
                (experts, held, bits)
            };
            let (experts, held, bits) = run(false, None);
            let (same_experts, held_less, same_bits) = run(true, None);
            assert_eq!(experts, same_experts, "spec {index} {dtype:?}");
            assert_eq!(bits, same_bits, "spec {index} {dtype:?}");
            assert!(held_less * 3 <= held, "spec {index}: {held_less} of {held} values are held");
            // Experts that are not the router's own choice are taken again too.
            let other: Vec<u16> = experts.iter().map(|e| (e + 1) % 5).collect();
            if !other.is_empty() {
                assert_eq!(run(false, Some(&other)).2, run(true, Some(&other)).2, "spec {index} {dtype:?}");
            }
        }
    }
}
