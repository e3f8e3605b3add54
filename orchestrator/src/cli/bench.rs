//! `freewheel bench decode | prefill | train | objectives`: how fast, and how near to what this machine can do, measured in the same run.

mod prefill;

use std::time::Instant;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use freewheel_actor::{EngineConfig, Finished, Request, SampleSpec, StopSpec};
use freewheel_kernels::{Precision, Threads, measure};
use freewheel_model::{LoadedModel, PolicyWeights, Purpose, Target, TrainBatch, TrainSeq};
use freewheel_types::{CounterRng, PolicyVersion, SamplingParams, TaskId, WeightsDtype};
use serde_json::{Value, json};

use super::fail::Explain as _;
use super::model::ModelArgs;
use super::table::table;
use crate::cost::Cost;

/// Measure speed, beside the machine's own limits.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  freewheel bench decode --model assets/sprout --batch 1,8,32\n  \
    freewheel bench train --model assets/sprout --batch 8 --length 128 --json")]
pub struct BenchCommand {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Tokens a second when decoding, by batch size.
    #[command(after_help = "Example:\n  freewheel bench decode --model assets/sprout --batch 1,8,32 --json")]
    Decode(BenchArgs),
    /// Cost of a prompt's tokens, by its length.
    #[command(
        after_help = "Example:\n  freewheel bench prefill --model assets/sprout --length 64,128,256,512 --json"
    )]
    Prefill(prefill::PrefillArgs),
    /// Tokens a second of a forward and backward pass, by sequences in the batch.
    #[command(after_help = "Example:\n  freewheel bench train --model assets/sprout --batch 8 --length 128")]
    Train(BenchArgs),
    Objectives(super::ablation::AblationArgs),
}

#[derive(Debug, Args)]
struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Sequences at once; several sizes, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [1usize, 8, 32])]
    batch: Vec<usize>,
    /// Tokens of a sequence: decoded after a prompt of 16, or trained on.
    #[arg(long, default_value_t = 64)]
    length: usize,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// Tokens of the prompt before decoding starts.
const PROMPT: usize = 16;
/// Each row is measured at least this long.
const SECONDS: f64 = 1.0;

struct Machine {
    threads: usize,
    precision: Precision,
    read_bytes_per_s: f64,
    peak_flops_per_s: f64,
}

impl BenchCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self.what {
            What::Decode(args) => args.run("decode", decode),
            What::Prefill(args) => args.run(),
            What::Train(args) => args.run("train", train),
            What::Objectives(args) => args.run(),
        }
    }
}

impl BenchArgs {
    fn run(
        &self,
        what: &str,
        measure_row: fn(&Self, &LoadedModel, &Threads, &Machine, usize) -> anyhow::Result<Value>,
    ) -> anyhow::Result<()> {
        let loaded = self.model.open()?;
        let context = loaded.model.spec().max_positions;
        if self.length == 0
            || PROMPT + self.length > context
            || self.batch.iter().any(|b| *b == 0 || *b > 4096)
        {
            return Err(anyhow::anyhow!(
                "--length {} or --batch {:?} is out of range",
                self.length,
                self.batch
            ))
            .input_hint(format!("--length 1 to {}, --batch 1 to 4096", context.saturating_sub(PROMPT)));
        }
        let threads = self.model.threads();
        let machine = Machine::measure(&loaded, &threads);
        let rows = self
            .batch
            .iter()
            .map(|batch| measure_row(self, &loaded, &threads, &machine, *batch))
            .collect::<anyhow::Result<Vec<_>>>()?;
        machine.print(what, &loaded, rows, self.json, text)
    }
}

impl Machine {
    fn measure(loaded: &LoadedModel, threads: &Threads) -> Self {
        let precision = match loaded.params.dtype() {
            WeightsDtype::Bf16 => Precision::Bf16,
            WeightsDtype::F32 => Precision::F32,
        };
        Self {
            threads: threads.count(),
            precision,
            read_bytes_per_s: measure::read_bandwidth(threads),
            peak_flops_per_s: measure::peak_flops(threads, precision),
        }
    }

