//! `freewheel bench train`: an update from tokens to new weights: forward pass, log-probs, backward pass, AdamW, packing.

use std::time::Instant;

use clap::Args;
use freewheel_kernels::Threads;
use freewheel_learner::optim::{Optimizer, OptimizerSettings};
use freewheel_model::{LoadedModel, Params, PolicyWeights, Purpose, Target, TrainBatch, TrainSeq};
use freewheel_types::{PolicyVersion, SamplingParams, WeightsDtype};
use serde_json::{Value, json};

use super::prefill::attention_flops;
use super::{Machine, Sampling, check_sizes, ids, median, number, token_flops};
use crate::cli::model::ModelArgs;
use crate::cli::table::{bytes, table};
use crate::cost::{Cost, update_bytes};

#[derive(Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Sequences at once; several sizes, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [8usize])]
    batch: Vec<usize>,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 64)]
    length: usize,
    #[command(flatten)]
    sampling: Sampling,
}

impl TrainArgs {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let loaded = self.model.open()?;
        check_sizes(&self.batch, self.length, 2..=loaded.model.spec().max_positions)?;
        let threads = self.model.threads();
        let machine = Machine::measure(&loaded, &threads);
        let mut trained = Trained::new(&loaded, &threads);
        let rows = self.batch.iter().map(|&batch| self.row(&loaded, &machine, &mut trained, batch));
        let rows = rows.collect::<anyhow::Result<Vec<_>>>()?;
        machine.print("train", &loaded, &rows, self.sampling.json, text)
    }

    fn row(
        &self,
        loaded: &LoadedModel,
        machine: &Machine,
        trained: &mut Trained<'_>,
        batch: usize,
    ) -> anyhow::Result<Value> {
        let tokens = ids(loaded, 0, batch * self.length);
        let mut parts = Vec::new();
        let rates = self.sampling.rates(|| {
            let times = trained.update(&tokens, self.length);
            parts.push(times);
            Ok((tokens.len() as f64, times.iter().sum()))
        })?;
        let part = |index: usize| {
            let mut times: Vec<f64> = parts.iter().skip(1).map(|times| times[index]).collect();
            times.sort_by(f64::total_cmp);
            median(&times)
        };
        let model = &loaded.model;
        // Backward computes two products for each of the forward pass.
        let products = token_flops(&model.products(loaded.params.dtype())) * tokens.len() as f64;
        let flops = 3.0 * (products + batch as f64 * attention_flops(model, self.length));
        let per_s = rates.median();
        let flops_per_s = flops * per_s / tokens.len() as f64;
        // AdamW reads the gradient twice, for its norm first, and sets it to zero; masters and both moments are read and written, the
        // weights written.
        let written = match loaded.params.dtype() {
            WeightsDtype::Bf16 => 2,
            WeightsDtype::F32 => 4,
        };
        let moved = (12 + 8 + 16 + written) * model.layout().total;
        Ok(json!({
            "what": "train", "batch": batch, "length": self.length, "rounds": rates.0.len(),
            "tokens_per_s": per_s, "tokens_per_s_extremes": rates.extremes(),
            "step_s": tokens.len() as f64 / per_s,
            "forward_s": part(0), "backward_s": part(1), "optimizer_s": part(2), "pack_s": part(3),
            "flops_per_step": flops, "flops_per_s": flops_per_s,
            "peak_fraction": flops_per_s / machine.peak_flops_per_s,
            "gemm_fraction": flops_per_s / machine.gemm_flops_per_s,
            "optimizer_bytes_per_s": moved as f64 / part(2),
            "optimizer_share": part(2) * per_s / tokens.len() as f64,
            "stream_bytes_per_s": trained.stream_bytes_per_s,
            "optimizer_stream_fraction": moved as f64 / part(2) / trained.stream_bytes_per_s,
            "memory_peak_bytes": memory_peak(),
            "memory_planned_bytes": update_bytes(&Cost::of(model, written as u64), written as u64, tokens.len() as u64),
        }))
    }
}

/// A model under training.
struct Trained<'a> {
    threads: &'a Threads,
    params: Params,
    weights: PolicyWeights,
    optimizer: Optimizer,
    grads: Vec<f32>,
    /// Bytes a second of STREAM's triad on this machine.
    stream_bytes_per_s: f64,
}

