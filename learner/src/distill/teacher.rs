//! Who says what is likely: a model at work, or what it said once, in a file.

use std::path::Path;
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_model::{LoadedModel, Params, PolicyWeights, Purpose, TileRows, TrainBatch, Transformer};
use freewheel_types::{Digest, PolicyVersion};

use crate::LearnerError;
use crate::packing::{TrainSequence, pack};
use crate::sft::TokenisedExample;

/// Rows whose logits are looked at together: bounds memory.
const ROWS: usize = 256;

/// The k likeliest tokens at each position of one completion, and their log-probs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopK {
    /// Ids `[tokens, k]`, likeliest first; of equals the lower id.
    pub ids: Vec<u32>,
    /// Log-probs `[tokens, k]`, nats.
    pub logprobs: Vec<f32>,
}

/// What a teacher said about every example.
#[derive(Clone, Debug, PartialEq)]
pub struct SoftTargets {
    /// Tokens kept at each position.
    pub k: usize,
    /// One entry an example.
    pub examples: Vec<TopK>,
}

/// A teacher at work.
#[derive(Debug)]
pub struct Teacher {
    weights: PolicyWeights,
    threads: Threads,
    k: usize,
}

impl Teacher {
    /// A teacher that keeps `k` tokens; no more than its vocabulary holds.
    pub fn new(model: &Arc<Transformer>, params: &Params, k: usize, threads: Threads) -> Self {
        let version = PolicyVersion::default();
        let weights = PolicyWeights::pack(model, params, version, Purpose::Sampling, &threads);
        Self { weights, k: k.min(model.spec().vocab_size), threads }
    }

    /// Tokens kept.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Goes on with other weights.
    pub fn load(&mut self, params: &Params) {
        self.weights.repack(params, PolicyVersion::default(), &self.threads);
    }

    /// What it says about `examples`, in order.
    pub fn say(&self, examples: &[&TokenisedExample], budget: usize) -> Vec<TopK> {
        let sequences: Vec<TrainSequence> = examples.iter().map(|example| example.sequence()).collect();
        let mut said = vec![TopK::default(); examples.len()];
        for packed in pack(&sequences, budget) {
            let tiles: Vec<TileRows> =
                packed.tiles.iter().filter_map(|tile| tile.rows_in(0, packed.tokens.len())).collect();
            let batch =
                TrainBatch { tokens: &packed.tokens, seqs: &packed.seqs, replay: None, tiles: &tiles };
            let tape = self.weights.forward_train(&self.threads, &batch);
            for sequence in &packed.sequences {
                let out = &mut said[sequence.index];
                for targets in packed.targets[sequence.targets.clone()].chunks(ROWS) {
                    let rows: Vec<usize> = targets.iter().map(|target| target.row).collect();
                    let logits = tape.logits(&self.threads, &self.weights, &rows);
                    logits.chunks_exact(logits.len() / rows.len()).for_each(|row| self.keep(row, out));
                }
            }
        }
        said
    }

    fn keep(&self, logits: &[f32], out: &mut TopK) {
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if self.k < ids.len() {
            ids.select_nth_unstable_by(self.k, order);
            ids.truncate(self.k);
        }
        ids.sort_unstable_by(order);
        let stats = freewheel_kernels::softmax::row_stats(logits, 1.0);
        let log_prob = |id: &u32| freewheel_kernels::softmax::log_prob(&stats, logits[*id as usize], 1.0);
        out.logprobs.extend(ids.iter().map(log_prob));
        out.ids.extend(ids);
    }
}

/// Identity of examples: what was said about others is of no use.
fn digest(examples: &[TokenisedExample]) -> String {
    let mut bytes = Vec::new();
    for example in examples {
        for ids in [&example.prompt_ids, &example.output_ids] {
            bytes.extend((ids.len() as u64).to_le_bytes());
            bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
        }
    }
    Digest::of(&bytes).to_string()
}

