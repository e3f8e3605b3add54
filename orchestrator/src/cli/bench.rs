//! `freewheel bench decode | prefill | train | gemm | exactness | saved | metap | objectives`: how fast, and how near to what this machine can
//! do, measured in the same run.

mod decode;
mod exactness;
mod gemm;
mod metap;
mod prefill;
mod roofline;
mod saved;
mod train;

use std::time::Instant;

use clap::{Args, Subcommand};
use freewheel_kernels::{Precision, Threads, measure};
use freewheel_model::{LoadedModel, ProductShape};
use freewheel_types::{CounterRng, WeightsDtype};
use serde_json::{Value, json};

use super::fail::Explain as _;

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
    /// Tokens a second when decoding, by batch size, beside the roofline.
    #[command(
        after_help = "Example:\n  freewheel bench decode --model assets/sprout --batch 1,8,32 --json\n  \
        freewheel bench decode --model assets/sprout --svg roofline.svg"
    )]
    Decode(decode::DecodeArgs),
    /// Cost of a prompt's tokens, by its length.
    #[command(
        after_help = "Example:\n  freewheel bench prefill --model assets/sprout --length 64,128,256,512 --json"
    )]
    Prefill(prefill::PrefillArgs),
    /// Tokens a second of an update: forward pass, backward pass, AdamW, new weights; by sequences in the batch.
    #[command(after_help = "Example:\n  freewheel bench train --model assets/sprout --batch 8 --length 128")]
    Train(train::TrainArgs),
    /// Speed of the products of a model, each by itself, by rows.
    #[command(after_help = "Example:\n  freewheel bench gemm --model assets/sprout --rows 1,32,512 --cold")]
    Gemm(gemm::GemmArgs),
    /// What it costs that a token has the same bits whatever shares its batch: each operation beside kernels without that rule.
    #[command(
        after_help = "Example:\n  freewheel bench exactness --model assets/sprout --rows 1,8,32 --context 256"
    )]
    Exactness(exactness::ExactnessArgs),
    /// What the prefix cache and guessed tokens save, where they should and where they should not.
    #[command(after_help = "Example:\n  freewheel bench saved --model models/smollm2 --batch 1,8")]
    Saved(saved::SavedArgs),
    /// MetaP's coordinate check: activations by width, at the start and after some updates, with and without it.
    #[command(after_help = "Example:\n  freewheel bench metap --widths 64,128,256,512 --svg coordinates.svg")]
    Metap(metap::MetapArgs),
    Objectives(super::ablation::AblationArgs),
}

impl BenchCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self.what {
            What::Decode(args) => args.run(),
            What::Prefill(args) => args.run(),
            What::Train(args) => args.run(),
            What::Gemm(args) => args.run(),
            What::Exactness(args) => args.run(),
            What::Saved(args) => args.run(),
            What::Metap(args) => args.run(),
            What::Objectives(args) => args.run(),
        }
    }
}

/// How often a row is measured, and what of it is printed.
#[derive(Clone, Debug, Args)]
struct Sampling {
    /// Times each row is measured; the median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// A row is measured at least this long.
const SECONDS: f64 = 1.0;

impl Sampling {
    /// Rates (work over seconds) of at least `rounds` calls, and of as many as fit in [`SECONDS`]. A call gives what it did and
    /// how long that took; the first, which warms up, does not count.
    fn rates(&self, mut call: impl FnMut() -> anyhow::Result<(f64, f64)>) -> anyhow::Result<Rates> {
        call()?;
        let (began, mut rates) = (Instant::now(), Vec::new());
        while rates.len() < self.rounds as usize || began.elapsed().as_secs_f64() < SECONDS {
            let (work, seconds) = call()?;
            rates.push(work / seconds);
        }
        rates.sort_by(f64::total_cmp);
        Ok(Rates(rates))
    }
}

/// Rates of several rounds, rising.
#[derive(Clone, Debug)]
struct Rates(Vec<f64>);

impl Rates {
    fn median(&self) -> f64 {
        median(&self.0)
    }

    /// Lowest and highest.
    fn extremes(&self) -> [f64; 2] {
        [self.0[0], self.0[self.0.len() - 1]]
    }
}

/// The middle of values that rise, or between the two in the middle.
pub(super) fn median(rising: &[f64]) -> f64 {
    (rising[(rising.len() - 1) / 2] + rising[rising.len() / 2]) / 2.0
}

/// What this machine reaches, as far as a model's speed hangs on it.
#[derive(Clone, Copy, Debug)]
struct Machine {
    threads: usize,
    precision: Precision,
    /// Bytes that reading was measured over: those of the model's weights.
    read_bytes: usize,
    /// Bytes a second when as many are read again and again as the model has weights.
    read_bytes_per_s: f64,
    /// Bytes a second from memory, over far more than caches hold.
    memory_bytes_per_s: f64,
    /// Operations a second of a large product, by the kernels.
    gemm_flops_per_s: f64,
    /// Operations a second on registers.
    peak_flops_per_s: f64,
}

/// Many times the caches.
const MEMORY_BYTES: usize = 512 << 20;

impl Machine {
    fn measure(loaded: &LoadedModel, threads: &Threads) -> Self {
        let precision = precision(loaded);
        let products = loaded.model.products(loaded.params.dtype());
        let weights: f64 = products.iter().map(|p| p.count as f64 * p.bytes()).sum();
        let read_bytes = (weights as usize).min(MEMORY_BYTES);
        Self {
            threads: threads.count(),
            precision,
            read_bytes,
            read_bytes_per_s: measure::read_bandwidth(threads, read_bytes),
            memory_bytes_per_s: measure::read_bandwidth(threads, MEMORY_BYTES),
            gemm_flops_per_s: measure::gemm_flops(threads, precision),
            peak_flops_per_s: measure::peak_flops(threads, precision),
        }
    }

