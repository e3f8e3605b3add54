//! A policy small enough to check by hand, whose next token depends on every key it attends to: a page that is shared,
//! copied, freed or rebuilt wrongly changes what is drawn. Beside it the same policy without pages or batches.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::sync::Arc;

use freewheel_actor::{
    Backend, BackendInfo, Draw, Drawn, LocalLayers, Request, StepBatch, StepOutput, StopSpec, TextDecoder,
};
use freewheel_kernels::attention::AttentionMask;
use freewheel_types::{CounterRng, FinishReason, PolicyVersion, RolloutId, SamplingParams, TaskId};

pub const VOCAB: usize = 19;
pub const PAGE: usize = 4;
pub const CONTEXT: usize = 64;
/// What a row of its local layer sees; no multiple of a page.
pub const MASK: AttentionMask = AttentionMask::Sliding(6);
pub const LAYERS: usize = 2;
pub const TOP_K: usize = 2;
/// Id whose text is empty; ends a sample where a test says so.
pub const EOS: u32 = 0;

/// Weights of this step make a forward panic.
pub const BROKEN: u64 = 99;

pub struct FakeWeights(pub PolicyVersion);

pub struct FakeBackend {
    weights: Arc<FakeWeights>,
    keys: Vec<Option<u64>>,
    /// The same in a layer that sees a window; lost where the engine says that nobody sees it any more.
    local_keys: Vec<Option<u64>>,
    /// Whether there is that layer.
    local: bool,
}

pub fn weights(step: u64) -> Arc<FakeWeights> {
    Arc::new(FakeWeights(PolicyVersion::new(1, step)))
}