impl SoftTargets {
    /// What `model` says about all of `examples`.
    pub fn compute(
        model: &LoadedModel,
        examples: &[TokenisedExample],
        k: usize,
        budget: usize,
        threads: &Threads,
    ) -> Self {
        let teacher = Teacher::new(&model.model, &model.params, k, threads.clone());
        let all: Vec<&TokenisedExample> = examples.iter().collect();
        let examples = all.chunks(64).flat_map(|some| teacher.say(some, budget)).collect();
        Self { k: teacher.k(), examples }
    }

    /// Writes it as safetensors: `ids` (U32) and `logprobs` (F32), `[tokens, k]`, example after example.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: &Path, examples: &[TokenisedExample]) -> Result<(), LearnerError> {
        let ids: Vec<u32> = self.examples.iter().flat_map(|example| &example.ids).copied().collect();
        let logprobs: Vec<f32> =
            self.examples.iter().flat_map(|example| &example.logprobs).copied().collect();
        let (tokens, half) = (ids.len() / self.k.max(1), 4 * ids.len());
        let shape = [tokens, self.k];
        let header = serde_json::json!({
            "__metadata__": { "examples": digest(examples) },
            "ids": { "dtype": "U32", "shape": shape, "data_offsets": [0, half] },
            "logprobs": { "dtype": "F32", "shape": shape, "data_offsets": [half, 2 * half] },
        });
        let mut bytes = header.to_string().into_bytes();
        bytes.resize(bytes.len().next_multiple_of(8), b' ');
        let mut file = (bytes.len() as u64).to_le_bytes().to_vec();
        file.extend(bytes);
        file.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
        file.extend(logprobs.iter().flat_map(|x| x.to_le_bytes()));
        std::fs::write(path, file).map_err(LearnerError::disk(path, "write"))
    }

    /// Reads what was said about `examples`.
    ///
    /// # Errors
    /// If the file cannot be read, is damaged, or is about other examples.
    pub fn load(path: &Path, examples: &[TokenisedExample]) -> Result<Self, LearnerError> {
        let bad = |what: String| LearnerError::Config(format!("{}: {what}", path.display()));
        let bytes = std::fs::read(path).map_err(LearnerError::disk(path, "read"))?;
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
        let about = header.metadata().as_ref().and_then(|metadata| metadata.get("examples").cloned());
        if about != Some(digest(examples)) {
            return Err(bad("is about other examples; remove it, or name another teacher.store".into()));
        }
        let file = safetensors::SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
        let tensor = |name: &str, dtype| {
            let view = file.tensor(name).map_err(|e| bad(e.to_string()))?;
            match (view.dtype() == dtype, view.shape()) {
                (true, &[tokens, k]) if k > 0 => Ok((tokens, k, view.data())),
                _ => Err(bad(format!("{name} is {:?} {:?}", view.dtype(), view.shape()))),
            }
        };
        let (tokens, k, ids) = tensor("ids", safetensors::Dtype::U32)?;
        let (_, _, logprobs) = tensor("logprobs", safetensors::Dtype::F32)?;
        let expected: usize = examples.iter().map(|example| example.output_ids.len()).sum();
        if tokens != expected || ids.len() != logprobs.len() {
            return Err(bad(format!("holds {tokens} tokens, the examples have {expected}")));
        }
        let ids: Vec<u32> = ids.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let logprobs: Vec<f32> = logprobs.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if let Some(wrong) = logprobs.iter().find(|x| x.is_nan() || **x > 0.0) {
            return Err(bad(format!("holds the log-prob {wrong}")));
        }
        let mut at = 0;
        let mut part = |example: &TokenisedExample| {
            let range = at..at + k * example.output_ids.len();
            at = range.end;
            TopK { ids: ids[range.clone()].to_vec(), logprobs: logprobs[range].to_vec() }
        };
        let examples = examples.iter().map(&mut part).collect();
        Ok(Self { k, examples })
    }
}
