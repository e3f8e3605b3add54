//! `freewheel bench prefill`: what a token of a prompt costs, by the prompt's length.
//!
//! Layers that see everything make a token dearer the longer the prompt is; layers that see a chunk or window do not,
//! and keep no more than that.

use std::time::Instant;

use clap::Args;
use freewheel_kernels::Threads;
use freewheel_kernels::attention::{AttentionMask, KV_BLOCK};
use freewheel_model::{BatchSeq, ForwardBatch, KvCache, PolicyWeights, Purpose, Transformer};
use freewheel_types::PolicyVersion;
use serde_json::{Value, json};

use super::{Machine, Sampling, ids, number, token_flops};
use crate::cli::fail::Explain as _;
use crate::cli::model::ModelArgs;
use crate::cli::table::table;

#[derive(Debug, Args)]
pub struct PrefillArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the prompt; several lengths, separated by commas. Left out: 64, 128 … up to the model's context, at most 4096.
    #[arg(long, value_delimiter = ',')]
    length: Vec<usize>,
    /// Tokens computed at once, as `actor.prefill_tokens`.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    rows: u32,
    #[command(flatten)]
    sampling: Sampling,
}

impl PrefillArgs {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let loaded = self.model.open()?;
        let context = loaded.model.spec().max_positions;
        let lengths = match self.length.as_slice() {
            [] => (6..=12).map(|n| 1 << n).take_while(|length| *length <= context).collect(),
            given => given.to_vec(),
        };
        if lengths.is_empty() || lengths.iter().any(|length| *length == 0 || *length > context) {
            return Err(anyhow::anyhow!("--length {lengths:?} is out of range"))
                .input_hint(format!("the model's context: 1 to {context} tokens"));
        }
        let threads = self.model.threads();
        let machine = Machine::measure(&loaded, &threads);
        let version = PolicyVersion::default();
        let weights =
            PolicyWeights::pack(&loaded.model, &loaded.params, version, Purpose::Sampling, &threads);
        let prompt = Prompt { weights: &weights, threads: &threads, rows: self.rows as usize };
        let flops = token_flops(&loaded.model.products(loaded.params.dtype()));
        let measure =
            |&length: &usize| prompt.measure(&ids(&loaded, 0, length), flops, &machine, &self.sampling);
        let rows = lengths.iter().map(measure).collect::<anyhow::Result<Vec<_>>>()?;
        machine.print("prefill", &loaded, &rows, self.sampling.json, text)
    }
}

/// What reads prompts.
struct Prompt<'a> {
    weights: &'a PolicyWeights,
    threads: &'a Threads,
    /// Rows of one call.
    rows: usize,
}

impl Prompt<'_> {
    /// Reads the prompt several times. `flops`: operations of a token's products.
    fn measure(
        &self,
        tokens: &[u32],
        flops: f64,
        machine: &Machine,
        sampling: &Sampling,
    ) -> anyhow::Result<Value> {
        let mut kv_bytes = 0;
        let rates = sampling.rates(|| {
            let began = Instant::now();
            kv_bytes = self.read(tokens);
            Ok((tokens.len() as f64, began.elapsed().as_secs_f64()))
        })?;
        let per_s = rates.median();
        let flops = flops + attention_flops(self.weights.model(), tokens.len()) / tokens.len() as f64;
        Ok(json!({
            "what": "prefill", "length": tokens.len(), "rows": self.rows, "rounds": rates.0.len(),
            "tokens_per_s": per_s, "tokens_per_s_extremes": rates.extremes(), "us_per_token": 1e6 / per_s,
            "flops_per_s": flops * per_s, "peak_fraction": flops * per_s / machine.peak_flops_per_s,
            "gemm_fraction": flops * per_s / machine.gemm_flops_per_s,
            "kv_bytes": kv_bytes,
        }))
    }

    /// Reads the prompt once, to the logits of its last row. Bytes of the keys and values held at the end.
    fn read(&self, tokens: &[u32]) -> usize {
        let model = self.weights.model();
        let pages: Vec<u32> = (0..tokens.len().div_ceil(KV_BLOCK) as u32).collect();
        let mask = KvCache::local_mask(model).unwrap_or(AttentionMask::Causal);
        let mut kv = KvCache::with_slots(self.weights, pages.len(), 0);
        let mut forgotten = 0;
        for position in (0..tokens.len()).step_by(self.rows) {
            let rows = self.rows.min(tokens.len() - position);
            let logit_rows = if position + rows == tokens.len() { vec![rows - 1] } else { Vec::new() };
            let seqs = [BatchSeq { rows, position, pages: &pages }];
            let tokens = &tokens[position..position + rows];
            let batch = ForwardBatch { tokens, seqs: &seqs, logit_rows: &logit_rows, tiles: &[] };
            self.weights.forward(self.threads, &mut kv, &batch);
            let past = mask.first_visible(position + rows) / KV_BLOCK;
            kv.forget(&pages[forgotten..past]);
            forgotten = past;
        }
        kv.bytes()
    }
}

/// Operations of attention over a prompt of `length`: two products of a query with every key and value it sees.
pub(super) fn attention_flops(model: &Transformer, length: usize) -> f64 {
    let layers = model.spec().layers.iter().map(|(attention, _)| {
        let seen = (0..length).map(|row| row + 1 - attention.mask().first_visible(row)).sum::<usize>() as f64;
        let widths = attention.heads * (attention.head_dim + attention.value_dim());
        2.0 * seen * widths as f64
    });
    layers.sum()
}

fn text(rows: &[Value]) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                number(row, "length", 1.0, 0),
                number(row, "us_per_token", 1.0, 2),
                number(row, "tokens_per_s", 1.0, 1),
                number(row, "flops_per_s", 1e-9, 1),
                number(row, "peak_fraction", 100.0, 1),
                number(row, "gemm_fraction", 100.0, 1),
                number(row, "kv_bytes", 1e-6, 2),
            ]
        })
        .collect();
    table(
        &["length", "us/token", "tokens/s", "GFLOP/s", "% of peak", "% of a large product", "KV MB"],
        &cells,
    )
}
