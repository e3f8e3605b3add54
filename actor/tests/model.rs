//! The engine on the real transformer: what it reports while sampling is what training computes, to the bit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use freewheel_actor::{
    ActorError, Backend, BackendInfo, CpuBackend, CpuLoader, Draw, Drawn, Engine, EngineConfig, Finished,
    PolicyLoader, Request, SampleSpec, StepBatch, StepOutput, StopSpec, TextDecoder,
};
use freewheel_kernels::{CodeBits, Threads};
use freewheel_model::delta::{delta_frame, key_frame};
use freewheel_model::{
    Activation, AttentionSpec, FfnSpec, KvCache, LatentSpec, ModelSpec, MoeSpec, OutputHead, ParamData,
    Params, PolicyWeights, Purpose, QkNorm, RopeSpec, RopeStyle, RouterKind, Target, TensorKind, TensorNames,
    TrainBatch, TrainSeq, Transformer,
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
    model_with(AttentionSpec { chunk: Some(24), ..attention(true) }, max_positions)
}

/// A window of 21 positions, and sinks (gpt-oss).
fn sliding() -> AttentionSpec {
    AttentionSpec { window: Some(21), sinks: true, ..attention(true) }
}

/// Latent attention (DeepSeek): heads of 5 dimensions without and 8 with position, values of 7.
fn latent() -> AttentionSpec {
    AttentionSpec {
        kv_heads: 4,
        head_dim: 13,
        qk_norm: QkNorm::None,
        latent: Some(LatentSpec { q_rank: Some(9), kv_rank: 10, nope_dim: 5, value_dim: 7, norm_eps: 1e-6 }),
        ..attention(true)
    }
}

/// The same with another attention in the middle.
fn model_with(middle: AttentionSpec, max_positions: usize) -> Arc<Transformer> {
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
        layers: vec![(attention(true), dense), (middle, moe.clone()), (attention(false), moe)],
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
    assert!(sampled_is_trained(model(96)) > 0, "the test must reach preemption");
}

#[test]
fn a_quantised_policy_is_trained_with_the_very_weights_it_samples_with() {
    for (bits, group) in [(CodeBits::Eight, 32), (CodeBits::Four, 32), (CodeBits::Eight, 128)] {
        sampled_is_trained(model(96).quantised(bits, group));
    }
}

const TRANSFORMS: [SamplingParams; 3] = [
    SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 },
    SamplingParams { temperature: 0.7, top_k: 9, top_p: 0.9, min_p: 0.02 },
    SamplingParams::GREEDY,
];

/// Weights of one policy for both sides.
struct Both {
    sampling: Arc<PolicyWeights>,
    training: PolicyWeights,
}

impl Both {
    fn new(model: &Arc<Transformer>, dtype: WeightsDtype) -> Self {
        let (params, version) = (params(model, 1, dtype), PolicyVersion::new(1, 4));
        let pack = |purpose| PolicyWeights::pack(model, &params, version, purpose, &Threads::single());
        Self { sampling: Arc::new(pack(Purpose::Sampling)), training: pack(Purpose::Training) }
    }

    fn engine(&self, threads: &Threads, config: EngineConfig) -> Engine<CpuBackend> {
        let backend = CpuBackend::new(self.sampling.clone(), threads.clone());
        Engine::new(backend, Arc::new(NoText), config).unwrap()
    }

    /// What the engine says of `sample` is what training computes for it.
    fn check(&self, threads: &Threads, sample: &Finished, sampling: &SamplingParams, what: &str) {
        let ids = [&sample.prompt_ids[..], &sample.output_ids[..]].concat();
        let seqs = [TrainSeq::whole(ids.len())];
        let batch = TrainBatch { tokens: &ids, seqs: &seqs, replay: None, tiles: &[] };
        let tape = self.training.forward_train(threads, &batch);
        let first = sample.prompt_ids.len();
        let targets: Vec<Target> =
            (first..ids.len()).map(|at| Target { row: at - 1, token: ids[at] }).collect();
        let trained = tape.log_probs(threads, &self.training, &targets, sampling);
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let what = format!("{what}, sample {}", sample.rollout);
        assert_eq!(bits(&sample.behaviour_logprobs), bits(&trained.logprobs), "{what}");
        let rows = (ids.len() - 1) * 2 * 2;
        assert_eq!(sample.experts.ids, tape.experts()[..rows], "{what}");
        assert!(sample.behaviour_logprobs.iter().all(|x| x.is_finite() && *x <= 0.0), "{what}");
    }
}

