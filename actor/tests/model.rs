//! The engine on the real transformer: what it reports while sampling is what training computes, to the bit.

use std::sync::Arc;

use freewheel_actor::{
    ActorError, CpuBackend, CpuLoader, Engine, EngineConfig, Finished, InFlight, PolicyLoader, Request,
    SampleSpec, StopSpec, TextDecoder,
};
use freewheel_kernels::Threads;
use freewheel_model::delta::{delta_frame, key_frame};
use freewheel_model::{
    Activation, AttentionSpec, FfnSpec, ModelSpec, MoeSpec, OutputHead, ParamData, Params, PolicyWeights,
    Purpose, QkNorm, RopeSpec, RopeStyle, RouterKind, Target, TensorKind, TensorNames, TrainBatch, TrainSeq,
    Transformer,
};
use freewheel_types::{CounterRng, Digest, PolicyVersion, SamplingParams, TaskId, WeightsDtype};

const VOCAB: usize = 41;

struct NoText;

impl TextDecoder for NoText {
    fn decode(&self, _ids: &[u32]) -> String {
        String::new()
    }
}

fn attention(rope: bool) -> AttentionSpec {
    let inv_freq = (0..4).map(|i| 10_000f32.powf(-i as f32 / 4.0)).collect();
    AttentionSpec {
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        scale: 8f32.powf(-0.5),
        rope: rope.then_some(RopeSpec { inv_freq, attention_factor: 1.0, style: RopeStyle::Half }),
        qk_norm: QkNorm::PerHead,
        chunk: None,
        window: None,
        sinks: false,
        temperature: None,
        qkv_bias: false,
        out_bias: false,
        latent: None,
    }
}

/// Dense, then a mixture of experts that sees chunks of 24 positions, then a mixture without positions.
fn model(max_positions: usize) -> Arc<Transformer> {
    let dense = FfnSpec::Dense { width: 40, activation: Activation::Silu };
    let moe = FfnSpec::Moe(MoeSpec {
        experts: 5,
        top_k: 2,
        width: 24,
        router: RouterKind::Softmax { renormalise: true },
        shared_width: None,
        activation: Activation::Silu,
        bias: false,
    });
    Transformer::new(ModelSpec {
        names: TensorNames::LLAMA,
        vocab_size: VOCAB,
        hidden: 32,
        layers: vec![
            (attention(true), dense),
            (AttentionSpec { chunk: Some(24), ..attention(true) }, moe.clone()),
            (attention(false), moe),
        ],
        norm_eps: 1e-5,
        norm_offset: 0.0,
        sandwich_norms: false,
        embedding_scale: 1.0,
        tied_embeddings: false,
        head: OutputHead::LanguageModel,
        max_positions,
        architecture: "Test".into(),
        vision: None,
    })
}

fn params(model: &Transformer, seed: u64, dtype: WeightsDtype) -> Params {
    let layout = model.layout().clone();
    let rng = CounterRng::new(seed, 0);
    let mut values: Vec<f32> = (0..layout.total as u64).map(|i| rng.normal(i) as f32 * 0.2).collect();
    for tensor in layout.tensors.iter().filter(|tensor| tensor.kind == TensorKind::Norm) {
        values[tensor.range()].iter_mut().for_each(|x| *x += 1.0);
    }
    Params { layout, data: ParamData::F32(values) }.cast(dtype)
}

fn request(id: u64, prompt_len: u64, samples: u32, sampling: SamplingParams) -> Request {
    let rng = CounterRng::new(7, id);
    Request {
        id,
        tiles: Vec::new(),
        prompt_ids: (0..prompt_len).map(|i| rng.below(i, VOCAB as u64) as u32).collect(),
        samples: (0..samples).map(|k| SampleSpec { rollout: TaskId(id).rollout(k) }).collect(),
        seed: 3,
        sampling,
        max_new_tokens: 30,
        stop: StopSpec { ids: [0].into(), strings: [].into() },
    }
}

#[test]
fn behaviour_logprobs_and_experts_are_those_of_training_to_the_bit() {
    let model = model(96);
    let transforms = [
        SamplingParams::default(),
        SamplingParams { temperature: 0.7, top_k: 9, top_p: 0.9, min_p: 0.02 },
        SamplingParams::GREEDY,
    ];
    for dtype in [WeightsDtype::F32, WeightsDtype::Bf16] {
        let params = params(&model, 1, dtype);
        let threads = Threads::new(2);
        let version = PolicyVersion::new(1, 4);
        let pack = |purpose| PolicyWeights::pack(&model, &params, version, purpose, &threads);
        let backend = CpuBackend::new(Arc::new(pack(Purpose::Sampling)), threads.clone());
        // Eleven pages for seven samples of up to five pages each, and chunks that cut every prompt.
        let page_bytes = freewheel_model::KvCache::page_bytes(&model) as u64;
        let config = EngineConfig {
            max_live: 5,
            kv_bytes: 11 * page_bytes,
            prefill_tokens: 7,
            in_flight: InFlight::Keep,
        };
        let mut engine = Engine::new(backend, Arc::new(NoText), config).unwrap();
        let requests = vec![
            request(1, 37, 3, transforms[0]),
            request(2, 5, 2, transforms[1]),
            request(3, 16, 1, transforms[2]),
            request(4, 1, 1, transforms[0]),
        ];
        let done = engine.run_to_end(requests.clone()).unwrap();
        assert_eq!(done.len(), 7);
        assert!(engine.stats().preemptions > 0, "the test must reach preemption");
        let training = pack(Purpose::Training);
        for sample in &done {
            let sampling = requests[sample.request as usize - 1].sampling;
            check_bits(&training, &threads, sample, &sampling);
        }
    }
}

