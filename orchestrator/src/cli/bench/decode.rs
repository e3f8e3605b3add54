//! `freewheel bench decode`: tokens a second by batch size, through the engine that rollouts come from.
//!
//! Bytes are counted, not sampled: weights once a step (of experts, those that the router chose), keys and values up to the
//! position. What is measured is time.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context as _;
use clap::Args;
use freewheel_actor::{CpuBackend, Engine, EngineConfig, Finished, Request, SampleSpec, StopSpec};
use freewheel_kernels::Threads;
use freewheel_model::{FfnSpec, LoadedModel, Transformer};
use freewheel_types::{SamplingParams, TaskId, WeightsDtype};
use serde_json::{Value, json};

use super::roofline::{self, Point};
use super::{Machine, Sampling, check_sizes, ids, number, token_flops, weight_bytes};
use crate::cli::model::ModelArgs;
use crate::cli::table::table;
use crate::cost::Cost;

#[derive(Debug, Args)]
pub struct DecodeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Sequences at once; several sizes, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [1usize, 8, 32])]
    batch: Vec<usize>,
    /// Tokens that each sequence decodes in a round.
    #[arg(long, default_value_t = 64)]
    length: usize,
    /// Tokens of each prompt before decoding starts.
    #[arg(long, default_value_t = 16)]
    prompt: usize,
    /// Draw the roofline with the rows on it.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    sampling: Sampling,
}

impl DecodeArgs {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let loaded = self.model.open()?;
        let context = loaded.model.spec().max_positions;
        check_sizes(&self.batch, self.length, 2..=context.saturating_sub(self.prompt.max(1)))?;
        let threads = self.model.threads();
        let machine = Machine::measure(&loaded, &threads);
        let rows = self
            .batch
            .iter()
            .map(|&batch| Decode { args: self, loaded: &loaded, threads: &threads, batch }.measure(&machine));
        let rows = rows.collect::<anyhow::Result<Vec<_>>>()?;
        if let Some(path) = &self.svg {
            let points: Vec<Point> = rows.iter().map(Point::of).collect();
            std::fs::write(path, roofline::svg(&machine, &points))
                .with_context(|| format!("{} cannot be written", path.display()))?;
        }
        machine.print("decode", &loaded, &rows, self.sampling.json, text)
    }
}

/// Decoding at one batch size.
struct Decode<'a> {
    args: &'a DecodeArgs,
    loaded: &'a LoadedModel,
    threads: &'a Threads,
    batch: usize,
}

impl Decode<'_> {
    fn measure(&self, machine: &Machine) -> anyhow::Result<Value> {
        // One row a token: what is measured is a step, not how often one is saved.
        let config = EngineConfig {
            max_live: self.batch,
            kv_bytes: 8 << 30,
            prefill_tokens: 4096,
            prefix_cache: false,
            draft_tokens: 0,
            ..EngineConfig::default()
        };
        let mut engine = crate::policy::engine(self.loaded, self.threads, config)?;
        let (mut finished, mut round) = (Vec::new(), 0);
        let rates = self.args.sampling.rates(|| {
            round += 1;
            self.round(&mut engine, round, &mut finished)
        })?;
        Ok(self.row(machine, &rates, &finished))
    }

    /// Decodes a batch of sequences to their ends; tokens and seconds.
    fn round(
        &self,
        engine: &mut Engine<CpuBackend>,
        round: u64,
        finished: &mut Vec<Finished>,
    ) -> anyhow::Result<(f64, f64)> {
        for index in 0..self.batch as u64 {
            let task = TaskId(round * self.batch as u64 + index);
            engine.submit(Request {
                id: index,
                prompt_ids: ids(self.loaded, index, self.args.prompt.max(1)),
                tiles: Vec::new(),
                samples: vec![SampleSpec { rollout: task.rollout(0) }],
                seed: 0,
                sampling: SamplingParams::default(),
                max_new_tokens: self.args.length,
                stop: StopSpec::default(),
            })?;
        }
        finished.clear();
        // The prompts are read in the first steps: that is not decoding.
        while engine.stats().live < self.batch && !engine.is_idle() {
            finished.extend(engine.step());
        }
        let (began, before) = (Instant::now(), engine.stats());
        while !engine.is_idle() {
            finished.extend(engine.step());
        }
        let tokens = engine.stats().tokens - before.tokens;
        Ok((tokens as f64, began.elapsed().as_secs_f64()))
    }

    fn row(&self, machine: &Machine, rates: &super::Rates, finished: &[Finished]) -> Value {
        let (model, dtype) = (&self.loaded.model, self.loaded.params.dtype());
        let element = match dtype {
            WeightsDtype::Bf16 => 2,
            WeightsDtype::F32 => 4,
        };
        let products = model.products(dtype);
        let coverage = coverage(model, self.args.prompt.max(1), finished);
        let context = self.args.prompt as f64 + self.args.length as f64 / 2.0;
        let kept = self.batch as f64 * context * Cost::of(model, element).kv_bytes as f64;
        let bytes = weight_bytes(&products, coverage.unwrap_or(1.0)) + kept;
        let flops = self.batch as f64 * (token_flops(&products) + attention_flops(model, context));
        let per_s = rates.median();
        let steps_per_s = per_s / self.batch as f64;
        let (read_s, product_s) = (bytes / machine.read_bytes_per_s, flops / machine.gemm_flops_per_s);
        let bound_s = read_s.max(product_s);
        json!({
            "what": "decode", "batch": self.batch, "length": self.args.length, "rounds": rates.0.len(),
            "tokens_per_s": per_s, "tokens_per_s_extremes": rates.extremes(), "step_ms": 1e3 / steps_per_s,
            "bytes_per_step": bytes, "flops_per_step": flops,
            "bytes_per_s": bytes * steps_per_s,
            "bandwidth_fraction": bytes * steps_per_s / machine.read_bytes_per_s,
            "flops_per_s": flops * steps_per_s,
            "peak_fraction": flops * steps_per_s / machine.peak_flops_per_s,
            "roofline_tokens_per_s": self.batch as f64 / bound_s,
            "over_roofline": 1.0 / steps_per_s / bound_s,
            "bound": if read_s >= product_s { "bytes" } else { "flops" },
            "expert_coverage": coverage,
        })
    }
}

