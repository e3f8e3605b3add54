//! Models that score a text: reward models and classifiers, on a decoder's body or an encoder's.
//!
//! A text becomes ids in one of two ways: a conversation through the chat template (decoders), or one or two segments
//! between special tokens (encoders). Scores of a text do not depend on what else is in the batch.

use std::path::Path;
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_kernels::attention::KV_BLOCK;
use freewheel_types::{Digest, PolicyVersion};

use crate::checkpoint::{self, LoadedEncoder, LoadedModel, read_json};
use crate::config::{CLASSIFIERS, ENCODERS, labels_of};
use crate::encoder::{EncoderBatch, EncoderWeights};
use crate::error::ModelError;
use crate::tokenizer::{Framed, Tokenizer};
use crate::transformer::{BatchSeq, ForwardBatch, KvCache, PolicyWeights, Purpose};

/// A model that gives a score for each of its labels.
#[derive(Debug)]
pub struct Scorer {
    body: Body,
    info: ScorerInfo,
    pad_id: Option<u32>,
    version: String,
}

/// What is known of a scorer without its weights.
#[derive(Clone, Debug)]
pub struct ScorerInfo {
    /// Architecture string as in `config.json`.
    pub architecture: String,
    /// Names of the labels, in the order of the scores.
    pub labels: Vec<String>,
    /// Longest input, tokens.
    pub max_tokens: usize,
    /// Whether it is an encoder: reads segments rather than a conversation.
    pub encoder: bool,
    /// Its tokenizer and chat template.
    pub tokenizer: Arc<Tokenizer>,
}

#[derive(Debug)]
enum Body {
    Decoder(Box<PolicyWeights>),
    Encoder { weights: Box<EncoderWeights>, token_types: bool },
}

impl ScorerInfo {
    /// Reads configuration and tokenizer of the model in `dir`, not its weights.
    ///
    /// # Errors
    /// Whatever is wrong with those files; [`ModelError::Unsupported`] if the model gives no scores.
    pub fn read(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let config = read_json(&path)?;
        let architecture = config
            .get("architectures")
            .and_then(|names| names.as_array()?.first()?.as_str())
            .unwrap_or_default()
            .to_owned();
        let (encoder, vocab_size, max_tokens) = if ENCODERS.contains(&architecture.as_str()) {
            let spec = crate::config::encoder_spec_from_config(&path, &config)?;
            if spec.labels.is_none() {
                return Err(no_scores(&path, &architecture));
            }
            (true, spec.vocab_size, spec.max_positions)
        } else if CLASSIFIERS.iter().any(|row| row.name == architecture) {
            let spec = crate::config::spec_from_config(&path, &config)?;
            (false, spec.vocab_size, spec.max_positions)
        } else {
            return Err(no_scores(&path, &architecture));
        };
        let tokenizer = Tokenizer::from_folder(dir)?;
        tokenizer.check_fits(vocab_size)?;
        let labels = labels_of(&path, &config)?;
        Ok(Self { architecture, labels, max_tokens, encoder, tokenizer: Arc::new(tokenizer) })
    }
}

fn no_scores(path: &Path, architecture: &str) -> ModelError {
    let names: Vec<&str> = CLASSIFIERS
        .iter()
        .map(|row| row.name)
        .chain(ENCODERS)
        .filter(|name| name.ends_with("ForSequenceClassification"))
        .collect();
    ModelError::Unsupported {
        path: path.to_owned(),
        what: format!("scoring with architecture `{architecture}`"),
        hint: format!("; supported are {}", names.join(", ")),
    }
}