/// Log-probs and experts of `sample` have the bits that training computes for its tokens.
fn check_bits(training: &PolicyWeights, threads: &Threads, sample: &Finished, sampling: &SamplingParams) {
    let ids = [&sample.prompt_ids[..], &sample.output_ids[..]].concat();
    let batch = TrainBatch { tokens: &ids, seqs: &[TrainSeq::whole(ids.len())], replay: None, tiles: &[] };
    let tape = training.forward_train(threads, &batch);
    let first = sample.prompt_ids.len();
    let targets: Vec<Target> = (first..ids.len()).map(|at| Target { row: at - 1, token: ids[at] }).collect();
    let trained = tape.log_probs(threads, training, &targets, sampling);
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&sample.behaviour_logprobs), bits(&trained.logprobs), "{}", sample.rollout);
    let rows = (ids.len() - 1) * 2 * 2;
    assert_eq!(sample.experts.ids, tape.experts()[..rows], "{}", sample.rollout);
    assert!(sample.behaviour_logprobs.iter().all(|x| x.is_finite() && *x <= 0.0));
}

#[test]
fn what_chunked_layers_do_not_need_holds_longer_sequences() {
    let model = model(4096);
    let params = params(&model, 1, WeightsDtype::F32);
    let threads = Threads::single();
    let pack = |purpose| PolicyWeights::pack(&model, &params, PolicyVersion::new(1, 4), purpose, &threads);
    let backend = CpuBackend::new(Arc::new(pack(Purpose::Sampling)), threads.clone());
    let kv_bytes = 20 * freewheel_model::KvCache::page_bytes(&model) as u64;
    let config = EngineConfig { max_live: 1, kv_bytes, prefill_tokens: 50, in_flight: InFlight::Keep };
    let mut engine = Engine::new(backend, Arc::new(NoText), config).unwrap();
    // One of three layers sees a chunk: room for 16 pages there leaves (20 - 16/3) * 3/2 = 22 in the others.
    assert_eq!(engine.stats().pages, 22);
    let requests = (0..2).map(|id| request(id, 304, 2, SamplingParams::default())).collect::<Vec<_>>();
    let done = engine.run_to_end(requests).unwrap();
    assert_eq!(done.len(), 4);
    let training = pack(Purpose::Training);
    for sample in &done {
        assert!(sample.output_ids.len() == 30 || sample.output_ids.last() == Some(&0));
        check_bits(&training, &threads, sample, &SamplingParams::default());
    }
}

#[test]
fn published_frames_become_the_weights_that_were_published() {
    let model = model(96);
    let tokenizer = Digest::of(b"tokenizer");
    let (v0, v1) = (PolicyVersion::new(1, 0), PolicyVersion::new(1, 1));
    let (old, new) = (params(&model, 1, WeightsDtype::Bf16), params(&model, 2, WeightsDtype::Bf16));
    let blank = params(&model, 3, WeightsDtype::Bf16);
    let mut loader = CpuLoader::new(model.clone(), blank, tokenizer, Threads::single());
    loader.apply(&key_frame(&old, v0, tokenizer)).unwrap();
    let first = loader.pack(v0, None).unwrap();
    loader.apply(&delta_frame(&old, v0, &new, v1, tokenizer)).unwrap();
    let second = loader.pack(v1, None).unwrap();
    let run = |weights: Arc<PolicyWeights>| {
        let config =
            EngineConfig { max_live: 4, kv_bytes: 1 << 20, prefill_tokens: 64, in_flight: InFlight::Keep };
        let backend = CpuBackend::new(weights, Threads::single());
        let mut engine = Engine::new(backend, Arc::new(NoText), config).unwrap();
        let done = engine.run_to_end(vec![request(1, 9, 3, SamplingParams::default())]).unwrap();
        done.into_iter().map(|sample| (sample.output_ids, sample.versions)).collect::<Vec<_>>()
    };
    for (weights, params, version) in [(first.clone(), &old, v0), (second, &new, v1)] {
        assert_eq!(weights.version(), version);
        let packed = PolicyWeights::pack(&model, params, version, Purpose::Sampling, &Threads::single());
        assert_eq!(run(weights), run(Arc::new(packed)));
    }
    // The memory of retired weights takes the next version.
    let spare = Arc::into_inner(first).unwrap();
    let again = loader.pack(v1, Some(spare)).unwrap();
    let packed = PolicyWeights::pack(&model, &new, v1, Purpose::Sampling, &Threads::single());
    assert_eq!(run(again), run(Arc::new(packed)));

    let other = key_frame(&new, v1, Digest::of(b"another tokenizer"));
    let error = loader.apply(&other).unwrap_err();
    assert!(matches!(&error, ActorError::BadWeights { version, .. } if *version == v1));
    assert!(error.to_string().contains("they are for tokenizer"), "{error}");
    let mut damaged = key_frame(&new, v1, tokenizer);
    let middle = damaged.chunks[0].len() / 2;
    damaged.chunks[0][middle] ^= 1;
    assert!(matches!(loader.apply(&damaged), Err(ActorError::BadWeights { .. })));
}