fn page_bytes(weights: &PolicyWeights) -> u64 {
    KvCache::page_bytes(weights.model(), weights.precision()) as u64
}

/// Returns how often a sample was preempted.
fn sampled_is_trained(model: Arc<Transformer>) -> u64 {
    let mut preemptions = 0;
    for dtype in [WeightsDtype::F32, WeightsDtype::Bf16] {
        let (both, threads) = (Both::new(&model, dtype), Threads::new(2));
        // Eleven pages for seven samples of up to five pages each, and chunks that cut every prompt.
        let bounds = EngineConfig {
            max_live: 5,
            kv_bytes: 11 * page_bytes(&both.sampling),
            ..EngineConfig::default()
        };
        let mut engine = both.engine(&threads, EngineConfig { prefill_tokens: 7, ..bounds });
        let requests = vec![
            request(1, 37, 3, TRANSFORMS[0]),
            request(2, 5, 2, TRANSFORMS[1]),
            request(3, 16, 1, TRANSFORMS[2]),
            request(4, 1, 1, TRANSFORMS[0]),
        ];
        let done = engine.run_to_end(requests.clone()).unwrap();
        assert_eq!(done.len(), 7);
        preemptions += engine.stats().preemptions;
        for sample in &done {
            both.check(
                &threads,
                sample,
                &requests[sample.request as usize - 1].sampling,
                &format!("{dtype:?}"),
            );
        }
    }
    preemptions
}

/// Numbers of one mix, one after the other.
struct Draws {
    rng: CounterRng,
    next: u64,
}

impl Draws {
    fn below(&mut self, n: u64) -> usize {
        self.next += 1;
        self.rng.below(self.next, n) as usize
    }
}

/// Requests with the step they arrive at; half of the prompts begin alike, and few tokens make guesses come right.
fn random_requests(draws: &mut Draws) -> Vec<(usize, Request)> {
    let one = |id: u64, draws: &mut Draws| {
        let (like, alphabet) =
            (if draws.below(2) == 0 { 0 } else { id }, [3, 12, VOCAB as u64][draws.below(3)]);
        let rng = CounterRng::new(8, like);
        let sampling = TRANSFORMS[draws.below(3)];
        let samples = 1 + draws.below(4) as u32;
        let prompt_ids = (0..1 + draws.below(45) as u64).map(|i| rng.below(i, alphabet) as u32).collect();
        let max_new_tokens = 1 + draws.below(30);
        (draws.below(25), Request { prompt_ids, max_new_tokens, ..request(id, 1, samples, sampling) })
    };
    (0..1 + draws.below(6) as u64).map(|id| one(id, draws)).collect()
}

/// Chunks of prompts, decoding, preemption, pages found again, guesses right and wrong, cancellation, any threads: what a
/// row is computed beside and when never shows; with plain, chunked, sliding and latent attention, sinks, and weights of
/// 32, 16, 8 and 4 bits. `FREEWHEEL_MIXES=60` tries fewer.
#[test]
fn random_mixes_are_what_training_computes() {
    let mixes = std::env::var("FREEWHEEL_MIXES").map_or(1000, |n| n.parse().expect("a number of mixes"));
    let model = model_with(attention(true), 96);
    let kinds = [
        Both::new(&model_with(AttentionSpec { chunk: Some(24), ..attention(true) }, 96), WeightsDtype::Bf16),
        Both::new(&model.quantised(CodeBits::Eight, 32), WeightsDtype::Bf16),
        Both::new(&model.quantised(CodeBits::Four, 32), WeightsDtype::Bf16),
        Both::new(&model, WeightsDtype::F32),
        Both::new(&model_with(sliding(), 96), WeightsDtype::Bf16),
        Both::new(&model_with(latent(), 96), WeightsDtype::Bf16),
        Both::new(&model_with(latent(), 96).quantised(CodeBits::Eight, 32), WeightsDtype::Bf16),
    ];
    let (mut preempted, mut found, mut right, mut wrong, mut checked) = (0, 0, 0, 0, 0);
    for mix in 0..mixes {
        let both = &kinds[mix as usize % kinds.len()];
        let mut draws = Draws { rng: CounterRng::new(99, mix), next: 0 };
        let threads = Threads::new(1 + draws.below(3));
        let config = EngineConfig {
            max_live: 1 + draws.below(7),
            kv_bytes: (7 + draws.below(20)) as u64 * page_bytes(&both.sampling),
            prefill_tokens: 1 + draws.below(40),
            prefix_cache: draws.below(4) > 0,
            draft_tokens: draws.below(8),
            ..EngineConfig::default()
        };
        let mut engine = both.engine(&threads, config);
        let requests = random_requests(&mut draws);
        let (cancel_at, cancelled) = (draws.below(60), draws.below(8) as u64);
        let mut done = Vec::new();
        for step in 0.. {
            for (_, request) in requests.iter().filter(|(at, _)| *at == step) {
                engine.submit(request.clone()).unwrap();
            }
            if step == cancel_at {
                done.extend(engine.cancel(cancelled));
            }
            done.extend(engine.step());
            if step > 25 && engine.is_idle() {
                break;
            }
            assert!(step < 10_000, "mix {mix} makes no progress");
        }
        let stats = engine.stats();
        assert_eq!(stats.pages_used, 0, "mix {mix} leaks pages");
        assert_eq!(done.len(), requests.iter().map(|(_, request)| request.samples.len()).sum::<usize>());
        for sample in done.iter().filter(|sample| !sample.output_ids.is_empty()) {
            both.check(
                &threads,
                sample,
                &requests[sample.request as usize].1.sampling,
                &format!("mix {mix}"),
            );
            checked += 1;
        }
        preempted += stats.preemptions;
        found += stats.prefix_tokens;
        right += stats.draft_hits;
        wrong += stats.drafted - stats.draft_hits;
    }
    for (count, what) in [
        (preempted, "preemptions"),
        (found, "pages found"),
        (right, "right guesses"),
        (wrong, "wrong guesses"),
    ] {
        assert!(count > 0, "the mixes must reach {what}");
    }
    println!(
        "{checked} samples of {mixes} mixes: {preempted} preemptions, {found} tokens found, {right} guesses right, {wrong} wrong"
    );
}