fn mix(a: u64, b: u64) -> u64 {
    let mut x = (a ^ b.rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(b);
    x = (x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^ (x >> 32)
}

fn key(version: PolicyVersion, token: u32, position: usize) -> u64 {
    mix(mix(version.step + 1, u64::from(token)), position as u64)
}

fn logits_of(version: PolicyVersion, hidden: u64) -> Vec<f32> {
    (0..VOCAB as u64).map(|v| (mix(mix(hidden, version.step), v) % 1000) as f32 / 250.0).collect()
}

fn experts_of(hidden: u64) -> Vec<u16> {
    (0..(LAYERS * TOP_K) as u64).map(|i| (mix(hidden, 77 + i) % 8) as u16).collect()
}

fn draw(logits: &[f32], sampling: &SamplingParams, uniform: f64) -> Drawn {
    // Greedy tokens are judged by the untempered distribution.
    let t = if sampling.is_greedy() { 1.0 } else { f64::from(sampling.temperature) };
    let weights: Vec<f64> = logits.iter().map(|&x| (f64::from(x) / t).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut at = uniform * total;
    let drawn = weights.iter().position(|w| {
        at -= w;
        at < 0.0
    });
    let likeliest = weights.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(token, _)| token);
    let token = if sampling.is_greedy() { likeliest } else { drawn }.unwrap_or(VOCAB - 1);
    Drawn { token: token as u32, logprob: (weights[token] / total).ln() as f32 }
}

impl FakeBackend {
    pub fn new(step: u64) -> Self {
        Self { weights: weights(step), keys: Vec::new(), local_keys: Vec::new(), local: true }
    }

    /// Without a layer that forgets: its pages may be kept for later prompts.
    pub fn without_local(step: u64) -> Self {
        Self { local: false, ..Self::new(step) }
    }
}

impl Backend for FakeBackend {
    type Weights = FakeWeights;

    fn info(&self) -> BackendInfo {
        BackendInfo {
            vocab_size: VOCAB,
            max_positions: CONTEXT,
            moe_layers: LAYERS,
            top_k: TOP_K,
            page_tokens: PAGE,
            page_bytes: 100,
            // Its memory is not counted here: pages are what a test asks for.
            local: self.local.then_some(LocalLayers { mask: MASK, page_bytes: 0 }),
            cheap_rows: 16,
            images: false,
        }
    }

    fn allocate(&mut self, pages: usize, _local: usize) {
        self.keys = vec![None; pages * PAGE];
        self.local_keys = self.keys.clone();
    }

    fn version(&self) -> PolicyVersion {
        self.weights.0
    }

    fn swap(&mut self, weights: Arc<FakeWeights>) -> Arc<FakeWeights> {
        std::mem::replace(&mut self.weights, weights)
    }

    fn forward(&mut self, batch: &StepBatch<'_>) -> StepOutput {
        let version = self.weights.0;
        assert_ne!(version.step, BROKEN, "planted: these weights break the backend");
        let slot = |pages: &[u32], position: usize| pages[position / PAGE] as usize * PAGE + position % PAGE;
        let mut row = 0;
        let mut writer = vec![None; self.keys.len()];
        for (index, seq) in batch.seqs.iter().enumerate() {
            for position in seq.position..seq.position + seq.rows {
                let at = slot(seq.pages, position);
                self.keys[at] = Some(key(version, batch.tokens[row], position));
                self.local_keys[at] = self.keys[at];
                assert_eq!(writer[at].replace(index), None, "two rows of a step write one key");
                row += 1;
            }
        }
        assert_eq!(row, batch.tokens.len());
        let mut hidden = Vec::new();
        for (index, seq) in batch.seqs.iter().enumerate() {
            for position in seq.position..seq.position + seq.rows {
                let read = |p| {
                    let at = slot(seq.pages, p);
                    assert!(
                        writer[at].is_none_or(|w| w == index),
                        "a row needs another sequence's row of the same step"
                    );
                    self.keys[at].expect("a key is read before it is written")
                };
                hidden.push((0..=position).fold(0, |h, p| mix(h, read(p))));
                let seen = if self.local { MASK.first_visible(position)..position + 1 } else { 0..0 };
                for p in seen {
                    let at = slot(seq.pages, p);
                    assert_eq!(
                        self.local_keys[at], self.keys[at],
                        "a page that a row still sees was forgotten"
                    );
                }
            }
        }
        StepOutput {
            logits: batch
                .logit_rows
                .iter()
                .flat_map(|&row| logits_of(version, hidden[row]))
                .collect::<Vec<_>>()
                .into(),
            experts: hidden.iter().flat_map(|&h| experts_of(h)).collect(),
        }
    }

    fn copy_page(&mut self, from: u32, to: u32) {
        let (from, to) = (from as usize * PAGE, to as usize * PAGE);
        self.keys.copy_within(from..from + PAGE, to);
        self.local_keys.copy_within(from..from + PAGE, to);
    }

    fn forget(&mut self, pages: &[u32]) {
        for &page in pages {
            self.local_keys[page as usize * PAGE..][..PAGE].fill(None);
        }
    }

    fn sample(&mut self, logits: &[f32], draws: &[Draw]) -> Vec<Drawn> {
        draws.iter().map(|d| draw(&logits[d.row * VOCAB..][..VOCAB], &d.sampling, d.uniform)).collect()
    }
}

/// Token `n` is the `n`th letter; [`EOS`] is nothing.
pub struct Letters;

impl TextDecoder for Letters {
    fn decode(&self, ids: &[u32]) -> String {
        ids.iter().filter(|&&id| id != EOS).map(|&id| char::from(b'a' + id as u8 - 1)).collect()
    }
}

pub fn request(id: u64, prompt: &[u32], samples: u32, max_new_tokens: usize) -> Request {
    let spec = |k| freewheel_actor::SampleSpec { rollout: TaskId(id).rollout(k) };
    Request {
        id,
        prompt_ids: prompt.to_vec(),
        tiles: Vec::new(),
        samples: (0..samples).map(spec).collect(),
        seed: 9,
        sampling: SamplingParams::default(),
        max_new_tokens,
        stop: StopSpec { ids: [EOS].into(), strings: [].into() },
    }
}

/// What the fake policy draws for one sample, token by token, with nothing shared, batched or kept.
pub struct Reference {
    pub output_ids: Vec<u32>,
    pub logprobs: Vec<f32>,
    pub experts: Vec<u16>,
    pub finish_reason: FinishReason,
}

/// As [`Reference`], with the first tokens given and `version` for all positions.
pub fn continue_from(
    request: &Request,
    rollout: RolloutId,
    version: PolicyVersion,
    given: &[u32],
) -> Reference {
    let rng = CounterRng::new(request.seed, rollout.0);
    let mut ids = [&request.prompt_ids[..], given].concat();
    let mut reference = Reference {
        output_ids: given.to_vec(),
        logprobs: Vec::new(),
        experts: Vec::new(),
        finish_reason: FinishReason::Length,
    };
    let limit = request.max_new_tokens.min(CONTEXT - request.prompt_ids.len());
    while reference.output_ids.len() < limit {
        let hidden = ids.iter().enumerate().fold(0, |h, (p, &id)| mix(h, key(version, id, p)));
        let uniform = rng.uniform(reference.output_ids.len() as u64);
        let drawn = draw(&logits_of(version, hidden), &request.sampling, uniform);
        ids.push(drawn.token);
        reference.output_ids.push(drawn.token);
        reference.logprobs.push(drawn.logprob);
        if request.stop.ids.contains(&drawn.token) {
            reference.finish_reason = FinishReason::Stop;
            break;
        }
    }
    let mut hidden = 0;
    for (p, &id) in ids[..ids.len() - 1].iter().enumerate() {
        hidden = mix(hidden, key(version, id, p));
        reference.experts.extend(experts_of(hidden));
    }
    reference
}

pub fn reference(request: &Request, rollout: RolloutId, version: PolicyVersion) -> Reference {
    continue_from(request, rollout, version, &[])
}