impl Scorer {
    /// Loads the model in `dir` and packs its weights.
    ///
    /// # Errors
    /// Whatever is wrong with the files, by name; see [`ScorerInfo::read`].
    pub fn load(dir: &Path, threads: &Threads) -> Result<Self, ModelError> {
        let info = ScorerInfo::read(dir)?;
        if info.encoder {
            let LoadedEncoder { encoder, params, .. } = checkpoint::load_encoder(dir, None)?;
            let version = version(params.digest(), &info.tokenizer);
            let weights = Box::new(EncoderWeights::pack(&encoder, &params, Purpose::Sampling, threads));
            let body = Body::Encoder { weights, token_types: encoder.spec().token_types > 1 };
            return Ok(Self { body, info, pad_id: None, version });
        }
        let loaded = checkpoint::load_classifier(dir, None)?;
        let version = version(loaded.params.digest(), &info.tokenizer);
        let LoadedModel { model, params, generation, .. } = loaded;
        let weights =
            PolicyWeights::pack(&model, &params, PolicyVersion::default(), Purpose::Sampling, threads);
        Ok(Self { body: Body::Decoder(Box::new(weights)), info, pad_id: generation.pad_id, version })
    }

    /// What is known of it without its weights.
    pub fn info(&self) -> &ScorerInfo {
        &self.info
    }

    /// Identity of weights and tokenizer, 16 hex digits: the same version gives the same scores.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Scores of each input, one for each label.
    ///
    /// A decoder's are read at the last token that is not the padding id, as the reference library does.
    ///
    /// # Panics
    /// If an input is empty, longer than [`ScorerInfo::max_tokens`] or holds an id outside the vocabulary.
    pub fn score(&self, threads: &Threads, inputs: &[Framed]) -> Vec<Vec<f32>> {
        if inputs.is_empty() {
            return Vec::new();
        }
        let lengths: Vec<usize> = inputs.iter().map(|input| input.ids.len()).collect();
        for len in &lengths {
            assert!(
                (1..=self.info.max_tokens).contains(len),
                "{len} tokens of 1 to {}",
                self.info.max_tokens
            );
        }
        let tokens: Vec<u32> = inputs.iter().flat_map(|input| &input.ids).copied().collect();
        let scores = match &self.body {
            Body::Encoder { weights, token_types } => {
                let types: Vec<u32> = inputs.iter().flat_map(|input| &input.token_types).copied().collect();
                let types = token_types.then_some(&types[..]);
                let batch = EncoderBatch { tokens: &tokens, token_types: types, lengths: &lengths };
                weights.scores(threads, &weights.forward(threads, &batch), &lengths)
            }
            Body::Decoder(weights) => self.decoder_scores(threads, weights, &tokens, inputs),
        };
        scores.chunks_exact(scores.len() / inputs.len()).map(<[f32]>::to_vec).collect()
    }

    fn decoder_scores(
        &self,
        threads: &Threads,
        weights: &PolicyWeights,
        tokens: &[u32],
        inputs: &[Framed],
    ) -> Vec<f32> {
        let blocks = |input: &Framed| input.ids.len().div_ceil(KV_BLOCK);
        let pages: Vec<u32> = (0..inputs.iter().map(blocks).sum::<usize>() as u32).collect();
        let (mut first_row, mut first_page) = (0, 0);
        let (mut seqs, mut rows) = (Vec::new(), Vec::new());
        for input in inputs {
            let count = blocks(input);
            seqs.push(BatchSeq {
                rows: input.ids.len(),
                position: 0,
                pages: &pages[first_page..first_page + count],
            });
            rows.push(first_row + score_row(&input.ids, self.pad_id));
            first_row += input.ids.len();
            first_page += count;
        }
        let mut cache = KvCache::new(weights, pages.len());
        let batch = ForwardBatch { tokens, seqs: &seqs, logit_rows: &rows, tiles: &[] };
        weights.forward(threads, &mut cache, &batch).logits.to_vec()
    }
}

/// The row whose scores count: the last that is not the padding id; the first if there is no other.
pub fn score_row(ids: &[u32], pad_id: Option<u32>) -> usize {
    ids.iter().rposition(|id| Some(*id) != pad_id).unwrap_or(0)
}

fn version(weights: Digest, tokenizer: &Tokenizer) -> String {
    let both = [weights.to_string(), tokenizer.digest().to_string()].concat();
    Digest::of(both.as_bytes()).to_string()[..16].to_owned()
}