    /// Prints what was measured, as JSON or as a table.
    fn print(
        &self,
        what: &str,
        loaded: &LoadedModel,
        rows: Vec<Value>,
        as_json: bool,
        text: fn(&[Value]) -> String,
    ) -> anyhow::Result<()> {
        let features = measure::cpu_features();
        if as_json {
            let result = json!({
                "what": what,
                "machine": {
                    "threads": self.threads, "features": features.used,
                    "read_bytes_per_s": self.read_bytes_per_s, "peak_flops_per_s": self.peak_flops_per_s,
                    "precision": format!("{:?}", self.precision).to_lowercase(),
                },
                "model": {"path": loaded.source, "parameters": loaded.model.layout().total},
                "rows": rows,
            });
            println!("{}", serde_json::to_string_pretty(&result)?);
            return Ok(());
        }
        println!(
            "{} on {} threads: reads {:.1} GB/s, computes {:.0} GFLOP/s",
            features.used,
            self.threads,
            self.read_bytes_per_s / 1e9,
            self.peak_flops_per_s / 1e9
        );
        print!("{}", text(&rows));
        Ok(())
    }
}

/// A number of a row for a table; `-` where there is none.
fn number(row: &Value, key: &str, scale: f64, digits: usize) -> String {
    row[key].as_f64().map_or_else(|| "-".into(), |x| format!("{:.digits$}", x * scale))
}

fn text(rows: &[Value]) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                number(row, "batch", 1.0, 0),
                number(row, "tokens_per_s", 1.0, 1),
                number(row, "bytes_per_s", 1e-9, 2),
                number(row, "bandwidth_fraction", 100.0, 1),
                number(row, "flops_per_s", 1e-9, 1),
                number(row, "peak_fraction", 100.0, 1),
                number(row, "expert_coverage", 1.0, 3),
            ]
        })
        .collect();
    table(&["batch", "tokens/s", "GB/s", "% of reads", "GFLOP/s", "% of peak", "experts read"], &cells)
}

fn ids(loaded: &LoadedModel, stream: u64, n: usize) -> Vec<u32> {
    let rng = CounterRng::new(1, stream);
    (0..n as u64).map(|i| rng.below(i, loaded.model.spec().vocab_size as u64) as u32).collect()
}

fn decode(
    args: &BenchArgs,
    loaded: &LoadedModel,
    threads: &Threads,
    machine: &Machine,
    batch: usize,
) -> anyhow::Result<Value> {
    // One row a token: what is measured is a step, not how often one is saved.
    let config = EngineConfig {
        max_live: batch,
        kv_bytes: 8 << 30,
        prefill_tokens: 4096,
        prefix_cache: false,
        draft_tokens: 0,
        ..EngineConfig::default()
    };
    let mut engine = crate::policy::engine(loaded, threads, config)?;
    let (mut seconds, mut tokens, mut steps) = (0.0, 0u64, 0u64);
    let mut finished = Vec::new();
    let mut round = 0;
    while seconds < SECONDS {
        for index in 0..batch as u64 {
            let task = TaskId(round * batch as u64 + index);
            engine.submit(Request {
                id: index,
                prompt_ids: ids(loaded, index, PROMPT),
                tiles: Vec::new(),
                samples: vec![SampleSpec { rollout: task.rollout(0) }],
                seed: 0,
                sampling: SamplingParams::default(),
                max_new_tokens: args.length,
                stop: StopSpec::default(),
            })?;
        }
        finished.clear();
        // The prompts are read in the first step: it is not decoding.
        while engine.stats().live < batch && !engine.is_idle() {
            finished.extend(engine.step());
        }
        let (began, before) = (Instant::now(), engine.stats());
        while !engine.is_idle() {
            finished.extend(engine.step());
        }
        let after = engine.stats();
        seconds += began.elapsed().as_secs_f64();
        tokens += after.tokens - before.tokens;
        steps += after.steps - before.steps;
        round += 1;
    }
    let cost = Cost::of(&loaded.model);
    let coverage = coverage(loaded, &finished);
    let context = PROMPT as f64 + args.length as f64 / 2.0;
    let weight = loaded.model.weight_bytes(loaded.params.dtype());
    let bytes = cost.decode_bytes(weight, batch, context, coverage.unwrap_or(1.0)) * steps as f64;
    let flops = cost.forward_flops() * tokens as f64;
    Ok(json!({
        "what": "decode", "batch": batch,
        "tokens_per_s": tokens as f64 / seconds,
        "bytes_per_s": bytes / seconds, "bandwidth_fraction": bytes / seconds / machine.read_bytes_per_s,
        "flops_per_s": flops / seconds, "peak_fraction": flops / seconds / machine.peak_flops_per_s,
        "expert_coverage": coverage, "seconds": seconds, "length": args.length,
    }))
}

