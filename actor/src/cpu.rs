//! Backend and loader on processor cores: a thin adapter over the one transformer of `freewheel-model`.

use std::sync::Arc;

use freewheel_kernels::attention::KV_BLOCK;
use freewheel_kernels::{Pages, Threads};
use freewheel_model::delta::apply_frame;
use freewheel_model::sampling::{self, SampleScratch};
use freewheel_model::vision::EncodedPrompt;
use freewheel_model::{
    BatchSeq, ForwardBatch, KvCache, Params, PolicyWeights, Purpose, Tokenizer, Transformer,
};
use freewheel_types::{Digest, PolicyVersion, PromptBody, WeightsPayload};

use crate::ActorError;
use crate::engine::{Backend, BackendInfo, Draw, Drawn, LocalLayers, StepBatch, StepOutput, TextDecoder};
use crate::role::{PolicyLoader, PromptCodec};

/// One version of a policy with its keys and values, on processor cores.
pub struct CpuBackend {
    model: Arc<Transformer>,
    weights: Arc<PolicyWeights>,
    cache: KvCache,
    threads: Threads,
    /// Memory for the next logits.
    logits: Pages<f32>,
}

impl CpuBackend {
    /// A backend that starts with `weights` and computes on `threads`.
    pub fn new(weights: Arc<PolicyWeights>, threads: Threads) -> Self {
        let model = weights.model().clone();
        let cache = KvCache::new(&weights, 0);
        Self { model, weights, cache, threads, logits: Pages::new() }
    }

    /// Its keys and values.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }
}

impl Backend for CpuBackend {
    type Weights = PolicyWeights;

    fn info(&self) -> BackendInfo {
        let (spec, precision) = (self.model.spec(), self.weights.precision());
        BackendInfo {
            vocab_size: spec.vocab_size,
            max_positions: spec.max_positions,
            moe_layers: spec.moe_layers(),
            top_k: spec.top_k(),
            page_tokens: KV_BLOCK,
            page_bytes: KvCache::page_bytes(&self.model, precision),
            local: KvCache::local_mask(&self.model)
                .map(|mask| LocalLayers { mask, page_bytes: KvCache::slot_bytes(&self.model, precision) }),
            // A matrix tile has sixteen rows.
            cheap_rows: 16,
            images: spec.vision.is_some(),
        }
    }

    fn allocate(&mut self, pages: usize, local: usize) {
        self.cache = KvCache::with_slots(&self.weights, pages, local);
    }

    fn version(&self) -> PolicyVersion {
        self.weights.version()
    }

    fn swap(&mut self, weights: Arc<PolicyWeights>) -> Arc<PolicyWeights> {
        std::mem::replace(&mut self.weights, weights)
    }

    fn forward(&mut self, batch: &StepBatch<'_>) -> StepOutput {
        let seqs: Vec<_> = batch
            .seqs
            .iter()
            .map(|s| BatchSeq { rows: s.rows, position: s.position, pages: s.pages })
            .collect();
        let batch = ForwardBatch {
            tokens: batch.tokens,
            seqs: &seqs,
            logit_rows: batch.logit_rows,
            tiles: batch.tiles,
        };
        let room = std::mem::take(&mut self.logits);
        let output = self.weights.forward_into(&self.threads, &mut self.cache, &batch, room);
        StepOutput { logits: output.logits, experts: output.experts }
    }

    fn reuse(&mut self, output: StepOutput) {
        self.logits = output.logits;
    }

    fn copy_page(&mut self, from: u32, to: u32) {
        self.cache.copy_page(from, to);
    }

    fn forget(&mut self, pages: &[u32]) {
        self.cache.forget(pages);
    }

    fn sample(&mut self, logits: &[f32], draws: &[Draw]) -> Vec<Drawn> {
        let vocab = self.model.spec().vocab_size;
        let mut drawn = vec![Drawn { token: 0, logprob: 0.0 }; draws.len()];
        self.threads.for_each_row_chunk(&mut drawn, 1, 1, |first, block| {
            let mut scratch = SampleScratch::default();
            for (out, draw) in block.iter_mut().zip(&draws[first..]) {
                let row = &logits[draw.row * vocab..][..vocab];
                let sampled = sampling::sample(row, &draw.sampling, draw.uniform, &mut scratch);
                *out = Drawn { token: sampled.token, logprob: sampled.logprob };
            }
        });
        drawn
    }
}

/// Published payloads to weights for a [`CpuBackend`].
pub struct CpuLoader {
    model: Arc<Transformer>,
    shadow: Params,
    tokenizer: Digest,
    threads: Threads,
}

impl CpuLoader {
    /// A loader for `model`. `arena` becomes the shadow copy: its values do not matter, its element type does.
    /// Weights made for another tokenizer than the one of digest `tokenizer` are refused.
    pub fn new(model: Arc<Transformer>, arena: Params, tokenizer: Digest, threads: Threads) -> Self {
        Self { model, shadow: arena, tokenizer, threads }
    }
}

impl PolicyLoader for CpuLoader {
    type Backend = CpuBackend;

    fn apply(&mut self, payload: &WeightsPayload) -> Result<(), ActorError> {
        let manifest = &payload.manifest;
        let bad = |what| ActorError::BadWeights { version: manifest.version, what };
        if manifest.tokenizer_digest != self.tokenizer {
            let theirs = manifest.tokenizer_digest;
            return Err(bad(format!("they are for tokenizer {theirs}, this actor has {}", self.tokenizer)));
        }
        // The caller applies deltas to their base only.
        apply_frame(&mut self.shadow, manifest.base, payload).map_err(|error| bad(error.to_string()))?;
        Ok(())
    }

    fn pack(
        &mut self,
        version: PolicyVersion,
        spare: Option<PolicyWeights>,
    ) -> Result<Arc<PolicyWeights>, ActorError> {
        // One thread: the engine is decoding on the others.
        let threads = Threads::single();
        let weights = match spare {
            Some(mut weights) => {
                weights.repack(&self.shadow, version, &threads);
                weights
            }
            None => PolicyWeights::pack(&self.model, &self.shadow, version, Purpose::Sampling, &threads),
        };
        Ok(Arc::new(weights))
    }

    fn backend(&mut self, weights: Arc<PolicyWeights>) -> CpuBackend {
        CpuBackend::new(weights, self.threads.clone())
    }
}

impl TextDecoder for Tokenizer {
    fn decode(&self, ids: &[u32]) -> String {
        Tokenizer::decode(self, ids)
    }
}

impl PromptCodec for Tokenizer {
    fn encode_prompt(&self, prompt: &PromptBody) -> Result<EncodedPrompt, ActorError> {
        Ok(Tokenizer::encode_prompt(self, prompt)?)
    }
}
