//! `freewheel bench gemm`: the products of a model, one at a time, by rows.

use clap::Args;
use freewheel_kernels::Threads;
use freewheel_kernels::measure::Product;
use freewheel_model::ProductShape;
use serde_json::{Value, json};

use super::{Machine, median, number};
use crate::cli::fail::Explain as _;
use crate::cli::model::ModelArgs;
use crate::cli::table::table;

#[derive(Debug, Args)]
pub struct GemmArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows of a product: tokens computed at once; several numbers, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [1usize, 4, 8, 32, 128, 512, 2048])]
    rows: Vec<usize>,
    /// Take the weights from memory each time, as a model does that caches do not hold.
    #[arg(long)]
    cold: bool,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

impl GemmArgs {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        if self.rows.is_empty() || self.rows.iter().any(|m| !(1..=65_536).contains(m)) {
            return Err(anyhow::anyhow!("--rows {:?} is out of range", self.rows)).input_hint("1 to 65536");
        }
        let loaded = self.model.open()?;
        let threads = self.model.threads();
        let machine = Machine::measure(&loaded, &threads);
        let products = loaded.model.products(loaded.params.dtype());
        let rows: Vec<Value> =
            products.iter().flat_map(|shape| self.shape(&threads, &machine, shape)).collect();
        machine.print("gemm", &loaded, &rows, self.json, text)
    }

    /// One shape at every number of rows.
    fn shape(&self, threads: &Threads, machine: &Machine, shape: &ProductShape) -> Vec<Value> {
        let any = Product { m: 1, cold: self.cold };
        let weights = any.matrices((shape.n, shape.k), shape.precision, shape.quantisation);
        let row = |&m: &usize| {
            let times = Product { m, cold: self.cold }.times(threads, &weights);
            let seconds = median(&times);
            let (flops, bytes) = (2.0 * (m * shape.n * shape.k) as f64, shape.bytes());
            json!({
                "what": shape.what, "m": m, "n": shape.n, "k": shape.k, "count": shape.count,
                "precision": format!("{:?}", shape.precision).to_lowercase(),
                "quantised": shape.quantisation.is_some(), "cold": self.cold,
                "us": 1e6 * seconds, "us_best": 1e6 * times[0], "calls": times.len(),
                "flops_per_s": flops / seconds, "peak_fraction": flops / seconds / machine.peak_flops_per_s,
                "bytes_per_s": bytes / seconds,
                "bandwidth_fraction": bytes / seconds / machine.memory_bytes_per_s,
            })
        };
        self.rows.iter().map(row).collect()
    }
}

fn text(rows: &[Value]) -> String {
    let word = |row: &Value, key: &str| row[key].as_str().unwrap_or("-").to_owned();
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                word(row, "what"),
                word(row, "precision") + if row["quantised"] == true { " codes" } else { "" },
                number(row, "m", 1.0, 0),
                number(row, "n", 1.0, 0),
                number(row, "k", 1.0, 0),
                number(row, "count", 1.0, 0),
                number(row, "us", 1.0, 1),
                number(row, "flops_per_s", 1e-9, 1),
                number(row, "peak_fraction", 100.0, 1),
                number(row, "bytes_per_s", 1e-9, 2),
            ]
        })
        .collect();
    let header = ["product", "numbers", "m", "n", "k", "matrices", "us", "GFLOP/s", "% of peak", "GB/s of W"];
    table(&header, &cells)
}