/// Mean share of a layer's experts that one decode step touches, counted from what the router chose; `None` for dense models.
fn coverage(loaded: &LoadedModel, finished: &[Finished]) -> Option<f64> {
    let spec = loaded.model.spec();
    let experts = spec.layers.iter().find_map(|(_, ffn)| match ffn {
        freewheel_model::FfnSpec::Moe(moe) => Some(moe.experts),
        freewheel_model::FfnSpec::Dense { .. } => None,
    })?;
    let (layers, top_k) = (spec.moe_layers(), spec.top_k());
    let row = layers * top_k;
    let rows = finished.iter().map(|done| done.experts.ids.len() / row).min()?;
    let (mut touched, mut counted) = (0usize, 0usize);
    for position in PROMPT..rows {
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

fn train(
    args: &BenchArgs,
    loaded: &LoadedModel,
    threads: &Threads,
    machine: &Machine,
    batch: usize,
) -> anyhow::Result<Value> {
    let version = PolicyVersion::default();
    let weights = PolicyWeights::pack(&loaded.model, &loaded.params, version, Purpose::Training, threads);
    let tokens = ids(loaded, 0, batch * args.length);
    let seqs = vec![TrainSeq::whole(args.length); batch];
    let targets: Vec<Target> = (0..tokens.len())
        .filter(|row| (row + 1) % args.length != 0)
        .map(|row| Target { row, token: tokens[row + 1] })
        .collect();
    let sampling = SamplingParams::default();
    let gradient = vec![-1.0 / targets.len().max(1) as f32; targets.len()];
    let mut grads = vec![0.0; loaded.model.layout().total];
    let mut once = || {
        let tape = weights
            .forward_train(threads, &TrainBatch { tokens: &tokens, seqs: &seqs, replay: None, tiles: &[] });
        let found = tape.log_probs(threads, &weights, &targets, &sampling);
        tape.backward(threads, &weights, &targets, &sampling, &gradient, None, &mut grads);
        found.logprobs.first().copied()
    };
    once().context("--length must be at least 2 to train")?;
    let began = Instant::now();
    let mut rounds = 0u32;
    while began.elapsed().as_secs_f64() < SECONDS {
        once();
        rounds += 1;
    }
    let seconds = began.elapsed().as_secs_f64();
    let done = f64::from(rounds) * tokens.len() as f64;
    // Backward computes two products for each of the forward pass.
    let flops = 3.0 * Cost::of(&loaded.model).forward_flops() * done;
    Ok(json!({
        "what": "train", "batch": batch, "length": args.length,
        "tokens_per_s": done / seconds,
        "bytes_per_s": Value::Null, "bandwidth_fraction": Value::Null,
        "flops_per_s": flops / seconds, "peak_fraction": flops / seconds / machine.peak_flops_per_s,
        "expert_coverage": Value::Null, "seconds": seconds,
    }))
}