    fn json(&self) -> Value {
        json!({
            "threads": self.threads, "features": measure::cpu_features().used,
            "precision": format!("{:?}", self.precision).to_lowercase(),
            "read_bytes": self.read_bytes, "read_bytes_per_s": self.read_bytes_per_s,
            "memory_bytes_per_s": self.memory_bytes_per_s,
            "gemm_flops_per_s": self.gemm_flops_per_s, "peak_flops_per_s": self.peak_flops_per_s,
        })
    }

    /// Prints what was measured, as JSON or as a table.
    fn print(
        &self,
        what: &str,
        loaded: &LoadedModel,
        rows: &[Value],
        as_json: bool,
        text: fn(&[Value]) -> String,
    ) -> anyhow::Result<()> {
        if as_json {
            let result = json!({
                "what": what,
                "machine": self.json(),
                "model": {"path": loaded.source, "parameters": loaded.model.layout().total},
                "rows": rows,
                "worst": worst(rows),
            });
            println!("{}", serde_json::to_string_pretty(&result)?);
            return Ok(());
        }
        println!(
            "{} on {} threads: reads {:.1} GB/s ({:.1} over {} MiB, as many as the weights), multiplies {:.0} GFLOP/s, \
             {:.0} at most",
            measure::cpu_features().used,
            self.threads,
            self.memory_bytes_per_s / 1e9,
            self.read_bytes_per_s / 1e9,
            self.read_bytes >> 20,
            self.gemm_flops_per_s / 1e9,
            self.peak_flops_per_s / 1e9,
        );
        print!("{}", text(rows));
        Ok(())
    }
}

/// The row that is furthest over its roofline; null where rows have none.
fn worst(rows: &[Value]) -> Value {
    let over = |row: &Value| row["over_roofline"].as_f64();
    let worst = rows.iter().filter_map(|row| Some((over(row)?, row))).max_by(|a, b| a.0.total_cmp(&b.0));
    worst.map_or(Value::Null, |(over, row)| json!({"over_roofline": over, "batch": row["batch"]}))
}

/// The numbers products are computed in.
fn precision(loaded: &LoadedModel) -> Precision {
    match loaded.params.dtype() {
        WeightsDtype::Bf16 => Precision::Bf16,
        WeightsDtype::F32 => Precision::F32,
    }
}

/// Bytes of weights that a forward pass reads when it touches `coverage` of the routed experts.
fn weight_bytes(products: &[ProductShape], coverage: f64) -> f64 {
    let touched = |product: &ProductShape| if product.routed.is_some() { coverage } else { 1.0 };
    products.iter().map(|product| product.count as f64 * product.bytes() * touched(product)).sum()
}

/// Operations of a token's products with weights (a multiply-add counts two).
fn token_flops(products: &[ProductShape]) -> f64 {
    let of = |p: &ProductShape| 2.0 * (p.count * p.n * p.k) as f64 * p.token_share();
    products.iter().map(of).sum()
}

/// A number of a row for a table; `-` where there is none.
fn number(row: &Value, key: &str, scale: f64, digits: usize) -> String {
    row[key].as_f64().map_or_else(|| "-".into(), |x| format!("{:.digits$}", x * scale))
}

fn ids(loaded: &LoadedModel, stream: u64, n: usize) -> Vec<u32> {
    let rng = CounterRng::new(1, stream);
    (0..n as u64).map(|i| rng.below(i, loaded.model.spec().vocab_size as u64) as u32).collect()
}

/// Refuses batches or lengths that cannot be measured: each batch 1 to 4096, `length` within `lengths`.
fn check_sizes(
    batch: &[usize],
    length: usize,
    lengths: std::ops::RangeInclusive<usize>,
) -> anyhow::Result<()> {
    if lengths.contains(&length) && !batch.is_empty() && batch.iter().all(|b| (1..=4096).contains(b)) {
        return Ok(());
    }
    Err(anyhow::anyhow!("--length {length} or --batch {batch:?} is out of range")).input_hint(format!(
        "--length {} to {}, --batch 1 to 4096",
        lengths.start(),
        lengths.end()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_row_is_furthest_over_its_roofline() {
        let row = |batch: u32, over: f64| json!({"batch": batch, "over_roofline": over});
        let found = worst(&[row(1, 1.1), row(8, 2.5), row(32, 1.9)]);
        assert_eq!(found, json!({"over_roofline": 2.5, "batch": 8}));
        assert_eq!(worst(&[json!({"m": 3})]), Value::Null);
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[1.0, 2.0, 9.0]), 2.0);
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
        let sampling = Sampling { rounds: 3, json: false };
        let mut call = 0.0;
        let rates = sampling.rates(|| {
            call += 1.0;
            std::thread::sleep(std::time::Duration::from_millis(500));
            Ok((call, 1.0))
        });
        let rates = rates.unwrap();
        assert_eq!((rates.median(), rates.extremes()), (3.0, [2.0, 4.0]), "the first only warms up");
    }
}