/// A backend that notes the most pages that local layers ever held.
struct Watched {
    inner: CpuBackend,
    most: Arc<AtomicUsize>,
}

impl Backend for Watched {
    type Weights = PolicyWeights;

    fn info(&self) -> BackendInfo {
        self.inner.info()
    }

    fn allocate(&mut self, pages: usize, local: usize) {
        self.inner.allocate(pages, local);
    }

    fn version(&self) -> PolicyVersion {
        self.inner.version()
    }

    fn swap(&mut self, weights: Arc<PolicyWeights>) -> Arc<PolicyWeights> {
        self.inner.swap(weights)
    }

    fn forward(&mut self, batch: &StepBatch<'_>) -> StepOutput {
        let output = self.inner.forward(batch);
        self.most.fetch_max(self.inner.cache().slots().0, Ordering::Relaxed);
        output
    }

    fn copy_page(&mut self, from: u32, to: u32) {
        self.inner.copy_page(from, to);
    }

    fn forget(&mut self, pages: &[u32]) {
        self.inner.forget(pages);
    }

    fn sample(&mut self, logits: &[f32], draws: &[Draw]) -> Vec<Drawn> {
        self.inner.sample(logits, draws)
    }
}

#[test]
fn what_chunked_layers_do_not_need_holds_longer_sequences() {
    let (both, threads) = (Both::new(&model(4096), WeightsDtype::F32), Threads::single());
    let most = Arc::new(AtomicUsize::new(0));
    let inner = CpuBackend::new(both.sampling.clone(), threads.clone());
    let backend = Watched { inner, most: most.clone() };
    let kv_bytes = 20 * page_bytes(&both.sampling);
    let config = EngineConfig { max_live: 1, kv_bytes, prefill_tokens: 50, ..EngineConfig::default() };
    let mut engine = Engine::new(backend, Arc::new(NoText), config).unwrap();
    // One of three layers sees a chunk: room for 16 pages there leaves (20 - 16/3) * 3/2 = 22 in the others.
    assert_eq!(engine.stats().pages, 22);
    let requests = (0..2).map(|id| request(id, 304, 2, SamplingParams::default())).collect::<Vec<_>>();
    let done = engine.run_to_end(requests).unwrap();
    assert_eq!(done.len(), 4);
    let most = most.load(Ordering::Relaxed);
    // A chunk of 24 and a step of 50 rows, for a sample and for the prompt that is next in line.
    assert!((3..=16).contains(&most), "{most} pages of at least 21 a sequence in the chunked layer");
    for sample in &done {
        assert!(sample.output_ids.len() == 30 || sample.output_ids.last() == Some(&0));
        both.check(&threads, sample, &SamplingParams::default(), "chunks");
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
            EngineConfig { max_live: 4, kv_bytes: 1 << 20, prefill_tokens: 64, ..EngineConfig::default() };
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
