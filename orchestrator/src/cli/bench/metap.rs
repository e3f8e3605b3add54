//! `freewheel bench metap`: the coordinate check as a table and as a plot.

mod plot;

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use freewheel_learner::coordinates::CoordinateCheck;
use freewheel_learner::fit;
use serde::Serialize;

use crate::cli::fail::Explain as _;
use crate::cli::table::table;

#[derive(Debug, Args)]
pub struct MetapArgs {
    /// Widths of the residual stream, separated by commas; multiples of 16.
    #[arg(long, value_delimiter = ',', default_values_t = [64usize, 128, 256, 512])]
    widths: Vec<usize>,
    /// Updates of AdamW before activations are looked at again.
    #[arg(long, default_value_t = 5)]
    updates: usize,
    /// Their learning rate.
    #[arg(long, default_value_t = 4e-3)]
    learning_rate: f64,
    /// Compute threads; 0 takes all cores. No number depends on it.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Draw them into this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print as JSON, a line each.
    #[arg(long)]
    json: bool,
}

/// One activation of one model.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Row {
    metap: bool,
    width: usize,
    /// Which activation.
    activation: String,
    /// Root mean square at the start.
    first: f64,
    /// After the updates; of the logits, how far they have moved.
    last: f64,
}

impl MetapArgs {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let threads = fit::threads(self.threads);
        let mut rows = Vec::new();
        for metap in [false, true] {
            for &width in &self.widths {
                let (updates, learning_rate) = (self.updates, self.learning_rate);
                let found = CoordinateCheck { width, metap, updates, learning_rate }.run(&threads).input()?;
                let ends = found.first.iter().zip(&found.last).enumerate();
                rows.extend(ends.map(|(place, (&first, &last))| {
                    let activation = name(place, found.first.len());
                    Row { metap, width, activation, first, last }
                }));
            }
        }
        match self.json {
            true => {
                rows.iter().try_for_each(|row| serde_json::to_string(row).map(|line| println!("{line}")))?
            }
            false => print!("{}", text(&rows)),
        }
        if let Some(path) = &self.svg {
            std::fs::write(path, plot::svg(&rows))
                .with_context(|| format!("{} cannot be written", path.display()))
                .input()?;
        }
        Ok(())
    }
}

/// The residual stream behind the embedding and behind each layer, then the logits.
fn name(place: usize, places: usize) -> String {
    match place {
        0 => "embedding".into(),
        _ if place + 1 == places => "logits".into(),
        layer => format!("layer {layer}"),
    }
}

fn text(rows: &[Row]) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let metap = if row.metap { "MetaP" } else { "plain" };
            let numbers = [row.first, row.last].map(|x| format!("{x:.4}"));
            [metap.to_owned(), row.width.to_string(), row.activation.clone()]
                .into_iter()
                .chain(numbers)
                .collect()
        })
        .collect();
    table(&["", "width", "activation", "at the start", "after the updates"], &cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_named_and_the_base_is_the_same_both_ways() {
        assert_eq!([0, 1, 2, 3].map(|place| name(place, 4)), ["embedding", "layer 1", "layer 2", "logits"]);
        let check = |metap| {
            let check = CoordinateCheck { width: 64, metap, updates: 1, learning_rate: 1e-3 };
            check.run(&fit::threads(1)).unwrap()
        };
        assert_eq!(check(false), check(true));
        let bad = CoordinateCheck { width: 40, metap: true, updates: 1, learning_rate: 1e-3 };
        assert!(bad.run(&fit::threads(1)).unwrap_err().to_string().contains("multiples of 16"));
    }
}