/// Operations of attention for a row that sees `context` positions, where the layer lets it.
fn attention_flops(model: &Transformer, context: f64) -> f64 {
    let layers = model.spec().layers.iter().map(|(attention, _)| {
        let row = context as usize;
        let seen = context - attention.mask().first_visible(row) as f64;
        2.0 * seen * (attention.heads * (attention.head_dim + attention.value_dim())) as f64
    });
    layers.sum()
}

/// Mean share of a layer's experts that one decode step touches, counted from what the router chose; `None` for dense models.
fn coverage(model: &Transformer, prompt: usize, finished: &[Finished]) -> Option<f64> {
    let spec = model.spec();
    let experts = spec.layers.iter().find_map(|(_, ffn)| match ffn {
        FfnSpec::Moe(moe) => Some(moe.experts),
        FfnSpec::Dense { .. } => None,
    })?;
    let (layers, top_k) = (spec.moe_layers(), spec.top_k());
    let row = layers * top_k;
    let rows = finished.iter().map(|done| done.experts.ids.len() / row).min()?;
    let (mut touched, mut counted) = (0usize, 0usize);
    for position in prompt..rows {
        for layer in 0..layers {
            let mut seen = vec![false; experts];
            for done in finished {
                let at = position * row + layer * top_k;
                done.experts.ids[at..at + top_k].iter().for_each(|id| seen[usize::from(*id)] = true);
            }
            touched += seen.iter().filter(|seen| **seen).count();
            counted += experts;
        }
    }
    (counted > 0).then(|| touched as f64 / counted as f64)
}

fn text(rows: &[Value]) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                number(row, "batch", 1.0, 0),
                number(row, "tokens_per_s", 1.0, 1),
                number(row, "step_ms", 1.0, 2),
                number(row, "bytes_per_s", 1e-9, 2),
                number(row, "bandwidth_fraction", 100.0, 1),
                number(row, "flops_per_s", 1e-9, 1),
                number(row, "peak_fraction", 100.0, 1),
                number(row, "roofline_tokens_per_s", 1.0, 0),
                number(row, "over_roofline", 1.0, 2),
                number(row, "expert_coverage", 1.0, 3),
            ]
        })
        .collect();
    let header = [
        "batch",
        "tokens/s",
        "ms/step",
        "GB/s",
        "% of reads",
        "GFLOP/s",
        "% of peak",
        "roofline",
        "times over",
        "experts read",
    ];
    let worst = super::worst(rows);
    let told = format!(
        "worst: {} times the roofline (bytes of the experts that were chosen, or operations), at batch {}\n",
        number(&worst, "over_roofline", 1.0, 2),
        number(&worst, "batch", 1.0, 0),
    );
    table(&header, &cells) + &told
}
