//! `freewheel logprobs`: what a model thinks of given tokens.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use freewheel_kernels::Threads;
use freewheel_model::sampling::{SampleScratch, log_prob_of};
use freewheel_model::vision::EncodedPrompt;
use freewheel_model::{
    BatchSeq, ForwardBatch, ForwardOutput, KvCache, LoadedModel, PolicyWeights, Purpose, RenderOptions,
    TileRows,
};
use freewheel_types::{PolicyVersion, SamplingParams};
use serde::Deserialize;
use serde_json::{Value, json};

use super::fail::Explain as _;
use super::model::ModelArgs;
use crate::lines;

/// Log-probs of given tokens: JSONL in, JSONL out.
///
/// A line holds `input_ids`, `text` (tokenised as it is, after the ids the tokenizer puts first) or `messages`. Out comes
/// `logprobs`, one for each token but the first, in nats, with `perplexity` over them.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  freewheel logprobs --model models/smollm2 --text 'The capital of France is Paris.'\n  \
    freewheel logprobs --model assets/sprout --input tokens.jsonl --experts > logprobs.jsonl"
)]
pub struct LogprobsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// JSONL file; `-` reads standard input.
    #[arg(long, value_name = "FILE", required_unless_present = "text")]
    input: Option<PathBuf>,
    /// A text; may be repeated.
    #[arg(long, value_name = "TEXT")]
    text: Vec<String>,
    /// Add `experts`: ids chosen at every position, MoE layer and rank.
    #[arg(long)]
    experts: bool,
    /// Add `logits`: a whole row for every position.
    #[arg(long)]
    logits: bool,
    /// Softmax temperature the log-probs are taken at.
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
}

#[derive(Debug, Default, Deserialize)]
struct Line {
    id: Option<Value>,
    input_ids: Option<Vec<u32>>,
    text: Option<String>,
    messages: Option<Vec<Value>>,
}

impl Line {
    fn check(&self) -> Result<(), String> {
        match [self.input_ids.is_some(), self.text.is_some(), self.messages.is_some()]
            .iter()
            .filter(|x| **x)
            .count()
        {
            1 => Ok(()),
            _ => Err("must hold one of `input_ids`, `text`, `messages`".into()),
        }
    }

    /// Ids and image tiles; paths of images start at `folder`.
    fn encode(&self, loaded: &LoadedModel, folder: &Path) -> anyhow::Result<EncodedPrompt> {
        let prompt = match (&self.input_ids, &self.messages) {
            (Some(ids), _) => EncodedPrompt { ids: ids.clone(), tiles: Vec::new() },
            (None, Some(messages)) => {
                let images = crate::images::of_messages(messages, folder).map_err(anyhow::Error::msg)?;
                loaded.tokenizer.encode_chat_with_images(messages, &RenderOptions::default(), &images)?
            }
            (None, None) => {
                let body = freewheel_types::PromptBody::Text(self.text.clone().unwrap_or_default());
                loaded.tokenizer.encode_prompt(&body)?
            }
        };
        let (spec, ids) = (loaded.model.spec(), &prompt.ids);
        if ids.len() < 2 || ids.len() > spec.max_positions {
            anyhow::bail!("{} tokens, must be 2 to {} (the model's context)", ids.len(), spec.max_positions);
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= spec.vocab_size) {
            anyhow::bail!("token id {id}, the vocabulary has {}", spec.vocab_size);
        }
        Ok(prompt)
    }
}

impl LogprobsArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let sampling = SamplingParams { temperature: self.temperature, ..SamplingParams::default() };
        sampling.validate().input()?;
        let mut lines = match &self.input {
            Some(path) => lines::read(path, Line::check)?,
            None => Vec::new(),
        };
        let texts = self.text.iter().map(|text| Line { text: Some(text.clone()), ..Line::default() });
        lines.extend(texts.enumerate().map(|(index, line)| (index + 1, line)));
        let loaded = self.model.open()?;
        let threads = self.model.threads();
        let version = PolicyVersion::default();
        let weights =
            PolicyWeights::pack(&loaded.model, &loaded.params, version, Purpose::Sampling, &threads);
        let mut out = std::io::BufWriter::new(std::io::stdout());
        let folder = self.input.as_deref().and_then(Path::parent).unwrap_or(Path::new(""));
        for (at, line) in &lines {
            let prompt =
                line.encode(&loaded, folder).map_err(|error| error.context(format!("line {at}"))).input()?;
            let output = forward(&weights, &threads, &prompt);
            let row = self.row(line, &prompt.ids, &output, &loaded, &sampling);
            writeln!(out, "{row}")?;
        }
        out.flush()?;
        Ok(())
    }

    fn row(
        &self,
        line: &Line,
        ids: &[u32],
        output: &ForwardOutput,
        loaded: &LoadedModel,
        sampling: &SamplingParams,
    ) -> Value {
        let spec = loaded.model.spec();
        let rows: Vec<&[f32]> = output.logits.chunks(spec.vocab_size).collect();
        let mut scratch = SampleScratch::default();
        let logprobs: Vec<f32> = ids[1..]
            .iter()
            .zip(&rows)
            .map(|(id, row)| log_prob_of(row, sampling, *id, &mut scratch).logprob)
            .collect();
        let mean = logprobs.iter().map(|x| f64::from(*x)).sum::<f64>() / logprobs.len() as f64;
        let mut map = serde_json::Map::new();
        if let Some(id) = &line.id {
            map.insert("id".into(), id.clone());
        }
        map.insert("input_ids".into(), json!(ids));
        map.insert("logprobs".into(), json!(logprobs));
        map.insert("logprob_sum".into(), json!(mean * logprobs.len() as f64));
        map.insert("perplexity".into(), json!((-mean).exp()));
        if self.experts {
            let per_layer = spec.top_k().max(1);
            let per_token = (spec.moe_layers() * per_layer).max(1);
            let nested: Vec<Vec<&[u16]>> =
                output.experts.chunks(per_token).map(|token| token.chunks(per_layer).collect()).collect();
            map.insert("experts".into(), json!(nested));
        }
        if self.logits {
            map.insert("logits".into(), json!(rows));
        }
        Value::Object(map)
    }
}

/// All positions of one sequence at once, logits of every row.
fn forward(weights: &PolicyWeights, threads: &Threads, prompt: &EncodedPrompt) -> ForwardOutput {
    let ids = &prompt.ids;
    let tiles: Vec<TileRows> = prompt.tiles.iter().filter_map(|tile| tile.rows_in(0, ids.len())).collect();
    let page = freewheel_kernels::attention::KV_BLOCK;
    let pages: Vec<u32> = (0..ids.len().div_ceil(page) as u32).collect();
    let mut cache = KvCache::new(weights, pages.len());
    let seqs = [BatchSeq { rows: ids.len(), position: 0, pages: &pages }];
    let logit_rows: Vec<usize> = (0..ids.len()).collect();
    let batch = ForwardBatch { tokens: ids, seqs: &seqs, logit_rows: &logit_rows, tiles: &tiles };
    weights.forward(threads, &mut cache, &batch)
}