impl<'a> Trained<'a> {
    fn new(loaded: &LoadedModel, threads: &'a Threads) -> Self {
        let (model, params) = (&loaded.model, loaded.params.clone());
        let version = PolicyVersion::default();
        Self {
            weights: PolicyWeights::pack(model, &params, version, Purpose::Training, threads),
            optimizer: Optimizer::new(OptimizerSettings::default(), &params),
            grads: vec![0.0; model.layout().total],
            stream_bytes_per_s: triad(threads),
            threads,
            params,
        }
    }

    /// One update on sequences of `length`: seconds of forward pass and log-probs, backward pass, optimiser, new weights.
    fn update(&mut self, tokens: &[u32], length: usize) -> [f64; 4] {
        let (threads, sampling) = (self.threads, SamplingParams::default());
        let seqs = vec![TrainSeq::whole(length); tokens.len() / length];
        let targets: Vec<Target> = (0..tokens.len())
            .filter(|row| (row + 1) % length != 0)
            .map(|row| Target { row, token: tokens[row + 1] })
            .collect();
        let gradient = vec![-1.0 / targets.len() as f32; targets.len()];
        let began = Instant::now();
        let batch = TrainBatch { tokens, seqs: &seqs, replay: None, tiles: &[] };
        let tape = self.weights.forward_train(threads, &batch);
        std::hint::black_box(tape.log_probs(threads, &self.weights, &targets, &sampling));
        let forward = began.elapsed().as_secs_f64();
        tape.backward(threads, &self.weights, &targets, &sampling, &gradient, None, &mut self.grads);
        let backward = began.elapsed().as_secs_f64();
        // Small, so that what is measured stays the same model.
        self.optimizer.update(threads, &mut self.grads, 1e-6, &mut self.params);
        let optimizer = began.elapsed().as_secs_f64();
        let version = PolicyVersion::new(0, self.optimizer.steps());
        self.weights.repack(&self.params, version, threads);
        let pack = began.elapsed().as_secs_f64();
        [forward, backward - forward, optimizer - backward, pack - optimizer]
    }
}

/// Bytes a second of a = b + s·c over arrays far larger than caches, the best of several times: STREAM's triad (McCalpin 1995), which counts
/// two reads and a write.
fn triad(threads: &Threads) -> f64 {
    const VALUES: usize = 32 << 20;
    let (mut a, b, c) = (vec![0.0f32; VALUES], vec![1.0f32; VALUES], vec![2.0f32; VALUES]);
    let mut once = || {
        let began = Instant::now();
        threads.for_each_row_chunk(&mut a, 1, 1 << 16, |first, a| {
            let range = first..first + a.len();
            for ((a, b), c) in a.iter_mut().zip(&b[range.clone()]).zip(&c[range]) {
                *a = b + 3.0 * c;
            }
        });
        std::hint::black_box(&mut a);
        12.0 * VALUES as f64 / began.elapsed().as_secs_f64()
    };
    once();
    (0..5).map(|_| once()).fold(0.0, f64::max)
}

/// Most bytes of memory this process ever held; `None` where the system does not tell.
fn memory_peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? << 10)
}

fn text(rows: &[Value]) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let memory = |key: &str| row[key].as_u64().map_or_else(|| "-".into(), bytes);
            vec![
                number(row, "batch", 1.0, 0),
                number(row, "length", 1.0, 0),
                number(row, "tokens_per_s", 1.0, 1),
                number(row, "forward_s", 1e3, 1),
                number(row, "backward_s", 1e3, 1),
                number(row, "optimizer_s", 1e3, 1),
                number(row, "pack_s", 1e3, 1),
                number(row, "flops_per_s", 1e-9, 1),
                number(row, "peak_fraction", 100.0, 1),
                number(row, "optimizer_share", 100.0, 1),
                number(row, "optimizer_bytes_per_s", 1e-9, 1),
                number(row, "stream_bytes_per_s", 1e-9, 1),
                memory("memory_peak_bytes"),
                memory("memory_planned_bytes"),
            ]
        })
        .collect();
    let header = [
        "batch",
        "length",
        "tokens/s",
        "forward ms",
        "backward ms",
        "AdamW ms",
        "weights ms",
        "GFLOP/s",
        "% of peak",
        "AdamW %",
        "AdamW GB/s",
        "STREAM GB/s",
        "memory",
        "planned",
    ];
    table(&header, &cells)
}
